"""The figures of a step: on their way from the device while the next step is queued, then read."""

import utils  # noqa: F401  quiets libraries before others import them

import torch


class Figures:
    """Numbers of one step, copied from the device behind what is queued.

    Reading them waits for that copy alone, not for what was queued after it.
    """

    def __init__(self, step, numbers, figures_of):
        """step: counted from 1; numbers (n,): on the device; figures_of(list): {name: number}."""
        self.step = step
        self.figures_of = figures_of
        self.arrived = None
        on_cuda = numbers.device.type == "cuda"
        self.numbers = numbers.to("cpu", non_blocking=on_cuda)  # then into pinned memory
        if on_cuda:
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        self.known = None

    def read(self):
        """Return {name: number}; waits for them the first time."""
        if self.known is None:
            if self.arrived:
                self.arrived.synchronize()
            self.known = self.figures_of(self.numbers.tolist())
        return self.known

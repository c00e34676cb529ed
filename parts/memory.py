"""The memory of a GPU: what is free, what a pass takes of it, how many tokens fit.

Sizes are in bytes; tokens are padded ones, whose graphs are kept for the backward pass.
"""

from contextlib import contextmanager

from utils import InputError

import torch

BUDGET = 0.7  # share of what is free: an allocator leaves gaps, and heavier steps may come

# bytes a trainable weight, behind a step's gradients: an optimizer's state, and what its step
# computes beside it (the fused one nothing)
OPTIMIZER_BYTES = {
    "adamw_torch_fused": 8,
    "adamw_torch": 8 + 4,
    "adamw_bnb_8bit": 2 + 4,
    "sgd": 0 + 4,
}
SYNC_BYTES = 4  # the buckets in which several processes add up gradients

BESIDE_PASSES = (
    "out of memory beside the passes, as in the optimizer's step: pass --optimizer adamw_8bit or "
    "--no-grow_pieces, lower --lora_r, or quantise."
)


def is_out_of_memory(error):
    """Tell whether a RuntimeError means that memory ran out, on any device."""
    # by its text: cuBLAS' and the CPU's errors are plain RuntimeErrors
    text = str(error)
    signs = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "Invalid buffer size")
    return any(sign in text for sign in signs)  # the last is a Mac's


class GpuMemory:
    """The memory of one GPU, as far as this process may take it."""

    def __init__(self, device):
        self.device = device

    def free(self):
        """Return how many bytes tensors could still take."""
        allocated = torch.cuda.memory_allocated(self.device)
        on_device, total = torch.cuda.mem_get_info(self.device)
        cached = torch.cuda.memory_reserved(self.device) - allocated  # the allocator's, unused
        allowed = total * torch.cuda.get_per_process_memory_fraction(self.device)
        return min(on_device + cached, allowed - allocated)

    def peak_of(self, attempt):
        """Return how many bytes attempt() took at most, above what was taken before it."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        attempt()
        return torch.cuda.max_memory_allocated(self.device) - before


def gpu_memory(trainer):
    """Return the GpuMemory to let pieces grow into; None on a CPU."""
    if trainer.args.device.type == "cuda":
        return GpuMemory(trainer.args.device)
    return None


def tokens_that_fit(budget, small, large):
    """Return how many tokens fit into `budget` bytes, by two measured passes.

    small, large: (tokens, bytes) of each. A pass is taken to cost a fixed part, the gradients of
    the weights above all, and as much for each token.
    """
    few, least = small
    many, most = large
    per_token = (most - least) / (many - few) if many > few else 0
    fixed = least - few * per_token
    if per_token <= 0 or fixed < 0:  # too alike to tell: the careful guess is that nothing is fixed
        fixed = 0
        per_token = most / many
    return max(0, int((budget - fixed) / per_token))


def bytes_to_come(optimizer, weights, processes):
    """Return what the steps of a run will hold that a first backward pass has not made yet.

    optimizer: as Trainer calls it; weights: how many are trained.
    """
    each = OPTIMIZER_BYTES[optimizer]
    if processes > 1:
        each += SYNC_BYTES
    return each * weights


@contextmanager
def memory_errors_as_ours(sentence=BESIDE_PASSES):
    """Raise InputError where memory runs out beside the passes, which start again by themselves."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(sentence) from error


@contextmanager
def held(size, device):
    """Hold `size` bytes while a block runs; raises InputError where there are not as many."""
    try:
        room = torch.empty(size, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"out of memory: the optimizer takes {size / 2**30:.1f} GiB beside the model: pass "
            "--optimizer adamw_8bit, lower --lora_r, or quantise."
        ) from None
    yield
    del room

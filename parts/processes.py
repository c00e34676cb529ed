"""What the processes of a run do together within a step: agree that it fits, add up gradients."""

import utils  # noqa: F401  quiets libraries before they are imported

import torch

FLAT_NUMBERS = 2**24  # of gradients that are sent at once: 64 MiB


class OutOfMemoryElsewhere(Exception):
    """Another process has run out of memory in this step: all of them start it again."""


def agree(accelerator, fits=True):
    """Learn whether the step fits into memory so far, for each process; raise where it does not.

    Each process calls this before it waits for the others, and one that has run out of memory calls
    it with fits=False in place of the next such call. Raises OutOfMemoryElsewhere on the others.
    """
    if accelerator.num_processes == 1:
        return
    failures = accelerator.reduce(torch.full((), not fits, device=accelerator.device).float())
    if fits and failures.item():
        raise OutOfMemoryElsewhere


def largest(accelerator, number):
    """Return the largest of all processes' numbers."""
    if accelerator.num_processes == 1:
        return number
    own = torch.tensor([number], device=accelerator.device)
    return accelerator.gather(own).max().item()


def average_gradients(accelerator, parameters):
    """Replace the gradients of all parameters by their means over processes; no one's is 0."""
    if accelerator.num_processes == 1:
        return
    for group in groups_of(parameters, FLAT_NUMBERS):
        for parameter in group:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([parameter.grad.flatten() for parameter in group])
        parts = accelerator.reduce(flat, "mean").split([each.numel() for each in group])
        for parameter, part in zip(group, parts, strict=True):
            parameter.grad.copy_(part.view_as(parameter))


def groups_of(parameters, most):
    """Split parameters, in their order, into lists of at most `most` numbers, or of one."""
    groups = []
    size = most
    for parameter in parameters:
        size += parameter.numel()
        if size > most:
            groups.append([])
            size = parameter.numel()
        groups[-1].append(parameter)
    return groups

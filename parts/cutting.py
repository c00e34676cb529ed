"""How the sequences of a step are laid out: cut into pieces, padded, moved to the device.

Shapes: B sequences of a piece, T tokens. A piece is a list of indices, the longest sequence first.
"""

import math

import utils  # noqa: F401  quiets libraries before they are imported

import torch
from torch import nn


def cut(lengths, budget):
    """Cut sequences, longest first, into pieces of at most `budget` padded tokens (or of one).

    lengths: of each sequence, in tokens. Returns lists of indices.
    """
    # sorted, sequences of a piece are of nearly one length: 1.1 padded tokens a real one, not 2.2
    pieces = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if pieces:
            longest = lengths[pieces[-1][0]]  # all of a piece are padded to its first
            if (len(pieces[-1]) + 1) * longest <= budget:
                pieces[-1].append(i)
                continue
        pieces.append([i])
    return pieces


def tokens_of(piece, lengths):
    """Return the tokens of a piece as `cut` makes it, padding included."""
    return len(piece) * lengths[piece[0]]


def padded_tokens(pieces, lengths):
    """Return the tokens of pieces as `cut` makes them, padding included."""
    return sum(tokens_of(piece, lengths) for piece in pieces)


def split(pieces, lengths, count):
    """Halve the largest pieces until there are `count`; there are as many sequences at least."""
    pieces = list(pieces)
    while len(pieces) < count:
        several = [place for place, piece in enumerate(pieces) if len(piece) > 1]
        place = max(several, key=lambda place: tokens_of(pieces[place], lengths))
        piece = pieces[place]
        half = math.ceil(len(piece) / 2)
        pieces[place : place + 1] = [piece[:half], piece[half:]]
    return pieces


def pad(sequences):
    """Return input_ids (B, T) of token sequences, padded on the right with 0, and lengths (B,)."""
    rows = [torch.tensor(ids) for ids in sequences]
    lengths = torch.tensor([len(row) for row in rows])
    # any id would do: nobody looks behind a sequence's length
    return nn.utils.rnn.pad_sequence(rows, batch_first=True).long(), lengths


def moved(tensors, device):
    """Return tensors (of one dtype, on the CPU) as views of one copy on the device.

    The CPU goes on at once. A copy from memory that is not pinned would wait until the device has
    done all that is queued, and so would anything that asks the device for a number or a size.
    """
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    on_cuda = device.type == "cuda"
    if on_cuda:
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=on_cuda).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

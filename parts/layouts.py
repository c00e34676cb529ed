"""A pair of answers as tokens: in one sequence, their prompt once, or in two with a prompt each.

Shapes: P pairs of a piece, B sequences, T tokens, N tokens of answers.
"""

from parts.causal import predicted
from parts.cutting import pad
from parts.samples import first_answer

import numpy as np
import torch


def collate_pairs(shares, samples):
    """Make one step of pairs: each is one sequence, prompt + chosen + (prompt) + rejected.

    With `shares` the prompt stands there once. Its last token alone is repeated before the rejected
    answer, whose first token it predicts.
    """
    step = {
        "rows": len(samples),
        "shares": shares,
        "sequences": [],
        "prompts": [],  # tokens
        "chosen": [],  # where the rejected answer's part begins
        "reference": [],
        "counted": [1] * len(samples),  # 0: the row only fills the step up
    }
    for sample in samples:
        chosen, rejected = sample["sides"]
        prompt = first_answer(chosen)
        first, second = chosen["input_ids"], rejected["input_ids"]
        if shares:
            second = second[prompt - 1 :]
        step["sequences"].append(np.concatenate([first, second]))
        step["prompts"].append(prompt)
        step["chosen"].append(len(first))
        step["reference"].append(sample.get("reference"))
    return step


def lay_out_pairs(step, piece):
    """Return all that a piece's passes and losses need: {name: int64 tensor}, on the CPU.

    input_ids (B, T); of the answers' tokens positions, labels and side (N,), which counts the
    answers; lengths (P, 2) of these, in tokens; counted (P,). Of pairs with one prompt more.
    """
    lay_out = lay_out_shared if step["shares"] else lay_out_apart
    input_ids, answer, lengths, more = lay_out(step, piece)
    # tokens come answer by answer in either layout: chosen, rejected, chosen of the next pair
    side = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten())
    counted = torch.tensor([step["counted"][i] for i in piece])
    inputs = {"input_ids": input_ids, "lengths": lengths, "side": side, "counted": counted}
    return inputs | predicted(input_ids, answer) | more


def lay_out_shared(step, piece):
    """Lay each pair of a piece out as one sequence, its prompt once.

    Returns input_ids (P, T), which tokens are answers (P, T), lengths (P, 2), and prompt and
    middle (P, 1), of which the device makes positions and mask.

        token      p0 p1 p2 | c0 c1 c2 | p2 r0 r1     prompt 3, middle 6, end 9
        position    0  1  2    3  4  5    2  3  4
        answer                 x  x  x       x  x

    The prompt's last token stands again at `middle`, to predict the rejected answer's first. From
    there on a token sees the prompt before it and its own part, never the chosen answer.
    """
    input_ids, ends = pad([step["sequences"][i] for i in piece])
    prompt = column(step["prompts"], piece)  # (P, 1)
    middle = column(step["chosen"], piece)
    end = ends[:, None]
    t = torch.arange(input_ids.shape[1])[None]  # (1, T)
    answer = (t >= prompt) & (t < end) & (t != middle)
    lengths = torch.cat([middle - prompt, end - middle - 1], 1)
    return input_ids, answer, lengths, {"prompt": prompt, "middle": middle}


def positions_and_mask(input_ids, prompt, middle, **_):
    """Return position_ids (P, T) of lay_out_shared, and which key a query sees (P, T, T).

    On the device, as the mask is large.
    """
    t = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, T)
    is_second = t >= middle  # (P, T)
    position_ids = torch.where(is_second, t - middle + prompt - 1, t)
    same_part = is_second[:, :, None] == is_second[:, None]  # (P, query, key)
    in_prompt = (t < prompt - 1)[:, None]
    is_causal = t[:, :, None] >= t[:, None]
    # padding belongs to the second part, whose tokens before it never see it
    return position_ids, (same_part | in_prompt) & is_causal


def lay_out_apart(step, piece):
    """Lay each pair of a piece out as two sequences, each with the prompt.

    Returns input_ids (2 P, T), which tokens are answers (2 P, T), lengths (P, 2), no more.
    """
    sides = []
    for i in piece:
        sequence, middle = step["sequences"][i], step["chosen"][i]
        sides += [sequence[:middle], sequence[middle:]]
    input_ids, sizes = pad(sides)
    prompt = column(step["prompts"], piece)  # (P, 1)
    t = torch.arange(input_ids.shape[1])[None]  # (1, T)
    answer = (t >= prompt.repeat_interleave(2, 0)) & (t < sizes[:, None])
    return input_ids, answer, sizes.view(-1, 2) - prompt, {}


def column(numbers, piece):
    """Return a piece's numbers (P, 1)."""
    return torch.tensor([numbers[i] for i in piece])[:, None]

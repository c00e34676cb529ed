"""What a teacher's scores say beside the labels, shown before training.

Shapes: R rows, W documents that a row shows, its positive first.
"""

import math

from utils import InputError, note, say

import torch

# temperatures to advise: 1, 2, 5 of each power of ten
STEPS = [step * 10.0**power for power in range(-3, 4) for step in (1, 2, 5)]
LABEL = 0.9  # of its mass on the positive: a teacher says little that the label does not
FLAT = 0.95  # of the highest entropy: it says nearly nothing at all
WANTED = 0.6  # of that: an order in which neither the first is all nor all are alike


def distributions(teacher, temperature):
    """Return softmax(scores / temperature) of each row; teacher (R, W): NaN where it has none."""
    scores = (teacher / temperature).masked_fill(teacher.isnan(), -torch.inf)
    return scores.softmax(1)


def entropy_share(teacher, temperature):
    """Return the mean entropy of the distributions, as a share of that of even ones."""
    shares = distributions(teacher, temperature)
    entropies = torch.special.entr(shares).sum(1)
    return (entropies / (~teacher.isnan()).sum(1).log()).mean().item()


def mass_on_positive(teacher, temperature):
    """Return the mean share of the first document, of rows where it has a score; NaN without any.

    A row without would count as 0: its teacher has not said that the positive is wrong.
    """
    has_score = ~teacher[:, 0].isnan()
    return distributions(teacher[has_score], temperature)[:, 0].mean().item()


def flaw_of(teacher, temperature):
    """Return in words why a teacher's distributions will not teach much, None where they will."""
    if mass_on_positive(teacher, temperature) > LABEL:
        return "says little beyond the label"
    if entropy_share(teacher, temperature) > FLAT:
        return "tells nearly nothing"
    return None


def advised_temperature(teacher):
    """Return a temperature at which a teacher's order is neither a label nor nearly even, or None.

    Of those the one nearest to WANTED: that alone may be a label, of two documents say.
    """
    good = [step for step in STEPS if flaw_of(teacher, step) is None]
    return min(good, key=lambda step: abs(entropy_share(teacher, step) - WANTED), default=None)


def in_words(teacher, temperature):
    """Return what a teacher (R, W) says of the positives, to stand behind how many rows it has."""
    has_score = ~teacher[:, 0].isnan()
    lacking = int((~has_score).sum())
    unscored = f", in {lacking:,} of them the positive has none" if lacking else ""
    if lacking == len(teacher):
        return unscored
    shares = 1 / (~teacher[has_score].isnan()).sum(1)
    return (
        f"{unscored}; it puts {mass_on_positive(teacher, temperature):.2f} on the positive at "
        f"--teacher_temperature {temperature:g} (all alike: {shares.mean().item():.2f})"
    )


def show_teacher(rows, weight, temperature):
    """Say what rows as they are shown bring of a teacher's scores; note what will not teach.

    rows: their lists of scores, that of the positive first, NaN for none; weight: --distill_weight;
    temperature: --teacher_temperature. Raises InputError where there is nothing to distill.
    """
    taught = [scores for scores in rows if sum(not math.isnan(score) for score in scores) > 1]
    if not taught:
        if weight:
            raise InputError(
                f"--distill_weight {weight:g}: no row shows two documents that have scores. Add "
                "pos_scores and neg_scores (examples/teacher_scores.py writes them), or drop it."
            )
        return
    counted = f"{len(taught):,} of {len(rows):,} rows show documents with scores"
    if not weight:
        say(f"teacher   {counted}: unused without --distill_weight X")
        return
    width = max(map(len, taught))
    teacher = torch.tensor([scores + [math.nan] * (width - len(scores)) for scores in taught])
    say(f"teacher   {counted}{in_words(teacher, temperature)}")
    if width <= 3:
        note(
            f"--distill_weight teaches the order of a row's documents, of which a step shows "
            f"{width}: little beyond the label. Raise --max_negs."
        )
    flaw = flaw_of(teacher, temperature)
    if flaw:
        better = advised_temperature(teacher)
        # scores that are all alike are so at any
        mended = f"pass {better:g}" if better else "no other helps"
        note(f"the teacher {flaw} at --teacher_temperature {temperature:g}: {mended}")

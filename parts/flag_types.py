"""What a flag takes: numbers of an interval, words in any case; types of argparse."""

import argparse
import math
from functools import partial


def bounded(kind, low, high=math.inf, without=()):
    """Argparse type: a number of `kind` from `low` to `high`, the ends in `without` excluded."""
    excluded = {math.inf, *without}
    left = "(" if low in excluded else "["
    right = ")" if high in excluded else "]"

    def number(text):
        value = kind(text)
        if low <= value <= high and value not in excluded:
            return value
        raise argparse.ArgumentTypeError(f"{text} is outside {number.interval}")

    number.interval = f"{left}{low}, {high}{right}"  # docs/flags.md shows it, too
    number.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return number


integer = partial(bounded, int)
real = partial(bounded, float)
count = integer(1)
natural = integer(0)
share = real(0, 1, {1})
above_zero = real(0, without={0})


def margin(text):
    """Argparse type: a difference of cosines as a number, 0.05, or a multiple as text, "1.05x"."""
    number = text.strip().lower()
    is_relative = number.endswith("x")
    try:
        value = float(number.removesuffix("x"))
    except ValueError:
        value = math.nan
    if is_relative and 0 < value <= 10:
        return f"{value:g}x"
    if not is_relative and 0 <= value <= 2:
        return value
    raise argparse.ArgumentTypeError(
        f"{text} is neither a difference of cosines from 0 to 2 (0.05) nor a multiple of the "
        "positive's up to 10 (1.05x)"
    )


margin.interval = "[0, 2], or a multiple in (0, 10] as 1.05x"


def one_of(*names):
    """Keyword arguments of a flag that takes one of `names`, in any case: Bf16, AdamW, None."""
    return {"type": str.lower, "choices": list(names)}

"""Which rows are trained on and which are held out: dev sets, limits, leaks, what was dropped."""

import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from parts.rows import HubSet, expand_files, read_hub_rows, read_rows
from utils import InputError, note, say


@dataclass(frozen=True)
class Source:
    """Where rows come from: files, or a data set on the hub."""

    train_files: list | None = None  # names and globs
    dev_files: list | None = None  # PATH or NAME=PATH
    hub: HubSet | None = None
    split: str = "train"  # of `hub`
    dev_split: str | None = None


@dataclass(frozen=True)
class Sizes:
    """How many rows are drawn, and how many of them are held out."""

    seed: int
    share: float  # held out where no flag says how many
    train: int | None = None  # --train_sample_limit
    dev: int | None = None  # --dev_sample_limit
    dev_size: float | None = None  # a share, too
    evaluates: bool = True  # False: nothing is held out for evaluations that never come
    whole: bool = False  # all rows are read, however few are trained on


def read_enough(source, sizes, split_rows):
    """Return split_rows(rows, dev sources), what the data make.

    Of a data set on the hub with --train_sample_limit N no more rows are drawn than are needed:
    2 (N + what is held out) + 1000. If that leaves fewer than N, all are read.
    """
    dev = dev_sources(source.dev_files)
    if not source.hub:
        files = expand_files(source.train_files or [])
        rows = [pair for file in files for pair in read_rows(file)]
        return split_rows(rows, dev)
    if source.dev_split:
        dev_rows = read_hub_rows(source.hub, source.dev_split, sizes.seed)
        if dev_rows:  # else rows are held out of the other split
            dev[""] = dev_rows
    count = rows_to_draw(sizes, has_dev=bool(dev))
    rows = read_hub_rows(source.hub, source.split, sizes.seed, count)
    if rows is None:
        raise InputError(
            f"--dataset_split {source.split} does not exist. Pass one of the splits named above."
        )
    found = split_rows(rows, dict(dev))
    left = len(found[0])
    if len(rows) == count and left < sizes.train:
        say(
            f"data      {len(rows)} rows, drawn with --seed, leave {left} of {sizes.train} to "
            "train on: reading all"
        )
        rows = read_hub_rows(source.hub, source.split, sizes.seed)
        found = split_rows(rows, dict(dev))
    return found


def rows_to_draw(sizes, has_dev):
    """Return how many rows of a data set on the hub give --train_sample_limit good ones."""
    if not sizes.train or sizes.whole:
        return math.inf
    held_out = 0 if has_dev else dev_wanted(sizes, sizes.train)
    # twice, since rows are dropped, and 1000, since whole groups are held out
    return 2 * (sizes.train + held_out) + 1000


def dev_wanted(sizes, rows):
    """Return how many of `rows` to hold out: a number, or a share of those that are trained on."""
    if sizes.dev:
        return sizes.dev
    share = sizes.share if sizes.dev_size is None else sizes.dev_size
    return math.ceil(share * min(rows, sizes.train or rows))


# ---------------------------------------------------------------- dev sets


def dev_sources(dev_files):
    """Name the dev sets of --dev_file: {name: path}."""
    dev = {}
    for given in dev_files or []:
        name, path = named_file(given)
        if name in dev:
            if path == dev[name]:
                what = "it is given twice. Drop one."
            elif name:
                what = f"a dev set is called '{name}' already. Write --dev_file NAME=PATH."
            else:
                what = "there is another dev set without a name. Write --dev_file NAME=PATH."
            raise InputError(f"--dev_file {given}: {what}")
        dev[name] = path
    if len(dev) > 1 and "" in dev:
        dev["dev"] = dev.pop("")
    return dev


def named_file(given):
    """Return (name or "", path) of one --dev_file; raises InputError for a name that cannot be."""
    if "=" in given and not os.path.exists(given):  # a path may have a "=" of its own
        name, _, path = given.partition("=")
    else:
        name = ""
        path = given
    files = expand_files([path])
    if len(files) > 1:
        listed = ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
        raise InputError(
            f"--dev_file {given} stands for {len(files)} files ({listed}). Write --dev_file "
            "NAME=PATH for each."
        )
    if re.search(r"[^\w.-]", name):
        raise InputError(
            f"--dev_file {given}: '{name}' cannot name files and metrics. Use letters, digits, "
            "'_', '-', '.' alone."
        )
    return name, files[0]


def hold_out(examples, key, sizes, by, most=math.inf, unit=None):
    """Hold examples out of training, all of one key(example) together: (rest, {"": held}).

    Flags say how many, else it is sizes.share of them, with at most `most` unit(example) values;
    `by` is the key in words. A group larger than a fifth of what is wanted stays in training, since
    a dev set of a few groups tells little; where all are larger, the smallest may be held out.
    """
    if sizes.dev or sizes.dev_size is not None:
        most = math.inf  # the flags say how many
    wanted = dev_wanted(sizes, len(examples))
    has_enough = len(examples) > 3  # of so few a dev set of one would take what is trained on
    if not wanted or not has_enough or not sizes.evaluates:
        return examples, {}
    groups = groups_of(examples, key)
    smallest = min(map(len, groups))
    largest_held = max(min(wanted, most) / 5, smallest if smallest <= wanted else 0)
    held = []
    rest = []
    units = 0  # distinct values of unit(example) in `held`
    for group in groups:
        fits = len(group) <= largest_held
        if fits and len(held) < wanted and units < most:
            held += group
            units += len(set(map(unit or key, group)))
        else:
            rest += group
    too_large = [len(group) for group in groups if len(group) > largest_held]
    if too_large:
        note(
            f"{len(too_large)} groups of rows with one {by} are never held out: each has more "
            f"than a fifth of the {min(wanted, most)} rows wanted (the largest: {max(too_large)} "
            "rows)"
        )
    say(f"dev       {len(held)} rows held out of the training set, by {by}")
    return rest, {"": held} if held else {}


def groups_of(examples, key):
    """Return the lists of examples that share key(example), in the order of their first ones."""
    groups = defaultdict(list)
    for example in examples:
        groups[key(example)].append(example)
    return list(groups.values())


# ---------------------------------------------------------------- what was dropped


def say_drops(drops, more=None):
    """Print what was dropped, {reason: [where]}; return {reason: count}.

    more: {reason: what is said behind it}.
    """
    counts = {}
    for reason, places in drops.items():
        counts[reason] = len(places)
        behind = (more or {}).get(reason, "")
        say(f"dropped   {len(places)} {reason} (first: {places[0]}){behind}")
    return counts


def leave_out(examples, leak):
    """Return the examples of which leak(example), the reason to leave it out, is None.

    Returns (kept, {reason: how many were left out}), and says the latter.
    """
    kept = []
    counts = Counter()
    for example in examples:
        why = leak(example)
        if why:
            counts[why] += 1
        else:
            kept.append(example)
    for why, count in counts.items():
        say(f"dropped   {count} {why}")
    return kept, dict(counts)


def too_few(left, dropped, dev_sets, source, need):
    """Return the InputError for `left` rows to train on, which says whether dev sets took some."""
    held_out = dev_sets and not source.dev_files and not source.dev_split
    if held_out or any("a dev set" in reason for reason in dropped):
        advice = (
            "The dev sets took the others: pass a smaller --dev_size or --dev_sample_limit, or "
            "other dev rows"
        )
    else:
        advice = "Add rows, or look at what was dropped, above"
    return InputError(f"{left} rows are left to train on, {need}. {advice}.")

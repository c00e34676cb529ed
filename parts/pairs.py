"""Formats of training rows -> Examples of the embedding trainer: a query, positives, negatives."""

import re
from collections import defaultdict
from dataclasses import dataclass

from parts.cells import label_of, prompt_of, texts_of, unpacked
from parts.rows import text_id
from parts.splits import say_drops
from utils import InputError, say

QUERY_NAMES = ("query", "anchor", "question")
POSITIVE_NAMES = (
    "pos",
    "positive",
    "positives",
    "answer",
    "document",
    "passage",
    "response",
    "positive_passages",
    "pos_doc",
)
NEGATIVE_NAMES = re.compile(
    r"(hard_?)?neg(ative)?s?_?\d*|negative_passages|neg_docs?|rejected_responses?"
)
LABEL_NAMES = ("label", "relevance", "score")


@dataclass
class Example:
    """One training row: `prompt` is BGE's, which replaces the query prefix."""

    query: str
    pos: list
    neg: list
    prompt: str | None = None


@dataclass(frozen=True)
class Columns:
    """The columns that flags name; None: found by name."""

    query: str | None = None
    positive: str | None = None
    negative: str | None = None


@dataclass(frozen=True)
class Roles:
    """Which columns of the rows are read, and as what."""

    query: str
    positive: str
    negatives: list
    label: str | None  # 1: the row's document matches its query, 0: it does not
    has_prompt: bool


def by_query(example):
    """Return what rows of the same query share."""
    return text_id(example.query)


# ---------------------------------------------------------------- rows


def read_examples(rows, columns, query_prefix):
    """Turn [(where, row)] into (Examples, {reason: count}); says what cannot be learnt from."""
    roles = find_roles(rows, columns)
    found, drops = read_each(rows, roles)
    if roles.label:
        found, without_positive = join_labelled(found)
        drops |= without_positive
    examples, repeated = distinct(found)
    drops |= repeated
    if query_prefix is not None and examples and all(example.prompt for example in examples):
        where, first = found[0]
        raise InputError(
            f"{where}: every row has a prompt of its own, {first.prompt!r}, which --query_prefix "
            f"{query_prefix!r} does not replace. Drop the flag, or rename the column."
        )
    refuse_ids(rows[0][0], roles.query, [example.query for example in examples])
    refuse_ids(rows[0][0], roles.positive, [example.pos[0] for example in examples])
    return examples, say_drops(drops)


def read_each(rows, roles):
    """Return ([(where, Example)], {reason: [where]} of the rows that lack a text).

    The document of a row with label 0 is an Example's negative.
    """
    found = []
    drops = defaultdict(list)
    for where, row in rows:
        query = texts_of(row.get(roles.query), where, roles.query)
        pos = texts_of(row.get(roles.positive), where, roles.positive)
        neg = []
        for name in roles.negatives:
            neg += texts_of(row.get(name), where, name)
        label = label_of(row.get(roles.label)) if roles.label else 1
        if len(query) > 1:
            raise InputError(f"{where}: {len(query)} queries in one row. Write a row for each.")
        if not query:
            drops["rows with an empty query"].append(where)
        elif not pos:
            drops["rows with an empty positive"].append(where)
        elif label is None:
            drops[f"rows with an empty {roles.label}"].append(where)
        else:
            prompt = prompt_of(row.get("prompt"), where) if roles.has_prompt else None
            if not label:
                neg = pos
                pos = []
            found.append((where, Example(query[0], pos, neg, prompt)))
    return found, dict(drops)


def join_labelled(found):
    """Join the rows [(where, Example)] of a query into one, at the place of its first.

    Returns ([(where, Example)], {reason: [where]} of the queries without a positive).
    """
    by_prompt = {}
    for where, example in found:
        key = (by_query(example), example.prompt)  # a joined row has one prompt
        if key not in by_prompt:
            by_prompt[key] = (where, Example(example.query, [], [], example.prompt))
        _, joined = by_prompt[key]
        joined.pos += example.pos
        joined.neg += example.neg
    kept = []
    drops = defaultdict(list)
    for where, joined in by_prompt.values():
        joined.pos = list(dict.fromkeys(joined.pos))
        joined.neg = list(dict.fromkeys(joined.neg))
        if joined.pos:
            kept.append((where, joined))
        else:
            drops["queries without a document of label 1"].append(where)
    return kept, dict(drops)


def distinct(found):
    """Return each Example of [(where, Example)] once, without negatives that are positives.

    Returns (Examples, {reason: [where]}).
    """
    examples = []
    drops = defaultdict(list)
    seen = set()
    for where, example in found:
        known = set(map(text_id, example.pos))
        # the loss would push away what it pulls
        true_neg = [text for text in example.neg if text_id(text) not in known]
        false_neg = len(example.neg) - len(true_neg)
        if false_neg:
            drops["negatives equal to a positive"] += [where] * false_neg
        example.neg = true_neg
        key = (by_query(example), *sorted(known), *sorted(map(text_id, true_neg)))
        if key in seen:  # in one step each of the two would be the other's negative
            drops["duplicate rows"].append(where)
            continue
        seen.add(key)
        examples.append(example)
    return examples, dict(drops)


def refuse_ids(where, name, texts):
    """Raise InputError where every text of a column is a number."""
    # MS MARCO's triples, say, name their texts by the numbers of another file
    if len(texts) > 1 and all(map(str.isdecimal, texts)):
        raise InputError(
            f"{where}: every {name} is a number, ids rather than texts. Look the texts up first."
        )


# ---------------------------------------------------------------- columns


def find_roles(rows, columns):
    """Find by name what each column is, and say it; raises InputError for what is unclear."""
    where = rows[0][0]
    # a row may lack a column, so that the first one does not show all
    fields = list(dict.fromkeys(name for _, row in rows[:1000] for name in row))
    query = find_column(fields, "query", QUERY_NAMES, columns.query, where)
    positive = find_column(fields, "positive", POSITIVE_NAMES, columns.positive, where)
    negatives = find_negatives(fields, columns.negative, where)
    unused = [name for name in fields if name not in {query, positive, *negatives, "prompt"}]
    has_prompt = any("prompt" in row for _, row in rows) and "prompt" not in (query, positive)
    # beside negatives of its own, a row's label says something else than "no match"
    has_negatives = columns.negative or any_filled(rows, negatives)
    label = None if has_negatives else find_label(rows, unused)
    said = f"columns   query = {query}, positive = {positive}"
    said += f", negatives = {', '.join(negatives) or 'none'}"
    if label:
        said += f", label = {label}"
        unused.remove(label)
    if has_prompt:
        said += ", query prefix = prompt"
    if unused:
        said += f" (unused: {', '.join(unused)})"
    say(said)
    return Roles(query, positive, negatives, label, has_prompt)


def find_column(fields, kind, names, flag, where):
    """Return the one column of a `kind`: the flag's, or the one whose name is in `names`."""
    if flag:
        found = [flag] if flag in fields else []
    else:
        found = [name for name in fields if name.lower() in names]
    if len(found) == 1:
        return found[0]
    if found:
        what = f"{len(found)} columns could be the {kind}: {', '.join(found)}"
    else:
        what = f"no column {flag}" if flag else f"no {kind}"
    raise InputError(
        f'{where}: {what} (fields: {in_quotes(fields)}). Rename one to "{names[0]}" (known: '
        f"{', '.join(names)}), or pass --{kind}_column NAME."
    )


def find_negatives(fields, flag, where):
    """Return the columns of negatives: the flag's, or all that are called so."""
    if not flag:
        return [name for name in fields if NEGATIVE_NAMES.fullmatch(name.lower())]
    if flag not in fields:
        raise InputError(f"{where}: no --negative_column {flag} (fields: {in_quotes(fields)}).")
    return [flag]


def in_quotes(names):
    """Return names as a list for reading."""
    return ", ".join(f'"{name}"' for name in names)


def any_filled(rows, names):
    """Tell whether some row has something in one of these columns."""
    for where, row in rows:
        for name in names:
            if unpacked(row.get(name), where, name) not in (None, "", []):
                return True
    return False


# ---------------------------------------------------------------- labels


def find_label(rows, names):
    """Return the column in `names` that says of each row's document whether it is a match, 1 or 0.

    None without one. Raises InputError where it holds other numbers: which of them are matches is
    not known here.
    """
    labels = []  # columns of 1s and 0s alone
    telling = []  # those of them that have both
    others = []  # what is said of columns with other numbers
    # rows that are all matches may have a column of 1s: one with both is believed before it, and
    # before a teacher's scores
    candidates = [name for name in names if name.lower() in LABEL_NAMES]
    for name in sorted(candidates, key=str.lower):  # label, relevance, score
        places = places_of_labels(rows, name)
        has_lists = any(isinstance(row.get(name), list) for _, row in rows)
        if places and places.keys() <= {0, 1} and not has_lists:
            labels.append(name)
            if len(places) == 2:
                telling.append(name)
        elif len(places) > 1:
            # one number in all rows, a version say, is no label
            odd = [number for number in places if number not in (0, 1)]
            number = next(iter(odd or places))
            what = f"{number:g}, one of {len(places)} different numbers"
            if has_lists:
                what = "a list of labels"
            others.append(f"{places[number]}: {name} is {what}")
    if len(telling) > 1:
        raise InputError(
            f"{rows[0][0]}: {len(telling)} columns could be the label: {', '.join(telling)}. "
            "Rename one."
        )
    if others and not telling:
        raise InputError(
            f"{others[0]}. Write 1 (the document matches the query) or 0 into each row, or rename "
            "the column: it is then unused and every row a match."
        )
    return next(iter(telling or labels), None)


def places_of_labels(rows, name):
    """Return {number: where it stands first} of a column; {} for one of class names."""
    places = {}
    for where, row in rows:
        cell = row.get(name)
        for value in cell if isinstance(cell, list) else [cell]:
            try:
                places.setdefault(label_of(value), where)
            except ValueError:
                return {}
    places.pop(None, None)  # an empty cell: its row will be dropped
    return places

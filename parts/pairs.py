"""Formats of training rows -> Examples of the embedding trainer: a query, positives, negatives."""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from parts.cells import prompt_of, texts_of, unpacked
from parts.columns import (
    fields_of,
    find_column,
    find_negatives,
    positive_names,
    query_names,
    refuse_unknown,
)
from parts.relevance import (
    documents_of,
    find_label,
    find_list_of_labels,
    find_scores,
    refuse_types,
    scores_by_text,
)
from parts.rows import OWN_FILE, file_of, own_file, text_id
from parts.splits import say_drops
from utils import InputError, say


@dataclass
class Example:
    """One training row.

    `prompt` is BGE's, which replaces the query prefix; `scores` are a teacher's, {text: score} of
    its documents; `file` is where the row stands, or, of a mined one, stood: a file, or a data set
    on the hub and its split.
    """

    query: str
    pos: list
    neg: list
    prompt: str | None = None
    scores: dict = field(default_factory=dict)
    file: str | None = field(default=None, compare=False)


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
    labels: str | None  # a list of these, one for each text of the positive column
    scores: list  # [(column of a teacher's scores, the columns whose texts it scores)]
    has_prompt: bool


def by_query(example):
    """Return what rows of the same query share."""
    return text_id(example.query)


# ---------------------------------------------------------------- rows


def read_examples(rows, columns, query_prefix, by_file=False, served=()):
    """Turn [(where, row)] into (Examples, {reason: count}); says what cannot be learnt from.

    Files may have formats of their own. by_file: an Example's documents all stand in one file, also
    where labels join rows; served: see refuse_types.
    """
    formats = find_formats(rows, columns, served)
    found = []
    labelled = []  # what labels are to join
    drops = defaultdict(list)
    for roles, of_format in formats:
        each, dropped = read_each(of_format, roles)
        if roles.label:
            labelled += each
        else:
            found += each
        for reason, places in dropped.items():
            drops[reason] += places
    joined, without_positive = join_labelled(labelled, by_file)
    found = in_order(found + joined, rows) if len(formats) > 1 else found + joined
    examples, repeated = distinct(found)
    if query_prefix is not None and examples and all(example.prompt for example in examples):
        where, first = found[0]
        raise InputError(
            f"{where}: every row has a prompt of its own, {first.prompt!r}, which --query_prefix "
            f"{query_prefix!r} does not replace. Drop the flag, or rename the column."
        )
    for roles, of_format in formats:
        files = {own_file(where, row) for where, row in of_format}
        own = [example for example in examples if example.file in files]
        refuse_ids(of_format[0][0], roles.query, [example.query for example in own])
        refuse_ids(of_format[0][0], roles.positive, [example.pos[0] for example in own])
    return examples, say_drops(drops | without_positive | repeated)


def in_order(found, rows):
    """Return [(where, Example)] in the order of the rows [(where, row)]."""
    places = {}
    for place, (where, _) in enumerate(rows):
        places.setdefault(where, place)
    return sorted(found, key=lambda pair: places[pair[0]])


def read_each(rows, roles):
    """Return ([(where, Example)], {reason: [where]} of the rows that lack a text).

    A document with label 0 is an Example's negative.
    """
    found = []
    drops = defaultdict(list)
    for where, row in rows:
        query = texts_of(row.get(roles.query), where, roles.query)
        first, negatives = documents_of(row, where, roles)
        if len(query) > 1:
            raise InputError(f"{where}: {len(query)} queries in one row. Write a row for each.")
        if not query:
            drops["rows with an empty query"].append(where)
        elif not first:
            drops["rows with an empty positive"].append(where)
        elif any(document.label is None for document in first):
            drops[f"rows with an empty {roles.label or roles.labels}"].append(where)
        elif roles.labels and not any(document.label for document in first):
            drops["rows without a document of label 1"].append(where)
        else:
            prompt = prompt_of(row.get("prompt"), where) if roles.has_prompt else None
            pos = [document for document in first if document.label]
            neg = [document for document in first if not document.label] + negatives
            scores = scores_by_text(pos + neg)
            pos = [document.text for document in pos]
            neg = [document.text for document in neg]
            file = own_file(where, row)
            found.append((where, Example(query[0], pos, neg, prompt, scores, file)))
    return found, dict(drops)


def join_labelled(found, by_file):
    """Join the rows [(where, Example)] of a query, of each file, into one, where its first stands.

    Returns ([(where, Example)], {reason: [where]} of the queries without a positive).
    """
    by_prompt = {}
    for where, example in found:
        # a joined row has one prompt
        key = (by_query(example), example.prompt, example.file if by_file else None)
        if key not in by_prompt:
            joined = Example(example.query, [], [], example.prompt, file=example.file)
            by_prompt[key] = (where, joined)
        _, joined = by_prompt[key]
        joined.pos += example.pos
        joined.neg += example.neg
        if example.pos:  # of a text with both labels the score beside label 1 stays
            joined.scores = joined.scores | example.scores
        else:
            joined.scores = example.scores | joined.scores
    kept = []
    drops = defaultdict(list)
    for where, joined in by_prompt.values():
        if joined.pos:
            kept.append((where, joined))
        else:
            drops["queries without a document of label 1"].append(where)
    return kept, dict(drops)


def distinct(found):
    """Return each Example of [(where, Example)] once, its texts too, no positive as a negative.

    Rows that differ in scores alone are one, with the first one's score of each text that has any;
    with another prompt a query is another one. Returns (Examples, {reason: [where]}).
    """
    drops = defaultdict(list)
    seen = {}
    for where, example in found:
        # a row would show a text that stands twice in it twice, in place of another
        example.pos = list(dict.fromkeys(example.pos))
        example.neg = list(dict.fromkeys(example.neg))
        known = set(map(text_id, example.pos))
        # the loss would push away what it pulls
        true_neg = [text for text in example.neg if text_id(text) not in known]
        false_neg = len(example.neg) - len(true_neg)
        if false_neg:
            drops["negatives equal to a positive"] += [where] * false_neg
        example.neg = true_neg
        example.scores = own_scores(example, example.scores)
        texts = (tuple(sorted(known)), tuple(sorted(map(text_id, true_neg))))
        key = (by_query(example), example.prompt, *texts)
        if key in seen:
            drops["duplicate rows"].append(where)
            seen[key].scores = own_scores(seen[key], example.scores | seen[key].scores)
        else:
            seen[key] = example
    return list(seen.values()), dict(drops)


def own_scores(example, scores):
    """Return those of {text: score} that are of an Example's documents."""
    documents = {*example.pos, *example.neg}
    return {text: score for text, score in scores.items() if text in documents}


def refuse_ids(where, name, texts):
    """Raise InputError where every text of a column is a number."""
    # MS MARCO's triples, say, name their texts by the numbers of another file
    if len(texts) > 1 and all(map(str.isdecimal, texts)):
        raise InputError(
            f"{where}: every {name} is a number, ids rather than texts. Look the texts up first."
        )


# ---------------------------------------------------------------- columns


def find_formats(rows, columns, served):
    """Return [(Roles, [(where, row)])] of the files that have the same columns; says what they are.

    A flag names a column where there is one of that name; other files' are found by name.
    """
    of_files = defaultdict(list)
    for where, row in rows:
        of_files[file_of(where)].append((where, row))
    together = defaultdict(list)  # files by their columns
    for file, own in of_files.items():
        together[frozenset(fields_of(own))].append(file)
    known = set().union(*together)
    formats = []
    for names, files in together.items():
        of_format = [pair for file in files for pair in of_files[file]]
        lacking = [kind for kind, name in vars(columns).items() if name in known - names]
        here = replace(columns, **dict.fromkeys(lacking))
        whose = ""
        if len(together) > 1:
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            whose = f"{files[0]}{more}: "
        formats.append((find_roles(of_format, here, served, whose), of_format))
    return formats


def find_roles(rows, columns, served, whose):
    """Find by name what each column is, and say it; raises InputError for what is unclear.

    served: see refuse_types; whose: what stands before that, where other files have other columns.
    """
    where = rows[0][0]
    fields = fields_of(rows)
    refuse_unknown(fields, columns, where)
    query = find_column(fields, "query", query_names(fields), columns.query, where)
    names = positive_names(fields)
    positive = find_column(fields, "positive", names, columns.positive, where)
    negatives = find_negatives(fields, columns.negative, where)
    unused = [name for name in fields if name not in {query, positive, *negatives, "prompt"}]
    has_prompt = any("prompt" in row for _, row in rows) and "prompt" not in (query, positive)
    refuse_types(rows, unused, negatives, served)
    # beside negatives of its own, a row's label says something else than "no match"
    has_negatives = columns.negative or any_filled(rows, negatives)
    labels = find_list_of_labels(rows, unused, positive)
    label = None if has_negatives or labels else find_label(rows, unused)
    scores = find_scores(rows, unused, positive, negatives)
    roles = Roles(query, positive, negatives, label, labels, scores, has_prompt)
    say_roles(roles, unused, whose)
    return roles


def say_roles(roles, others, whose):
    """Print what each column is; `others` have no text, and some of them a role."""
    said = f"columns   {whose}query = {roles.query}, positive = {roles.positive}"
    said += f", negatives = {', '.join(roles.negatives) or 'none'}"
    if roles.label:
        said += f", label = {roles.label}"
    if roles.labels:
        said += f", labels = {roles.labels}"
    scores = [name for name, _ in roles.scores]
    if scores:
        said += f", scores = {', '.join(scores)}"
    if roles.has_prompt:
        said += ", query prefix = prompt"
    if OWN_FILE in others:
        said += f", file = {OWN_FILE}"
    read = {roles.label, roles.labels, *scores, OWN_FILE}
    unused = [name for name in others if name not in read]
    if unused:
        said += f" (unused: {', '.join(unused)})"
    say(said)


def any_filled(rows, names):
    """Tell whether some row has something in one of these columns."""
    for where, row in rows:
        for name in names:
            if unpacked(row.get(name), where, name) not in (None, "", []):
                return True
    return False

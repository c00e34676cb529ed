"""What columns beside the texts say of a row's documents: labels, a teacher's scores, a type."""

from typing import NamedTuple

from parts.cells import (
    is_list,
    label_of,
    listed,
    number_of,
    numbers_in,
    texts_of,
    unpacked,
    written,
)
from utils import InputError

# those of sentence-transformers among them; the plural ones are columns of lists elsewhere
LABEL_NAMES = ("label", "labels", "relevance", "score", "scores")
PLURAL = ("labels", "scores")
LARGEST = 1e20  # of a score: divided by the smallest --teacher_temperature, float32 holds it
# of FlagEmbedding: what its documents are, and what does the same here
TYPES = {
    "only_1neg": ("one negative of each query is shown", "--max_negs 1"),
    "no_in_batch_neg": ("a query has its own negatives alone", "--no-in_batch_negatives"),
    "symmetric_class": (
        "documents are names of classes, right for other queries too",
        "--no-in_batch_negatives",
    ),
    "symmetric_clustering": (
        "documents get the prompt too, and are right for other queries",
        "--no-in_batch_negatives, and the prompt as --doc_prefix",
    ),
    "symmetric_sts": ("documents get the prompt too", "it as --doc_prefix"),
}


class Document(NamedTuple):
    """A document of a row: what the row says of it."""

    text: str
    label: int | None  # 1: it matches the query, 0: it does not, None: the row does not say
    score: float | None = None  # a teacher's


def documents_of(row, where, roles):
    """Return the Documents of a row's columns: (of the positive column, of the negatives).

    Texts that are empty are left out, with their labels and scores.
    """
    texts = {}
    for name in (roles.positive, *roles.negatives):
        texts[name] = written(row.get(name), where, name)
    scores = {name: [None] * len(texts[name]) for name in texts}
    for name, columns in roles.scores:
        numbers = scores_in(row.get(name), where, name)
        if name.lower() == "scores" and numbers:
            refuse_unlabelled(texts, roles, where)
        scores |= shared_out(numbers, {column: texts[column] for column in columns}, where, name)
    first = texts[roles.positive]
    labels = labels_of(row, where, roles, len(first))
    matches = []
    for text, label, score in zip(first, labels, scores[roles.positive], strict=True):
        if text:
            matches.append(Document(text, label, score))
    negatives = []
    for name in roles.negatives:
        for text, score in zip(texts[name], scores[name], strict=True):
            if text:
                negatives.append(Document(text, 0, score))
    return matches, negatives


def scores_by_text(documents):
    """Return {text: score} of those Documents that have one; the first one's, of equal texts."""
    scores = {}
    for document in documents:
        if document.score is not None:
            scores.setdefault(document.text, document.score)
    return scores


# ---------------------------------------------------------------- a teacher's scores


def find_scores(rows, names, positive, negatives):
    """Return [(column of scores, the columns whose texts it scores)]: BGE's, else `scores`.

    names: the columns without another role. `scores` has a list for the positive column and then
    the negatives, in their order.
    """
    known = {name.lower(): name for name in names}
    found = []
    if "pos_scores" in known:
        found.append((known["pos_scores"], [positive]))
    if "neg_scores" in known and negatives:
        found.append((known["neg_scores"], negatives))
    joint = known.get("scores")
    # one number a row is no score of one of its texts: it may be their difference
    if not found and joint and any_list(rows, joint):
        if negatives or any_texts(rows, positive):
            found.append((joint, [positive, *negatives]))
    return found


def scores_in(value, where, name):
    """Return the numbers of a cell, None for each that is missing: [] for an empty cell."""
    value = numbers_in(value, where)
    if value is None:
        return []
    scores = []
    for item in listed(value):
        if item is not None and not is_score(item):
            raise InputError(
                f"{where}: {name} has {item!r:.60}, no finite number up to {LARGEST:g}. Write one "
                "for each text, null where there is none."
            )
        scores.append(item if item is None else float(item))
    return scores


def is_score(item):
    """Tell whether a value is a number that a loss can bear: not NaN, infinity, 1e30, or true."""
    return isinstance(item, int | float) and not isinstance(item, bool) and abs(item) < LARGEST


def shared_out(scores, texts, where, name):
    """Share the scores of a cell out to columns, {column: texts as written}: {column: scores}.

    Without any, no text has one. Raises InputError where there are not as many as texts.
    """
    if not scores:
        return {column: [None] * len(texts[column]) for column in texts}
    # a cell that holds nothing may have a place in the scores, or none
    filled = [column for column in texts if texts[column] != [None]]
    for columns in (list(texts), filled):
        if sum(len(texts[column]) for column in columns) == len(scores):
            break
    else:
        count = sum(len(texts[column]) for column in filled)
        named = ", ".join(list(texts)[:3]) + (", ..." if len(texts) > 3 else "")
        raise InputError(
            f"{where}: {name} has {len(scores)} numbers, and {named} {count} texts. Write one for "
            "each text, null where there is none."
        )
    found = {column: [None] * len(texts[column]) for column in texts}
    start = 0
    for column in columns:
        end = start + len(texts[column])
        found[column] = scores[start:end]
        start = end
    return found


def refuse_unlabelled(texts, roles, where):
    """Raise InputError for scores of a list of which nothing says which texts are matches."""
    first = [text for text in texts[roles.positive] if text]
    has_negatives = any(any(texts[name]) for name in roles.negatives)
    if len(first) > 1 and not (roles.labels or has_negatives):
        raise InputError(
            f"{where}: {len(first)} texts of {roles.positive} have scores, and which of them match "
            "the query is not known. Add labels, a list of 1s and 0s, or write pos and neg."
        )


# ---------------------------------------------------------------- lists of labels


def find_list_of_labels(rows, names, positive):
    """Return the column `labels` in `names`, where it has lists beside lists of texts, or None."""
    for name in names:
        if name.lower() == "labels" and any_list(rows, name) and any_texts(rows, positive):
            return name
    return None


def any_list(rows, name):
    """Tell whether some row has a list in a column of numbers."""
    return any(is_list(row.get(name)) for _, row in rows)


def any_texts(rows, name):
    """Tell whether some row has a list in a column of texts."""
    cells = (unpacked(row.get(name), where, name) for where, row in rows)
    return any(isinstance(cell, list | tuple) for cell in cells)


def labels_of(row, where, roles, count):
    """Return the label of each of the `count` texts of a row's positive column.

    None where the cell is empty. Raises InputError where a list has others than 1 and 0, or not
    `count` of them.
    """
    if roles.label:
        return [label_of(row.get(roles.label))] * count
    if not roles.labels:
        return [1] * count
    labels = numbers_in(row.get(roles.labels), where)
    if labels is None or labels == []:
        return [None] * count
    labels = listed(labels)
    for label in labels:
        if number_of(label) not in (0, 1):
            raise InputError(
                f"{where}: {roles.labels} has {label!r:.60}. Write 1 (the text matches the query) "
                "or 0 for each text, and what a teacher says of it into scores."
            )
    if len(labels) != count:
        raise InputError(
            f"{where}: {roles.labels} has {len(labels)} labels, and {roles.positive} {count} "
            "texts. Write a 1 or a 0 for each text."
        )
    return [number_of(label) for label in labels]


# ---------------------------------------------------------------- types


def types_served(max_negs, in_batch, doc_prefix):
    """Return those of TYPES that flags do the same as; doc_prefix: None where it is not given."""
    served = set()
    if max_negs == 1:
        served.add("only_1neg")
    if not in_batch:
        served |= {"no_in_batch_neg", "symmetric_class"}
    if doc_prefix is not None:
        served.add("symmetric_sts")
    if not in_batch and doc_prefix is not None:
        served.add("symmetric_clustering")
    return served


def refuse_types(rows, names, negatives, served):
    """Raise InputError for a row of whose `type` nothing here makes what FlagEmbedding does.

    names: the columns without another role; served: types that flags do the same as. Other values,
    as "normal", say nothing, and only_1neg nothing new of a row with one negative.
    """
    column = next((name for name in names if name.lower() == "type"), None)
    for where, row in rows:
        kind = row.get(column)
        if not isinstance(kind, str) or kind not in TYPES or kind in served:
            continue
        texts = [text for name in negatives for text in texts_of(row.get(name), where, name)]
        if kind == "only_1neg" and len(texts) < 2:
            continue
        meaning, flag = TYPES[kind]
        raise InputError(
            f"{where}: type is {kind} (in FlagEmbedding: {meaning}). Pass {flag}, or rename "
            "the column."
        )


# ---------------------------------------------------------------- a label a row


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
    for name in candidates(rows, names):
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


def candidates(rows, names):
    """Return the columns in `names` that may hold a label a row: label before score."""
    found = []
    for name in names:
        is_of_lists = name.lower() in PLURAL and any_list(rows, name)
        if name.lower() in LABEL_NAMES and not is_of_lists:
            found.append(name)
    return sorted(found, key=str.lower)


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

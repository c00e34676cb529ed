"""Columns that are known by their names: which holds queries, positives, negatives."""

import re

from parts.rows import fields_in_words
from utils import InputError

QUERY_NAMES = (
    "query",
    "anchor",
    "question",
    "質問",
    "質問文",
    "問い",
    "問い合わせ",
    "お問い合わせ",
    "問題",
    "问题",
)
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
    "回答",
    "回答文",
    "ご回答",
    "答え",
    "正解",
    "解答",
    "答案",
    "文書",
)
NEGATIVE_NAMES = re.compile(
    r"(hard_?)?neg(ative)?s?_?\d*|negative_passages|neg_docs?|rejected_responses?"
)
Q_AND_A = {"q", "a"}  # known where they are all: beside others they may be anything
# of columns that labels or scores stand beside, as sentence-transformers' rerankers are taught
LIST_NAMES = ("docs", "documents", "passages", "candidates")


def fields_of(rows):
    """Return the names of all columns: a row may lack some, so that the first does not show all."""
    return list(dict.fromkeys(name for _, row in rows for name in row))


def refuse_unknown(fields, columns, where):
    """Raise InputError where no query and no positive is known: both are asked for at once."""
    names = {name.lower() for name in fields}
    known = {*query_names(fields), *positive_names(fields)}
    if columns.query or columns.positive or not names.isdisjoint(known):
        return
    raise InputError(
        f"{where}: no query and no positive (fields: {in_quotes(fields, where)}). Rename them to "
        '"question" and "answer", or 質問 and 回答, or pass --query_column NAME '
        "--positive_column NAME."
    )


def query_names(fields):
    """Return the names that the column of queries may have in rows of these columns."""
    return (*QUERY_NAMES, "q") if is_q_and_a(fields) else QUERY_NAMES


def is_q_and_a(fields):
    """Tell whether rows have the columns Q and A, and no other."""
    return {name.lower() for name in fields} == Q_AND_A


def positive_names(fields):
    """Return the names that the column of positives may have in rows of these columns."""
    names = {name.lower() for name in fields}
    is_judged = not names.isdisjoint(("labels", "scores"))
    if is_judged and names.isdisjoint(POSITIVE_NAMES):
        return POSITIVE_NAMES + LIST_NAMES
    return (*POSITIVE_NAMES, "a") if is_q_and_a(fields) else POSITIVE_NAMES


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
        f'{where}: {what} (fields: {in_quotes(fields, where)}). Rename one to "{names[0]}" (known: '
        f"{', '.join(names)}), or pass --{kind}_column NAME."
    )


def find_negatives(fields, flag, where):
    """Return the columns of negatives: the flag's, or all that are called so."""
    if not flag:
        return [name for name in fields if NEGATIVE_NAMES.fullmatch(name.lower())]
    if flag not in fields:
        raise InputError(
            f"{where}: no --negative_column {flag} (fields: {in_quotes(fields, where)})."
        )
    return [flag]


def in_quotes(names, where):
    """Return the names of the columns of the row at `where` as a list for reading."""
    return fields_in_words(names, where, mark='"')

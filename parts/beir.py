"""A BEIR folder: corpus.jsonl, queries.jsonl, and qrels/*.tsv, which judge pairs of the two."""

from pathlib import Path

from parts.cells import number_of
from parts.corpus import document_of
from parts.rows import read_rows, read_table
from utils import InputError


def read_beir(folder):
    """Read a BEIR folder: (queries {id: text}, corpus {id: text}, relevant ids of each query).

    Of several qrels it takes dev.tsv, else test.tsv. Raises InputError for what is no such folder,
    and for judgements of what is not there.
    """
    folder = Path(folder)
    missing = [name for name in ("corpus.jsonl", "queries.jsonl") if not (folder / name).is_file()]
    qrels = sorted(folder.glob("qrels/*.tsv"), key=order_of_qrels)
    if missing or not qrels:
        raise InputError(f"{folder} is no BEIR folder: no {', '.join(missing) or 'qrels/*.tsv'}.")
    corpus = read_beir_texts(folder / "corpus.jsonl")
    queries = read_beir_texts(folder / "queries.jsonl")
    relevant = {}
    for where, query, document, score in read_qrels(qrels[0], queries):
        # a judgement of what is not there would make recall 1 unreachable
        if query not in queries or document not in corpus:
            unknown = query if query not in queries else document
            raise InputError(f"{where}: {unknown} is in no file of {folder}.")
        if score > 0:  # 0: looked at, and found irrelevant
            relevant.setdefault(query, set()).add(document)
    return queries, corpus, relevant


def order_of_qrels(path):
    """Return a key that puts dev.tsv first, test.tsv second."""
    return path.stem not in ("dev", "test"), path.stem


def read_beir_texts(path):
    """Read corpus.jsonl or queries.jsonl into {id: text}."""
    texts = {}
    for where, row in read_rows(path):
        if "_id" not in row or "text" not in row:
            raise InputError(
                f'{where}: no _id or no text. A line is {{"_id": "7", "text": "..."}}.'
            )
        text = document_of(row, where) or "-"  # an empty document counts too
        if texts.setdefault(str(row["_id"]), text) != text:
            raise InputError(
                f"{where}: the _id {row['_id']} stood before another text. Delete one of the two."
            )
    return texts


def read_qrels(path, queries):
    """Read judgements into [(where, query id, document id, score)]; a first line may name them."""
    lines = read_table(path)
    width = len(lines[0][1]) if lines else 0
    if width not in (2, 3):
        raise InputError(
            f"{path} has lines of {width} columns. Write query id, document id and score, "
            "tab-separated."
        )
    first = lines[0][1]
    has_no_score = width == 2 or number_of(first[2]) is None
    if first[0] not in queries and has_no_score:  # column names
        lines = lines[1:]
    judgements = []
    for where, cells in lines:
        score = 1.0 if width == 2 else number_of(cells[-1])
        if len(cells) != width or score is None:
            raise InputError(
                f"{where}: not the {width} columns of the first line, or a score that is no number."
            )
        judgements.append((where, cells[0], cells[1], score))
    return judgements

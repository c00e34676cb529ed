"""Files of documents alone, without queries: a corpus to mine in, or to search in."""

from collections import defaultdict
from pathlib import Path

from parts.cells import NO_TEXT, TABLE_LINE, texts_of
from parts.columns import in_quotes
from parts.rows import expand_files, read_rows, text_id
from parts.splits import say_drops
from utils import InputError


def read_corpus(patterns):
    """Return each distinct text of files and globs of documents once, in their order.

    A row has a `text`, and may have a `title` that stands before it, as in a BEIR corpus.jsonl.
    Texts are the same where they differ in case and white space alone; the first one stays. Raises
    InputError naming the row that has no `text`, and where no document is left.
    """
    documents = {}  # text_id -> text
    drops = defaultdict(list)
    for file in expand_files(patterns):
        if Path(file).is_dir():
            raise InputError(
                f"{file} is a folder, not a file of documents. Name its files; of a BEIR folder, "
                "its corpus.jsonl."
            )
        for where, row in read_rows(file):
            text = document_of(row, where)
            if not text:
                drops["documents without a text"].append(where)
            elif text_id(text) in documents:
                drops["documents whose text stood before"].append(where)
            else:
                documents[text_id(text)] = text
    if not documents:
        raise InputError(
            f"{' '.join(map(str, patterns))}: not one row has a text that shows. Write "
            '{"text": "..."} for each document.'
        )
    say_drops(drops)
    return list(documents.values())


def document_of(row, where):
    """Return title and text of a row in one, "" where both are empty.

    Raises InputError for a row without `text`, and for cells that are no texts.
    """
    if "text" not in row:
        raise InputError(
            f"{where}: no text (fields: {in_quotes(row, where)}). Rename the one that holds the "
            'document to "text".'
        )
    passage = {}
    for name in ("title", "text"):
        cell = row.get(name)
        passage[name] = "" if is_nothing(cell, where) else cell
    found = texts_of(passage, where, "the document")
    return found[0] if found else ""


def is_nothing(cell, where):
    """Tell whether a cell is empty: None, NaN, or what programs write into a table for these."""
    if isinstance(cell, str):
        return TABLE_LINE.search(where) is not None and cell.strip() in NO_TEXT
    return cell is None or cell != cell

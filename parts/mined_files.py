"""Files of mined negatives: rows as --train_file reads them, and as a resumed run does."""

import json
import shutil
from pathlib import Path

from parts.rows import MINED, OWN_FILE, read_rows, text_id
from utils import InputError


def mined_file(folder, epoch):
    """Return the path of what was mined for an epoch, which is counted from 0."""
    return Path(folder) / f"{MINED}{epoch + 1}.jsonl"


def copy_mined(folder, target, epoch):
    """Copy what was mined for an epoch into another folder, in which a run is resumed."""
    if Path(folder).resolve() != Path(target).resolve():
        shutil.copy(mined_file(folder, epoch), target)


def write_mined(path, miner, found, vectors):
    """Write a Miner's rows with what it has found for them, so that --train_file reads them.

    vectors: Vectors, of which `found` was mined. A reader finds the whole file or none.
    """
    part = Path(f"{path}.part")
    with part.open("w", encoding="utf-8") as file:
        for row in file_rows(miner, found, vectors):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    part.replace(path)


def file_rows(miner, found, vectors):
    """Yield the rows of a file."""
    pool = miner.pool
    for example, place in zip(miner.examples, miner.place, strict=True):
        columns, scores, _ = found[place]
        own = [*example.pos, *example.neg]
        own_columns = pool.columns(map(text_id, own))
        texts = [pool.documents[column][0] for column in own_columns]
        of_row = vectors.of([miner.queries[place], *texts])
        cosines = (of_row[1:] @ of_row[0]).tolist()
        count = len(example.pos)
        row = {
            "query": example.query,
            "pos": example.pos,
            "neg": example.neg + [pool.words[column] for column in columns],
            "pos_cosines": rounded(cosines[:count]),
            "neg_cosines": rounded(cosines[count:] + scores),
            "source": ["own"] * len(example.neg) + ["mined"] * len(columns),
            OWN_FILE: example.file,
        }
        if example.prompt is not None:
            row["prompt"] = example.prompt
        if example.scores:  # a teacher's, of which mined negatives have none
            row["pos_scores"] = [example.scores.get(text) for text in row["pos"]]
            row["neg_scores"] = [example.scores.get(text) for text in example.neg]
            row["neg_scores"] += [None] * len(columns)
        yield row


def read_mined(path, miner):
    """Return the documents of each row of a Miner that write_mined wrote.

    Raises InputError for other rows.
    """
    if not Path(path).is_file():
        raise InputError(
            f"{path} is not there, and the model that mined it has been trained on since. Copy "
            "it back, or start anew."
        )
    rows = read_rows(path)
    if len(rows) != len(miner.examples):
        raise InputError(
            f"{path} has {len(rows)} rows of {len(miner.examples)}. Copy it back, or start anew."
        )
    found = []
    for (where, row), example in zip(rows, miner.examples, strict=True):
        mined = []
        for text, source in zip(row.get("neg", []), row.get("source", []), strict=False):
            if source == "mined":
                mined.append(text)
        columns = miner.pool.columns(map(text_id, mined))
        if row.get("query") != example.query or len(columns) < len(mined):
            raise InputError(f"{where}: not what this run has mined. Copy it back, or start anew.")
        found.append([miner.pool.documents[column] for column in columns])
    return found


def rounded(cosines):
    """Return cosines to five digits, which is what float32 vectors are good for."""
    return [round(cosine, 5) for cosine in cosines]

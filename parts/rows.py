"""Files and data sets on the hub as rows: [(where, row)], where naming file and line in errors."""

import csv
import glob
import hashlib
import io
import json
import math
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils import InputError, no_connection, note, reason, say

import numpy as np
import pyarrow
import pyarrow.parquet
from datasets import get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetsError

MINED = "mined_negatives-"  # what names of files begin with that runs write
EXCEL = "In Excel, save it as CSV UTF-8."
ADVICE = {  # on files that cannot be read, by their endings
    ".xlsx": EXCEL,
    ".xlsm": EXCEL,
    ".xls": EXCEL,
    ".txt": "If it is a table, rename it to .tsv or .csv, else convert it to JSON Lines.",
}
# what an .xlsx (or another ZIP archive) and an .xls begin with
BINARY = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
OWN_FILE = "train_file"  # the column of such a file that says which one a row was read of


@dataclass(frozen=True)
class HubSet:
    """A data set on the hub, or in a local folder of that form."""

    name: str
    subset: str | None = None
    revision: str | None = None


# ---------------------------------------------------------------- files


def read_rows(path):
    """Read one file into [(where, row)]; raises InputError on what is no row, and where none is."""
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        advice = ADVICE.get(path.suffix.lower(), "Convert it to JSON Lines.")
        raise InputError(f"{path} is none of .jsonl, .json, .csv, .tsv, .parquet. {advice}")
    rows = reader(path)
    if not rows:
        raise InputError(f"{path} holds no rows. Write one JSON object a line.")
    return rows


def expand_files(patterns):
    """Return the files that names and globs stand for; raises InputError for one without any.

    A glob stands for no files of mined negatives, which hold the rows of others, unless it says so.
    """
    files = []
    for pattern in patterns:
        if os.path.exists(pattern):  # a name that is there is no pattern, whatever brackets it has
            found = [pattern]
        else:
            found = sorted(glob.glob(pattern, recursive=True))
            mined = [path for path in found if Path(path).name.startswith(MINED)]
            if mined and MINED not in pattern:
                note(f"{pattern} leaves out {mined[0]}, which a run has mined: name it to take it")
                found = [path for path in found if path not in mined]
        if not found:
            raise not_there(pattern, patterns)
        files += found
    return files


def not_there(pattern, patterns):
    """Return the InputError on one of `patterns` that stands for no file."""
    for words in zip(patterns, patterns[1:], strict=False):
        whole = " ".join(words)
        if pattern in words and os.path.exists(whole):  # a shell has cut it in two
            return InputError(
                f'{pattern} is not there, but "{whole}" is. A name with spaces needs quotes.'
            )
    return InputError(f"{pattern} is not there (looked in {Path.cwd()}). Check the path.")


def read_text(path):
    """Return the text of a file in UTF-8 or Shift_JIS; raises InputError where it is neither."""
    try:
        with path.open("rb") as file:
            first = file.read(4)
        if first in BINARY:
            raise InputError(f"{path} is an Excel workbook, or an archive, and no text. {EXCEL}")
        return path.read_text(encoding="utf-8-sig")  # -sig: Excel starts a CSV with a BOM
    except OSError as error:  # a folder, links in a circle, no permission
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8 (byte {error.start})"
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{what} but UTF-16. Save it as UTF-8.")
    if not is_shift_jis(data):
        raise InputError(f"{what}. Save it as UTF-8.")
    note(f"{what} and is read as Shift_JIS, which Japanese Excel writes")
    return path.read_text(encoding="cp932")


def is_shift_jis(data):
    """Tell whether bytes are Japanese text in the encoding of Windows there, CP932.

    Some bytes in other encodings can be decoded, too, but not to kana, of which Japanese text is
    half: of a thousand samples of ten rows each in GB18030, Big5, EUC-KR, EUC-JP, CP1252, KOI8-R
    and UTF-8 with a lost byte none was taken for Japanese.
    """
    try:
        text = data.decode("cp932")
    except UnicodeDecodeError:
        return False
    wide = [letter for letter in text if not letter.isascii()]
    kana = [letter for letter in wide if "\u3041" <= letter <= "\u30fe"]
    return len(kana) * 10 >= len(wide)


def refuse_repeats(names, where):
    """Raise InputError for a name given twice in a row or table: one of the two would be lost."""
    for name, count in Counter(names).items():
        if count > 1 and name:  # Excel writes empty columns without a name
            raise InputError(
                f'{where}: {count} columns or keys are called "{name}". Rename or delete all but '
                "one."
            )


def fields_in_words(fields, where, mark=""):
    """Return the names of a row's columns, in `mark`s, as a list for reading; `where`: the row."""
    # a table without a line of names has texts for names
    names = [name if len(name) <= 60 else f"{name[:60]}..." for name in fields]
    shown = ", ".join(f"{mark}{name}{mark}" for name in names)
    if is_of_table(where):
        shown += "; does the first line name the columns?"
    return shown


def is_of_table(where):
    """Tell whether the row at `where` is one of a .csv or .tsv."""
    return file_of(where).lower().endswith((".csv", ".tsv"))


def file_of(where):
    """Return the file that `where` of a row names, or the data set on the hub and its split."""
    # the same text for all rows of a file
    return sys.intern(where.rpartition(", ")[0])  # ", line 7", ", row 7"


def own_file(where, row):
    """Return the file of a row: of a mined one that which it was mined for."""
    named = row.get(OWN_FILE)
    if isinstance(named, str) and named.strip():
        return sys.intern(named)
    return file_of(where)


# ---------------------------------------------------------------- JSON


def read_json_lines(path):
    """Read a file of one JSON object a line."""
    return parse_lines(read_text(path), path)


def read_json_file(path):
    """Read a .json file, which holds a list of objects, or JSON Lines under another name."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return parse_lines(text, path)
    items, repeats = parse_with_repeats(text, path)
    rows = []
    for i, item in enumerate(items, 1):
        where = f"{path}, row {i}"
        rows.append((where, checked(item, where, repeats)))
    return rows


def parse_lines(text, path):
    """Read JSON Lines into [(where, row)]; raises InputError naming the line."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and spans_lines(text):
        raise InputError(
            f"{path}, line {lines[0][0]}: a JSON value over several lines. Write each row on a "
            "line of its own (jq -c . FILE), or one list into a .json."
        )
    parsed = []
    for i, line in lines:
        where = f"{path}, line {i}"
        parsed.append((where, *parse_with_repeats(line, where)))
    return [(where, checked(row, where, repeats)) for where, row, repeats in parsed]


def spans_lines(text):
    """Tell whether the first line of a text is not valid JSON, but begins a value that is."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return "\n" in text.lstrip()[:end]


def parse_json(text, where, as_object=None):
    """Parse JSON; raises InputError naming `where`. as_object(pairs) makes an object of them."""
    try:
        return json.loads(text, object_pairs_hook=as_object)
    except json.JSONDecodeError as error:
        what = f"{error.msg}, column {error.colno}"
        raise InputError(f"{where}: no valid JSON ({what}). Mend or delete it.") from None
    except (RecursionError, ValueError) as error:  # brackets in brackets, thousands of digits
        what = reason(error).partition(";")[0]
        raise InputError(f"{where}: no valid JSON ({what}). Mend or delete it.") from None


def parse_with_repeats(text, where):
    """Parse JSON into (value, {id: (object, names)} of the objects that have a name twice)."""
    repeats = {}

    def as_object(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            repeats[id(found)] = found, names  # kept, so that no other object gets its id
        return found

    return parse_json(text, where, as_object), repeats


def checked(row, where, repeats):
    """Return a row; raises InputError where it is no object, or has a name twice."""
    if not isinstance(row, dict):
        what = f"a {type(row).__name__}, not a JSON object"
        raise InputError(f"{where}: {what}. Write one {{...}} a row.")
    if id(row) in repeats:  # deeper ones are no columns
        refuse_repeats(repeats[id(row)][1], where)
    return row


# ---------------------------------------------------------------- tables


def read_table(path):
    """Read a .csv or .tsv file into [(where, [cell, ...])], the line of the column names first."""
    text = read_text(path)
    csv.field_size_limit(2**31 - 1)
    header = text.partition("\n")[0]
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    signs = (usual, ";", "\t", ",")  # Excel may write any of them under either name
    delimiter = next((sign for sign in signs if sign in header), usual)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    lines = []
    end = 0  # the last line that could be read
    try:
        for cells in reader:
            end = reader.line_num
            if cells:
                lines.append((f"{path}, line {end}", cells))
    except csv.Error as error:
        raise InputError(f"{path}, line {end + 1}: {error}. Double the quotes.") from None
    return lines


def read_csv(path):
    """Read a table whose first line names the columns."""
    lines = read_table(path)
    if not lines:
        return []
    where, written = lines[0]
    names = [name.strip() for name in written]  # of wide spaces, too
    refuse_repeats(names, where)
    rows = []
    for where, cells in lines[1:]:
        if len(cells) != len(names):
            raise InputError(
                f"{where}: not the {len(names)} columns of the first line. Quote the text."
            )
        rows.append((where, dict(zip(names, cells, strict=True))))
    return rows


def read_parquet(path):
    """Read a parquet file."""
    try:
        # first, since a table with two columns of one name cannot be made into rows
        refuse_repeats(pyarrow.parquet.read_schema(path).names, path)
        rows = rows_of_table(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # no parquet, a broken page
        raise InputError(
            f"{path} is no parquet file that can be read ({reason(error)}). Write it again."
        ) from None
    return [(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]


def rows_of_table(rows):
    """Return rows as a file of JSON would have them: without columns that are empty throughout.

    An empty cell of another column stays, as None: its row lacks a text, its format is that of the
    others.
    """
    filled = {name for row in rows for name, cell in row.items() if cell is not None}
    found = []
    for row in rows:
        found.append({name: without_none(cell) for name, cell in row.items() if name in filled})
    return found


def without_none(value):
    """Leave out the keys without a value, which tables fill in at every depth."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return value


READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json_file,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


# ---------------------------------------------------------------- the hub


def read_hub_rows(hub, split, seed, count=math.inf):
    """Read one split of a HubSet into [(where, row)]; None where there is no such split, said here.

    Of a split with more than `count` rows that many are drawn by the seed, and no other is read.
    """
    data = load_split(hub, split)
    if data is None:
        return None
    numbers = range(len(data))
    if count < len(data):
        # the order of data.shuffle(seed), which would write all rows
        numbers = np.random.default_rng(seed).permutation(len(data))[:count]
        data = data.select(numbers, keep_in_memory=True)
    try:
        rows = rows_of_table(list(data))
    except ImportError as error:  # sounds and films are decoded by packages that nothing here needs
        what = f"--dataset_name {hub.name} holds more than text"
        raise InputError(f"{what}: {reason(error)}") from None
    numbered = zip(numbers, rows, strict=True)
    return [(f"{hub.name}[{split}], row {i + 1}", row) for i, row in numbered]


def load_split(hub, split):
    """Return one split of a HubSet as a Dataset; None where there is no such split."""
    more = {}
    if os.path.isdir(hub.name):  # datasets does not notice that a file of such a folder has changed
        more = {"download_mode": "force_redownload", "verification_mode": "no_checks"}
    try:
        splits = get_dataset_split_names(hub.name, hub.subset, revision=hub.revision)
        if split not in splits:
            say(f"data      {hub.name} has no split '{split}' (there are: {', '.join(splits)})")
            return None
        return load_dataset(hub.name, hub.subset, split=split, revision=hub.revision, **more)
    except (ValueError, OSError, DatasetsError) as error:  # no such set, subset, revision; offline
        if no_hub := no_connection(f"--dataset_name {hub.name}", error):
            raise no_hub from None
        why = reason(error)
        if str(error.__cause__ or "").strip():  # what went wrong is in its last line
            why += f" ({str(error.__cause__).strip().splitlines()[-1]})"
        if os.path.isdir(hub.name):
            why = f"{why.rstrip('.')}. Pass the files of the folder as --train_file."
        raise InputError(f"--dataset_name {hub.name} cannot be read: {why}") from None


# ---------------------------------------------------------------- texts


def text_id(text):
    """Return 63 bits that two texts share if they differ in case and white space alone."""
    normal = " ".join(text.casefold().split())
    digest = hashlib.blake2b(normal.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

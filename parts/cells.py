"""What a cell of a training row holds: texts, a prompt, a number."""

import contextlib
import json
import math
import re
from unicodedata import category

from utils import InputError

TABLE_LINE = re.compile(r"\.[ct]sv, line \d+", re.IGNORECASE)  # in `where` of a table's row
# what programs write into a table's cell that holds nothing
NO_TEXT = {"", "nan", "NaN", "NULL", "None", "null"}


def texts_of(value, where, name):
    """Return the non-empty texts of a cell.

    It may be a text, a {title, text} passage, a list of these, a JSON list of texts.
    """
    return [text for text in written(value, where, name) if text is not None]


def written(value, where, name):
    """Return the texts of a cell at the places where they are written, None for an empty one."""
    texts = []
    for item in leaves(unpacked(value, where, name)):
        text = passage_of(item, where, name)
        texts.append(text and text.strip())
    return texts


def leaves(value):
    """Return what a value holds: itself, or what the items of a list hold."""
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def unpacked(value, where, name):
    """Return a cell as meant: a JSON list of texts as that list, a table's nothing as None."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    is_table = TABLE_LINE.search(where)
    if is_table and text in NO_TEXT:
        return None
    if not (text.startswith("[") and text.endswith("]")):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        items = json.loads(text)
        if all(isinstance(item, str) for item in items):
            return items
    if is_table and text.startswith("['"):
        raise InputError(
            f"{where}: {name} is {text[:60]}, a list as Python prints it. Write it with json.dumps."
        )
    return value  # "[1]" may well be a text


def passage_of(value, where, name):
    """Return the text in a value with its white space, or None where it is blank."""
    if isinstance(value, dict):
        value = text_of_passage(value, where, name)
    if value is None or value != value:  # NaN is what a table has for nothing
        return None
    if not isinstance(value, str):
        what = f"{where}: {name} is the {type(value).__name__} {str(value)[:60]}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise InputError(f"{what}, an id rather than a text. Look the texts up first.")
        raise InputError(f"{what}, not a text. Write it as one.")
    if not shows(value):
        return None
    return value.encode(errors="replace").decode()  # half an emoji cannot be encoded


def shows(text):
    """Tell whether a text has more than white space, zero-width spaces and controls."""
    for character in text:
        if not character.isspace() and category(character) not in ("Cc", "Cf"):
            return True
    return False


def text_of_passage(passage, where, name):
    """Return title and text of a {title, text} passage, whose text may be called content."""
    body = passage.get("content") if passage.get("text") is None else passage["text"]
    parts = [part for part in (passage.get("title"), body) if part is not None]
    if passage and not parts:
        raise InputError(
            f"{where}: {name} is {str(passage)[:60]}, an id rather than a text, or its text is not "
            'called "text". Look the texts up first.'
        )
    for part in parts:
        if not isinstance(part, str):
            what = f"{where}: {name} has the {type(part).__name__} {str(part)[:60]}"
            raise InputError(f"{what} where a text belongs.")
    return " ".join(filter(None, parts))


def prompt_of(value, where):
    """Return a row's own prompt with the white space it ends in, or None."""
    items = leaves(unpacked(value, where, "prompt"))
    prompts = [text for item in items if (text := passage_of(item, where, "prompt"))]
    if len(prompts) > 1:
        raise InputError(
            f"{where}: {len(prompts)} prompts in one row. Write the one that its query gets."
        )
    return prompts[0] if prompts else None


def label_of(value):
    """Return the number in a cell of labels, None for an empty one; ValueError for a class name."""
    is_blank = isinstance(value, str) and value.strip() in NO_TEXT
    if value is None or value != value or is_blank:
        return None
    number = number_of(value)
    if number is None:
        raise ValueError
    return number


def number_of(value):
    """Return a cell as a number, which a text ("0", "true") may hold too; None where it is none."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf
    except (TypeError, ValueError):
        return None


def numbers_in(value, where):
    """Return a cell of numbers as meant: as JSON writes it, a table's nothing as None."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    is_table = TABLE_LINE.search(where)
    if is_table and text in NO_TEXT:
        return None
    if is_table or text.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return value


def is_list(value):
    """Tell whether a cell is a list, or a text that is one in JSON."""
    return isinstance(value, list | tuple) or isinstance(value, str) and value.strip()[:1] == "["


def listed(value):
    """Return a list as it is, another value as a list of one."""
    return value if isinstance(value, list | tuple) else [value]

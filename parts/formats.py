"""The known formats of a row: its cells become the turns of a conversation, as they are written."""

import re

from parts.messages import Drop, first_written, is_filled, is_list_of_objects, media_in, turns_of
from parts.rows import fields_in_words, file_of, is_of_table, parse_json
from utils import InputError, say

PAIRS = (  # of prompt and answer; the first whose cells hold something is taken
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("質問", "回答"),
    ("質問", "ご回答"),
    ("質問", "答え"),
    ("質問文", "回答文"),
    ("質問文", "回答"),
    ("問い合わせ", "回答"),
    ("問い合わせ", "ご回答"),
    ("お問い合わせ", "回答"),
    ("お問い合わせ", "ご回答"),
    ("問い", "答え"),
    ("問題", "正解"),
    ("問題", "解答"),
    ("问题", "回答"),
    ("问题", "答案"),
    ("問題", "答案"),
)
TURN_LISTS = ("messages", "conversations", "conversation")
LISTS = (*TURN_LISTS, "tools", "functions", "history")  # may be written as JSON in a text
KNOWN = "messages, conversations, " + ", ".join("/".join(pair) for pair in PAIRS)


def holds_objects(value):
    """Tell whether a cell is a list of JSON objects, or a text that begins as one."""
    if isinstance(value, str):
        return bool(re.match(r"\s*\[\s*\{", value))
    return is_list_of_objects(value)


def cleaned(where, row):
    """Return the cells of a row: "" for null, no empty lists, lists written in a text parsed.

    Raises InputError for images and the like, and for a list that is no JSON.
    """
    if media := media_in(row):
        raise InputError(
            f'{where}: "{media}" is not empty, and only text can be trained on here. '
            "Leave such rows out; if their text says all, delete the field."
        )
    cells = {}
    for name, value in row.items():
        if name in ("conversation", "functions") and not holds_objects(value):
            continue  # a word that other data uses otherwise
        if name in LISTS and isinstance(value, str) and is_filled(value):
            value = parse_json(value, f"{where}, {name}")
        if name not in LISTS or is_filled(value):
            cells[name] = "" if value is None else value
    return cells


def tools_of(row):
    """Return the tools of a cleaned row as a list, also OpenAI's old "functions"; None without."""
    tools = row.get("tools")
    if not tools:
        functions = [each for each in row.get("functions", []) if "name" in each]
        tools = [{"type": "function", "function": each} for each in functions]
    if not isinstance(tools, list):
        tools = [tools]
    return tools or None


def pair_of(row, sides=2):
    """Return the names of a row's prompt and answer, preferably of filled cells; None without any.

    With sides=1 only the prompt is looked for.
    """
    by_letter = {name.upper(): name for name in row}
    if by_letter.keys() == {"Q", "A"}:  # and no other column, beside which they may be anything
        return by_letter["Q"], by_letter["A"]
    empty = None
    for pair in PAIRS:
        names = pair[:sides]
        if not set(names) <= set(row):
            continue
        if all(row[name] not in ("", []) for name in names):
            return pair
        empty = empty or pair
    return empty


def say_columns(rows):
    """Print which columns of each table among rows [(where, row)] are prompt and answer."""
    tables = {}  # file: its first row
    for where, row in rows:
        if is_of_table(where):
            tables.setdefault(file_of(where), row)
    for file, row in tables.items():
        pair = None if any(name in row for name in TURN_LISTS) else pair_of(row)
        if pair:
            whose = f"{file}: " if len(tables) > 1 else ""
            say(f"columns   {whose}prompt = {pair[0]}, answer = {pair[1]}")


def alpaca_prompt(row, where):
    """Return alpaca's instruction and input, or dolly's and its context, as one text.

    One of them may be empty.
    """
    texts = [row["instruction"], first_written(row, ("input", "context"))]  # alpaca's, dolly's
    for text in texts:
        if not isinstance(text, str):
            raise InputError(
                f"{where}: the {type(text).__name__} {str(text)[:60]} is not a text. Write "
                "instruction and input as texts."
            )
    return "\n\n".join(text for text in texts if text.strip())


def history_turns(row, where):
    """Return the turns of LLaMA-Factory's history, [[question, answer], ...]."""
    history = row.get("history", [])
    turns = []
    for past in history if isinstance(history, list) else [None]:
        if not isinstance(past, list) or len(past) != 2:
            raise InputError(f"{where}: history is no list of [question, answer] pairs.")
        question, answer = past
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    return turns


def prompt_turns(where, row, name):
    """Return the turns before the answer of a row whose prompt is called `name`: history first."""
    if name == "instruction" and isinstance(row[name], str):
        turns = [{"role": "user", "content": alpaca_prompt(row, where)}]
    else:
        turns = turns_of(row[name], where, name, "user")
    return history_turns(row, where) + turns


def raw_turns(where, row, fields):
    """Return the turns of a cleaned row of any known format as they are written.

    fields: the names of all its cells, those of empty lists included. Raises Drop, InputError.
    """
    name = next((name for name in TURN_LISTS if name in row), None)
    if name:
        return turns_of(row[name], where, name, "user")
    if pair := pair_of(row):
        prompt, answer = pair
        return prompt_turns(where, row, prompt) + turns_of(row[answer], where, answer, "assistant")
    # an empty list of turns is a row to drop; an unknown format is a file to refuse
    is_of_turns = "messages" in fields or "conversations" in fields
    if is_of_turns or not any(map(is_filled, row.values())):
        raise Drop("rows without a turn")
    if "text" in row:
        raise InputError(
            f'{where}: "text" alone does not say which part is the response. Write the row as '
            '{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]} or '
            "prompt/completion."
        )
    hint = " For chosen/rejected pass --pref_loss." if "chosen" in row else ""
    raise InputError(
        f"{where}: none of the known formats (fields: {fields_in_words(fields, where)}). Rename "
        f'the columns to "question" and "answer", or 質問 and 回答. Known: {KNOWN}.{hint}'
    )

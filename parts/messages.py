"""Turns of any spelling, OpenAI's or ShareGPT's, become messages as chat templates take them."""

import contextlib
import itertools
import json
import re

from utils import InputError

CALLS = (
    "function_call",
    "tool_call",
)  # roles whose content is a call: {"name": ..., "arguments": ...}
ROLES = {  # as they are written: as templates know them
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
# keys of a list of exchanges: xtuner's, MOSS'
EXCHANGES = (("input", "output"), ("human", "assistant"), ("user", "assistant"))
MEDIA = ("images", "videos", "audios", "image", "video", "audio", "image_url", "input_audio")
WEIGHTS = ("weight", "loss_weight", "train", "training")
THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
NO_CALL = 'rows with a function call that is no JSON {"name", "arguments"}'


class Drop(Exception):
    """A row cannot be learnt from; the message is the reason that is counted."""


class UnknownRole(InputError):
    """A turn's role is none of ROLES. Such rows are dropped, unless more than half of them are."""

    def __init__(self, where, role):
        super().__init__(f"{where}: unknown role {role}. Known roles: {', '.join(ROLES)}.")
        self.drop = f"rows with the unknown role {role}"


# ---------------------------------------------------------------- cells


def is_filled(value):
    """Tell whether a cell holds anything: tables write nothing as null, "", [] or [null]."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "null")
    if isinstance(value, list):
        return any(map(is_filled, value))
    return bool(value)


def is_list_of_objects(value):
    """Tell whether a cell is a list of JSON objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def media_in(cells):
    """Return the first field of a row, turn or part that holds an image or the like, or None."""
    return next((name for name in MEDIA if is_filled(cells.get(name))), None)


def first_written(cells, names, default=""):
    """Return the first of the cells called `names` that is there and neither null nor empty."""
    for name in names:
        if cells.get(name) not in (None, ""):
            return cells[name]
    return default


def kind_of(turn):
    """Return the role of a turn as it is written, OpenAI's or ShareGPT's, in lower case."""
    role = turn.get("role") or turn.get("from")
    return role.strip().lower() if isinstance(role, str) else None


def role_of(turn):
    """Return the role of a turn as templates know it; None for an unknown one."""
    return ROLES.get(kind_of(turn))


# ---------------------------------------------------------------- lists of turns


def turns_of(value, where, name, role):
    """Return a list of messages from one of messages or exchanges, or a text: a turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not is_list_of_objects(value):
        raise InputError(
            f"{where}: {name} is the {type(value).__name__} {str(value)[:60]}, not a text or a "
            'list of messages. Write [{"role": "user", "content": "..."}, ...].'
        )
    if any("role" in turn or "from" in turn for turn in value):
        return value
    for question, answer in EXCHANGES:
        if all(question in exchange or answer in exchange for exchange in value):
            exchanges = [exchange_turns(exchange, question, answer) for exchange in value]
            return list(itertools.chain(*exchanges))
    return value


def exchange_turns(exchange, question, answer):
    """Return the turns of one exchange, {"input", "output"} say, which are `question`, `answer`."""
    learnt = exchange.get("output_with_loss", True)  # xtuner's
    texts = {
        "system": exchange.get("system") or None,
        "user": exchange.get(question),
        "assistant": exchange.get(answer),
    }
    turns = []
    for role, text in texts.items():
        if text is not None:
            turns.append({"role": role, "content": text, "train": learnt})
    return turns


# ---------------------------------------------------------------- a turn's text and weight


def text_of(content, where, kind):
    """Return the text of a turn, which may come in parts; raises InputError for what is no text."""
    if is_list_of_objects(content):
        return "".join(text_of_part(part, where, kind) for part in content)
    if not isinstance(content, str):
        raise InputError(
            f"{where}: the content of a {kind} turn is a {type(content).__name__}, not a text. "
            "Write JSON answers as text, with json.dumps; images cannot be trained on here."
        )
    # half an emoji, which JSON can write and no tokenizer reads, becomes "?"
    return content.encode(errors="replace").decode()


def text_of_part(part, where, kind):
    """Return the text of {"type": "text", "text" or "value": ...}; InputError for images etc."""
    part_type = part.get("type", "text")
    is_text = part_type in ("text", "input_text", "output_text")
    if not is_text or media_in(part):
        raise InputError(
            f"{where}: a {kind} turn holds a part of type {part_type}. Write it as text, or "
            "leave the row out; images cannot be trained on here."
        )
    return text_of(first_written(part, ("text", "value")), where, kind)


def weight_of(turn, where):
    """Return 0 for a turn that is context alone, 1 for one to learn from; InputError for others."""
    if turn.get("train_detail") or turn.get("training_detail"):
        raise InputError(
            f"{where}: a turn is learnt from in part (train_detail). Give the whole turn a "
            "weight of 0 or 1."
        )
    weight = 1
    for name in WEIGHTS:
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1, "0", "1"):  # false and true are 0 and 1
            written = json.dumps(value, default=str)[:60]
            raise InputError(
                f"{where}: the {name} of a turn is {written}. Write 1 to learn "
                "from the turn, 0 for context alone."
            )
        weight = min(weight, int(value))
    return weight


# ---------------------------------------------------------------- calls of functions


def functions_of(message):
    """Return [{"name", "arguments"}] of a turn's tool calls."""
    return [call.get("function", call) for call in message.get("tool_calls", ())]


def calls_of(value):
    """Return OpenAI's tool calls of {"name", "arguments"}, of a list of such, or of JSON.

    Returns None if it is neither.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        arguments = function.get("arguments", function.get("parameters", {}))
        named = {"name": function["name"], "arguments": arguments}
        calls.append({"type": "function", "function": named})
    return calls or None


def listed_calls(value):
    """Return the tool_calls of a turn as a list; they may be one call, or JSON. Drop for others."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and calls_of(call) for call in calls):
        raise Drop(NO_CALL)
    return calls


def with_calls(turn):
    """Return a turn with what it calls in another form than OpenAI's as its tool_calls.

    That is a text, or OpenAI's old "function_call"; a turn without either is returned as it is.
    Raises Drop for a call that cannot be read.
    """
    kind = kind_of(turn)
    text = turn.get("content") or turn.get("value")
    moved = {"role": "assistant", "content": "", "value": ""}  # the text is the call
    if ROLES.get(kind) == "assistant" and turn.get("function_call"):
        calls = calls_of(turn["function_call"])
        moved = {}  # here the text stands beside the call
    elif kind in CALLS and not turn.get("tool_calls"):
        calls = calls_of(text)
    elif kind == "function" and '"arguments"' in str(text) and calls_of(text):
        calls = calls_of(text)  # ShareGPT's "function" is a call here and a result there
    else:
        return turn
    if not calls:
        raise Drop(NO_CALL)
    return {**turn, **moved, "tool_calls": calls}


# ---------------------------------------------------------------- messages


def read_message(turn, where):
    """Return one turn, OpenAI's or ShareGPT's, as {"role", "content", ...}.

    Raises InputError for what is neither.
    """
    kind = kind_of(turn)
    if kind not in ROLES:
        role = json.dumps(turn.get("role") or turn.get("from"), ensure_ascii=False, default=str)
        raise UnknownRole(where, role[:60])
    if media := media_in(turn):
        raise InputError(
            f'{where}: a {kind} turn has "{media}", and only text can be trained on here. '
            "Leave such rows out."
        )
    content = text_of(first_written(turn, ("content", "value", "text")), where, kind)
    names = ("reasoning_content", "reasoning", "thinking")
    reasoning = text_of(next((turn[name] for name in names if turn.get(name)), ""), where, kind)
    message = {"role": ROLES[kind], "content": content}
    for name in ("name", "tool_call_id"):
        if turn.get(name) is not None:
            message[name] = turn[name]
    if is_filled(turn.get("tool_calls")):  # a template may take an empty list for a call
        message["tool_calls"] = listed_calls(turn["tool_calls"])
    if reasoning:
        message["reasoning_content"] = reasoning
        message["thinking"] = reasoning  # gpt-oss's name
    if message["role"] == "assistant" and not weight_of(turn, where):
        message["weight"] = 0
    return message


def read_turns(turns, where):
    """Return the messages of turns; raises as read_message and with_calls do.

    A call joins the answer right before it, as in one message of OpenAI's. It gets an id of nine
    characters, which Mistral's templates ask for, and so does the result behind it.
    """
    messages = []
    waiting = []  # ids of calls whose results are still to come
    ids = (f"call{i:05}" for i in itertools.count(1))
    for turn in turns:
        called = with_calls(turn)
        is_call = called is not turn
        message = read_message(called, where)
        if is_call:
            message["tool_calls"] = [{"id": next(ids), **call} for call in message["tool_calls"]]
            waiting += [call["id"] for call in message["tool_calls"]]
        elif message["role"] == "tool" and waiting:
            answered = waiting.pop(0)
            message.setdefault("tool_call_id", answered)
        if is_call and not message["content"] and messages and joins(message, messages[-1]):
            before = messages[-1]
            before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def joins(call, before):
    """Tell whether a message that calls goes on with the one before it: an answer of its weight."""
    return before["role"] == "assistant" and before.get("weight") == call.get("weight")

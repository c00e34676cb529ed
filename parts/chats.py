"""Rows become Examples of conversations, or of pairs: what is learnt from, as text alone."""

import itertools
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

from parts.formats import TURN_LISTS, cleaned, pair_of, raw_turns, say_columns, tools_of
from parts.messages import Drop, UnknownRole, functions_of, read_turns, role_of, turns_of
from parts.rows import parse_json, read_rows, text_id
from parts.scores import answer_of, is_empty, parse_answer
from parts.splits import hold_out, leave_out, read_enough, say_drops
from utils import InputError, say

MAX_LEVELS = 64  # of objects in a tool or in arguments: pickle and templates fail in some hundreds
TAG_RESIDUE = re.compile(
    r"<\|[^|<>]*\|>|</?[A-Za-z][\w:-]*/?>|\[/?INST\]|^\s*(###|Human:|User:|Assistant:)"
    r"|&(amp|lt|gt);"
)


@dataclass
class Example:
    """One row: where it stands, its messages in the form that chat templates take, its tools.

    Of a pair the messages end in the chosen answer, and `rejected` is the other.
    """

    where: str  # "FILE, line 7", for what is said about it
    messages: list  # [{"role", "content", ...}], the last one an answer
    tools: list | None = None
    rejected: dict | None = None

    @property
    def prefixes(self):
        """Hashes of messages[:0], messages[:1], ...: rows that share one agree up to there."""
        hashes = [0]
        for message in self.messages:
            calls = json.dumps(message.get("tool_calls"), ensure_ascii=False, sort_keys=True)
            turn = f"{message['role']} {message['content']} {calls}"
            hashes.append(text_id(f"{hashes[-1]} {turn}"))
        return hashes

    @property
    def answers(self):
        """Indices of the assistant turns that a question precedes; a greeting answers nothing."""
        found = []
        asked = False
        for i, message in enumerate(self.messages):
            if message["role"] in ("user", "tool"):
                asked = True
            elif message["role"] == "assistant" and asked:
                found.append(i)
        return found

    @property
    def opening(self):
        """Hash of all before the first answer: rows that share it may hold the same answer."""
        return self.prefixes[self.answers[0]]

    @property
    def last(self):
        """Index of the last assistant turn."""
        return max(i for i, turn in enumerate(self.messages) if turn["role"] == "assistant")

    @property
    def answer(self):
        """The text of the last answer, without its thinking."""
        return answer_of(self.messages[self.last]["content"])

    @property
    def turns(self):
        """All its messages, the rejected answer of a pair included."""
        return [*self.messages, self.rejected] if self.rejected else self.messages


def has_reasoning(examples):
    """Tell whether an answer of any row has reasoning, in a field of its own or in its text."""
    for example in examples:
        for turn in example.turns:
            reasons = turn.get("reasoning_content") or "</think>" in turn["content"]
            if turn["role"] == "assistant" and reasons:
                return True
    return False


# ---------------------------------------------------------------- training rows and dev sets


def read_data(source, sizes, system_prompt, drop_regex, as_pairs, overfit, trains):
    """Read, check and split the data of a run.

    overfit: how many rows are learnt by heart, which are their own dev set, or None. trains: False
    where dev sets are all that is needed. Returns (training Examples, {name: dev Examples}, counts
    for the report).
    """
    read = partial(
        read_examples, system_prompt=system_prompt, drop_regex=drop_regex, as_pairs=as_pairs
    )
    split = partial(split_rows, read, sizes, overfit)
    examples, dev_sets, dropped = read_enough(source, sizes, split)
    if not examples and (trains or not dev_sets):
        if any("a dev set" in reason for reason in dropped):
            raise InputError(
                "no row is left to train on: the dev sets took them. Pass a --dev_file of other "
                "rows."
            )
        raise InputError("no row is left to train on. Look at what was dropped, above.")
    counts = {name or "dev": len(dev) for name, dev in dev_sets.items()}
    said = [f"{len(examples)} rows to train on"] if trains else []
    said += [f"{name}: {count} rows" for name, count in counts.items()]
    say(f"data      {'; '.join(said)}")
    return examples, dev_sets, {"train_rows": len(examples), "dropped": dropped, "dev": counts}


def split_rows(read, sizes, overfit, rows, sources):
    """Turn training rows and dev sources into Examples, by `read`.

    Returns (training Examples, {name: dev Examples}, {reason: training rows dropped}).
    """
    say_columns(rows)
    examples, dropped = read(rows)
    random.Random(sizes.seed).shuffle(examples)  # so that the first of them are a fair draw
    dev_sets = {name: draw_dev(read, sizes, name, dev) for name, dev in sources.items()}
    if overfit:  # its rows are their own dev set; an empty answer alone is too easy to learn
        something_to_find = [e for e in examples if not is_empty(parse_answer(e.answer))]
        learnt = (something_to_find or examples)[:overfit]
        return learnt, dev_sets | {"": learnt}, dropped
    if not dev_sets:  # rows of one opening are held out together: their answers may be the same
        examples, dev_sets = hold_out(examples, attrgetter("opening"), sizes, "prompt")
    examples, leaks = without_leaks(examples, dev_sets)
    return examples[: sizes.train], dev_sets, dropped | leaks


def draw_dev(read, sizes, name, source):
    """Return the Examples of a dev set, from a file or from rows; raises InputError for none."""
    dev, _ = read(read_rows(source) if isinstance(source, str) else source)
    if not dev:
        file = source if isinstance(source, str) else name
        raise InputError(f"--dev_file {file} holds no row to evaluate on.")
    # the same rows with --eval_only, which has none to train on
    draw = random.Random(f"{sizes.seed} {name}")
    return draw.sample(dev, min(sizes.dev or len(dev), len(dev)))


def without_leaks(examples, dev_sets):
    """Leave out the rows that give dev rows away: one's prompt, or an answer behind the same turns.

    Returns (kept, {reason: how many were left out}).
    """
    prompts = set()
    answers = set()  # with the turns that they stand behind
    for example in itertools.chain(*dev_sets.values()):
        prefixes = example.prefixes
        for i in example.answers:
            prompts.add(prefixes[i])
            answers.add(prefixes[i + 1])

    def leak(example):
        prefixes = example.prefixes
        if prefixes[example.last] in prompts:
            return "training rows whose prompt is in a dev set"
        if not answers.isdisjoint(prefixes):
            return "training rows with an answer of a dev set behind the same turns"
        return None

    return leave_out(examples, leak)


# ---------------------------------------------------------------- all rows


def read_examples(rows, system_prompt, drop_regex, as_pairs):
    """Turn [(where, row)] into Examples; counts, and says, what cannot be learnt from.

    Returns (examples, {reason: rows dropped}). Raises InputError for a row of no known format.
    """
    read = read_pair if as_pairs else read_example
    examples = []
    seen = set()
    drops = defaultdict(list)  # reason: where
    unknown = []
    for where, row in rows:
        try:
            example = read(where, row, system_prompt)
            key = key_of(example, drop_regex)
            if key in seen:
                raise Drop("duplicate rows")
        except Drop as drop:
            drops[str(drop)].append(where)
        except UnknownRole as error:
            unknown.append(error)
            drops[error.drop].append(where)
        else:
            seen.add(key)
            examples.append(example)
    if 2 * len(unknown) > len(rows):
        raise unknown[0]  # no odd row here and there: a spelling to tell the user about
    return examples, say_drops(drops)


def key_of(example, drop_regex):
    """Return what two equal rows share; raises Drop for a row that is not wanted."""
    turns = example.turns
    texts = itertools.chain.from_iterable(map(texts_in, turns))
    if drop_regex and any(re.search(drop_regex, text) for text in texts):
        raise Drop("rows that match --drop_regex")
    if is_deeper([turns, example.tools], MAX_LEVELS):
        raise Drop(f"rows with tools or arguments in more than {MAX_LEVELS} levels")
    return json.dumps([turns, example.tools], sort_keys=True)


def texts_in(turn):
    """Return the texts of a turn: its content, its reasoning, the arguments of its calls."""
    texts = [turn["content"], turn.get("reasoning_content", "")]
    for function in functions_of(turn):
        arguments = function.get("arguments") or ""
        is_text = isinstance(arguments, str)
        texts.append(arguments if is_text else json.dumps(arguments, ensure_ascii=False))
    return texts


def is_deeper(value, levels):
    """Tell whether lists and objects stand in more than so many of one another."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(item, levels - 1) for item in items)


# ---------------------------------------------------------------- a row to an Example


def read_example(where, row, system_prompt):
    """Turn a row of any known format into an Example; Drop, or InputError for an unknown format."""
    fields = list(row)
    row = cleaned(where, row)
    if row.get("label") is False or row.get("kto_tag") is False:  # 0 may mean anything
        raise Drop("rows whose label or kto_tag is false (KTO: answers to unlearn)")
    turns = raw_turns(where, row, fields)
    system = row.get("system") or row.get("system_prompt") or system_prompt
    has_system = bool(turns) and role_of(turns[0]) == "system"
    if system and not has_system:
        turns = [{"role": "system", "content": system}, *turns]
    messages = read_turns(turns, where)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nobody answers
    refuse_useless(messages)
    return Example(where, messages, tools_of(row))


def refuse_useless(messages):
    """Raise Drop for messages, up to the last answer, from which nothing can be learnt."""
    if not messages:
        raise Drop("rows without an assistant turn")
    weights = []
    asked = ""  # the texts that could be answered
    for message in messages:
        if message["role"] == "assistant":
            if not message["content"].strip() and not message.get("tool_calls"):
                raise Drop("rows with an empty response")
            weights.append(message.get("weight"))
        elif message["role"] in ("user", "tool"):
            asked += message["content"]
    if not asked.strip():
        raise Drop("rows with an empty prompt")
    if weights.count(0) == len(weights):
        raise Drop("rows whose answers all have weight 0")


# ---------------------------------------------------------------- a row to a pair


def read_pair(where, row, system_prompt):
    """Turn a row with chosen and rejected answers into an Example.

    Answers are texts, messages, or whole conversations whose common beginning is the prompt; the
    prompt is what an SFT row has before its answer. Raises Drop, or InputError for an unknown
    format.
    """
    own = ("chosen", "rejected", "label", "kto_tag")
    rest = cleaned(where, {key: value for key, value in row.items() if key not in own})
    example = read_side(where, row, rest, "chosen", system_prompt)
    other = read_side(where, row, rest, "rejected", system_prompt)
    if example.messages[:-1] != other.messages[:-1]:
        raise Drop("pairs that differ in more than the last answer")
    chosen = example.messages[-1]
    rejected = other.messages[-1]
    if chosen == rejected:
        raise Drop("pairs whose answers are equal")
    if 0 in (chosen.get("weight"), rejected.get("weight")):
        raise Drop("pairs with an answer of weight 0")
    example.rejected = rejected
    return example


def read_side(where, row, rest, name, system_prompt):
    """Return the Example of a pair's prompt, which is in `rest`, and its answer row[name]."""
    value = row.get(name)
    if not value and name in row:
        raise Drop(f"pairs without a {name} answer")
    if not value:
        raise InputError(
            f'{where}: no "{name}" (fields: {", ".join(row)}). A pair is {{"prompt", "chosen", '
            '"rejected"}.'
        )
    if isinstance(value, str) and value.lstrip().startswith(("[{", '{"role"', '{"from"')):
        value = parse_json(value, f"{where}, {name}")  # messages in a CSV cell
    if isinstance(value, dict):
        value = [value]
    turns = turns_of(value, where, name, "assistant")
    cells = with_answer(where, rest, turns)
    if cells is None:
        raise InputError(
            f'{where}: no prompt beside "{name}" (fields: {", ".join(row)}). Write it as "prompt".'
        )
    example = read_example(where, cells, system_prompt)
    roles = [message["role"] for message in example.messages]
    if roles[-2:] == ["assistant", "assistant"]:  # whose end would be taken for the question
        raise Drop("pairs whose prompt ends in an answer")
    return example


def with_answer(where, rest, turns):
    """Return the cells of the SFT row that one side of a pair is; None where it lacks a prompt."""
    if not turns or role_of(turns[0]) != "assistant":  # a whole conversation, with its prompt
        kept = ("system", "system_prompt", "tools", "functions")
        return {"messages": turns, **{name: rest[name] for name in kept if name in rest}}
    history = next((name for name in TURN_LISTS if name in rest), None)
    if history:
        return {**rest, history: [*turns_of(rest[history], where, history, "user"), *turns]}
    if pair := pair_of(rest, sides=1):
        return {**rest, pair[1]: turns}
    return None

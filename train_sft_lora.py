"""Fine-tune a causal language model with LoRA, on the responses alone or on preferences: every token's mask checked.

    python train_sft_lora.py --train_file examples/sample_chats.jsonl --output_dir runs/first
    python train_sft_lora.py --model_name Qwen/Qwen3-4B --train_file chats.jsonl --load_in_4bit --eval_generate 100
    python train_sft_lora.py --train_file pairs.jsonl --pref_loss sigmoid --init_adapter runs/first/final

A data line: {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
With --pref_loss: {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
output_dir: final/ (adapter, tokenizer, stop tokens), checkpoints, logs, training_curves.png, predictions, a report.
Shapes: B sequences, T tokens, N supervised tokens, V vocabulary, P pairs; (P, 2) is chosen, rejected.
"""

import argparse
import contextlib
import copy
import http.client
import itertools
import json
import math
import os
import queue
import random
import re
import signal
import threading
import time
import unicodedata
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from statistics import fmean as mean

import merge
import utils
from utils import InputError, integer, named, one_of, real, say

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from datasets import Features, Value
from datasets import List as ListOf
from datasets.fingerprint import Hasher
from jinja2 import TemplateError
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, set_seed

LOGITS_AT_ONCE = 2**26  # positions x vocabulary: 256 MiB in float32
GENERATED_AT_ONCE = 32  # rows
HELD_OUT = 0.2  # of the rows, where no dev set is named
REQUESTS_AT_ONCE = 8  # to --endpoint
ANSWER_SECONDS = 8 * 600  # a server with one slot lets the others wait
PAUSES = (1, 2)  # seconds before the second and the third try
MAX_LEVELS = 64  # of objects in a tool or in arguments: pickle and templates fail in some hundreds
SHORT_ANSWER_TOKENS = 64  # --sanity_overfit asks for an exact match up to this length
PREFERENCE_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
WITHOUT_REFERENCE, PER_TOKEN = ("orpo", "simpo"), ("ipo", "orpo", "simpo")

# ---------------------------------------------------------------- arguments


def parse_args(argv=None):
    """Parse and check the command line; exits 2 with one sentence on what is wrong."""
    parser = argparse.ArgumentParser(
        "train_sft_lora.py", usage="%(prog)s --train_file FILE [flags, see --help]", description=__doc__,
        allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter,
    )
    base = "Qwen/Qwen3-0.6B"
    utils.add_input_flags(parser, base, dev_size="0.2")
    utils.add_training_flags(parser, batch=2, step=16, epochs=1, checkpointing=True, metric="loss")
    add = parser.add_argument_group("SFT").add_argument
    add("--max_length", "--max_seq_length", "--max_sequence_length", type=integer(8), default=2048, metavar="N",
        help="tokens of a row [2048]")
    add("--overlong", default="drop", **one_of("drop", "truncate_prompt", "error"),
        help="rows above --max_length; a response is never cut [drop]")
    add("--train_turns", default="all", **one_of("all", "last"), help="assistant turns to learn from [all]")
    add("--enable_thinking", default="auto", **one_of("auto", "true", "false"),
        help="what the template is told [auto: true if a training row has reasoning]")
    add("--system_prompt", metavar="TEXT", help="system turn of the rows that have none")
    add("--chat_template", metavar="FILE", help="Jinja template in place of the tokenizer's")
    add("--drop_regex", metavar="REGEX", help="drop rows in which a text matches")
    add("--eval_generate", type=integer(0), default=0, metavar="N", help="rows of each dev set to generate on [0]")
    add("--max_new_tokens", type=integer(1), default=256, metavar="N", help="longest generated answer, in tokens [256]")
    add("--sanity_overfit", type=integer(1), metavar="N", help="learn N rows by heart in 200 steps, or exit 1")
    add("--eval_only", action="store_true", help="measure the dev sets on --model_name (base, adapter, merged folder)")
    add("--endpoint", metavar="URL", help="with --eval_only: ask this OpenAI-compatible server instead")
    add("--endpoint_model", default="default", metavar="NAME", help="the model's name there [default]")
    add = parser.add_argument_group("preferences").add_argument
    add("--pref_loss", **one_of(*PREFERENCE_LOSSES),
        help="learn which answer is better, from chosen/rejected rows [off]")
    add("--pref_beta", type=real(0, without={0}), metavar="X", help="strength of the preference loss [0.1]")
    add("--pref_ftx", type=real(0, 10), metavar="X", help="weight of an SFT loss on the chosen answers beside it [0]")
    add("--dpo_label_smoothing", type=real(0, 0.5), metavar="X", help="share of wrong labels, for sigmoid [0]")
    add("--simpo_gamma", type=real(0, without={0}), metavar="X", help="margin that simpo asks for [0.5]")
    args = parser.parse_args(argv)
    has_data = args.dev_file or args.train_file or args.dataset_name
    for wrong, sentence in (
        (args.sanity_overfit and args.eval_only, "--sanity_overfit trains and --eval_only does not: pass one"),
        (args.sanity_overfit and args.eval_strategy == "no", "--sanity_overfit must measure: drop --eval_strategy no"),
        (args.endpoint and not args.endpoint.startswith(("http://", "https://")),
         f"--endpoint {args.endpoint} is no address of a server: write it as http://localhost:8080"),
        (args.endpoint and not args.eval_only, "--endpoint is evaluated, not trained: add --eval_only"),
        (args.sanity_overfit and (args.dev_file or args.save_best or args.early_stopping_patience),
         "--sanity_overfit measures the rows it trains on: drop --dev_file, --save_best, --early_stopping_patience"),
        (args.eval_only and not has_data, "--eval_only needs rows to evaluate on: pass --dev_file"),
        (not args.pref_loss and (args.pref_beta or args.pref_ftx), "--pref_beta and --pref_ftx need --pref_loss"),
        (args.dpo_label_smoothing and args.pref_loss != "sigmoid", "--dpo_label_smoothing is for --pref_loss sigmoid"),
        (args.simpo_gamma is not None and args.pref_loss != "simpo", "--simpo_gamma is for --pref_loss simpo"),
        (args.pref_loss and (args.sanity_overfit or args.endpoint),
         "--pref_loss compares log-probabilities: drop --sanity_overfit and --endpoint"),
        (args.pref_loss and args.train_turns == "last", "--train_turns: of a pair only the last answer is learnt from"),
        (args.pref_loss and (args.lora_dropout or args.model_dropout),
         "--pref_loss compares a model with what it was: drop --lora_dropout and --model_dropout"),
    ):
        if wrong:
            parser.error(sentence)
    try:
        re.compile(args.drop_regex or "")
    except re.error as error:
        parser.error(f"--drop_regex {args.drop_regex}: {error}")
    if args.eval_only and args.model_name and (Path(args.model_name) / "adapter_config.json").is_file():
        args.init_adapter, args.model_name = args.model_name, None
    args.pref_beta, args.pref_ftx = args.pref_beta or 0.1, args.pref_ftx or 0.0
    args.dpo_label_smoothing = args.dpo_label_smoothing or 0.0
    args.simpo_gamma = 0.5 if args.simpo_gamma is None else args.simpo_gamma
    args.lora_dropout = 0.0 if args.pref_loss else args.lora_dropout
    if args.sanity_overfit:  # the model's own rows are its dev set
        args.eval_generate, args.save_best, args.lora_dropout = args.sanity_overfit, 0, 0.0
        args.max_steps = args.max_steps or 200
    return utils.finish_flags(parser, args, base, step=16)


# ---------------------------------------------------------------- data

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}
ROLES |= {"developer": "system"} | {role: role for role in ("user", "assistant", "system", "tool")}
CALLS = ("function_call", "tool_call")  # roles whose content is a call: {"name": ..., "arguments": ...}
ROLES |= dict.fromkeys(CALLS, "assistant")
ROLES |= dict.fromkeys(("function", "function_response", "tool_response"), "tool")
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
         ("instruction", "output"), ("instruction", "response"), ("input", "output"))
EXCHANGES = (("input", "output"), ("human", "assistant"), ("user", "assistant"))  # in a list: xtuner's, MOSS'
TURN_LISTS = ("messages", "conversations", "conversation")
LISTS = (*TURN_LISTS, "tools", "functions", "history")  # may be written as JSON in a text
MEDIA = ("images", "videos", "audios", "image", "video", "audio", "image_url", "input_audio")
KNOWN = "messages, conversations, " + ", ".join("/".join(pair) for pair in PAIRS)
TAG_RESIDUE = re.compile(
    r"<\|[^|<>]*\|>|</?[A-Za-z][\w:-]*/?>|\[/?INST\]|^\s*(###|Human:|User:|Assistant:)|&(amp|lt|gt);")
THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
NO_CALL = 'rows with a function call that is no JSON {"name", "arguments"}'
TOO_LONG = "answers that do not fit into --max_length with their prompt"


class Drop(Exception):
    """A row cannot be learnt from; the message is the reason that is counted."""


class UnknownRole(InputError):
    """A turn's role is none of ROLES. Such rows are dropped, unless more than half of them are."""

    def __init__(self, where, role):
        super().__init__(f"{where}: unknown role {role}. Known roles: {', '.join(ROLES)}.")
        self.drop = f"rows with the unknown role {role}"


@dataclass
class Example:
    """One row: where it stands, its messages in the form that chat templates take, its tools.

    Of a pair the messages end in the chosen answer, and `rejected` is the other.
    """

    where: str
    messages: list
    tools: list | None = None
    rejected: dict | None = None

    @property
    def prefixes(self):
        """Hashes of messages[:0], messages[:1], ...: rows that share one say the same up to there."""
        hashes = [0]
        for message in self.messages:
            calls = json.dumps(message.get("tool_calls"), ensure_ascii=False, sort_keys=True)
            hashes.append(utils.text_id(f"{hashes[-1]} {message['role']} {message['content']} {calls}"))
        return hashes

    @property
    def answers(self):
        """Indices of the assistant turns that a question precedes; a greeting answers nothing."""
        roles = [message["role"] for message in self.messages]
        asked = next(i for i, role in enumerate(roles) if role in ("user", "tool"))
        return [i for i, role in enumerate(roles) if role == "assistant" and i > asked]

    @property
    def opening(self):
        """Hash of all that comes before the first answer: another row that shares it may hold the same answer."""
        return self.prefixes[self.answers[0]]

    @property
    def last(self):
        """Index of the last assistant turn."""
        return max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")

    @property
    def answer(self):
        """The text of the last answer, without its thinking."""
        return answer_of(self.messages[self.last]["content"])


def answer_of(text):
    """Return what follows the thinking in a generated or written answer."""
    return text.rpartition("</think>")[2].strip()


def is_filled(value):
    """Tell whether a cell holds anything: tables write nothing as null, "", [] or [null]."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "null")
    if isinstance(value, list):
        return any(map(is_filled, value))
    return bool(value)


def is_list_of_objects(value):
    """Tell whether a cell is a list of JSON objects, or a text that begins as one."""
    if isinstance(value, str):
        return bool(re.match(r"\s*\[\s*\{", value))
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def cleaned(where, row):
    """Return the cells of a row: "" for null, no empty lists, lists written in a text parsed.

    Raises InputError for images and the like, and for a list that is no JSON.
    """
    if media := [name for name in MEDIA if is_filled(row.get(name))]:
        raise InputError(f'{where}: "{media[0]}" is not empty, and only text can be trained on here. '
                         "Leave such rows out; if their text says all, delete the field.")
    cells = {}
    for name, value in row.items():
        if name in ("conversation", "functions") and not is_list_of_objects(value):
            continue  # a word that other data uses otherwise
        if name in LISTS and isinstance(value, str) and is_filled(value):
            value = utils.parse_json(value, f"{where}, {name}")
        if name not in LISTS or is_filled(value):
            cells[name] = "" if value is None else value
    return cells


def kind_of(turn):
    """Return the role of a turn as it is written, OpenAI's or ShareGPT's, in lower case."""
    role = turn.get("role") or turn.get("from")
    return role.strip().lower() if isinstance(role, str) else None


def turns_of(value, where, name, role):
    """Return a list of messages from one of messages or exchanges, or from a text: a turn of `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise InputError(f"{where}: {name} is the {type(value).__name__} {str(value)[:60]}, not a text or a list of "
                         'messages. Write [{"role": "user", "content": "..."}, ...].')
    if any("role" in turn or "from" in turn for turn in value):
        return value
    for pair in EXCHANGES:
        if all(pair[0] in exchange or pair[1] in exchange for exchange in value):
            return [turn for exchange in value for turn in exchange_turns(exchange, *pair)]
    return value


def exchange_turns(exchange, question, answer):
    """Return the turns of one exchange, {"input", "output"} say, whose keys are `question` and `answer`."""
    learnt = exchange.get("output_with_loss", True)  # xtuner's
    found = [("system", exchange.get("system") or None), ("user", exchange.get(question)),
             ("assistant", exchange.get(answer))]
    return [{"role": role, "content": text, "train": learnt} for role, text in found if text is not None]


def text_of(content, where, kind):
    """Return the text of a turn, which may come in parts; raises InputError for what is no text."""
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return "".join(text_of_part(part, where, kind) for part in content)
    if not isinstance(content, str):
        raise InputError(f"{where}: the content of a {kind} turn is a {type(content).__name__}, not a text. Write "
                         "JSON answers as text, with json.dumps; images cannot be trained on here.")
    return content.encode(errors="replace").decode()


def text_of_part(part, where, kind):
    """Return the text of {"type": "text", "text" or "value": ...}; raises InputError for images and the like."""
    part_type = part.get("type", "text")
    has_media = any(is_filled(part.get(name)) for name in MEDIA)
    if part_type not in ("text", "input_text", "output_text") or has_media:
        raise InputError(f"{where}: a {kind} turn holds a part of type {part_type}. Write it as text, or "
                         "leave the row out; images cannot be trained on here.")
    written = [part[name] for name in ("text", "value") if part.get(name) not in (None, "")]
    return text_of(written[0] if written else "", where, kind)


def weight_of(turn, where):
    """Return 0 for a turn that is context alone, 1 for one to learn from; raises InputError for others."""
    if turn.get("train_detail") or turn.get("training_detail"):
        raise InputError(f"{where}: a turn is learnt from in part (train_detail). Give the whole turn a "
                         "weight of 0 or 1.")
    weights = [1]
    for name in ("weight", "loss_weight", "train", "training"):
        value = turn.get(name)
        if value is not None and value not in (0, 1, "0", "1"):  # false and true are 0 and 1
            written = json.dumps(value, default=str)[:60]
            raise InputError(f"{where}: the {name} of a turn is {written}. Write 1 to learn "
                             "from the turn, 0 for context alone.")
        weights.append(1 if value is None else int(value))
    return min(weights)


def calls_of(value):
    """Return OpenAI's tool calls of {"name", "arguments"}, of a list of such, or of JSON; None if it is neither."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    calls = []
    for call in value if isinstance(value, list) else [value]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            return None
        arguments = inner.get("arguments", inner.get("parameters", {}))
        calls.append({"type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return calls or None


def listed_calls(value):
    """Return the tool_calls of a turn as a list, from one call or JSON too; raises Drop for what is none."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and calls_of(call) for call in calls):
        raise Drop(NO_CALL)
    return calls


def with_calls(turn):
    """Return a turn whose text, or OpenAI's old "function_call", is a call with it as tool_calls; raises Drop."""
    kind, text = kind_of(turn), turn.get("content") or turn.get("value")
    moved = {"role": "assistant", "content": "", "value": ""}
    if ROLES.get(kind) == "assistant" and turn.get("function_call"):
        calls, moved = calls_of(turn["function_call"]), {}
    elif kind in CALLS and not turn.get("tool_calls"):
        calls = calls_of(text)
    elif kind == "function" and '"arguments"' in str(text) and calls_of(text):  # else it is a result
        calls = calls_of(text)
    else:
        return turn
    if not calls:
        raise Drop(NO_CALL)
    return {**turn, **moved, "tool_calls": calls}


def read_message(turn, where):
    """Return one turn, OpenAI's or ShareGPT's, as {"role", "content", ...}; raises InputError for what is neither."""
    kind = kind_of(turn)
    if kind not in ROLES:
        role = json.dumps(turn.get("role") or turn.get("from"), ensure_ascii=False, default=str)
        raise UnknownRole(where, role[:60])
    if media := [name for name in MEDIA if is_filled(turn.get(name))]:
        raise InputError(f'{where}: a {kind} turn has "{media[0]}", and only text can be trained on here. '
                         "Leave such rows out.")
    written = [turn[name] for name in ("content", "value", "text") if turn.get(name) not in (None, "")]
    content = text_of(written[0] if written else "", where, kind)
    reasoning = next((turn[name] for name in ("reasoning_content", "reasoning", "thinking") if turn.get(name)), "")
    reasoning = text_of(reasoning, where, kind)
    message = {"role": ROLES[kind], "content": content}
    message |= {name: turn[name] for name in ("name", "tool_call_id") if turn.get(name) is not None}
    if is_filled(turn.get("tool_calls")):  # a template may take an empty list for a call
        message["tool_calls"] = listed_calls(turn["tool_calls"])
    if reasoning:
        message |= {"reasoning_content": reasoning, "thinking": reasoning}  # the second is gpt-oss's name
    if message["role"] == "assistant" and not weight_of(turn, where):
        message["weight"] = 0
    return message


def read_turns(turns, where):
    """Return the messages of turns; raises as read_message and with_calls do.

    A call joins the answer right before it, as in one message of OpenAI's. It gets an id of nine
    characters, which Mistral's templates ask for, and so does the result behind it.
    """
    messages, waiting = [], []
    ids = (f"call{i:05}" for i in itertools.count(1))
    for turn in turns:
        called = with_calls(turn)
        message = read_message(called, where)
        before = messages[-1] if messages else {"role": None}
        joins = before["role"] == "assistant" and before.get("weight") == message.get("weight")
        if called is not turn:
            message["tool_calls"] = [{"id": next(ids), **call} for call in message["tool_calls"]]
            waiting += [call["id"] for call in message["tool_calls"]]
        elif message["role"] == "tool" and waiting:
            message.setdefault("tool_call_id", waiting.pop(0))
        if called is not turn and joins and not message["content"]:
            before["tool_calls"] = [*before.get("tool_calls", []), *message["tool_calls"]]
        else:
            messages.append(message)
    return messages


def alpaca_prompt(row, where):
    """Return alpaca's instruction and input, or dolly's and its context, as one text; one of them may be empty."""
    extra = next((row[name] for name in ("input", "context") if row.get(name) not in (None, "")), "")
    for text in (row["instruction"], extra):
        if not isinstance(text, str):
            raise InputError(f"{where}: the {type(text).__name__} {str(text)[:60]} is not a text. Write "
                             "instruction and input as texts.")
    return "\n\n".join(text for text in (row["instruction"], extra) if text.strip())


def prompt_turns(where, row, name):
    """Return the turns before the answer of a row whose prompt is called `name`, LLaMA-Factory's history included."""
    if name == "instruction" and isinstance(row[name], str):
        turns = [{"role": "user", "content": alpaca_prompt(row, where)}]
    else:
        turns = turns_of(row[name], where, name, "user")
    history = row.get("history", [])  # [[user, assistant], ...]
    if not isinstance(history, list) or not all(isinstance(past, list) and len(past) == 2 for past in history):
        raise InputError(f"{where}: history is no list of [question, answer] pairs.")
    past = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in history]
    return [*itertools.chain(*past), *turns]


def pair_of(row, sides=2):
    """Return the names of a row's prompt and answer, preferably of cells that hold something; None without any.

    With sides=1 only the prompt is looked for.
    """
    there = [pair for pair in PAIRS if all(name in row for name in pair[:sides])]
    filled = [pair for pair in there if all(row[name] not in ("", []) for name in pair[:sides])]
    return next(iter(filled + there), None)


def raw_turns(where, row, fields):
    """Return the turns of a cleaned row of any known format as they are written; raises Drop, InputError.

    fields: the names of all its cells, those of empty lists included.
    """
    name = next((name for name in TURN_LISTS if name in row), None)
    if name:
        return turns_of(row[name], where, name, "user")
    if pair := pair_of(row):
        return prompt_turns(where, row, pair[0]) + turns_of(row[pair[1]], where, pair[1], "assistant")
    if "messages" in fields or "conversations" in fields or not any(map(is_filled, row.values())):
        raise Drop("rows without a turn")
    if "text" in row:
        raise InputError(f'{where}: "text" alone does not say which part is the response. Write the row as '
                         '{"messages": [{"role": "user", ...}, {"role": "assistant", ...}]} or prompt/completion.')
    hint = " For chosen/rejected pass --pref_loss." if "chosen" in row else ""
    raise InputError(f"{where}: none of the known formats (fields: {', '.join(fields)}). Known: {KNOWN}.{hint}")


def tools_of(row):
    """Return the tool definitions of a cleaned row as a list, OpenAI's old "functions" too; None without any."""
    functions = [each for each in row.get("functions", []) if "name" in each]
    tools = row.get("tools") or [{"type": "function", "function": each} for each in functions]
    return (tools if isinstance(tools, list) else [tools]) or None


def read_example(where, row, system_prompt):
    """Turn a row of any known format into an Example; raises Drop, or InputError for an unknown format."""
    fields = list(row)
    row = cleaned(where, row)
    if row.get("label") is False or row.get("kto_tag") is False:
        raise Drop("rows whose label or kto_tag is false (KTO: answers to unlearn)")
    turns = raw_turns(where, row, fields)
    system = row.get("system") or row.get("system_prompt") or system_prompt
    if system and not (turns and ROLES.get(kind_of(turns[0])) == "system"):
        turns = [{"role": "system", "content": system}, *turns]
    messages = read_turns(turns, where)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nobody answers
    answers = [message for message in messages if message["role"] == "assistant"]
    if not messages:
        raise Drop("rows without an assistant turn")
    if any(not answer["content"].strip() and not answer.get("tool_calls") for answer in answers):
        raise Drop("rows with an empty response")
    if not any(message["role"] in ("user", "tool") and message["content"].strip() for message in messages[:-1]):
        raise Drop("rows with an empty prompt")
    if all(answer.get("weight") == 0 for answer in answers):
        raise Drop("rows whose answers all have weight 0")
    return Example(where, messages, tools_of(row))


def read_pair(where, row, system_prompt):
    """Turn a row with chosen and rejected answers into an Example; raises Drop, or InputError for an unknown format.

    Answers are texts, messages, or whole conversations whose common beginning is the prompt; the prompt is what an SFT
    row has before its answer.
    """
    sides = []
    own = ("chosen", "rejected", "label", "kto_tag")
    rest = cleaned(where, {key: value for key, value in row.items() if key not in own})
    history = next((key for key in TURN_LISTS if key in rest), None)
    pair = pair_of(rest, sides=1)
    for name in ("chosen", "rejected"):
        if not row.get(name):
            raise Drop(f"pairs without a {name} answer") if name in row else InputError(
                f'{where}: no "{name}" (fields: {", ".join(row)}). A pair is {{"prompt", "chosen", "rejected"}}.')
        value = row[name]
        if isinstance(value, str) and value.lstrip().startswith(("[{", '{"role"', '{"from"')):  # messages in a CSV cell
            value = utils.parse_json(value, f"{where}, {name}")
        turns = turns_of([value] if isinstance(value, dict) else value, where, name, "assistant")
        if not turns or ROLES.get(kind_of(turns[0])) != "assistant":
            known = {key: rest[key] for key in ("system", "system_prompt", "tools", "functions") if key in rest}
            side = {"messages": turns, **known}
        elif history:
            side = {**rest, history: [*turns_of(rest[history], where, history, "user"), *turns]}
        elif pair:
            side = {**rest, pair[1]: turns}
        else:
            raise InputError(f'{where}: no prompt beside "{name}" (fields: {", ".join(row)}). Write it as "prompt".')
        sides.append(read_example(where, side, system_prompt))
        roles = [message["role"] for message in sides[-1].messages]
        if roles[-2:] == ["assistant", "assistant"]:
            raise Drop("pairs whose prompt ends in an answer")
    example, other = sides
    if example.messages[:-1] != other.messages[:-1]:
        raise Drop("pairs that differ in more than the last answer")
    if example.messages == other.messages:
        raise Drop("pairs whose answers are equal")
    if 0 in (example.messages[-1].get("weight"), other.messages[-1].get("weight")):
        raise Drop("pairs with an answer of weight 0")
    example.rejected = other.messages[-1]
    return example


def is_deeper(value, levels):
    """Tell whether lists and objects stand in more than so many of one another."""
    if not isinstance(value, dict | list):
        return False
    items = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deeper(item, levels - 1) for item in items)


def texts_in(turn):
    """Return the texts of a turn: its content, its reasoning, the arguments of its calls."""
    arguments = [function.get("arguments") or "" for function in functions_of(turn)]
    calls = [each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in arguments]
    return [turn["content"], turn.get("reasoning_content", ""), *calls]


def read_examples(rows, args):
    """Turn [(where, row)] into Examples; counts, and says, what cannot be learnt from. Returns (examples, counts)."""
    examples, seen, drops, unknown = [], set(), defaultdict(list), []
    for where, row in rows:
        try:
            example = (read_pair if args.pref_loss else read_example)(where, row, args.system_prompt)
            texts = [*example.messages, *filter(None, [example.rejected])]
            if args.drop_regex and any(re.search(args.drop_regex, text) for turn in texts for text in texts_in(turn)):
                raise Drop("rows that match --drop_regex")
            if is_deeper([texts, example.tools], MAX_LEVELS):
                raise Drop(f"rows with tools or arguments in more than {MAX_LEVELS} levels")
            key = json.dumps([texts, example.tools], sort_keys=True)
            if key in seen:
                raise Drop("duplicate rows")
        except Drop as drop:
            drops[str(drop)].append(where)
            continue
        except UnknownRole as error:
            unknown.append(error)
            drops[error.drop].append(where)
            continue
        seen.add(key)
        examples.append(example)
    if 2 * len(unknown) > len(rows):
        raise unknown[0]
    return examples, utils.say_drops(drops)


def without_leaks(examples, dev_sets, dropped):
    """Leave out the rows that give dev rows away: one's whole prompt, or one's answer behind the same turns."""
    prompts, answers = set(), set()
    for dev in dev_sets.values():
        for example in dev:
            prefixes = example.prefixes
            prompts.update(prefixes[i] for i in example.answers)
            answers.update(prefixes[i + 1] for i in example.answers)

    def leak(example):
        prefixes = example.prefixes
        if prefixes[example.last] in prompts:
            return "training rows whose prompt is in a dev set"
        if not answers.isdisjoint(prefixes):
            return "training rows with an answer of a dev set behind the same turns"
        return None

    return utils.leave_out(examples, leak, dropped)


def read_data(args):
    """Read, check and split the data. Returns (training Examples, {name: dev Examples}, counts for the report)."""
    examples, dev_sets, dropped = utils.read_enough(args, partial(split_rows, args), HELD_OUT)
    if not examples and not (args.eval_only and dev_sets):
        if any("a dev set" in reason for reason in dropped):
            raise InputError("no row is left to train on: the dev sets took them. Pass a --dev_file of other rows.")
        raise InputError("no row is left to train on. Look at what was dropped, above.")
    sizes = {name or "dev": len(dev) for name, dev in dev_sets.items()}
    trained = [] if args.eval_only else [f"{len(examples)} rows to train on"]
    say(f"data      {'; '.join(trained + [f'{name}: {n} rows' for name, n in sizes.items()])}")
    return examples, dev_sets, {"train_rows": len(examples), "dropped": dropped, "dev": sizes}


def split_rows(args, rows, sources):
    """Turn training rows and dev sources into (training Examples, {name: dev Examples}, {reason: rows dropped})."""
    examples, dropped = read_examples(rows, args)
    random.Random(args.seed).shuffle(examples)
    dev_sets = {}
    for name, source in sources.items():
        dev_rows = utils.read_rows(source) if isinstance(source, str) else source
        dev = read_examples(dev_rows, args)[0]
        draw = random.Random(f"{args.seed} {name}")  # the same rows with --eval_only, which has none to train on
        dev_sets[name] = draw.sample(dev, min(args.dev_sample_limit or len(dev), len(dev)))
        if not dev_sets[name]:
            raise InputError(f"--dev_file {source if isinstance(source, str) else name} holds no row to evaluate on.")
    if args.sanity_overfit:
        found = [example for example in examples if not is_empty(parse_answer(example.answer))]
        examples = dev_sets[""] = (found or examples)[: args.sanity_overfit]
    elif not dev_sets:
        examples, dev_sets = utils.hold_out(examples, attrgetter("opening"), args, "prompt", HELD_OUT)
    if not args.sanity_overfit:
        examples = without_leaks(examples, dev_sets, dropped)[: args.train_sample_limit]
    return examples, dev_sets, dropped


# ---------------------------------------------------------------- chat template and masks

# for tokenizers without a chat template; BOS stands where the tokenizer itself would put one
PLAIN_TEMPLATE = """{{ BOS }}{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}

{% elif message.role == 'user' %}### User:
{{ message.content }}

{% elif message.role == 'assistant' %}### Assistant:
{{ message.content }}{{ eos_token }}

{% else %}{{ raise_exception('the plain template has no ' + message.role + ' turns') }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}### Assistant:
{% endif %}"""


QUESTION, ANSWER, FOLLOW_UP = "QUESTION-ONE", "ANSWER-ONE", "QUESTION-TWO"  # of trial conversations
THOUGHT = "THOUGHT-ONE"
FUNCTION = "trial_function"
TOOL = {"type": "function", "function": {
    "name": FUNCTION, "description": "A trial.",
    "parameters": {"type": "object", "required": ["place"],
                   "properties": {"place": {"type": "string", "description": "Where."}}}}}
LEFT_OUT = ("answers that are, or stand behind, a tool call or tool turn that the chat template "
            "leaves out")


def as_message(role, content, **more):
    """Return one turn in the form that chat templates take."""
    return {"role": role, "content": content, **more}


def trial_call(arguments, i=0):
    """Return the i-th tool call of a trial, with what the strictest templates (Mistral's) ask for."""
    call_id = f"call0000{i}"  # nine letters and digits
    function = {"name": FUNCTION, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def plain_template(tokenizer):
    """Return PLAIN_TEMPLATE with the BOS that this tokenizer would put; InputError without an EOS."""
    if not tokenizer.eos_token:
        raise InputError("the tokenizer has neither a chat template nor an EOS token, so that no "
                         "answer could end. Pass --chat_template, or choose another base.")
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    return PLAIN_TEMPLATE.replace("BOS", "bos_token" if adds_bos else "''")


def functions_of(message):
    """Return [{"name", "arguments"}] of a turn's tool calls."""
    return [call.get("function", call) for call in message.get("tool_calls", ())]


def called(message):
    """Return the names of the functions that a turn calls."""
    return [function.get("name", "") for function in functions_of(message)]


def quoted_arguments(messages):
    """Return the arguments of tool calls that are texts, as JSON strings."""
    arguments = [f.get("arguments") for message in messages for f in functions_of(message)]
    texts = [each for each in arguments if isinstance(each, str)]
    return [json.dumps(text, ensure_ascii=plain) for text in texts for plain in (False, True)]


def common_suffix(one, other):
    """Return the longest end that two texts share."""
    return os.path.commonprefix([one[::-1], other[::-1]])[::-1]


def overlap(one, other):
    """Return how many items at the end of one list are those at the beginning of the other."""
    sizes = range(min(len(one), len(other)), 0, -1)
    return next((n for n in sizes if one[-n:] == other[:n]), 0)


def is_whole(rendered, texts):
    """Tell whether every text is in what a template rendered, white space and the like aside."""
    at = 0
    for text in (text.strip() for text in texts):  # as they stand and in this order, nearly always
        at = rendered.find(text, at) + len(text)
        if at < len(text):
            break
    else:
        return True
    rendered = squeezed(rendered)
    return all(squeezed(text) in rendered for text in texts)


def cuts_of(tokenizer):
    """Return a pattern of the tokens before which a text may be cut, and its pieces tokenised apart; None without one.

    `tokenizers` looks for added tokens first, and treats what stands between them apart. No cut is made before one that
    takes its surroundings along, that may stand within another, or that is a letter behind a token of whole words.
    """
    added = tokenizer.added_tokens_decoder.values()
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return None
    within = {character for token in added for character in token.content[1:]}
    greedy = [token.content for token in added if token.lstrip or token.single_word or token.normalized]
    whole_words = any(token.single_word for token in added)  # a cut would end the word that a letter goes on with
    barred = re.compile(r"[^\x00-\x7f]|\w") if whole_words else re.compile("(?!)")
    cuts = [token.content for token in added
            if token.content[0] not in within and not barred.match(token.content)
            and not any(other.startswith(token.content) for other in greedy)]
    return re.compile("|".join(map(re.escape, cuts))) if cuts else None


# a template is a program, and runs on whatever a row holds
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError,
                   MemoryError, SyntaxError)
TRIAL_SECONDS, TRIAL_BYTES = 10, 2**30
REMEMBERED_TOKENS = 2**18  # of pieces of rendered text


@contextlib.contextmanager
def limited_trial():
    """Run trial conversations for at most TRIAL_SECONDS, and in TRIAL_BYTES more memory; raises InputError.

    Without an alarm (outside the main thread, on Windows) nothing is limited, and without /proc memory is not.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise InputError(f"the chat template takes more than {TRIAL_SECONDS} s for a conversation of three turns. Pass "
                         "another with --chat_template.")

    import resource  # not on Windows

    limits, size = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if size.exists():
        pages = int(size.read_text().split()[0])
        ceiling = pages * resource.getpagesize() + TRIAL_BYTES
        known = [limit for limit in limits if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([ceiling, *known]), limits[1]))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TRIAL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Chat:
    """How conversations become tokens: a tokenizer's chat template, and what trial conversations show about it.

    `stops` are the tokens that end an answer: the tokenizer's EOS, those of the base's generation_config, and the
    special token that follows an answer when the conversation goes on. `emits` is the one that the template itself
    writes; if that is None, `end` is appended. `tail` is all that it writes behind the last answer.
    """

    def __init__(self, tokenizer, thinking, base_stops):
        self.tokenizer, self.thinking = tokenizer, thinking
        if not tokenizer.chat_template:
            tokenizer.chat_template = plain_template(tokenizer)
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = {*added, *tokenizer.all_special_tokens} - {"<think>", "</think>"}
        self.special = sorted(special, key=len, reverse=True)
        self.special_pattern = re.compile("|".join(map(re.escape, self.special)) or "(?!)")
        self.cuts, self.pieces, self.remembered = cuts_of(tokenizer), {}, 0
        with limited_trial():
            self.try_out([stop for stop in base_stops if stop])

    def try_out(self, base_stops):
        """Learn from trial conversations what the template writes around a turn, or InputError."""
        user, answer = as_message("user", QUESTION), as_message("assistant", ANSWER)
        try:
            prompt = self.render([user], True)  # what inference sees
            alone = self.render([user, answer], False)
            longer = self.render([user, answer, as_message("user", FOLLOW_UP)], False)
            before, after = longer.split(ANSWER)
        except (Drop, ValueError) as error:
            raise InputError("the chat template cannot render a simple conversation: "
                             f"{utils.reason(error)}. Pass another with --chat_template.") from None
        if self.ids(longer) != self.tokenised(longer):
            self.cuts = None  # a tokenizer of its own kind
        shared = os.path.commonprefix([prompt, alone])
        opening, _, self.tail = alone[len(shared) :].partition(ANSWER)
        self.find_stops(opening, self.tail, before, after, base_stops)
        ended = self.ended(alone, ANSWER)
        self.emits = next((stop for stop in self.stops if ended.endswith(stop)), None)
        self.scaffold = prompt[len(shared) :]  # what only the prompt of an answer has ("<think>\n", say)
        self.own_system = self.find_own_system(before, after)
        system = self.rendered([as_message("system", "SYSTEM"), user], True)
        self.folds_system = system is None or "SYSTEM" not in system
        self.takes_objects = self.find_argument_form()
        defined = self.rendered([user], True, [TOOL])
        self.shows_tools = defined is None or FUNCTION in defined
        shapes = itertools.product((False, True), (0, 1, 2), (False, True))
        self.tool_use = {shape: self.shows(*shape) for shape in shapes}
        self.frame = find_frame(self)

    def find_stops(self, opening, tail, before, after, base_stops):
        """Set `stops`, the tokens that end an answer, and `end`, to append where none is written."""
        eos = self.tokenizer.eos_token
        known = [eos, *base_stops] if eos else base_stops
        after = after.lstrip()
        following = next((token for token in self.special if after.startswith(token)), None)
        ends_otherwise = any(stop in tail for stop in known)
        if following and following not in tail and ends_otherwise:
            following = None  # gpt-oss: <|end|> closes a channel, <|return|> the answer
        if following and following in opening:
            following = None  # Kimi K3: <|close|> closes the thinking, too
        self.stops = list(dict.fromkeys([*known, following] if following else known))
        if not self.stops:
            raise InputError("neither the tokenizer nor the template has a token that ends an answer. Choose a base "
                             "with an EOS token, or pass --chat_template.")
        self.stop_ids = self.tokenizer.convert_tokens_to_ids(self.stops)
        # a token that also opens a user turn (GLM's <|user|>) closes an answer only where the base says so
        opens_a_turn = following and following in before
        closes = following and (following in base_stops or not opens_a_turn)
        self.end = following if closes else self.stops[0]

    def find_own_system(self, before, after):
        """Return the system text that the template adds by itself (Qwen2.5's "You are Qwen."), or None."""
        head = self.without_special(before.split(QUESTION)[0])  # what stands before the first question
        between = self.without_special(after.split(FOLLOW_UP)[0])  # and before any later one
        own = head.removesuffix(common_suffix(between, head)).strip()
        return own if re.search(r"\w", own) else None

    def find_argument_form(self):
        """Tell whether tool calls are to bring their arguments as an object, else as JSON text."""
        arguments, rendered = {"place": "HERE"}, []
        for form in (arguments, json.dumps(arguments)):
            call = as_message("assistant", "", tool_calls=[trial_call(form)])
            rendered.append(self.rendered([as_message("user", QUESTION), call], False))
        as_object, as_text = rendered
        if as_object is None or as_text is None:
            return as_object is not None
        return str(arguments) not in as_object  # Python's quotes make no JSON

    def shows(self, text, calls, tools):
        """Return whether the template renders the calls of an assistant turn, and tool turns behind it.

        It may depend on whether the turn has text, on whether it has one call or several, and on whether the row has
        tools. What the template refuses counts as rendered: where it refuses a row too, its own words say why.
        """
        places = [f"PLACE-{i}" for i in range(calls)]
        turn = as_message("assistant", ANSWER if text else "")
        if calls:
            forms = (trial_call({"place": place}, i) for i, place in enumerate(places))
            turn["tool_calls"] = [self.readable(call) for call in forms]
        results = [as_message("tool", f"RESULT-{i}", name=FUNCTION, tool_call_id=trial_call({}, i)["id"])
                   for i in range(max(calls, 1))]
        trial, tools = [as_message("user", QUESTION), turn], [TOOL] if tools else None
        called = self.rendered(trial, False, tools)
        answered = self.rendered([*trial, *results], True, tools)
        return (called is None or is_whole(called, places),
                answered is None or is_whole(answered, [result["content"] for result in results]))

    def leaves_out(self, messages, tools):
        """Tell whether the template leaves out a tool call or tool turn of these messages."""
        shows_results = self.tool_use[True, 0, bool(tools)][1]
        for message in messages:
            if message["role"] == "assistant":
                calls = min(len(message.get("tool_calls", ())), 2)
                shape = bool(message["content"].strip()), calls, bool(tools)
                shows_calls, shows_results = self.tool_use[shape]
                if not shows_calls:
                    return True
            elif message["role"] == "tool" and not shows_results:
                return True
        return False

    def without_special(self, text):
        """Return text without its special tokens."""
        return self.special_pattern.sub("", text)

    def rendered(self, messages, prompt, tools=None):
        """Return what render() gives, or None where the template refuses the messages."""
        try:
            return self.render(messages, prompt, tools)
        except Drop:
            return None

    def render(self, messages, prompt, tools=None):
        """Render messages, and with `prompt` the header of the answer to come; raises Drop where that fails."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                                      add_generation_prompt=prompt, enable_thinking=self.thinking)
        except TEMPLATE_ERRORS as error:
            why = utils.reason(error) or type(error).__name__
            raise Drop(f"rows that the chat template refuses ({why})") from None

    def tokenised(self, text):
        """Tokenise rendered text, which brings its special tokens along; of several texts a list for each."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def ids(self, text):
        """Return tokenised(text), put together from what stands between special tokens, each piece tokenised once.

        So the turns of a conversation, each of which begins with all before it, cost little more than the last alone.
        """
        if self.cuts is None:
            return self.tokenised(text)
        starts = [0, *(match.start() for match in self.cuts.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(starts) if end > start]
        if self.remembered > REMEMBERED_TOKENS:
            self.pieces.clear()
            self.remembered = 0
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self.pieces]
        for piece, ids in zip(new, self.tokenised(new) if new else (), strict=True):
            self.pieces[piece] = ids
            self.remembered += len(ids)
        return list(itertools.chain.from_iterable(self.pieces[piece] for piece in pieces))

    def ended(self, text, answer):
        """Return text, rendered messages, up to the first stop token behind the last `answer` in it."""
        words = text.removesuffix(self.tail)  # an answer "a" is in the "assistant" that may follow, too
        words = self.special_pattern.sub(lambda token: "\0" * len(token[0]), words)  # and "d" in <|end|>
        start = max(words.rfind(answer.strip()), 0) + len(answer.strip())
        ends = [text.find(stop, start) + len(stop) for stop in self.stops if stop in text[start:]]
        return text[: min(ends)] if ends else text.rstrip()

    def prepare(self, messages):
        """Return the messages as this template takes them; raises Drop for special tokens inside a text."""
        for message in messages:
            found = self.special_pattern.search(message["content"])
            if found:
                raise Drop(f"rows whose text holds the special token {found[0]}")
        if not self.thinking:
            messages = [{**{k: v for k, v in m.items() if k not in ("reasoning_content", "thinking")},
                         "content": THINKING.sub("", m["content"]) if m["role"] == "assistant" else m["content"]}
                        for m in messages]
            if any(m["role"] == "assistant" and not m["content"].strip() and not m.get("tool_calls") for m in messages):
                raise Drop("rows with a response of thinking alone, which --enable_thinking false leaves out")
        messages = [{**m, "tool_calls": [self.readable(call) for call in m["tool_calls"]]} if "tool_calls" in m else m
                    for m in messages]
        if self.folds_system and messages[0]["role"] == "system":
            system, *messages = messages
            i = next(i for i, message in enumerate(messages) if message["role"] != "assistant")
            text = f"{system['content']}\n\n{messages[i]['content']}"
            messages = [*messages[:i], {**messages[i], "content": text}, *messages[i + 1 :]]
        return messages

    def readable(self, call):
        """Return a tool call with its arguments as an object, or as JSON where the template refuses objects."""
        inner = call.get("function", call)
        arguments = inner.get("arguments") or {}
        if self.takes_objects and isinstance(arguments, str):  # OpenAI's form; a template would quote it once more
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        elif not self.takes_objects and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        inner = {**inner, "arguments": arguments}
        return {**call, "function": inner} if "function" in call else inner

    def turn(self, messages, i, tools=None):
        """Return (prompt ids, answer ids) of the assistant turn messages[i]: what inference sees, and has to say.

        The answer ends in its stop token. Raises Drop where the template refuses the turn or does not render it whole.
        """
        before, answer = messages[:i], messages[i]
        if not any(turn["role"] in ("user", "tool") for turn in before):
            raise Drop("answers that no question precedes")
        if self.leaves_out(messages[: i + 1], tools):
            raise Drop(LEFT_OUT)
        prompt = self.render(before, True, tools)
        full = self.render([*before, answer], False, tools)
        asked = [turn["content"] for turn in before if turn["role"] in ("user", "system")]
        if not is_whole(prompt, asked):
            raise Drop("rows with a turn that the template leaves out or changes")
        if any(text in full for text in quoted_arguments(messages[: i + 1])):
            raise Drop("rows with a tool call whose arguments are a text, which the template quotes: "
                       "write them as a JSON object")
        prompt_ids = self.ids(prompt)
        if full.startswith(prompt):
            answer_ids = self.answer_behind(prompt, prompt_ids, full[len(prompt) :], answer)
        else:
            answer_ids = self.answer_elsewhere(prompt, prompt_ids, full, answer, before, tools)
        said = [answer["content"], answer.get("reasoning_content", ""), *called(answer)]
        if not is_whole(self.tokenizer.decode(answer_ids), said):
            raise Drop("rows with an answer or reasoning that the template does not render whole "
                       "(--enable_thinking false leaves reasoning out)")
        return prompt_ids, answer_ids

    def with_stop(self, text, answer):
        """Return text up to the stop token of the answer that it renders; one is appended if there is none."""
        said = [part for part in (answer["content"], *called(answer)[-1:]) if part.strip()]
        # no further than the first stop behind any of them: there inference ends, and what is left out is found missing
        text = min((self.ended(text, part) for part in said or [""]), key=len)
        return text if text.endswith(tuple(self.stops)) else text + self.end

    def answer_behind(self, prompt, prompt_ids, rest, answer):
        """Return the answer's ids where the template goes on from the prompt with the text `rest`."""
        text = self.with_stop(rest, answer)
        ids = self.ids(prompt + text)
        if ids[: len(prompt_ids)] == prompt_ids:
            return ids[len(prompt_ids) :]
        return self.ids(text)  # tokens would merge across the border, which they cannot at inference

    def answer_elsewhere(self, prompt, prompt_ids, full, answer, before, tools):
        """Return the answer's ids where the template renders the end of the prompt differently before an answer.

        With a snowman in the answer's place the render shows where answers begin.
        """
        last = before[-1]["content"].strip()
        snowman = self.render([*before, as_message("assistant", "\u2603")], False, tools)
        ids = self.ids(self.with_stop(full, answer))
        shared = os.path.commonprefix([prompt_ids, ids, self.ids(snowman)])
        if is_whole(self.tokenizer.decode(shared), [last]):
            # only the prompt ends in a scaffold, as DeepSeek's "<think>\n"; the answer may repeat its end
            scaffold, answer_ids = prompt_ids[len(shared) :], ids[len(shared) :]
            return answer_ids[overlap(scaffold, answer_ids) :]
        # only a last user turn holds the system text, as Mistral-Nemo's: the answer follows the same end of that turn
        head = os.path.commonprefix([full, snowman])
        end = prompt[prompt.rfind(last) :]
        at = head.rfind(end)
        if not last or last not in prompt or at < 0 or head[at + len(end) :].strip():
            raise Drop("rows whose prompt the template renders differently once the answer is there")
        return self.answer_behind(prompt, prompt_ids, full[at + len(end) :], answer)

    def shortened(self, messages, i, tools, max_length):
        """Return messages whose turn i fits, the longest user text cut from the middle; raises Drop if it cannot."""
        while (excess := sum(map(len, self.turn(messages, i, tools))) - max_length) > 0:
            j = max((j for j in range(i) if messages[j]["role"] in ("user", "tool")),
                    key=lambda j: len(messages[j]["content"]))
            text = messages[j]["content"]
            keep = int(len(text) * (1 - (excess + 4) / max(1, len(self.ids(text))))) // 2
            keep = min(keep, len(text) // 2 - 4)  # shorter each time, the dots included
            if keep < 8:
                raise Drop("rows too long for --max_length even with the prompt shortened")
            short = {**messages[j], "content": f"{text[:keep]} ... {text[-keep:]}"}
            messages = [*messages[:j], short, *messages[j + 1 :]]
        return messages

    def samples(self, messages, tools, args):
        """Return ([(ids, [(start, end) of each supervised span])], [why a turn was dropped], prompts shortened).

        Turns whose sequence goes on where the one before stopped share a sample; else each turn is a sample of its own,
        for then a trained sequence is what inference would have seen.
        """
        samples, drops, shortened = [], [], 0
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1) != 0]
        if args.train_turns == "last":
            turns = turns[-1:]
        if len(turns) > 1:  # most pieces of all turns in one call of the tokenizer
            self.ids(self.rendered(messages, False, tools) or "")
        for i in turns:
            try:
                prompt, answer = self.turn(messages, i, tools)
                if len(prompt) + len(answer) > args.max_length:
                    if args.overlong != "truncate_prompt":
                        raise Drop(TOO_LONG)
                    prompt, answer = self.turn(self.shortened(messages, i, tools, args.max_length), i, tools)
                    shortened += 1
            except Drop as drop:
                drops.append(str(drop))
                continue
            ids, spans = prompt + answer, []
            if samples and ids[: len(samples[-1][0])] == samples[-1][0]:
                spans = samples.pop()[1]
            samples.append((ids, [*spans, (len(prompt), len(ids))]))
        return samples, drops, shortened

    def pair(self, messages, rejected, tools, args):
        """Return (the samples of the chosen and of the rejected answer, [], prompts shortened); raises Drop."""
        i, shortened = len(messages) - 1, 0
        sides = [messages, [*messages[:-1], rejected]]
        turns = [self.turn(side, i, tools) for side in sides]
        sizes = [len(prompt) + len(answer) for prompt, answer in turns]
        if max(sizes) > args.max_length:
            if args.overlong != "truncate_prompt":
                raise Drop(TOO_LONG)
            before = self.shortened(sides[sizes.index(max(sizes))], i, tools, args.max_length)[:-1]
            turns, shortened = [self.turn([*before, side[-1]], i, tools) for side in sides], 1
        (prompt, chosen), (other, worse) = turns
        if prompt != other or chosen == worse:
            raise Drop("pairs that the template renders with equal answers or different prompts")
        return [(prompt + answer, [(len(prompt), len(prompt + answer))]) for answer in (chosen, worse)], [], shortened


@dataclass
class Frame:
    """What a template writes around an answer: one of `marks`, or `prefix` at the very start, and behind it `end`."""

    marks: list
    prefix: str
    end: str


def trial_answers(chat):
    """Yield (ids, (text before it, ANSWER, text behind it)) of answers with and without reasoning.

    The ids are what a model has to generate, without the stop token; forms that the template refuses are left out.
    """
    plain = as_message("assistant", ANSWER)
    reasoned = as_message("assistant", ANSWER, reasoning_content=THOUGHT, thinking=THOUGHT)
    inline = as_message("assistant", f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}")
    for answer in (plain, reasoned, inline):
        with contextlib.suppress(Drop):
            _, ids = chat.turn([as_message("user", QUESTION), answer], 1)
            ids = ids[: next((t for t, token in enumerate(ids) if token in chat.stop_ids), None)]
            text = chat.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            if ANSWER in text:  # else the tokenizer changes texts, as those do that make them lower case
                yield ids, text.partition(ANSWER)


def find_frame(chat):
    """Return the Frame around the answers of a template; None where decoding without special tokens takes it away."""
    trials = list(trial_answers(chat))
    if all(answer_of(decode_answer(chat.tokenizer, ids, None)) == ANSWER for ids, _ in trials):
        return None
    marks, prefix = [], ""
    for _, (before, _, _) in trials:
        _, thought, mark = before.rpartition(THOUGHT)
        if thought or any(token in mark for token in chat.special):
            marks.append(mark.strip())
        else:  # plain words (functionary's "all\n"), which an answer may hold as well
            prefix = mark
    end = trials[0][1][2].strip()
    return Frame([mark for mark in dict.fromkeys(marks) if mark], prefix, end)


def decode_answer(tokenizer, ids, frame):
    """Decode generated ids, their stop token left out; of a template with a Frame what stands in it.

    That is what follows the last of its marks and precedes its end. Text without a mark is returned as it is.
    """
    text = tokenizer.decode(ids, skip_special_tokens=frame is None, clean_up_tokenization_spaces=False)
    if frame is None:
        return text
    starts = [text.rfind(mark) + len(mark) for mark in frame.marks if mark in text]
    text = text[max(starts) :] if starts else text.removeprefix(frame.prefix)
    return text.partition(frame.end)[0] if frame.end else text


def squeezed(text):
    """Return text without what templates and tokenizers change: white space and Unicode's compatibility forms."""
    return "".join(unicodedata.normalize("NFKC", text).split())


class TrainSet(list):
    """Samples {"input_ids" (T,), "supervised" (T,) bool}, or pairs {"sides": [chosen, rejected]} of samples.

    `epoch` is set by the training loop. `unrolled` is how many times the tokens of each row's longest sample there are.
    """

    epoch = 0
    unrolled = 1.0


def encode_row(chat, messages, tools, rejected, args):
    """Return what Chat.samples, or Chat.pair, returns of a row; ([], [the reason], 0) of one that is dropped."""
    try:
        if rejected:
            *messages, rejected = chat.prepare([*messages, rejected])
            return chat.pair(messages, rejected, tools, args)
        return chat.samples(chat.prepare(messages), tools, args)
    except Drop as drop:
        return [], [str(drop)], 0


def first_ids(examples, chat, args, count, tokenizer):
    """Return the token ids of the first `count` samples, as `chat` makes them with another tokenizer."""
    other, found = copy.copy(chat), []
    other.tokenizer = tokenizer
    for example in examples:
        if len(found) >= count:
            break
        samples = encode_row(other, example.messages, example.tools, example.rejected, args)[0]
        found += [ids for ids, _ in samples]
    return found[:count]


def tokenise(examples, chat, args):
    """Turn Examples into samples of token ids and masks. Returns (TrainSet, {reason: [where]}, prompts shortened)."""
    if not examples:  # --eval_only
        return TrainSet(), {}, 0
    kinds = {"row": Value("int64"), "input_ids": ListOf(Value("int32")), "supervised": ListOf(Value("bool")),
             "reason": Value("string"), "shortened": Value("int32")}

    def encode(batch):
        rows = []
        for row, text in zip(batch["row"], batch["example"], strict=True):
            samples, drops, shortened = encode_row(chat, *json.loads(text), args)
            for ids, spans in samples:
                supervised = [False] * len(ids)
                for start, end in spans:
                    supervised[start:end] = [True] * (end - start)
                rows.append((row, ids, supervised, "", shortened))
            rows += [(row, [], [], reason, 0) for reason in drops]
        return dict(zip(kinds, map(list, zip(*rows, strict=True)), strict=True)) if rows else {k: [] for k in kinds}

    texts = [json.dumps([e.messages, e.tools, e.rejected], ensure_ascii=False) for e in examples]
    tokenizer = chat.tokenizer
    key = [texts, utils.tokens_key(tokenizer, tokenise), tokenizer.chat_template, chat.thinking, chat.stops, chat.end,
           args.max_length, args.overlong, args.train_turns]
    columns = {"row": list(range(len(texts))), "example": texts}
    data = utils.cached_map(columns, encode, key, args.num_workers, Features(kinds))
    ids, offsets = utils.ragged(data, "input_ids")
    supervised, _ = utils.ragged(data, "supervised")
    samples, drops, longest = TrainSet(), defaultdict(list), Counter()
    for i, (row, reason) in enumerate(zip(data["row"], data["reason"], strict=True)):
        part = slice(offsets[i], offsets[i + 1])
        if reason:
            drops[reason].append(examples[row].where)
        else:
            samples.append({"input_ids": ids[part], "supervised": supervised[part]})
            longest[row] = max(longest[row], len(ids[part]))
    if samples and not args.pref_loss:
        samples.unrolled = sum(map(tokens_of, samples)) / longest.total()
    if args.overlong == "error" and TOO_LONG in drops:
        raise InputError(f"{drops[TOO_LONG][0]}: longer than --max_length {args.max_length}. Raise it, or drop "
                         "--overlong error.")
    if args.pref_loss:
        samples = TrainSet({"sides": list(sides)} for sides in zip(samples[::2], samples[1::2], strict=True))
    return samples, drops, sum(data["shortened"])


def collate(samples):
    """Make one step of samples."""
    return {"rows": len(samples), "sequences": [sample["input_ids"] for sample in samples],
            "supervised": [sample["supervised"] for sample in samples]}


def collate_pairs(shares, samples):
    """Make one step of pairs: each is one sequence, prompt + chosen + (prompt if not `shares`) + rejected.

    A shared prompt's last token is repeated before the rejected answer, whose first token it predicts.
    """
    step = {"rows": len(samples), "sequences": [], "prompts": [], "chosen": [], "reference": []}
    for sample in samples:
        (chosen, worse), prompt = (side["input_ids"] for side in sample["sides"]), first_answer(sample["sides"][0])
        step["sequences"].append([*chosen, *(worse[prompt - 1 :] if shares else worse)])
        step["prompts"].append(prompt)  # tokens
        step["chosen"].append(len(chosen))  # where the rejected answer's part begins
        step["reference"].append(sample.get("reference"))
    return step


def first_answer(sample):
    """Return the index of a sample's first supervised token."""
    return int(sample["supervised"].nonzero()[0][0])


def tokens_of(sample):
    """Return the number of tokens of a sample, or of both sides of a pair."""
    return sum(len(side["input_ids"]) for side in flat([sample]))


def longest_side(pair):
    """Return the tokens of the longer side of a pair."""
    return max(len(side["input_ids"]) for side in pair["sides"])


def flat(samples):
    """Return samples as they are, or the two sides of each pair."""
    return [side for sample in samples for side in sample.get("sides", [sample])]


@dataclass
class DevSet:
    """Samples for the loss, and rows to generate on: prompt ids (or None for an endpoint), Example."""

    samples: list
    generated: list


# ---------------------------------------------------------------- loss and metrics


def token_scores(logits, labels):
    """Return cross entropy (N,) in float32, and whether the label is the likeliest token (N,); logits (N, V)."""
    logits = logits.float()
    return F.cross_entropy(logits, labels, reduction="none"), logits.detach().argmax(1) == labels


def gains(args, logps, reference, lengths):
    """Return how much likelier answers have become (P, 2); times --pref_beta these are the rewards.

    logps, reference: summed log-probabilities (P, 2) of the answers, lengths: their tokens. ipo, orpo and simpo take
    means over tokens; orpo and simpo have no reference.
    """
    gained = logps if args.pref_loss in WITHOUT_REFERENCE else logps - reference
    return gained / lengths if args.pref_loss in PER_TOKEN else gained


def preference_losses(args, logps, reference, lengths, kl=(0.0, 0.0)):
    """Return each pair's loss (P,), from (P, 2) as in gains(); kl: mean gains of the step's answers, for kto_pair.

    sigmoid: Rafailov et al. 2023, eq. 7, smoothed as in Mitchell 2023; hinge: Zhao et al. 2023 (SLiC); ipo: Azar et al.
    2023, eq. 17, on means; kto_pair: Ethayarajh et al. 2024, eq. 8; orpo: Hong et al. 2024, eq. 6 and 7; simpo: Meng et
    al. 2024, eq. 6.
    """
    beta, smoothing, gained = args.pref_beta, args.dpo_label_smoothing, gains(args, logps, reference, lengths)
    chosen, rejected = gained.unbind(1)
    margin, fine_tuning = chosen - rejected, -logps[:, 0] / lengths[:, 0]
    if args.pref_loss == "sigmoid":
        losses = -(1 - smoothing) * F.logsigmoid(beta * margin) - smoothing * F.logsigmoid(-beta * margin)
    elif args.pref_loss == "hinge":
        losses = F.relu(1 - beta * margin)
    elif args.pref_loss == "ipo":
        losses = (margin - 1 / (2 * beta)).square()
    elif args.pref_loss == "kto_pair":
        losses = 1 - (torch.sigmoid(beta * (chosen - kl[1])) + torch.sigmoid(beta * (kl[0] - rejected))) / 2
    elif args.pref_loss == "orpo":
        odds = gained - torch.log(-torch.expm1(gained.clamp(max=-1e-6)))  # log(p / (1 - p)), p per token
        losses = fine_tuning - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
    else:
        losses = -F.logsigmoid(beta * margin - args.simpo_gamma)
    return losses + args.pref_ftx * fine_tuning


def parse_answer(text):
    """Return the object or list that an answer is in JSON, else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a model that repeats "[" a thousand times
        return None
    return value if isinstance(value, dict | list) else None


def leaves(value, path=""):
    """Yield (path, scalar) of a JSON value; list indices are left out of the path, null and "" are no leaves."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, path)
    elif value not in (None, ""):
        yield path, value


def is_empty(value):
    """Tell whether a JSON value has no truthy leaf; None, an answer that is no JSON, has none."""
    return not any(scalar for _, scalar in leaves(value))


def generation_metrics(references, predictions, stopped):
    """Score generated answers: stop_rate, exact_match and, over the rows whose reference is JSON, extraction metrics.

    json_valid; false_positive_rate (the reference is empty, the prediction not, or no JSON), empty_rate
    (the reference is not empty, the prediction is, or no JSON); micro precision, recall and f1 over
    (path, value) leaves as multisets, also by path.
    """
    found = {"stop_rate": mean(stopped),
             "exact_match": mean([a == b for a, b in zip(references, predictions, strict=True)])}
    pairs = [(gold, parse_answer(text)) for reference, text in zip(references, predictions, strict=True)
             if (gold := parse_answer(reference)) is not None]
    if not pairs:
        return found
    found["json_valid"] = mean([predicted is not None for _, predicted in pairs])
    on_empty = [predicted is None or not is_empty(predicted) for gold, predicted in pairs if is_empty(gold)]
    on_full = [is_empty(predicted) for gold, predicted in pairs if not is_empty(gold)]
    found |= {"false_positive_rate": mean(on_empty)} if on_empty else {}
    found |= {"empty_rate": mean(on_full)} if on_full else {}
    hits, claims, golds = Counter(), Counter(), Counter()
    for sides in pairs:
        # JSON text as the value: true is not 1, and 1 is not "1"
        gold, predicted = (Counter((path, json.dumps(scalar)) for path, scalar in leaves(side)) for side in sides)
        for counter, part in ((hits, gold & predicted), (claims, predicted), (golds, gold)):
            for (path, _), count in part.items():
                counter[path] += count
    names = {"": list(claims | golds)} | {f".{path}": [path] for path in sorted(golds)}
    for name, paths in names.items() if golds else ():
        hit, claimed, gold = (sum(counter[path] for path in paths) for counter in (hits, claims, golds))
        found[f"precision{name}"], found[f"recall{name}"] = hit / max(1, claimed), hit / gold
        found[f"f1{name}"] = 2 * hit / (claimed + gold)
    return found


# ---------------------------------------------------------------- training


class SftTrainer(utils.StepTrainer):
    """Minimises the mean loss of a step's supervised tokens, however many pieces the step is cut into."""

    def __init__(self, *, flags, chat, plain_head, **kwargs):
        super().__init__(batch_size=flags.batch_size, **kwargs)
        self.flags, self.chat, self.plain_head = flags, chat, plain_head
        self.head = self.model.get_output_embeddings()

    def supervised_scores(self, model, step, piece):
        """Return token_scores of a piece's supervised tokens."""
        masks = [torch.tensor(step["supervised"][i]) for i in piece]
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True).to(self.args.device)
        return self.token_scores(model, self.pad(step, piece)[0], mask)

    def token_scores(self, model, input_ids, mask, **inputs):
        """Return token_scores where `mask` (B, T) is; only the positions before get logits, which predict the token."""
        keep = F.pad(mask[:, 1:], (0, 1))
        labels = input_ids[mask]  # (N,)
        chunk = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        with self.accelerator.autocast():
            # no attention mask: a causal model never sees the padding on its right
            if len(labels) <= chunk or not self.plain_head:
                return token_scores(model(input_ids=input_ids, logits_to_keep=keep, **inputs).logits, labels)
            whole, self.head.forward = self.head.forward, lambda hidden: hidden
            try:
                hidden = model(input_ids=input_ids, logits_to_keep=keep, **inputs).logits  # (N, D)
            finally:
                self.head.forward = whole

            def part(hidden, labels):
                with self.accelerator.autocast():
                    return token_scores(self.head(hidden), labels)

            scores = [recomputed(part, *both, use_reentrant=False)
                      for both in zip(hidden.split(chunk), labels.split(chunk), strict=True)]
            return tuple(map(torch.cat, zip(*scores, strict=True)))

    def run_step(self, model, step, pieces, tokens_at_once):
        """Forward and backward of one step, piece by piece; its loss is a mean over the tokens of all processes."""
        world, counted = self.accelerator.num_processes, self.counted_rows(model, step)
        step["supervised"] = [mask & bool(counts) for mask, counts in zip(step["supervised"], counted, strict=True)]
        tokens = torch.tensor(sum(int(mask.sum()) for mask in step["supervised"]), device=self.args.device)
        tokens, total = self.accelerator.reduce(tokens), 0
        for i, piece in enumerate(pieces):
            with self.unsynced(model, i < len(pieces) - 1):
                # DDP averages the gradients
                loss = self.supervised_scores(model, step, piece)[0].sum() / tokens * world
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def counted_rows(self, model, step):
        """Return which rows of a step carry loss: under DDP the last step of an epoch repeats rows to fill up."""
        rows, count = self.args.per_device_train_batch_size, len(self.train_dataset)
        world = self.accelerator.num_processes
        place = self.state.global_step % math.ceil(count / rows / world) * world + self.accelerator.process_index
        return torch.tensor([model is self.model or place * rows + i < count for i in range(step["rows"])])

    def warnings_about(self, after):
        """Return a warning for each dev set whose answers seldom stop."""
        rates = {name.removeprefix("eval_"): rate for name, rate in after.items() if name.endswith("stop_rate")}
        return [f"{1 - rate:.0%} of the generated answers ({name}) do not stop in --max_new_tokens "
                f"{self.flags.max_new_tokens}: look at predictions-*.jsonl for repetition; more steps teach the stop "
                "token, more tokens give room" for name, rate in rates.items() if rate < 0.9]

    def pieces_of(self, step):
        """Cut rows that are only measured."""
        limit = min(self.device_tokens, 2 * self.flags.batch_size * self.flags.max_length)
        return utils.cut(self.lengths_of(step), limit // 2**self.halvings)

    def score(self, samples):
        """Return {"loss", "token_accuracy"} over the supervised tokens of samples, shared out over the processes."""
        own = collate(samples[self.accelerator.process_index :: self.accelerator.num_processes])

        def score_own():
            sums = torch.zeros(3, dtype=torch.float64)
            for piece in self.pieces_of(own):
                losses, hits = (part.cpu().double() for part in self.supervised_scores(self.model, own, piece))
                sums += torch.stack([losses.sum(), hits.sum(), torch.tensor(len(hits))])
            return sums

        sums = self.evaluated(score_own)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device))
        loss, hits, count = sums.tolist()
        return {"loss": loss / count, "token_accuracy": hits / count}

    def generate(self, prompts):
        """Answer prompts (token ids) greedily, shared out over the processes: [(text, whether it stopped)]."""
        world = self.accelerator.num_processes
        own = sorted(range(self.accelerator.process_index, len(prompts), world), key=lambda i: -len(prompts[i]))

        def answer_own():
            answers, size = {}, max(1, GENERATED_AT_ONCE // 2**self.halvings)
            for part in (own[start : start + size] for start in range(0, len(own), size)):
                room = self.chat.limit - len(prompts[part[0]])
                with self.accelerator.autocast():
                    found = generate_greedily(self.model, [prompts[i] for i in part], self.chat.stop_ids,
                                              min(self.flags.max_new_tokens, room))
                for i, (ids, stopped) in zip(part, found, strict=True):
                    answers[i] = decode_answer(self.chat.tokenizer, ids, self.chat.frame), stopped
            return answers

        answers = self.evaluated(answer_own)
        if world > 1:
            answers = dict(gather_object(list(answers.items())))
        return [answers[i] for i in range(len(prompts))]


class PreferenceTrainer(SftTrainer):
    """Minimises the mean preference loss of a step's pairs; a pair's common prompt is computed once if `shares`.

    The reference is the model as it is before the first step: the base, or what --init_adapter holds. Its
    log-probabilities are computed once; with --eval_only the reference is the model with its adapter switched off.
    """

    def __init__(self, *, pair_sets, **kwargs):
        super().__init__(**kwargs)
        self.pair_sets = pair_sets
        self.shares = self.can_share(max((pair for pairs in pair_sets for pair in pairs), key=longest_side))
        self.data_collator = partial(collate_pairs, self.shares)

    def can_share(self, pair):
        """Tell whether prompts can be computed once: no layer's window is shorter than `pair`, the longest, and its
        log-probabilities are the same. They are not where attention takes no mask of its own, say."""
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window and window < longest_side(pair):
            return False
        found = []
        for self.shares in (False, True):
            try:
                step = collate_pairs(self.shares, [pair])
                found.append(self.evaluated(lambda step=step: self.pair_logps(self.model, step, [0])[0]))
            except (TypeError, ValueError, RuntimeError):
                if not self.shares:
                    raise
                return False
        return torch.allclose(*found, rtol=2e-3 if self.args.fp16 or self.args.bf16 else 1e-5)

    def pair_logps(self, model, step, piece):
        """Return summed log-probabilities of the answers, and their lengths in tokens: both (P, 2)."""
        prompt, middle, end = (torch.tensor(values)[:, None] for values in (
            [step["prompts"][i] for i in piece], [step["chosen"][i] for i in piece],
            [len(step["sequences"][i]) for i in piece]))
        if self.shares:
            input_ids, t = self.pad(step, piece)[0], torch.arange(int(end.max()))[None]  # (P, T), (1, T)
            second = t >= middle  # the prompt's last token once more, and the rejected answer
            answer = (t >= prompt) & (t < end) & (t != middle)
            seen = (second[:, :, None] == second[:, None]) | (t < prompt - 1)[:, None]
            seen = (seen & (t[:, :, None] >= t[:, None]))[:, None].to(input_ids.device)  # (P, 1, T, T)
            if self.model.config._attn_implementation == "eager":  # adds its mask
                seen = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float16).min)
            inputs = {"attention_mask": seen, "position_ids": torch.where(second, t - middle + prompt - 1, t)}
            inputs["position_ids"] = inputs["position_ids"].to(input_ids.device)
            lengths = torch.cat([middle - prompt, end - middle - 1], 1)
        else:
            sides = [part for i in piece for part in (step["sequences"][i][: step["chosen"][i]],
                                                      step["sequences"][i][step["chosen"][i] :])]
            input_ids, sizes = self.pad({"sequences": sides}, range(len(sides)))
            t, sizes, inputs = torch.arange(input_ids.shape[1])[None], sizes.cpu()[:, None], {}
            answer = (t >= prompt.repeat_interleave(2, 0)) & (t < sizes)
            lengths = sizes.view(-1, 2) - prompt
        losses, _ = self.token_scores(model, input_ids, answer.to(input_ids.device), **inputs)  # row by row
        which = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten()).to(losses.device)
        logps = -losses.new_zeros(lengths.numel()).index_add(0, which, losses)
        return logps.view(-1, 2), lengths.to(losses.device)

    def lengths_of(self, step):
        """Return how many tokens each pair takes in a piece: two sides are padded alike."""
        whole = super().lengths_of(step)
        return whole if self.shares else [2 * max(first, both - first) for first, both in
                                          zip(step["chosen"], whole, strict=True)]

    def reference(self, step, piece, logps):
        """Return reference log-probabilities (P, 2); before they are computed the model is its own reference."""
        known = [step["reference"][i] for i in piece]
        return logps.detach() if None in known else torch.tensor(known, device=logps.device)

    def run_step(self, model, step, pieces, tokens_at_once):
        """Forward and backward of one step, piece by piece; its loss is a mean over the pairs of all processes."""
        counted, kl, args = self.counted_rows(model, step).to(self.args.device), (0.0, 0.0), self.flags
        pairs = self.accelerator.reduce(counted.sum())
        if args.pref_loss == "kto_pair":
            kl = torch.zeros(2, device=self.args.device)
            for piece in pieces:
                with torch.no_grad():
                    logps, lengths = self.pair_logps(model, step, piece)
                gained = gains(args, logps, self.reference(step, piece, logps), lengths)
                kl += (gained * counted[piece][:, None]).sum(0)
            kl = (self.accelerator.reduce(kl) / pairs).clamp(min=0)
        total, seen = 0, torch.zeros(9, device=self.args.device, dtype=torch.float64)
        for i, piece in enumerate(pieces):
            with self.unsynced(model, i < len(pieces) - 1):
                logps, lengths = self.pair_logps(model, step, piece)
                reference = self.reference(step, piece, logps)
                losses = preference_losses(args, logps, reference, lengths, kl) * counted[piece]
                loss = losses.sum() / pairs * self.accelerator.num_processes  # DDP averages the gradients
                self.accelerator.backward(loss)
            total += loss.detach()
            seen += self.pair_sums(logps.detach(), reference, lengths, losses.detach(), counted[piece])
        self.seen = seen
        return total

    def figures_of_step(self, loss):
        """Return the loss of the step, and what it did to rewards and log-probabilities."""
        return self.pair_means(self.seen) | super().figures_of_step(loss)

    def pair_sums(self, logps, reference, lengths, losses, counted):
        """Return sums over pairs: count, accurate, loss, and rewards, log-probabilities, lengths of both sides (9,)."""
        rewards = self.flags.pref_beta * gains(self.flags, logps, reference, lengths)
        accurate = (1 + (rewards[:, :1] - rewards[:, 1:]).sign()) / 2  # a tie is a half
        columns = [torch.ones_like(accurate), accurate, losses[:, None], rewards, logps, lengths]
        return (torch.cat(columns, 1) * counted[:, None]).double().sum(0)

    def pair_means(self, sums):
        """Return {name: mean} from pair_sums of all processes."""
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.args.device))
        count, accurate, loss, *sides = sums.tolist()
        names = [f"{name}_{side}" for name in ("reward", "logp", "tokens") for side in ("chosen", "rejected")]
        means = {name: value / count for name, value in zip(names, sides, strict=True)}
        return {"loss": loss / count, "accuracy": accurate / count,
                "margin": means["reward_chosen"] - means["reward_rejected"], **means}

    def each_pair(self, samples):
        """Yield (rows of `samples`, their logps, lengths, reference) of this process' share, piece by piece."""
        own = list(range(self.accelerator.process_index, len(samples), self.accelerator.num_processes))
        step = collate_pairs(self.shares, [samples[i] for i in own])
        for piece in self.pieces_of(step):
            logps, lengths = self.pair_logps(self.model, step, piece)
            yield [own[i] for i in piece], logps, lengths, self.reference(step, piece, logps)

    def before_training(self):
        """Compute the reference log-probabilities of all pairs, once."""
        if self.flags.pref_loss in WITHOUT_REFERENCE:
            return
        shared = "once a pair" if self.shares else "with each answer"
        say(f"reference of {sum(map(len, self.pair_sets))} pairs; prompts are computed {shared}")
        off = self.flags.eval_only
        if off and not self.flags.init_adapter:
            raise InputError(f"--pref_loss {self.flags.pref_loss} compares an adapter with its base, and "
                             f"{self.flags.model_name} is no adapter. Name one, or pass --pref_loss simpo.")
        with self.model.disable_adapter() if off else contextlib.nullcontext():
            for samples in self.pair_sets:
                found = self.evaluated(lambda samples=samples: [(rows, logps.tolist()) for rows, logps, *_ in
                                                                self.each_pair(samples)])
                for rows, logps in gather_object(found) if self.accelerator.num_processes > 1 else found:
                    for row, pair in zip(rows, logps, strict=True):
                        samples[row]["reference"] = pair

    def score(self, samples):
        """Return pair_means of a dev set, and the better accuracy of two rules: take the longer, the shorter answer.

        The loss of kto_pair is that without its KL terms.
        """

        def score_own():
            sums = torch.zeros(9, dtype=torch.float64)
            for _, logps, lengths, reference in self.each_pair(samples):
                losses, ones = preference_losses(self.flags, logps, reference, lengths), torch.ones(len(logps))
                sums += self.pair_sums(logps, reference, lengths, losses, ones.to(logps.device)).cpu()
            return sums

        sizes = [[len(side["input_ids"]) for side in pair["sides"]] for pair in samples]
        longer = mean([(1 + (a > b) - (a < b)) / 2 for a, b in sizes])  # a tie is a half
        return self.pair_means(self.evaluated(score_own)) | {"length_accuracy": max(longer, 1 - longer)}


def generate_greedily(model, prompts, stop_ids, max_new_tokens):
    """Continue prompts (token ids) in one batch: [(ids before the first stop token, whether there was one)]."""
    longest = max(map(len, prompts))
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=stop_ids,
                              pad_token_id=stop_ids[0])
    model.generation_config = greedy  # or the base's own would fill in a repetition penalty, say
    rows = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.no_grad():
        rows = model.generate(input_ids=rows, generation_config=greedy, attention_mask=mask)
    found = []
    for ids in rows[:, longest:].tolist():
        end = next((t for t, token in enumerate(ids) if token in stop_ids), None)
        found.append((ids[:end], end is not None))
    return found


def measure(args, dev_sets, trainer=None):
    """Return {metric: value} over all dev sets, their names in front; without a trainer --endpoint answers."""
    metrics = {}
    for name, dev in dev_sets.items():
        found = trainer.score(dev.samples) if trainer else {}
        if dev.generated:
            prompts, examples = zip(*dev.generated, strict=True)
            step = trainer.state.global_step if trainer else 0
            label = f"{name or 'dev'}-{step}"
            answers = trainer.generate(prompts) if trainer else ask_all(args, label, examples)
            if not trainer or trainer.is_world_process_zero():
                write_predictions(args, label, examples, answers)
            texts, stopped = zip(*answers, strict=True)
            predictions = [answer_of(text) for text in texts]
            found |= generation_metrics([example.answer for example in examples], predictions, stopped)
        metrics |= {named(name, key): value for key, value in found.items()}
    return metrics


def predictions_file(args, name):
    """Return the path of predictions-<name>.jsonl, its folder made."""
    path = Path(args.output_dir) / f"predictions-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def prediction_line(example, text, stopped):
    """Return a line of JSON: what was asked, what was expected, what came."""
    line = {"messages": example.messages[: example.last], "reference": example.answer,
            "prediction": answer_of(text), "stopped": stopped, "where": example.where}
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_predictions(args, name, examples, answers):
    """Write predictions-<name>.jsonl in the order of the rows, so that a reader finds all lines or those before."""
    if args.dry_run:
        return
    path = predictions_file(args, name)
    part = Path(f"{path}.part")
    lines = [prediction_line(example, *answer) for example, answer in zip(examples, answers, strict=True)]
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)


# ---------------------------------------------------------------- a server's answers


class NoAnswer(Exception):
    """A server gave no answer that can be used; the message says what came. Asking again may help."""


def as_openai(messages, thinking):
    """Return messages as OpenAI's API takes them: arguments as text, an id in each call and in its result."""
    asked, waiting = [], []
    numbers = itertools.count(1)
    for message in messages:
        sent = {name: message[name] for name in ("role", "content", "name", "tool_call_id") if name in message}
        if message["role"] == "assistant" and not thinking:  # as in Chat.prepare
            sent["content"] = THINKING.sub("", message["content"])
        if thinking and "reasoning_content" in message:
            sent["reasoning_content"] = message["reasoning_content"]
        if message.get("tool_calls"):
            sent["tool_calls"] = [as_openai_call(call, f"call{next(numbers):05}") for call in message["tool_calls"]]
            waiting += [call["id"] for call in sent["tool_calls"]]
        if message["role"] == "tool" and waiting:
            sent.setdefault("tool_call_id", waiting[0])
            waiting.pop(0)
        asked.append(sent)
    return asked


def as_openai_call(call, default_id):
    """Return a tool call as OpenAI's API takes it."""
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"id": call.get("id") or default_id, "type": "function",
            "function": {"name": function.get("name"), "arguments": arguments}}


def as_request(args, example):
    """Return the body of the request for the last answer of an Example."""
    thinking = args.enable_thinking == "true"
    body = {"model": args.endpoint_model, "messages": as_openai(example.messages[: example.last], thinking),
            "temperature": 0, "max_tokens": args.max_new_tokens, "chat_template_kwargs": {"enable_thinking": thinking}}
    if example.tools:
        bare = [isinstance(tool, dict) and "function" not in tool for tool in example.tools]
        body["tools"] = [{"type": "function", "function": tool} if wrap else tool
                         for tool, wrap in zip(example.tools, bare, strict=True)]
    return body


def post(url, body):
    """Send JSON and return the JSON that comes back; raises NoAnswer, or InputError if the request is refused."""
    key = os.environ.get("OPENAI_API_KEY", "-")
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            reply = urllib.request.urlopen(request, timeout=ANSWER_SECONDS)
        except urllib.error.HTTPError as error:
            reply = error
        with reply:
            code = reply.code
            text = reply.read().decode(errors="replace")
    except TimeoutError:
        raise InputError(f"{url} gave no answer within {ANSWER_SECONDS // 60} minutes. Is the server busy?") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NoAnswer(f"--endpoint {url} gives no answer: {utils.reason(error)}. Is the server up?") from None
    if code >= 400:
        refused = code < 500 and code not in (408, 429)  # not: too slow, too many at once
        said = " ".join(text.split())[:200] or http.client.responses.get(code, "nothing")
        raise (InputError if refused else NoAnswer)(f"{url} answers {code}: {said}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise NoAnswer(f"{url} answers with what is no JSON: {text[:200]!r}") from None


def read_reply(reply, url):
    """Return (text, whether it stopped) of a chat completion; raises NoAnswer for what is none."""
    try:
        choice = reply["choices"][0]
        content, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        raise NoAnswer(f"{url} answers with no choices[0].message: {json.dumps(reply)[:200]}") from None
    if content is not None and not isinstance(content, str):
        raise NoAnswer(f"{url} answers with a content that is the {type(content).__name__} "
                       f"{json.dumps(content)[:60]}, not a text")
    content = content or ""  # a tool call has none
    if content != content.encode(errors="replace").decode():
        raise NoAnswer(f"{url} answers with half a character in {json.dumps(content)[:200]}: that is no Unicode text")
    return content, finish in ("stop", "tool_calls", "function_call")


def ask(args, example):
    """Ask --endpoint for the last answer of an Example: (text, whether it stopped); raises InputError after 3 tries."""
    url = args.endpoint.rstrip("/").removesuffix("/chat/completions")
    url = f"{url}/chat/completions" if url.endswith("/v1") else f"{url}/v1/chat/completions"
    body = as_request(args, example)
    for seconds in (*PAUSES, None):
        try:
            return read_reply(post(url, body), url)
        except NoAnswer as error:
            if seconds is None:
                raise InputError(f"{error} (asked {len(PAUSES) + 1} times, last for {example.where})") from None
            time.sleep(seconds)


def ask_in_threads(args, examples):
    """Ask --endpoint for the last answers of Examples, several at once; yield (i, answer or what went wrong).

    After a failure only those under way are waited for. The threads are daemons: Ctrl-C waits for nobody.
    """
    waiting, came = iter(range(len(examples))), queue.SimpleQueue()

    def work():
        for i in waiting:
            try:
                came.put((i, ask(args, examples[i])))
            except Exception as error:
                came.put((i, error))
                list(waiting)  # takes the rest from the others
        came.put(None)

    for _ in range(REQUESTS_AT_ONCE):
        threading.Thread(target=work, daemon=True).start()
    for _ in range(REQUESTS_AT_ONCE):
        yield from iter(came.get, None)  # until one more thread has ended


def ask_all(args, name, examples):
    """Ask --endpoint for the last answers of Examples: [(text, whether it stopped)]; raises InputError if one fails.

    Each is written to predictions-<name>.jsonl as it comes.
    """
    path, answers, failures = predictions_file(args, name), {}, []
    bar = tqdm(total=len(examples), desc=f"asking {name}", unit="row", leave=False, disable=not utils.shows_bars())
    with path.open("w", encoding="utf-8") as file, bar:
        for i, answer in ask_in_threads(args, examples):
            if isinstance(answer, Exception):
                failures.append(answer)
                continue
            answers[i] = answer
            file.write(prediction_line(examples[i], *answer))
            file.flush()
            bar.update()
    for failure in failures:
        if not isinstance(failure, InputError):
            raise failure
        kept = f" {len(answers)} of {len(examples)} answers are in {path}." if answers else ""
        raise InputError(f"{str(failure).rstrip('.')}.{kept}")
    return [answers[i] for i in range(len(examples))]


# ---------------------------------------------------------------- main


def settle_chat(args, examples, dev_sets, config, tokenizer, notes):
    """Make the Chat of this run; settles --enable_thinking, the template and --max_length, and notes what is odd."""
    if args.chat_template:
        try:
            tokenizer.chat_template = Path(args.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--chat_template {args.chat_template} cannot be read: {utils.reason(error)}") from None
    own_template = bool(tokenizer.chat_template)
    settle_thinking(args, examples or sum(dev_sets.values(), []))
    stops = stored_stops(args, tokenizer)
    chat = Chat(tokenizer, args.enable_thinking == "true", stops)
    chat.limit = limit = utils.position_limit(config, tokenizer)
    if args.max_length > limit:
        notes.append(f"--max_length {args.max_length} is above the {limit} positions of the base: lowered to {limit}")
        args.max_length = int(limit)
    with_tools = sum(bool(example.tools) for example in examples or sum(dev_sets.values(), []))
    for present, note in (
        (not own_template, "the tokenizer has no chat template: a plain one (### User: / ### Assistant:) is used, and "
                           "saved with it; an instruct model has its own"),
        (chat.emits is None, f"the chat template ends no answer: {chat.end} is appended to each"),
        (own_template and stops and chat.emits not in [None, *stops],
         f"the base's generation_config does not stop at {chat.emits}: it looks like a base model, which may never "
         "have been trained on that token, nor can LoRA. Prefer the instruct model, or pass a --chat_template that "
         f"ends answers in {stops[0] if stops else chat.end}"),
        (chat.scaffold, f"the prompt of an answer ends in {chat.scaffold!r}, which the template leaves out of history: "
                        "answers are learnt right behind it, where inference starts"),
        (chat.folds_system, "the chat template takes no system turn: its text is put before the first user turn"),
        (chat.own_system and any(example.messages[0]["role"] != "system" for example in examples),
         f"to rows without a system turn the chat template adds by itself: {chat.own_system!r}"),
        (with_tools and not chat.shows_tools,
         f"the chat template leaves out the tool definitions of {with_tools} rows: nothing in their prompts says what "
         "can be called"),
    ):
        if present:
            notes.append(note)
    return chat


def stored_stops(args, tokenizer):
    """Return the tokens at which the generation_config of the adapter or base stops."""
    ids = (utils.base_json(args, "generation_config.json") or {}).get("eos_token_id") or []
    return tokenizer.convert_ids_to_tokens(ids if isinstance(ids, list) else [ids])


def settle_thinking(args, examples):
    """Settle --enable_thinking auto: as the adapter was trained, else true where an answer has reasoning."""
    if args.enable_thinking == "auto":
        stored = {} if args.endpoint else merge.flags_of(utils.base_json(args, "training_config.json") or {})
        reasons = any(m.get("reasoning_content") or "</think>" in m["content"]
                      for example in examples for m in [*example.messages, example.rejected or {"role": ""}]
                      if m["role"] == "assistant")
        args.enable_thinking = stored.get("enable_thinking", str(reasons).lower())


def choose_generated(args, name, examples, chat):
    """Choose the rows of a dev set to generate on: [(prompt ids, Example)], without a Chat [(None, Example)]."""
    rows = [example for example in examples if example.answer and "weight" not in example.messages[example.last]]
    rows = random.Random(f"{args.seed} {name}").sample(rows, min(args.eval_generate, len(rows)))
    chosen = []
    for example in rows if chat else ():
        try:
            prepared = chat.prepare(example.messages[: example.last + 1])  # which may fold the system turn
            prompt, answer = chat.turn(prepared, len(prepared) - 1, example.tools)
        except Drop:
            continue  # counted where the dev set was tokenised
        if len(prompt) < args.max_length and not (args.sanity_overfit and len(answer) > SHORT_ANSWER_TOKENS):
            chosen.append((prompt, example))
    if not rows and args.endpoint:
        raise InputError(f"dev set {name or 'dev'}: no row has an answer in words to compare with.")
    return chosen if chat else [(None, example) for example in rows]


def make_samples(args, examples, dev_sets, chat, counts):
    """Tokenise everything: (TrainSet, {name: DevSet}); raises InputError where nothing is left to learn from."""
    train_set, drops, shortened = tokenise(examples, chat, args)
    counts["dropped"] |= utils.say_drops(drops)
    counts["shortened"] = shortened
    if shortened:
        say(f"shortened {shortened} prompts to --max_length {args.max_length}, from the middle of their longest text")
    if not train_set and examples:
        if list(drops) == [TOO_LONG]:
            rows = [(chat.prepare([*e.messages[: e.last], last]), e.tools) for e in examples[:1000]
                    for last in (e.messages[e.last], e.rejected) if last]
            longest = max(sum(map(len, chat.turn(messages, len(messages) - 1, tools))) for messages, tools in rows)
            raise InputError(f"all {len(drops[TOO_LONG])} responses were cut away by --max_length {args.max_length}. "
                             f"Raise it: the longest row has {longest} tokens.")
        raise InputError("no row has a token to learn from. Look at what was dropped, above.")
    made = {}
    for name, dev in dev_sets.items():
        samples, drops, _ = tokenise(dev, chat, args)
        counts["dropped"] |= {f"{name or 'dev'}: {reason}": n for reason, n in utils.say_drops(drops).items()}
        if not samples:
            raise InputError(f"dev set {name or 'dev'}: no row has a token to score. Look at what was dropped, above.")
        made[name] = DevSet(samples, choose_generated(args, name, dev, chat))
    return train_set, made


def unknown_share(samples, chat):
    """Return the share of unknown tokens, special ones left aside; 0 where the template itself writes that token."""
    tokenizer = chat.tokenizer
    unknown = tokenizer.unk_token_id
    trial = chat.rendered([as_message("user", QUESTION), as_message("assistant", ANSWER)], False) or ""
    if unknown is None or tokenizer.unk_token in trial or unknown in chat.stop_ids:  # GPT-2 has one for everything
        return 0
    special = np.array([*set(tokenizer.convert_tokens_to_ids(chat.special)) - {unknown}])
    ids = np.concatenate([sample["input_ids"] for sample in samples])
    return (ids == unknown).sum() / max(1, len(ids) - np.isin(ids, special).sum())


def show_examples(train_set, examples, chat, notes):
    """Print three samples, or pairs, with the supervised tokens marked, and what the answers have in common."""
    on, off = ("\033[32m", "\033[0m") if os.isatty(1) else ("[[", "]]")
    for i, sample in enumerate(flat(train_set[:3]), 1):
        ids, mask, text = sample["input_ids"], sample["supervised"], ""
        edges = [0, *(t for t in range(1, len(ids)) if mask[t] != mask[t - 1]), len(ids)]
        for start, end in zip(edges, edges[1:], strict=False):
            part = chat.tokenizer.decode(ids[start:end]).replace("\n", "\\n")
            part = part if len(part) < 400 else f"{part[:200]} ... {part[-200:]}"
            text += f"{on}{part}{off}" if mask[start] else part
        kind = f"{'chosen  ' if i % 2 else 'rejected'} {(i + 1) // 2}" if "sides" in train_set[0] else f"example {i}"
        say(f"{kind} {len(ids):5} tokens, {mask.sum()} supervised: {text}")
    if train_set.unrolled >= 1.05:
        notes.append("the chat template rewrites past turns, so that each answer is a sample of its own, of all that "
                     f"inference sees: {train_set.unrolled:.1f} times the tokens of the conversations. --train_turns "
                     "last learns the last answer of each alone, without the repeats")
    train_set = flat(train_set)
    learnt = sum(int(sample["supervised"].sum()) for sample in train_set)
    total = sum(len(sample["input_ids"]) for sample in train_set)
    ends = mean([sample["input_ids"][-1] in chat.stop_ids for sample in train_set])
    say(f"masks     {len(train_set)} samples, {total:,} tokens, {learnt:,} of them supervised ({learnt / total:.1%}); "
        f"{ends:.0%} end in {' or '.join(chat.stops)}; enable_thinking {str(chat.thinking).lower()}")
    answers = [(example.answer, example.where) for example in examples]
    for name, cut in (("response", None), ("response opening", 16)):
        (text, count), = Counter(answer[:cut] for answer, _ in answers).most_common(1)
        if count > 1:
            say(f"commonest {name}, in {count / len(answers):.1%} of the rows: {text[:80]!r}")
    residue = [(found[0], where) for answer, where in answers if (found := TAG_RESIDUE.search(answer))]
    if residue:
        notes.append(f"{len(residue)} responses look as if tags were left in them (first: {residue[0][1]}: "
                     f"{residue[0][0]!r}); --drop_regex drops such rows")
    unknown = unknown_share(train_set, chat)
    if unknown > 0.01:
        notes.append(f"{unknown:.0%} of all tokens are {chat.tokenizer.unk_token}: the base cannot read these texts")


def plan_run(args, train_set, dev_sets, notes):
    """Make the plan; raises InputError for a metric that is not measured."""
    first, metric = next(iter(dev_sets), ""), args.metric_for_best
    keys = {}
    for name, dev in dev_sets.items():
        gold = [example.answer for _, example in dev.generated]
        scores = ["loss", "accuracy", "margin", "length_accuracy"] if args.pref_loss else ["loss", "token_accuracy"]
        keys[name] = [*scores, *(generation_metrics(gold, gold, [True]) if gold else ())]
    known = [named(name, key) for name in keys for key in keys[name] if key != "length_accuracy"]
    if metric and dev_sets:
        metric = utils.measured(metric, known, "" if args.eval_generate else " More are with --eval_generate N.")
    metric = metric or named(first, "accuracy" if args.pref_loss else "loss")
    lower = [named(name, key) for name in keys for key in ("loss", "false_positive_rate", "empty_rate")]
    greater_is_better = metric not in [*lower, "loss"]
    plan = utils.make_plan(args, len(train_set), bool(dev_sets), metric, greater_is_better, False, notes)
    plan.watched = [[named(name, key), key == "recall"] for name in keys for key in keys[name]
                    if key in ("loss", "recall")]
    # exact_match says something new where answers are no JSON alone
    wanted = ("loss", "f1", "recall", "false_positive_rate", "json_valid", "margin", "accuracy", "length_accuracy")
    shown = [named(name, key) for name, measured in keys.items() for key in measured
             if key in wanted or key == "exact_match" and "f1" not in measured]
    plan.shown = list(dict.fromkeys([metric, *shown] if dev_sets else []))
    if args.pref_loss == "simpo" and args.pref_beta < 1:
        notes.append(f"simpo is nearly flat at --pref_beta {args.pref_beta:g}: take 2.5 to 10, and a quarter to a half "
                     "of that as --simpo_gamma")
    if args.epochs > 3 and not args.max_steps:
        notes.append(f"{args.epochs:g} epochs: more than 3 usually learn the answers by heart")
    if args.sanity_overfit:
        plan.eval_steps = plan.total_steps
    return plan


def load_model(args, config, notes):
    """Load the base, look at what it does, wrap it. Returns (model, whether its head is a plain layer, precision).

    Raises InputError for a model that sees the future, or cannot be asked for the logits of single positions.
    """
    precision, in_words = utils.choose_precision(args)
    model, absent = utils.load_base(args, AutoModelForCausalLM, config, precision, notes)
    say(f"model     {args.model_name}, {in_words}" + (f", {args.bits}-bit base" if args.bits else ""))
    model.eval()
    head, caught = model.get_output_embeddings(), []
    if head is None:
        raise InputError(f"{args.model_name} has no output head. Choose a causal language model.")
    hooks, ran = [head.register_forward_hook(lambda _, __, output: caught.append(output))], set()
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in linear.items():
        tower = ".".join(name.split(".")[:2])  # a vision tower beside the language model, say
        hooks.append(layer.register_forward_hook(lambda *_, tower=tower: ran.add(tower)))
    keep = torch.tensor([[False, True, True, False]], device=model.device)

    def logits(last):
        with torch.autocast(model.device.type, utils.DTYPES[precision], enabled=precision != "none"):
            return model(torch.tensor([[5, 6, 7, last]], device=model.device), logits_to_keep=keep).logits

    try:
        with torch.no_grad():
            first, changed = logits(8), logits(9)
    except TypeError as error:
        raise InputError(f"{args.model_name} takes no logits_to_keep ({utils.reason(error)}): its code is too old "
                         "for this script.") from None
    for hook in hooks:
        hook.remove()
    unused = [name for name in linear if ".".join(name.split(".")[:2]) not in ran]
    noise = 1e-4 if precision == "none" and not args.bits else 0.05
    if (first.float() - changed.float()).norm() > noise * first.float().norm():
        raise InputError(f"{args.model_name} sees the tokens that it is to predict. Choose a causal language model.")
    utils.check_loaded(model, absent, lambda: logits(8), args, notes)
    plain_head = torch.equal(caught[0], first)  # no softcapping or scaling behind it
    return utils.add_adapter(model, args, "CAUSAL_LM", unused, notes), plain_head, precision


def first_logits(trainer, samples, ids):
    """Return logits (N, V) of the first answer tokens of `samples`, whose token ids are `ids`, to compare models by."""
    step = {"rows": len(ids), "sequences": ids, "supervised": [sample["supervised"] for sample in samples]}

    def logits_of(i):
        keep = torch.tensor(step["supervised"][i][1:].nonzero()[0][:8], device=trainer.args.device)
        with trainer.accelerator.autocast():
            logits = trainer.model(input_ids=trainer.pad(step, [i])[0], logits_to_keep=keep).logits
        return logits[0].float()

    return trainer.evaluated(lambda: torch.cat([logits_of(i) for i in range(step["rows"])]))


def save_stops(args, chat, folder):
    """Write the base's generation_config with the merged stop tokens, for whoever serves the model."""
    stored = utils.base_json(args, "generation_config.json") or {}
    utils.write_json(folder / "generation_config.json", stored | {"eos_token_id": chat.stop_ids})


def check_overfit(after, train_set):
    """Raise InputError unless --sanity_overfit has learnt its rows by heart."""
    exact, accuracy = after.get("exact_match"), after["token_accuracy"]
    has_long = any(sample["supervised"].sum() > SHORT_ANSWER_TOKENS for sample in train_set)
    figures = (f"exact match {exact:.1%}, " if exact is not None else "") + f"token accuracy {accuracy:.1%}"
    if (exact is not None and exact < 0.9) or (has_long or exact is None) and accuracy < 0.95:
        raise InputError(f"sanity overfit failed on {len(train_set)} samples: {figures}; 90 % exact match is needed, "
                         "or 95 % token accuracy for long answers. If the loss hardly fell: raise --lr, --max_steps or "
                         "--lora_r. If it fell: training and generation see different prompts (template, "
                         "--enable_thinking, BOS), labels are shifted, or the stop token is wrong.")
    say(f"sanity    passed: {figures}")


def report_evaluation(args, run, metrics):
    """Print and write the metrics of --eval_only; return the report."""
    for name, value in metrics.items():
        say(f"result    {name} {value:.4f}")
    report = run | {"metrics": metrics}
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    utils.write_json(Path(args.output_dir) / "evaluation_report.json", report)
    return report


def main(argv=None):
    """Run the command line `argv`; return what training_summary_report.json holds."""
    args, notes = parse_args(argv), []
    state = utils.start_process(args)
    checkpoint = utils.open_output_dir(args)
    set_seed(args.seed)
    with state.main_process_first():
        examples, dev_examples, counts = read_data(args)
    if args.endpoint and not state.is_main_process:
        return None  # one process asks
    if args.endpoint:
        args.eval_generate = args.eval_generate or max(map(len, dev_examples.values()))
        settle_thinking(args, sum(dev_examples.values(), []))
        dev_sets = {name: DevSet([], choose_generated(args, name, dev, None)) for name, dev in dev_examples.items()}
        run = {"flags": vars(args), "data": counts}
        return run if args.dry_run else report_evaluation(args, run, measure(args, dev_sets))

    config, tokenizer = utils.load_config(args), utils.load_tokenizer(args)
    chat = settle_chat(args, examples, dev_examples, config, tokenizer, notes)
    with state.main_process_first():
        train_set, dev_sets = make_samples(args, examples, dev_examples, chat, counts)
    train_set = train_set or TrainSet(next(iter(dev_sets.values())).samples)  # --eval_only
    plan = plan_run(args, train_set, dev_sets, notes)
    model, plain_head, precision = load_model(args, config, notes)
    sets = [flat(part) for part in (train_set, *(dev.samples for dev in dev_sets.values()))]
    largest = max(sample["input_ids"].max() for samples in sets for sample in samples)
    utils.check_vocabulary(model, args, tokenizer, largest)
    trainer_class, own = SftTrainer, {"data_collator": collate}
    if args.pref_loss:
        pair_sets = [dev.samples for dev in dev_sets.values()] + [train_set] * (not args.eval_only)
        trainer_class, own = PreferenceTrainer, {"pair_sets": pair_sets}
    trainer = trainer_class(
        flags=args, chat=chat, plain_head=plain_head, model=model, measure=partial(measure, args, dev_sets),
        train_dataset=train_set,
        eval_dataset=train_set,  # never read: Trainer refuses to evaluate without one
        args=utils.training_arguments(args, plan, precision, drop_last=False), processing_class=tokenizer, **own,
    )
    texts = [[(e.messages, e.tools, e.rejected) for e in part] for part in (examples, *dev_examples.values())]
    fingerprint = Hasher.hash([texts, tokenizer.chat_template])
    run = utils.describe_run(args, precision, fingerprint, checkpoint) | {"data": counts}
    if args.eval_only:
        for note in notes:
            say(f"note      {note}")
        if args.dry_run:
            return run
        trainer.before_training()
        return report_evaluation(args, run, trainer.measure(trainer))
    show_examples(train_set, examples, chat, notes)
    tokens = list(map(tokens_of, train_set))
    compared = flat(train_set[:8])[:8]
    inputs = partial(first_ids, examples, chat, args, len(compared))
    outputs = partial(first_logits, trainer, compared)
    report = utils.carry_out(trainer, args, plan, run, checkpoint, tokens, inputs, outputs, AutoModelForCausalLM,
                             write_files=partial(save_stops, args, chat))
    if args.sanity_overfit and "metrics" in report:
        check_overfit(report["metrics"]["after"], train_set)
    return report


if __name__ == "__main__":
    utils.run(main, parse_args)

"""Examples become samples of token ids and masks, kept on disk from run to run.

Shapes: T tokens of a sample.
"""

import copy
import json
from collections import Counter, defaultdict

from parts.masks import TOO_LONG, encode_row, turn
from parts.messages import functions_of
from parts.pieces import Pieces
from parts.splits import say_drops
from parts.template import Chat
from parts.token_cache import cached_map, ragged, tokens_key
from parts.trials import ANSWER, QUESTION, as_message, is_whole
from utils import InputError, say

import numpy as np
from datasets import Features, Value
from datasets import List as ListOf

COLUMNS = Features(
    {
        "row": Value("int64"),  # which Example
        "input_ids": ListOf(Value("int32")),
        "supervised": ListOf(Value("bool")),
        "reason": Value("string"),  # why a turn was dropped, which has no ids; else ""
        "shortened": Value("int32"),  # prompts of the row, with each of its samples
    }
)


class TrainSet(list):
    """Samples {"input_ids" (T,), "supervised" (T,) bool}, or pairs {"sides": [chosen, rejected]}.

    `epoch` is set by the training loop. `unrolled` is how many times the tokens of each row's
    longest sample there are.
    """

    epoch = 0
    unrolled = 1.0


def flat(samples):
    """Return samples as they are, or the two sides of each pair."""
    sides = []
    for sample in samples:
        sides += sample.get("sides", [sample])
    return sides


def tokens_of(sample):
    """Return the number of tokens of a sample, or of both sides of a pair."""
    return sum(len(side["input_ids"]) for side in flat([sample]))


def longest_side(pair):
    """Return the tokens of the longer side of a pair."""
    return max(len(side["input_ids"]) for side in pair["sides"])


def first_answer(sample):
    """Return the index of a sample's first supervised token."""
    return int(sample["supervised"].nonzero()[0][0])


# ---------------------------------------------------------------- tokens


def encode_example(row, text, chat, rules):
    """Return the COLUMNS of one Example in JSON: a dict for each sample and each dropped turn."""
    samples, drops, shortened = encode_row(chat, *json.loads(text), rules)
    found = []
    for ids, spans in samples:
        supervised = [False] * len(ids)
        for start, end in spans:
            supervised[start:end] = [True] * (end - start)
        found.append([row, ids, supervised, "", shortened])
    for reason in drops:
        found.append([row, [], [], reason, 0])
    return [dict(zip(COLUMNS, cells, strict=True)) for cells in found]


def cache_key(texts, chat, rules):
    """Return all that the tokens depend on, the code that makes them included."""
    code = (functions_of, Chat.render, Pieces.ids, is_whole, turn, tokenise)  # one of each file
    return [
        texts,
        tokens_key(chat.tokenizer, *code),
        chat.tokenizer.chat_template,
        chat.thinking,
        chat.stops,
        chat.end,
        rules.max_length,
        rules.overlong,
        rules.train_turns,
    ]


def tokenise(examples, chat, rules, as_pairs, workers):
    """Turn Examples into samples of token ids and masks.

    Returns (TrainSet, {reason: [where a turn was dropped]}, how many prompts were shortened).
    """
    if not examples:  # --eval_only
        return TrainSet(), {}, 0

    def encode(batch):
        found = []
        for row, text in zip(batch["row"], batch["example"], strict=True):
            found += encode_example(row, text, chat, rules)
        return {name: [cells[name] for cells in found] for name in COLUMNS}

    # as JSON: Arrow would give each object the keys of all others
    parts = ([each.messages, each.tools, each.rejected] for each in examples)
    texts = [json.dumps(part, ensure_ascii=False) for part in parts]
    columns = {"row": list(range(len(texts))), "example": texts}
    data = cached_map(columns, encode, cache_key(texts, chat, rules), workers, COLUMNS)
    samples, drops = read_back(data, examples)
    if rules.overlong == "error" and TOO_LONG in drops:
        raise InputError(
            f"{drops[TOO_LONG][0]}: longer than --max_length {rules.max_length}. Raise it, or drop "
            "--overlong error."
        )
    if as_pairs:
        samples = paired(samples)
    return samples, drops, sum(data["shortened"])


def read_back(data, examples):
    """Return (TrainSet, {reason: [where a turn was dropped]}) of a Dataset of COLUMNS."""
    ids, offsets = ragged(data, "input_ids")
    supervised, _ = ragged(data, "supervised")
    samples = TrainSet()
    drops = defaultdict(list)
    longest = Counter()  # tokens of a row's longest sample
    for i, (row, reason) in enumerate(zip(data["row"], data["reason"], strict=True)):
        if reason:
            drops[reason].append(examples[row].where)
            continue
        part = slice(offsets[i], offsets[i + 1])
        samples.append({"input_ids": ids[part], "supervised": supervised[part]})
        longest[row] = max(longest[row], len(ids[part]))
    if samples:
        samples.unrolled = sum(map(tokens_of, samples)) / longest.total()
    return samples, drops


def paired(samples):
    """Return the TrainSet of pairs whose sides follow each other in `samples`."""
    sides = zip(samples[::2], samples[1::2], strict=True)
    return TrainSet({"sides": [chosen, rejected]} for chosen, rejected in sides)


def first_ids(examples, chat, rules, count, tokenizer):
    """Return the token ids of the first `count` samples, as `chat` makes them with `tokenizer`.

    So a tokenizer that was saved is compared with the one that was trained with.
    """
    other = copy.copy(chat)
    other.tokenizer = tokenizer
    other.pieces = Pieces(tokenizer)  # which remembers nothing of the other's
    other.pieces.cuts = chat.pieces.cuts
    found = []
    for example in examples:
        if len(found) >= count:
            break
        samples, _, _ = encode_row(other, example.messages, example.tools, example.rejected, rules)
        found += [ids for ids, _ in samples]
    return found[:count]


# ---------------------------------------------------------------- the sets of a run


def make_samples(examples, dev_examples, chat, rules, as_pairs, workers):
    """Tokenise everything: (TrainSet, {name of a dev set: TrainSet}, counts for the report).

    Raises InputError where nothing is left to learn from or to score.
    """
    train_set, drops, shortened = tokenise(examples, chat, rules, as_pairs, workers)
    dropped = say_losses(drops, train_set, rules, "the training set")
    if shortened:
        say(
            f"shortened {shortened} prompts to --max_length {rules.max_length}, from the middle of "
            "their longest text"
        )
    if not train_set and examples:  # without examples dev sets are all that is measured
        if list(drops) == [TOO_LONG]:
            raise InputError(
                f"all {len(drops[TOO_LONG])} responses were cut away by --max_length "
                f"{rules.max_length}. Raise it: the longest row has {longest_row(examples, chat)} "
                "tokens."
            )
        raise InputError("no row has a token to learn from. Look at what was dropped, above.")
    dev_samples = {}
    for name, dev in dev_examples.items():
        found, drops, _ = tokenise(dev, chat, rules, as_pairs, workers)
        whose = f"the dev set {name}".rstrip()
        for reason, count in say_losses(drops, found, rules, whose).items():
            dropped[f"{name or 'dev'}: {reason}"] = count
        if not found:
            raise InputError(
                f"dev set {name or 'dev'}: no row has a token to score. Look at what was dropped, "
                "above."
            )
        dev_samples[name] = found
    return train_set, dev_samples, {"dropped": dropped, "shortened": shortened}


def say_losses(drops, samples, rules, whose):
    """Print what a set lost, {reason: [where]}, and what is left; return {reason: count}."""
    more = {reason: f", of {whose}" for reason in drops}
    if TOO_LONG in drops:
        count = len(drops[TOO_LONG])
        left = sum(map(answers_of, samples))
        more[TOO_LONG] += (
            f": {count / (count + left):.1%} of its answers, {left} are left. Raise "
            f"--max_length {rules.max_length}, or pass --overlong truncate_prompt"
        )
    return say_drops(drops, more)


def answers_of(sample):
    """Return how many answers a sample teaches; a pair counts as one."""
    if "sides" in sample:
        return 1
    mask = sample["supervised"]
    return int(mask[0]) + int((mask[1:] & ~mask[:-1]).sum())  # each begins behind a prompt


def longest_row(examples, chat):
    """Return the tokens of the longest of the first 1,000 rows, prompt and last answer."""
    longest = 0
    for example in examples[:1000]:
        before = example.messages[: example.last]
        for answer in (example.messages[example.last], example.rejected):
            if answer:
                messages = chat.prepare([*before, answer])
                prompt, said = turn(chat, messages, len(messages) - 1, example.tools)
                longest = max(longest, len(prompt) + len(said))
    return longest


def unknown_share(samples, chat):
    """Return the share of unknown tokens, special ones left aside.

    It is 0 where the template itself writes that token, or it ends answers: GPT-2 has one token for
    everything.
    """
    tokenizer = chat.tokenizer
    unknown = tokenizer.unk_token_id
    trial = [as_message("user", QUESTION), as_message("assistant", ANSWER)]
    written = chat.rendered(trial, False) or ""
    if unknown is None or tokenizer.unk_token in written or unknown in chat.stop_ids:
        return 0
    special = set(tokenizer.convert_tokens_to_ids(chat.special)) - {unknown}
    ids = np.concatenate([sample["input_ids"] for sample in samples])
    is_special = np.isin(ids, np.array([*special]))
    return (ids == unknown).sum() / max(1, len(ids) - is_special.sum())

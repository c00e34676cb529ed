"""Samples of whole data sets: what the tokens of rewritten history cost."""

from families import FAMILIES, make_chat
from parts.chats import Example
from parts.masks import Rules
from parts.samples import tokenise


def ten_turns(length):
    """Return 10 turns of `length` words each."""
    text = " ".join(["apple"] * length)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(10)]


def test_tokens_that_rewritten_history_costs_are_counted():
    examples = [Example("", ten_turns(length)) for length in (50, 100)]
    rules = Rules(10_000)
    chat = make_chat(*FAMILIES["qwen3"][0])
    train_set = tokenise(examples, chat, rules, False, 0)[0]
    sizes = [len(sample["input_ids"]) for sample in train_set]
    assert len(sizes) == 10 and train_set.unrolled == sum(sizes) / (sizes[4] + sizes[9])
    assert 2.9 < train_set.unrolled < 3.1  # (1 + 2 + 3 + 4 + 5) / 5
    last = Rules(10_000, train_turns="last")
    assert tokenise(examples, chat, last, False, 0)[0].unrolled == 1
    assert tokenise(examples, make_chat(*FAMILIES["chatml"][0]), rules, False, 0)[0].unrolled == 1

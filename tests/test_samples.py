"""Samples of whole data sets: what rewritten history costs, another tokenizer's."""

from conftest import chat_tokenizer
from families import FAMILIES, make_chat
from parts.chats import Example
from parts.masks import Rules
from parts.samples import first_ids, tokenise


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


def test_ids_of_another_tokenizer_are_its_own():
    chat = make_chat(*FAMILIES["chatml"][0])
    template, eos, special, *_ = FAMILIES["chatml"][0]
    texts = ["apple apple apple"] * 50
    other = chat_tokenizer(template, eos, None, special.split(), texts)
    examples = [Example("", ten_turns(length)) for length in (5, 10)]
    rules = Rules(10_000)
    own = first_ids(examples, chat, rules, 2, chat.tokenizer)[0]
    others = first_ids(examples, chat, rules, 2, other)[0]
    text = chat.tokenizer.decode(own)
    assert text == other.decode(others) and own != others
    assert others == other(text)["input_ids"]  # nothing is remembered of the first

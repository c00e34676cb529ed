"""Ids that are put together from pieces are those of the whole text, and no piece is read twice."""

import random

from conftest import chat_tokenizer
from families import CHATML, FAMILIES, make_chat
from parts import masks
from parts.masks import Rules
from parts.template import Chat

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers


def long_conversation(turns):
    """Return `turns` turns of odd texts, some of weight 0."""
    draw = random.Random(turns)
    parts = [
        "apple",
        "\n",
        "\n\n",
        "  ",
        "<",
        "<|",
        "|>",
        "e\u0301",
        "\u65e5\u672c",
        "42",
        '{"a": [1]}',
        "</",
    ]
    return [
        {
            "role": "assistant" if i % 2 else "user",
            "content": draw.choice(["", " ", "\n"])
            + "x"
            + "".join(draw.choices(parts, k=draw.randrange(40))),
            "weight": 0 if i % 7 == 3 else 1,
        }
        for i in range(turns)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_are_those_of_tokenising_every_turn_anew(name):
    chat = make_chat(*FAMILIES[name][0])
    slow = make_chat(*FAMILIES[name][0])
    slow.pieces.cuts = None
    for turns in (2, 5, 12):
        for limits in ({}, {"max_length": 150}, {"max_length": 150, "overlong": "truncate_prompt"}):
            messages = long_conversation(turns)
            rules = Rules(**{"max_length": 10_000} | limits)
            found = masks.samples(chat, chat.prepare(messages), None, rules)
            assert found == masks.samples(slow, slow.prepare(messages), None, rules)


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma", "mistral", "phi 3"])
def test_a_conversation_is_tokenised_once(name, monkeypatch):
    chat, read = make_chat(*FAMILIES[name][0]), []
    tokenised = chat.pieces.tokenised
    chat.pieces.forget()
    monkeypatch.setattr(
        chat.pieces, "tokenised", lambda texts: read.extend(texts) or tokenised(texts)
    )
    messages = [turn | {"weight": 1} for turn in long_conversation(40)]
    whole = chat.render(messages, False)
    assert masks.samples(chat, messages, None, Rules(10**6))[0]
    assert sum(map(len, read)) < 1.5 * len(whole)  # turn by turn it is 20 times as much


@pytest.mark.parametrize("trait", ["lstrip", "rstrip", "single_word", "normalized"])
@pytest.mark.parametrize("before", ["metaspace", "bytes"])
def test_texts_are_cut_where_their_tokens_stay_the_same(before, trait):
    tokenizer = chat_tokenizer(CHATML, "<|im_end|>", None, ["<|im_start|>", "<|im_", "[A]"])
    backend = tokenizer.backend_tokenizer
    if before == "metaspace":  # Llama 2's, which begins a text in a token of its own
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.normalizer = normalizers.NFC()
    greedy = [AddedToken(text, lstrip=True, normalized=False) for text in ("<|im_end|>!", "A][")]
    tokenizer.add_tokens([AddedToken("<odd>", **{"normalized": False} | {trait: True}), *greedy])
    chat = Chat(tokenizer, False, [])
    assert chat.pieces.cuts and "<odd>" not in chat.pieces.cuts.pattern or trait == "rstrip"
    draw = random.Random(0)
    parts = [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "[A]",
        "A]",
        "A][",
        "<odd>",
        "<|im_end|>!",
        " ",
        "e\u0301",
        "! ",
    ]
    for _ in range(300):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        assert chat.ids(text) == chat.tokenised(text), text


def test_a_letter_behind_a_token_of_whole_words_is_no_place_to_cut():
    tokenizer = chat_tokenizer(CHATML, "<|im_end|>", None, ["<|im_start|>", "End", "\u00c9"])
    tokenizer.add_tokens([AddedToken("<odd>", single_word=True, normalized=False)])
    chat = Chat(tokenizer, False, [])
    for text in ("<odd>End<odd>", "<odd>\u00c9 <odd>", "<odd><|im_end|>", "End<odd>"):
        assert chat.ids(text) == chat.tokenised(text), text

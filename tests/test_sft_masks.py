"""What is supervised, token by token, for the template families, written from their documentation."""

import json
import random
import types

from conftest import chat_tokenizer
from train_sft_lora import LEFT_OUT, Chat, Drop, Example, as_message, tokenise

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    + CHATML
)  # brings a system turn of its own
QWEN3 = (  # history loses its thinking; without thinking the prompt holds an empty block
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set content = m.content %}"
    "{% set thought = m.reasoning_content or '' %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|start_header_id|>{{ m.role }}"
    "<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (  # ends whole conversations, but not prompts, in a second token
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (  # only the prompt opens a thinking block
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
DEEPSEEK_CLOSED = DEEPSEEK.replace("<think>\n", "<think></think>").replace(
    "<|Assistant|>{{ m", "<|Assistant|></think>{{ m"
)
GLM = (  # no end-of-turn token
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
COHERE = (  # an answer is always followed by the next prompt
    "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|end|>{% endfor %}<|turn|>assistant: "
)
NEMO = (  # strict about tool calls; the system text stands in a user turn, where that is the last one
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ system + '\n\n' if system and loop.last }}"
    "{{ m.content }}[/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS]{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('Tool call IDs should have length 9!') }}{% endif %}"
    "{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}"
    "[/TOOL_RESULTS]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
R1_DISTILL = (  # calls have a type; a turn that calls ends twice
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.tool_calls %}<|Assistant|>{% for c in m.tool_calls %}"
    "{{ '<|call|>' + c.type + ' ' + c.function.name + '\n' + c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% if m.role == 'assistant' %}<|Assistant|>{{ m.content }}{{ eos_token }}{% endif %}"
    "{% if m.role == 'tool' %}<|output|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n</think>{% endif %}"
)
FIRST_CALL = CHATML.replace(  # gpt-oss renders one call of a turn
    "{{ m.content }}",
    "{{ m.content }}{% if m.tool_calls %}<call>{{ m.tool_calls[0].function | tojson }}{% endif %}",
)
NO_TOOL_TURNS = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
)  # Phi-3.5
MERGING = (
    "{% for m in messages %}{{ m.role }}: a{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: a{% endif %}"
)

Q1, A1, Q2, A2 = "What is 2+2?", "It is four.", "And 3+3?", '{"six": [6]}'
Q25_SYSTEM = "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
EMPTY = "<think>\n\n</think>\n\n"

# name: (template, eos, other special tokens, thinking, generation_config's stops), the two turns as (prompt, answer),
# whether they share a sample, the stop tokens
FAMILIES = {
    "chatml": (
        (CHATML, "<|im_end|>", "<|im_start|> <|endoftext|>", False, ["<|endoftext|>"]),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"{A2}<|im_end|>",
        True,
        ["<|im_end|>", "<|endoftext|>"],
    ),
    "qwen2.5": (
        (QWEN25, "<|im_end|>", "<|im_start|>", False, []),
        f"{Q25_SYSTEM}<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"{A1}<|im_end|>",
        f"{Q25_SYSTEM}<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}"
        "<|im_end|>\n<|im_start|>assistant\n",
        f"{A2}<|im_end|>",
        True,
        ["<|im_end|>"],
    ),
    "base model, whose own eos is another": (
        (CHATML, "<|endoftext|>", "<|im_start|> <|im_end|>", False, ["<|endoftext|>"]),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"{A2}<|im_end|>",
        True,
        ["<|endoftext|>", "<|im_end|>"],
    ),
    "qwen3": (
        (QWEN3, "<|im_end|>", "<|im_start|>", False, []),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{EMPTY}",
        f"{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        f"<|im_start|>assistant\n{EMPTY}",
        f"{A2}<|im_end|>",
        False,
        ["<|im_end|>"],
    ),
    "qwen3 thinking": (
        (QWEN3, "<|im_end|>", "<|im_start|>", True, []),
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n",
        f"<think>\nadd them\n</think>\n\n{A1}<|im_end|>",
        f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n"
        "<|im_start|>assistant\n",
        f"<think>\nadd again\n</think>\n\n{A2}<|im_end|>",
        False,
        ["<|im_end|>"],
    ),
    "llama 3": (
        (
            LLAMA3,
            "<|eot_id|>",
            "<|begin_of_text|> <|start_header_id|> <|end_header_id|>",
            False,
            [],
        ),
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{Q1}<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n",
        f"{A1}<|eot_id|>",
        f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{Q1}<|eot_id|><|start_header_id|>assistant"
        f"<|end_header_id|>\n\n{A1}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{Q2}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        f"{A2}<|eot_id|>",
        True,
        ["<|eot_id|>"],
    ),
    "gemma": (
        (GEMMA, "<eos>", "<bos> <start_of_turn> <end_of_turn>", False, ["<eos>", "<end_of_turn>"]),
        f"<bos><start_of_turn>user\n{Q1}<end_of_turn>\n<start_of_turn>model\n",
        f"{A1}<end_of_turn>",
        f"<bos><start_of_turn>user\n{Q1}<end_of_turn>\n<start_of_turn>model\n{A1}<end_of_turn>\n<start_of_turn>user\n{Q2}"
        "<end_of_turn>\n<start_of_turn>model\n",
        f"{A2}<end_of_turn>",
        True,
        ["<eos>", "<end_of_turn>"],
    ),
    "mistral": (
        (MISTRAL, "</s>", "<s> [INST] [/INST]", False, []),
        f"<s>[INST] {Q1} [/INST]",
        f"{A1}</s>",
        f"<s>[INST] {Q1} [/INST]{A1}</s>[INST] {Q2} [/INST]",
        f"{A2}</s>",
        True,
        ["</s>"],
    ),
    "phi 3": (
        (PHI3, "<|endoftext|>", "<|user|> <|assistant|> <|end|>", False, []),
        f"<|user|>\n{Q1}<|end|>\n<|assistant|>\n",
        f"{A1}<|end|>",
        f"<|user|>\n{Q1}<|end|>\n<|assistant|>\n{A1}<|end|>\n<|user|>\n{Q2}<|end|>\n<|assistant|>\n",
        f"{A2}<|end|>",
        True,
        ["<|endoftext|>", "<|end|>"],
    ),
    "deepseek": (
        (DEEPSEEK, "<|eos|>", "<|bos|> <|User|> <|Assistant|>", False, []),
        f"<|bos|><|User|>{Q1}<|Assistant|><think>\n",
        f"{A1}<|eos|>",
        f"<|bos|><|User|>{Q1}<|Assistant|>{A1}<|eos|><|User|>{Q2}<|Assistant|><think>\n",
        f"{A2}<|eos|>",
        False,
        ["<|eos|>"],
    ),
    "deepseek, thinking closed": (
        (DEEPSEEK_CLOSED, "<|eos|>", "<|bos|> <|User|> <|Assistant|>", False, []),
        f"<|bos|><|User|>{Q1}<|Assistant|><think></think>",
        f"{A1}<|eos|>",
        f"<|bos|><|User|>{Q1}<|Assistant|></think>{A1}<|eos|><|User|>{Q2}<|Assistant|><think></think>",
        f"{A2}<|eos|>",
        False,
        ["<|eos|>"],
    ),
    "no end-of-turn token, the base stops at the next user": (
        (GLM, "<|endoftext|>", "<|user|> <|assistant|>", False, ["<|endoftext|>", "<|user|>"]),
        f"<|user|>\n{Q1}<|assistant|>\n",
        f"{A1}<|user|>",
        f"<|user|>\n{Q1}<|assistant|>\n{A1}<|user|>\n{Q2}<|assistant|>\n",
        f"{A2}<|user|>",
        True,
        ["<|endoftext|>", "<|user|>"],
    ),
    "no end-of-turn token, the base says nothing": (
        (GLM, "<|endoftext|>", "<|user|> <|assistant|>", False, []),
        f"<|user|>\n{Q1}<|assistant|>\n",
        f"{A1}<|endoftext|>",
        f"<|user|>\n{Q1}<|assistant|>\n{A1}<|user|>\n{Q2}<|assistant|>\n",
        f"{A2}<|endoftext|>",
        False,
        ["<|endoftext|>", "<|user|>"],
    ),
    "the next prompt follows every answer": (
        (COHERE, "<|end|>", "<|turn|>", False, []),
        f"<|turn|>user: {Q1}<|end|><|turn|>assistant: ",
        f"{A1}<|end|>",
        f"<|turn|>user: {Q1}<|end|><|turn|>assistant: {A1}<|end|><|turn|>user: {Q2}<|end|><|turn|>assistant: ",
        f"{A2}<|end|>",
        False,  # in history the space before an answer is part of its first token
        ["<|end|>"],
    ),
    "no template": (
        (None, "<|eos|>", "", False, []),
        f"### User:\n{Q1}\n\n### Assistant:\n",
        f"{A1}<|eos|>",
        f"### User:\n{Q1}\n\n### Assistant:\n{A1}<|eos|>\n\n### User:\n{Q2}\n\n### Assistant:\n",
        f"{A2}<|eos|>",
        True,
        ["<|eos|>"],
    ),
}


def conversation():
    return [
        {"role": "user", "content": Q1},
        {"role": "assistant", "content": A1, "reasoning_content": "add them"},
        {"role": "user", "content": Q2},
        {"role": "assistant", "content": A2, "reasoning_content": "add again"},
    ]


def flags(**changes):
    return types.SimpleNamespace(
        **{"train_turns": "all", "max_length": 10_000, "overlong": "drop"} | changes
    )


def make_chat(template, eos, special, thinking, stops):
    bos = next(
        (
            token
            for token in special.split()
            if token in ("<s>", "<bos>", "<|bos|>", "<|begin_of_text|>")
        ),
        None,
    )
    return Chat(chat_tokenizer(template, eos, bos, special.split()), thinking, stops)


@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_tokens_are_what_inference_has_to_say(name):
    settings, prompt1, answer1, prompt2, answer2, joined, stops = FAMILIES[name]
    chat = make_chat(*settings)
    assert chat.stops == stops
    messages = chat.prepare(conversation())
    samples, drops, _ = chat.samples(messages, None, flags())
    assert not drops
    expected = [(prompt1, answer1), (prompt2, answer2)]
    for i, (prompt, answer) in zip((1, 3), expected, strict=True):
        seen = chat.tokenizer.apply_chat_template(
            messages[:i], add_generation_prompt=True, enable_thinking=settings[3], return_dict=False
        )
        assert seen == chat.ids(prompt), "the hand-written prompt is not what inference sees"
        if not joined:
            ids, spans = samples[i // 2]
            assert ids == seen + chat.ids(answer)
            assert spans == [(len(seen), len(ids))]
    if joined:
        (ids, spans), first = samples[0], len(chat.ids(prompt1))
        assert len(samples) == 1
        assert ids == chat.ids(prompt2) + chat.ids(answer2)
        assert spans == [
            (first, first + len(chat.ids(answer1))),
            (len(chat.ids(prompt2)), len(ids)),
        ]
        assert ids[: spans[0][1]] == chat.ids(prompt1) + chat.ids(answer1)
    for ids, spans in samples:
        assert all(ids[end - 1] in chat.stop_ids for _, end in spans)


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
    slow.cuts = None
    for turns in (2, 5, 12):
        for limits in ({}, {"max_length": 150}, {"max_length": 150, "overlong": "truncate_prompt"}):
            messages = long_conversation(turns)
            assert chat.samples(chat.prepare(messages), None, flags(**limits)) == slow.samples(
                slow.prepare(messages), None, flags(**limits)
            )


@pytest.mark.parametrize("name", ["chatml", "llama 3", "gemma", "mistral", "phi 3"])
def test_a_conversation_is_tokenised_once(name, monkeypatch):
    chat, read = make_chat(*FAMILIES[name][0]), []
    tokenised = chat.tokenised
    chat.pieces.clear()
    monkeypatch.setattr(chat, "tokenised", lambda texts: read.extend(texts) or tokenised(texts))
    messages = [turn | {"weight": 1} for turn in long_conversation(40)]
    whole = chat.render(messages, False)
    assert chat.samples(messages, None, flags(max_length=10**6))[0]
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
    assert chat.cuts and "<odd>" not in chat.cuts.pattern or trait == "rstrip"
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


def ten_turns(length):
    """Return 10 turns of `length` words each."""
    text = " ".join(["apple"] * length)
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i in range(10)]


def test_tokens_that_rewritten_history_costs_are_counted():
    examples = [Example("", ten_turns(length)) for length in (50, 100)]
    settings = flags(num_workers=0, pref_loss=None)
    chat = make_chat(*FAMILIES["qwen3"][0])
    train_set = tokenise(examples, chat, settings)[0]
    sizes = [len(sample["input_ids"]) for sample in train_set]
    assert len(sizes) == 10 and train_set.unrolled == sum(sizes) / (sizes[4] + sizes[9])
    assert 2.9 < train_set.unrolled < 3.1  # (1 + 2 + 3 + 4 + 5) / 5
    assert (
        tokenise(examples, chat, flags(num_workers=0, pref_loss=None, train_turns="last"))[
            0
        ].unrolled
        == 1
    )
    assert tokenise(examples, make_chat(*FAMILIES["chatml"][0]), settings)[0].unrolled == 1


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_last_turn_alone(name):
    settings, _, _, prompt2, answer2, *_ = FAMILIES[name]
    chat = make_chat(*settings)
    samples, _, _ = chat.samples(chat.prepare(conversation()), None, flags(train_turns="last"))
    ids, spans = samples[0]
    assert len(samples) == 1
    assert ids == chat.ids(prompt2) + chat.ids(answer2) and spans == [
        (len(chat.ids(prompt2)), len(ids))
    ]


def test_turn_of_weight_zero_is_context_alone():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = conversation()
    messages[1]["weight"] = 0
    (ids, spans), *others = chat.samples(chat.prepare(messages), None, flags())[0]
    assert not others and len(spans) == 1
    assert chat.tokenizer.decode(ids[slice(*spans[0])]) == f"{A2}<|im_end|>"


def test_tokens_do_not_merge_across_the_border():
    tokenizer = chat_tokenizer(
        MERGING, "<|eos|>", None, [], texts=["assistant: apple apple apple"] * 50
    )
    chat = Chat(tokenizer, False, [])
    assert (
        len(chat.ids(" apple")) == 1
    )  # in the whole render, the prompt's "a" and the answer's "pple" are one token
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "pple"}]
    prompt, answer = chat.turn(messages, 1)
    assert prompt == chat.ids("user: ax<|eos|>assistant: a")
    assert answer == chat.ids("pple<|eos|>")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_is_in_the_text_of_the_template_ends_as_any_other(name):
    chat = make_chat(*FAMILIES[name][0])

    def said(answer):
        messages = chat.prepare([as_message("user", Q1), as_message("assistant", answer)])
        return chat.tokenizer.decode(chat.turn(messages, 1)[1])

    ending = said(A1).partition(A1)[2]
    for answer in ("d", "e", "end", "text", "of", "END", "eos", "s", "im", "assistant"):
        assert said(answer).endswith(answer + ending), answer


def test_system_turn_is_folded_where_the_template_refuses_it():
    chat = make_chat(*FAMILIES["gemma"][0])
    messages = [{"role": "system", "content": "Be brief."}, *conversation()[:2]]
    assert chat.folds_system
    prompt, _ = chat.turn(chat.prepare(messages), 1)
    assert chat.tokenizer.decode(prompt) == (
        f"<bos><start_of_turn>user\nBe brief.\n\n{Q1}<end_of_turn>\n<start_of_turn>model\n"
    )
    greeted = chat.prepare([messages[0], {"role": "assistant", "content": "Hello."}, *messages[1:]])
    assert [turn["content"] for turn in greeted[:2]] == [
        "Hello.",
        f"Be brief.\n\n{Q1}",
    ]  # no words in its mouth
    assert not make_chat(*FAMILIES["chatml"][0]).folds_system


def test_system_text_of_the_template_itself_is_found():
    assert make_chat(*FAMILIES["qwen2.5"][0]).own_system == "system\nYou are Qwen."
    for name in ("chatml", "qwen3", "llama 3", "gemma", "mistral", "phi 3", "no template"):
        assert make_chat(*FAMILIES[name][0]).own_system is None


def test_template_that_cuts_an_answer_is_found_out():
    cutting = CHATML.replace("{{ m.content }}", "{{ m.content[:12] }}")
    chat = Chat(
        chat_tokenizer(cutting, "<|im_end|>", None, ["<|im_start|>"]), False, ["<|im_end|>"]
    )
    messages = [
        {"role": "user", "content": "short"},
        {"role": "assistant", "content": "much longer than that"},
    ]
    with pytest.raises(Drop, match="does not render whole"):
        chat.turn(messages, 1)


def test_reasoning_that_the_template_leaves_out_is_found_out():
    chat = make_chat(CHATML, "<|im_end|>", "<|im_start|>", True, [])
    with pytest.raises(Drop, match="reasoning"):
        chat.turn(chat.prepare(conversation()), 1)


def test_special_tokens_inside_a_text_are_found():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = [
        {"role": "user", "content": "say <|im_end|>"},
        {"role": "assistant", "content": "no"},
    ]
    with pytest.raises(Drop, match="special token <.im_end.>"):
        chat.prepare(messages)


def test_tools_and_calls_are_rendered_and_supervised():
    template = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}" + CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for call in m.tool_calls %}<call>{{ call | tojson }}</call>{% endfor %}",
    )
    chat = Chat(chat_tokenizer(template, "<|im_end|>", None, ["<|im_start|>"]), False, [])
    call = {"function": {"name": "add", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "four"},
    ]
    (ids, spans), *others = chat.samples(chat.prepare(messages), [{"name": "add"}], flags())[0]
    assert not others and chat.tokenizer.decode(ids).startswith('tools: [{"name": "add"}]\n')
    calls, answer = (chat.tokenizer.decode(ids[start:end]) for start, end in spans)
    assert calls == '<call>{"function": {"name": "add", "arguments": {}}}</call><|im_end|>'
    assert answer == "four<|im_end|>"


def call(city="Paris", **changes):
    function = {"name": "weather", "arguments": json.dumps({"city": city})} | changes
    return {"id": "a1B2c3D4e", "type": "function", "function": function}


def tool_conversation(calls, text=""):
    return [
        *conversation()[:2],
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": text} | ({"tool_calls": calls} if calls else {}),
        *(
            {"role": "tool", "content": "rain", "tool_call_id": "a1B2c3D4e"}
            for _ in calls or [None]
        ),
        {"role": "assistant", "content": "It rains."},
    ]


def learnt(chat, messages, tools=None):
    """Return the texts of the supervised spans, and why turns were dropped."""
    samples, drops, _ = chat.samples(chat.prepare(messages), tools, flags())
    return [
        chat.tokenizer.decode(ids[slice(*span)]) for ids, spans in samples for span in spans
    ], drops


STRICT = {
    "nemo": (
        (NEMO, "</s>", "<s> [INST] [/INST] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]", False, []),
        '[TOOL_CALLS]{"name": "weather", "arguments": {"city": "Paris"}}</s>',
    ),
    "r1 distill": (
        (R1_DISTILL, "<|eos|>", "<|bos|> <|User|> <|Assistant|> <|call|> <|output|>", False, []),
        '<|call|>function weather\n{"city": "Paris"}<|eos|>',
    ),
}


@pytest.mark.parametrize("name", STRICT)
def test_strict_templates_get_the_arguments_of_calls_as_objects(name):
    settings, called = STRICT[name]
    chat = make_chat(*settings)
    spans, drops = learnt(chat, tool_conversation([call()]))
    assert not drops and chat.takes_objects
    assert spans == [f"{A1}{settings[1]}", called, f"It rains.{settings[1]}"]


def test_text_and_call_with_a_stop_between_them_are_not_learnt_as_one_answer():
    parted = CHATML.replace(  # Nemotron-Nano's
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{% if m.content %}<|im_end|>\n<|im_start|>"
        "assistant\n{% endif %}{{ c.function | tojson }}{% endfor %}",
    )
    for chat in (
        make_chat(parted, "<|im_end|>", "<|im_start|>", False, []),
        make_chat(*STRICT["r1 distill"][0]),
    ):
        spans, drops = learnt(chat, tool_conversation([call()], "Let me see."))
        assert len(spans) == 2 and spans[0].startswith(A1) and spans[1].startswith("It rains.")
        assert len(drops) == 1 and "does not render whole" in drops[0]
        assert not learnt(chat, tool_conversation([call()]))[1]


def test_arguments_that_python_would_print_are_given_as_json():
    printing = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments }}{% endfor %}",
    )
    chat = make_chat(printing, "<|im_end|>", "<|im_start|>", False, [])
    for arguments in ('{"city": "Paris"}', {"city": "Paris"}):
        spans, _ = learnt(chat, tool_conversation([call(name="", arguments=arguments)]))
        assert spans[1] == '{"city": "Paris"}<|im_end|>'


@pytest.mark.parametrize("arguments", ["city=Paris", '"Paris"'])
def test_text_arguments_that_the_template_quotes_are_dropped(arguments):
    chat = make_chat(*STRICT["nemo"][0])
    spans, drops = learnt(chat, tool_conversation([call(arguments=arguments)]))
    assert spans == [f"{A1}</s>"] and len(drops) == 2
    assert all("arguments are a text, which the template quotes" in drop for drop in drops)
    assert not learnt(chat, tool_conversation([call(arguments="")]))[
        1
    ]  # OpenAI's form of no arguments


LOSSES = {  # template, what it renders of a conversation with tools, and what it does not
    "the call": (
        CHATML,
        tool_conversation([], "<call>weather</call>"),
        tool_conversation([call()]),
    ),
    "the call behind a text": (CHATML, conversation(), tool_conversation([call()], "Let me see.")),
    "the second call": (
        FIRST_CALL,
        tool_conversation([call()]),
        tool_conversation([call(), call("Rome")]),
    ),
    "the tool turn": (NO_TOOL_TURNS, conversation(), tool_conversation([], "<call>weather</call>")),
}


@pytest.mark.parametrize("name", LOSSES)
def test_answers_behind_tool_context_that_the_template_leaves_out_are_dropped(name):
    template, kept, lost = LOSSES[name]
    chat = make_chat(template, "<|im_end|>", "<|im_start|>", False, [])
    spans, drops = learnt(chat, kept)
    assert not drops and len(spans) == sum(turn["role"] == "assistant" for turn in kept)
    spans, drops = learnt(chat, lost)
    before = [A1, "<call>weather</call>"] if name == "the tool turn" else [A1]
    assert spans == [f"{text}<|im_end|>" for text in before]
    assert set(drops) == {LEFT_OUT} and len(spans) + len(drops) == 3


def test_system_text_that_moves_to_the_last_user_turn_is_learnt_from():
    chat = make_chat(*STRICT["nemo"][0])
    messages = [{"role": "system", "content": "Be brief."}, *conversation()]
    samples, drops, _ = chat.samples(chat.prepare(messages), None, flags())
    prompts = [
        f"<s>[INST]Be brief.\n\n{Q1}[/INST]",
        f"<s>[INST]{Q1}[/INST]{A1}</s>[INST]Be brief.\n\n{Q2}[/INST]",
    ]
    assert not drops and not chat.folds_system
    for (ids, spans), prompt, answer in zip(
        samples, prompts, (f"{A1}</s>", f"{A2}</s>"), strict=True
    ):
        assert ids == chat.ids(prompt) + chat.ids(answer)  # the prompt that inference sees
        assert spans == [(len(chat.ids(prompt)), len(ids))]


def test_a_prompt_that_changes_before_its_last_turn_and_in_it_is_not_learnt_from():
    spaced = NEMO.replace(
        "{{ m.content }}[/INST]", "{{ m.content }}{{ ' (last)' if loop.last }}[/INST]"
    )
    chat = make_chat(spaced, *STRICT["nemo"][0][1:])
    messages = [{"role": "system", "content": "Be brief."}, *conversation()]
    drops = chat.samples(chat.prepare(messages), None, flags())[1]
    assert (
        drops == ["rows whose prompt the template renders differently once the answer is there"] * 2
    )


def test_overlong_turns_are_dropped_and_the_ones_before_kept():
    settings, prompt1, answer1, *_ = FAMILIES["chatml"]
    chat = make_chat(*settings)
    length = len(chat.ids(prompt1)) + len(chat.ids(answer1))
    samples, drops, _ = chat.samples(chat.prepare(conversation()), None, flags(max_length=length))
    assert [ids for ids, _ in samples] == [chat.ids(prompt1) + chat.ids(answer1)]
    assert len(drops) == 1 and "do not fit" in drops[0]


def test_prompt_is_shortened_and_the_response_kept_whole():
    chat = make_chat(*FAMILIES["chatml"][0])
    long = " ".join(f"word{i}" for i in range(200))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": long},
        {"role": "assistant", "content": A2},
    ]
    samples, drops, shortened = chat.samples(
        messages, None, flags(max_length=120, overlong="truncate_prompt")
    )
    (ids, ((start, end),)), *_ = samples
    assert (drops, shortened) == ([], 1) and 60 < len(ids) <= 120
    assert chat.tokenizer.decode(ids[start:end]) == f"{A2}<|im_end|>"
    text = chat.tokenizer.decode(ids[:start])
    assert "Be brief." in text and "word0 " in text and " ... " in text and "word199" in text
    _, drops, _ = chat.samples(messages, None, flags(max_length=20, overlong="truncate_prompt"))
    assert drops == ["rows too long for --max_length even with the prompt shortened"]


def test_an_answer_that_no_question_precedes_is_not_learnt():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = [{"role": "assistant", "content": "Welcome!"}, *conversation()[:2]]
    samples, drops, _ = chat.samples(chat.prepare(messages), None, flags())
    assert drops == ["answers that no question precedes"]
    (ids, ((start, end),)), *others = samples
    assert not others and chat.tokenizer.decode(ids[start:end]) == f"{A1}<|im_end|>"


def test_arguments_of_calls_are_objects_for_the_template_unless_it_refuses_them():
    tojson = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ c.arguments | tojson }}{% endfor %}",
    )
    joined = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls %}{{ '' + c.function.arguments }}{% endfor %}",
    ).replace("c.arguments", "c.function.arguments")
    for template, name in (
        (tojson.replace("c.arguments", "c.function.arguments"), "object"),
        (joined, "text"),
    ):
        chat = Chat(chat_tokenizer(template, "<|im_end|>", None, ["<|im_start|>"]), False, [])
        assert chat.takes_objects == (name == "object")
        for arguments in (
            '{"a": null}',
            {"a": None},
        ):  # OpenAI's form, and the one transformers documents
            call = {"function": {"name": "", "arguments": arguments}}
            messages = [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            (ids, ((start, end),)), *_ = chat.samples(chat.prepare(messages), None, flags())[0]
            assert chat.tokenizer.decode(ids[start:end]) == '{"a": null}<|im_end|>'


def test_a_turn_that_the_template_leaves_out_is_found_out():
    forgetful = CHATML.replace(
        "{{ m.content }}", "{{ m.content if m.role == 'assistant' else m.content[:14] }}"
    )
    chat = Chat(chat_tokenizer(forgetful, "<|im_end|>", None, ["<|im_start|>"]), False, [])
    assert not chat.samples(chat.prepare(conversation()), None, flags())[1]
    messages = [
        {"role": "user", "content": f"{Q1} And more."},
        {"role": "assistant", "content": A1},
    ]
    assert chat.samples(messages, None, flags())[1] == [
        "rows with a turn that the template leaves out or changes"
    ]


def test_shortening_ends_where_a_character_is_many_tokens():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = [
        {"role": "user", "content": "\u0e01\u0e02" * 60},
        {"role": "assistant", "content": "x"},
    ]
    full = sum(map(len, chat.turn(messages, 1)))
    for length in range(full - 12, full):
        prompt, answer = chat.shortened(messages, 1, None, length)
        assert len(prompt) + len(answer) <= length

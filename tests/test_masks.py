"""What is supervised, token by token, for the template families, and how answers are read."""

from conftest import chat_tokenizer
from families import (
    A1,
    A2,
    CHATML,
    FAMILIES,
    FIRST_CALL,
    FRAMED,
    MERGING,
    NEMO,
    NO_TOOL_TURNS,
    Q1,
    Q2,
    STRICT,
    TEXT,
    call,
    conversation,
    make_chat,
    tool_conversation,
)
from parts import masks, trials
from parts.masks import Rules, decode_answer, find_frame
from parts.messages import Drop
from parts.scores import answer_of
from parts.template import LEFT_OUT, Chat
from parts.trials import as_message
from utils import InputError

import pytest


@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_tokens_are_what_inference_has_to_say(name):
    settings, prompt1, answer1, prompt2, answer2, joined, stops = FAMILIES[name]
    chat = make_chat(*settings)
    assert chat.stops == stops
    messages = chat.prepare(conversation())
    samples, drops, _ = masks.samples(chat, messages, None, Rules(10_000))
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


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_last_turn_alone(name):
    settings, _, _, prompt2, answer2, *_ = FAMILIES[name]
    chat = make_chat(*settings)
    samples, _, _ = masks.samples(
        chat, chat.prepare(conversation()), None, Rules(10_000, train_turns="last")
    )
    ids, spans = samples[0]
    assert len(samples) == 1
    assert ids == chat.ids(prompt2) + chat.ids(answer2) and spans == [
        (len(chat.ids(prompt2)), len(ids))
    ]


def test_turn_of_weight_zero_is_context_alone():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = conversation()
    messages[1]["weight"] = 0
    (ids, spans), *others = masks.samples(chat, chat.prepare(messages), None, Rules(10_000))[0]
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
    prompt, answer = masks.turn(chat, messages, 1)
    assert prompt == chat.ids("user: ax<|eos|>assistant: a")
    assert answer == chat.ids("pple<|eos|>")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_that_is_in_the_text_of_the_template_ends_as_any_other(name):
    chat = make_chat(*FAMILIES[name][0])

    def said(answer):
        messages = chat.prepare([as_message("user", Q1), as_message("assistant", answer)])
        return chat.tokenizer.decode(masks.turn(chat, messages, 1)[1])

    ending = said(A1).partition(A1)[2]
    for answer in ("d", "e", "end", "text", "of", "END", "eos", "s", "im", "assistant"):
        assert said(answer).endswith(answer + ending), answer


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
        masks.turn(chat, messages, 1)


def test_reasoning_that_the_template_leaves_out_is_found_out():
    chat = make_chat(CHATML, "<|im_end|>", "<|im_start|>", True, [])
    with pytest.raises(Drop, match="reasoning"):
        masks.turn(chat, chat.prepare(conversation()), 1)


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
    (ids, spans), *others = masks.samples(
        chat, chat.prepare(messages), [{"name": "add"}], Rules(10_000)
    )[0]
    assert not others and chat.tokenizer.decode(ids).startswith('tools: [{"name": "add"}]\n')
    calls, answer = (chat.tokenizer.decode(ids[start:end]) for start, end in spans)
    assert calls == '<call>{"function": {"name": "add", "arguments": {}}}</call><|im_end|>'
    assert answer == "four<|im_end|>"


def learnt(chat, messages, tools=None):
    """Return the texts of the supervised spans, and why turns were dropped."""
    samples, drops, _ = masks.samples(chat, chat.prepare(messages), tools, Rules(10_000))
    return [
        chat.tokenizer.decode(ids[slice(*span)]) for ids, spans in samples for span in spans
    ], drops


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
    samples, drops, _ = masks.samples(chat, chat.prepare(messages), None, Rules(10_000))
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
    drops = masks.samples(chat, chat.prepare(messages), None, Rules(10_000))[1]
    assert (
        drops == ["rows whose prompt the template renders differently once the answer is there"] * 2
    )


def test_overlong_turns_are_dropped_and_the_ones_before_kept():
    settings, prompt1, answer1, *_ = FAMILIES["chatml"]
    chat = make_chat(*settings)
    length = len(chat.ids(prompt1)) + len(chat.ids(answer1))
    samples, drops, _ = masks.samples(chat, chat.prepare(conversation()), None, Rules(length))
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
    samples, drops, shortened = masks.samples(
        chat, messages, None, Rules(120, overlong="truncate_prompt")
    )
    (ids, ((start, end),)), *_ = samples
    assert (drops, shortened) == ([], 1) and 60 < len(ids) <= 120
    assert chat.tokenizer.decode(ids[start:end]) == f"{A2}<|im_end|>"
    text = chat.tokenizer.decode(ids[:start])
    assert "Be brief." in text and "word0 " in text and " ... " in text and "word199" in text
    _, drops, _ = masks.samples(chat, messages, None, Rules(20, overlong="truncate_prompt"))
    assert drops == ["rows too long for --max_length even with the prompt shortened"]


def test_an_answer_that_no_question_precedes_is_not_learnt():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = [{"role": "assistant", "content": "Welcome!"}, *conversation()[:2]]
    samples, drops, _ = masks.samples(chat, chat.prepare(messages), None, Rules(10_000))
    assert drops == ["answers that no question precedes"]
    (ids, ((start, end),)), *others = samples
    assert not others and chat.tokenizer.decode(ids[start:end]) == f"{A1}<|im_end|>"


def test_a_turn_that_the_template_leaves_out_is_found_out():
    forgetful = CHATML.replace(
        "{{ m.content }}", "{{ m.content if m.role == 'assistant' else m.content[:14] }}"
    )
    chat = Chat(chat_tokenizer(forgetful, "<|im_end|>", None, ["<|im_start|>"]), False, [])
    assert not masks.samples(chat, chat.prepare(conversation()), None, Rules(10_000))[1]
    messages = [
        {"role": "user", "content": f"{Q1} And more."},
        {"role": "assistant", "content": A1},
    ]
    assert masks.samples(chat, messages, None, Rules(10_000))[1] == [
        "rows with a turn that the template leaves out or changes"
    ]


def test_shortening_ends_where_a_character_is_many_tokens():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = [
        {"role": "user", "content": "\u0e01\u0e02" * 60},
        {"role": "assistant", "content": "x"},
    ]
    full = sum(map(len, masks.turn(chat, messages, 1)))
    for length in range(full - 12, full):
        prompt, answer = masks.shortened(chat, messages, 1, None, length)
        assert len(prompt) + len(answer) <= length


# ---------------------------------------------------------------- generated answers


def framed_chat(name, thinking=True):
    template, eos, special, _ = FRAMED[name]
    return Chat(chat_tokenizer(template, eos, None, special.split()), thinking, [eos])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", FRAMED)
def test_an_answer_is_what_stands_in_the_frame(name, thinking):
    chat = framed_chat(name, thinking)
    frame = find_frame(chat)
    for generated, answer in FRAMED[name][3]:
        assert answer_of(decode_answer(chat.tokenizer, chat.ids(generated), frame)) == answer
    question = {"role": "user", "content": "What?"}
    _, ids = masks.turn(chat, [question, {"role": "assistant", "content": TEXT}], 1)
    end = min(t for t, token in enumerate(ids) if token in chat.stop_ids)
    assert end >= len(ids) - 2  # phi's and Command A's second token is not needed
    assert answer_of(decode_answer(chat.tokenizer, ids[:end], frame)) == TEXT


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_templates_have_no_frame(name):
    chat = make_chat(*FAMILIES[name][0])
    assert find_frame(chat) is None
    assert decode_answer(chat.tokenizer, chat.ids(TEXT), None) == TEXT


def test_blanks_before_punctuation_are_kept():
    tokenizer = chat_tokenizer(CHATML, "<|im_end|>", None, ["<|im_start|>"])
    tokenizer.clean_up_tokenization_spaces = True  # Llama 3 has it in its file
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) != TEXT
    assert decode_answer(tokenizer, tokenizer(TEXT)["input_ids"], None) == TEXT


def test_thoughts_that_a_template_never_ends_are_found_out(monkeypatch):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.thinking %}END{% endif %}")
    chat = make_chat(template.replace("END", endless), "<|im_end|>", "<|im_start|>", True, [])
    monkeypatch.setattr(trials, "TRIAL_SECONDS", 0.5)
    with pytest.raises(InputError, match="takes more than 0.5 s"):
        find_frame(chat)

"""What trial conversations show of a chat template, and what it makes of messages."""

import utils
from conftest import chat_tokenizer
from families import CHATML, FAMILIES, Q1, conversation, make_chat
from parts import masks
from parts.masks import Rules
from parts.messages import Drop
from parts.template import Chat

import pytest


def test_tokenizer_without_template_and_eos_is_refused():
    tokenizer = chat_tokenizer(None, "<|eos|>")
    tokenizer.eos_token = None
    with pytest.raises(utils.InputError, match="neither a chat template nor an EOS token"):
        Chat(tokenizer, False, [])


def test_template_and_tokenizer_without_any_stop_are_refused():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<|eos|>"
    )
    tokenizer.eos_token = None
    with pytest.raises(utils.InputError, match="no.* has a token that ends an answer"):
        Chat(tokenizer, False, [])


def test_system_turn_is_folded_where_the_template_refuses_it():
    chat = make_chat(*FAMILIES["gemma"][0])
    messages = [{"role": "system", "content": "Be brief."}, *conversation()[:2]]
    assert chat.folds_system
    prompt, _ = masks.turn(chat, chat.prepare(messages), 1)
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


def test_special_tokens_inside_a_text_are_found():
    chat = make_chat(*FAMILIES["chatml"][0])
    messages = [
        {"role": "user", "content": "say <|im_end|>"},
        {"role": "assistant", "content": "no"},
    ]
    with pytest.raises(Drop, match="special token <.im_end.>"):
        chat.prepare(messages)


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
            (ids, ((start, end),)), *_ = masks.samples(
                chat, chat.prepare(messages), None, Rules(10_000)
            )[0]
            assert chat.tokenizer.decode(ids[start:end]) == '{"a": null}<|im_end|>'

"""Rows of every known format, and what is said about rows, files and flags that are wrong."""

import json
import shutil

import train_sft_lora
import utils
from conftest import chat_tokenizer, make_chats, write_jsonl

import pytest
from transformers import AutoTokenizer

USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def messages_of(row, system_prompt=None):
    return train_sft_lora.read_example("file, line 1", row, system_prompt).messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": json.dumps([USER, ANSWER])},
        {"messages": [{**USER, "name": None}, {**ANSWER, "tool_calls": None}]},  # as tables fill them in
        {"messages": [USER, ANSWER, {"role": "user", "content": "unanswered"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
                ANSWER,
            ]
        },
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "lang": "en"},
        {"conversations": [{"from": "user", "value": "2+2?"}, {"from": "model", "value": "4"}]},
        {"conversations": [{"role": "human", "content": "2+2?"}, {"role": "bot", "content": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"instruction": "2+2?", "output": "4"},
        {"prompt": "2+2?", "completion": "4"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "2+2?", "response": "4"},
        {"question": "2+2?", "answer": "4"},
        {"query": "2+2?", "response": "4"},
        {"input": "2+2?", "output": "4"},
        {"messages": [{**USER, "id": 7}, ANSWER], "tools": "", "system": None},
        {"messages": "", "prompt": "2+2?", "completion": "4"},
    ],
)
def test_known_formats_give_the_same_messages(row):
    assert messages_of(row) == [USER, ANSWER]


def test_alpaca_input_history_and_system():
    row = {
        "instruction": "Add.",
        "input": "2 and 2",
        "output": "4",
        "history": [["Hi", "Hello"]],
        "system": "Be brief.",
    }
    assert messages_of(row) == [
        SYSTEM,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Add.\n\n2 and 2"},
        ANSWER,
    ]


def test_system_prompt_is_for_rows_without_one():
    assert messages_of({"messages": [USER, ANSWER]}, "Be brief.") == [SYSTEM, USER, ANSWER]
    assert messages_of({"messages": [SYSTEM, USER, ANSWER]}, "Be long.") == [SYSTEM, USER, ANSWER]


def test_tools_and_reasoning_are_kept():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
    row = {"messages": [USER, call, {"role": "observation", "content": "4"}, {**ANSWER, "reasoning": "2 and 2"}]}
    example = train_sft_lora.read_example("x", {**row, "tools": '[{"name": "add"}]'}, None)
    assert example.tools == [{"name": "add"}]
    assert example.messages[1]["tool_calls"] == call["tool_calls"] and example.messages[1]["content"] == ""
    assert example.messages[2]["role"] == "tool" and example.messages[3]["reasoning_content"] == "2 and 2"


# what is wrong, the row, what is said
BAD_ROWS = {
    "text alone": ({"text": "2+2? 4"}, 'line 2: "text" alone does not say which part is the response'),
    "no known field": ({"a": "2+2?", "b": "4"}, r"line 2: none of the known formats \(fields: a, b\)"),
    "half a pair": ({"prompt": "2+2?"}, r"none of the known formats \(fields: prompt\)"),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "x"}, ANSWER]},
        'line 2: unknown role "robot". Known roles',
    ),
    "no role": ({"messages": [{"content": "x"}, ANSWER]}, "unknown role null"),
    "answer is an object": ({"prompt": "2+2?", "completion": {"sum": 4}}, "line 2: completion is the dict"),
    "content is an object": (
        {"messages": [USER, {"role": "assistant", "content": {"sum": 4}}]},
        "content of a assistant turn is a dict",
    ),
    "content is an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]},
        "images cannot be trained on",
    ),
    "messages are a number": ({"messages": 7}, "messages is the int 7, not a text or a list"),
    "messages are texts": ({"messages": ["2+2?", "4"]}, "messages is the list"),
    "messages are broken JSON": ({"messages": '[{"role": "user", "content": "x"'}, "line 2, messages: no valid JSON"),
    "tools are broken JSON": ({"messages": [USER, ANSWER], "tools": "[{"}, "line 2, tools: no valid JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named_by_line(name, run_sft, tmp_path):
    row, sentence = BAD_ROWS[name]
    data = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [USER, ANSWER]}, row])
    with pytest.raises(utils.InputError, match=sentence):
        run_sft(data=data)


BAD_FILES = {
    "truncated JSON": ('{"messages": [{"role": "user", "content": "x"}, {"role": "assis\n', "line 1: no valid JSON"),
    "no rows": ("", "holds no rows"),
    "a list a line": ("[1, 2]\n", "line 1: a list, not a JSON object"),
    "all answers empty": ('{"prompt": "x", "completion": "  "}\n', "no row is left to train on"),
    "nobody answers": ('{"messages": [{"role": "user", "content": "x"}]}\n', "no row is left to train on"),
    "nobody asks": ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "no row is left to train on"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_ends_in_a_sentence(name, run_sft, tmp_path):
    text, sentence = BAD_FILES[name]
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(utils.InputError, match=sentence):
        run_sft(data=str(tmp_path / "bad.jsonl"))


# flags beside good data, what is said
BAD_FLAGS = {
    "unknown metric": (
        ["--metric_for_best", "pos_f1"],
        "pos_f1 is not measured. Choose one of loss, token_accuracy. More",
    ),
    "everything over-long": (
        ["--max_length", 12],
        r"all 58 responses were cut away by --max_length 12. Raise it: the longest row",
    ),
    "first over-long": (["--max_length", 30, "--overlong", "error"], "line .*: longer than --max_length 30"),
    "all dropped by regex": (["--drop_regex", "."], "no row is left to train on"),
    "dev file without rows": (["--dev_file", "EMPTY"], "holds no row to evaluate on"),
    "no template file": (["--chat_template", "nowhere.jinja"], "--chat_template nowhere.jinja cannot be read"),
    "template with an error": (["--chat_template", "BROKEN"], "the chat template cannot render a simple conversation"),
    "template without answers": (["--chat_template", "MUTE"], "the chat template cannot render a simple conversation"),
    "template refusing every row": (["--chat_template", "REFUSES"], "no row has a token to learn from"),
    "not a causal model": (["--model_name", "BERT"], "Choose a causal language model"),
    "adapter of another base": (["--init_adapter", "NO_ADAPTER"], SystemExit),
    "unreachable endpoint": (["--eval_only", "--endpoint", "http://127.0.0.1:9"], "gives no answer"),
}


@pytest.mark.parametrize("name", BAD_FLAGS)
def test_bad_flag_ends_in_a_sentence(name, run_sft, tmp_path, tiny_bert, tiny_chat):
    flags, sentence = BAD_FLAGS[name]
    files = {"EMPTY": write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "x", "completion": ""}])}
    files["BERT"] = str(tmp_path / "bert")
    shutil.copytree(tiny_bert, tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_chat).save_pretrained(tmp_path / "bert")
    files["NO_ADAPTER"] = str(tmp_path)
    for key, text in (
        ("BROKEN", "{% for m in messages %}"),
        ("MUTE", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"),
        (
            "REFUSES",
            "{% for m in messages %}{% if 'QUESTION' not in messages[0].content %}{{ raise_exception('no finding') }}"
            "{% endif %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
        ),
    ):
        (tmp_path / f"{key}.jinja").write_text(text)
        files[key] = str(tmp_path / f"{key}.jinja")
    flags = [files.get(flag, flag) for flag in flags]
    if sentence is SystemExit:
        with pytest.raises(SystemExit) as exit:
            run_sft(*flags)
        assert exit.value.code == 2
    else:
        with pytest.raises(utils.InputError, match=sentence):
            run_sft(*flags)


def test_tokenizer_without_template_and_eos_is_refused():
    tokenizer = chat_tokenizer(None, "<|eos|>")
    tokenizer.eos_token = None
    with pytest.raises(utils.InputError, match="neither a chat template nor an EOS token"):
        train_sft_lora.Chat(tokenizer, False, [])


def test_template_and_tokenizer_without_any_stop_are_refused():
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<|eos|>")
    tokenizer.eos_token = None
    with pytest.raises(utils.InputError, match="no.* has a token that ends an answer"):
        train_sft_lora.Chat(tokenizer, False, [])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--endpoint", "http://x"], "add --eval_only"),
        (["--sanity_overfit", "5", "--eval_only"], "pass one"),
        (["--sanity_overfit", "5", "--dev_file", "x"], "measures the rows it trains on"),
        (["--sanity_overfit", "5", "--early_stopping_patience", "2"], "measures the rows it trains on"),
        (["--drop_regex", "("], "--drop_regex"),
        (["--max_length", "4"], "outside"),
        (["--overlong", "cut"], "invalid choice"),
        (["--eval_generate", "-1"], "outside"),
    ],
)
def test_flags_that_do_not_go_together_exit_2(flags, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        train_sft_lora.parse_args(["--train_file", "x", *flags])
    assert exit.value.code == 2 and sentence in capsys.readouterr().err


def test_eval_only_needs_rows(capsys):
    with pytest.raises(SystemExit):
        train_sft_lora.parse_args(["--eval_only"])
    assert "needs rows to evaluate on" in capsys.readouterr().err


def test_every_drop_is_counted_by_reason(run_sft, tmp_path, capsys):
    rows = make_chats(30)
    rows += [rows[3], {"prompt": "x", "completion": ""}, {"prompt": "<br>tag", "completion": "y"}]
    rows += [{"prompt": "say <|im_start|>", "completion": "no"}, {"prompt": "word " * 300, "completion": "long"}]
    rows += [{"messages": [{"role": "user", "content": "x"}]}]
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"messages": [*rows[1]["messages"][:2], ANSWER]}])
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    report = run_sft("--dry_run", "--drop_regex", "<br>", "--dev_file", dev, data=data)
    assert report["data"]["dropped"] == {
        "duplicate rows": 1,
        "rows with an empty response": 1,
        "rows that match --drop_regex": 1,
        "rows without an assistant turn": 1,
        "training rows whose prompt is in a dev set": 1,
        "rows whose text holds the special token <|im_start|>": 1,
        train_sft_lora.TOO_LONG: 1,
    }
    said = capsys.readouterr().out
    assert f"dropped   1 duplicate rows (first: {data}, line 31)" in said
    assert f"with their prompt (first: {data}, line 35)" in said


def test_dev_rows_are_held_out_by_prompt(tmp_path):
    rows = [{"prompt": f"question {i % 10}", "completion": f"answer {i}"} for i in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = train_sft_lora.parse_args(["--train_file", data, "--dev_size", "0.25"])
    examples, dev_sets, counts = train_sft_lora.read_data(args)
    assert counts["dev"] == {"dev": 12} and len(examples) == 28  # whole prompts
    assert not {e.messages[0]["content"] for e in examples} & {e.messages[0]["content"] for e in dev_sets[""]}


def say_turns(*texts):
    """A row of user and assistant turns in alternation; a leading "system: " makes a system turn."""
    messages = [{"role": "system", "content": texts[0]}] if texts[0].startswith("system: ") else []
    rest = texts[len(messages) :]
    return {"messages": messages + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(rest)]}


def read_split(tmp_path, rows, *flags):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    return train_sft_lora.read_data(train_sft_lora.parse_args(["--train_file", data, *flags]))


def test_conversations_that_begin_alike_are_held_out_together(tmp_path):
    rows = [say_turns(f"question {i % 20}", "yes", f"and {i}?", f"no {i}") for i in range(40)]
    rows += [say_turns(f"Question  {i}", "perhaps") for i in range(20)]
    examples, dev_sets, _ = read_split(tmp_path, rows, "--dev_size", "0.3")
    openings = [{utils.text_id(e.messages[0]["content"]) for e in part} for part in (examples, dev_sets[""])]
    assert [len(part) for part in (examples, dev_sets[""])] == [42, 18] and not openings[0] & openings[1]


def test_what_precedes_the_first_answer_is_system_and_question_and_no_greeting(tmp_path):
    hello = {"role": "assistant", "content": "Hello!"}
    greeted = [{"messages": [hello, *say_turns(f"question {i}", f"no {i}")["messages"]]} for i in range(20)]
    by_system = [say_turns(f"system: {i}", "Begin.", f"yes {i}") for i in range(20)]
    for rows in (greeted, by_system):
        examples, dev_sets, _ = read_split(tmp_path, rows, "--dev_size", "0.25")
        assert (len(examples), len(dev_sets[""])) == (15, 5)
    dev = write_jsonl(tmp_path / "dev.jsonl", greeted[:2])
    examples, _, _ = read_split(tmp_path, greeted, "--dev_file", dev)
    assert len(examples) == 18  # the greeting is no answer of the dev set


def test_a_prompt_with_many_rows_is_never_held_out(tmp_path, capsys):
    rows = [say_turns("Tell a joke.", f"joke {i}") for i in range(60)]
    rows += [say_turns(f"question {i}", f"answer {i}") for i in range(40)]
    for seed in range(5):
        examples, dev_sets, _ = read_split(tmp_path, rows, "--dev_size", "0.1", "--seed", str(seed))
        assert len(dev_sets[""]) == 10 and "Tell a joke." not in {e.messages[0]["content"] for e in dev_sets[""]}
        assert len(examples) == 90
    said = "1 groups of rows with one prompt are never held out: each has more than a fifth of the 10 rows wanted"
    assert f"{said} (the largest: 60 rows)" in capsys.readouterr().out
    examples, dev_sets, _ = read_split(tmp_path, rows[:60])
    assert len(examples) == 60 and not dev_sets


@pytest.mark.parametrize("flags", [["--save_best", "1"], ["--early_stopping_patience", "2"]])
def test_a_best_state_needs_rows_that_could_be_held_out(flags, tmp_path, run_sft):
    data = write_jsonl(tmp_path / "rows.jsonl", [say_turns("Tell a joke.", f"joke {i}") for i in range(20)])
    with pytest.raises(utils.InputError, match="need an evaluation, and no rows could be held out"):
        run_sft("--dry_run", *flags, data=data)


def test_rows_that_give_a_dev_row_away_are_not_trained(tmp_path):
    dev = [say_turns("a", "b", "c", "d")]
    rows = {
        "whole prompt": say_turns("A", "b", "c", "other"),
        "prompt of its first answer": say_turns("a", "other"),
        "an answer, then another question": say_turns("a", "B ", "other", "other"),
        "an answer that is not the last": say_turns("a", "b", "c", "d", "e", "f"),
    }
    kept = [
        say_turns("a", "other", "c", "d"),
        say_turns("c", "d"),
        say_turns("other", "b"),
        say_turns("system: brief", "a", "b"),
    ]
    path = write_jsonl(tmp_path / "dev.jsonl", dev)
    examples, _, counts = read_split(tmp_path, [*rows.values(), *kept], "--dev_file", path)
    turns = [[message["content"] for message in row["messages"]] for row in kept]
    assert sorted([message["content"] for message in e.messages] for e in examples) == sorted(turns)
    assert counts["dropped"] == {
        "training rows whose prompt is in a dev set": 2,
        "training rows with an answer of a dev set behind the same turns": 2,
    }


def test_sanity_rows_are_those_with_something_to_find(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", make_chats(60))
    args = train_sft_lora.parse_args(["--train_file", data, "--sanity_overfit", "10"])
    examples, dev_sets, _ = train_sft_lora.read_data(args)
    assert examples == dev_sets[""] and len(examples) == 10
    parsed = [train_sft_lora.parse_answer(example.answer) for example in examples]
    assert not any(value is not None and train_sft_lora.is_empty(value) for value in parsed)


def test_the_context_of_a_question_is_kept():
    row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "qa"}
    assert messages_of(row)[0]["content"] == "Who?\n\nAda wrote it."


def test_a_null_in_a_call_is_kept_and_one_that_a_table_filled_in_is_not(tmp_path):
    import pyarrow.parquet

    call = {"function": {"name": "add", "arguments": {"a": None, "b": 1}}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert messages_of(row)[1]["tool_calls"] == [call]
    other = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "no"}}]}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, other]), tmp_path / "rows.parquet")
    rows = utils.read_rows(tmp_path / "rows.parquet")
    assert messages_of(rows[1][1])[1]["tool_calls"] == [{"function": {"name": "no"}}]


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "unknown role"),
        ({"messages": [USER, {**ANSWER, "thinking": ["a"]}]}, "is a list, not a text"),
        ({"instruction": "x", "output": "y", "history": "abc"}, "history: no valid JSON"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "no list of .question, answer. pairs"),
        ({"messages": [USER, ANSWER], "system": {"a": 1}}, "content of a system turn is a dict"),
    ],
)
def test_odd_cells_end_in_a_sentence(row, sentence):
    with pytest.raises(utils.InputError, match=sentence):
        messages_of(row)

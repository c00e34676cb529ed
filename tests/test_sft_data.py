"""Rows of every known format, and what is said about rows, files and flags that are wrong."""

import json
import math
import shutil

import train_embed_lora
import train_sft_lora
import utils
from conftest import chat_tokenizer, make_chats, write_jsonl

import pyarrow
import pyarrow.parquet
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
        {
            "messages": [{**USER, "name": None}, {**ANSWER, "tool_calls": None}]
        },  # as tables fill them in
        {"messages": [USER, ANSWER, {"role": "user", "content": "unanswered"}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}],
                },
                ANSWER,
            ]
        },
        {
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            "lang": "en",
        },
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
        {"messages": "[]", "prompt": "2+2?", "completion": "4"},
        {
            "messages": [
                {"role": "USER", "text": "2+2?"},
                {"role": "Assistant", "content": "", "value": "4"},
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "2+2?"}]}, ANSWER]},
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "output_text", "text": "4"}]},
            ]
        },
        {
            "messages": [USER, {**ANSWER, "weight": 1}],
            "images": [],
            "videos": None,
            "audio": "[]",
            "label": True,
        },
        {
            "messages": [USER, {**ANSWER, "loss_weight": "1", "train": True}],
            "label": "false",
            "kto_tag": 0,
        },
        {"conversation": [{"input": "2+2?", "output": "4"}]},
        {"conversation": [USER, ANSWER]},
        {"conversations": [{"human": "2+2?", "assistant": "4"}]},
        {"conversation": "of two", "prompt": "2+2?", "completion": "4"},
        {"instruction": "", "input": "2+2?", "output": "4"},
        {"instruction": None, "input": "2+2?", "output": "4"},
        {"instruction": " ", "context": "2+2?", "response": "4"},
        {"prompt": None, "completion": None, "question": "2+2?", "answer": "4"},
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
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}],
    }
    row = {
        "messages": [
            USER,
            call,
            {"role": "observation", "content": "4"},
            {**ANSWER, "reasoning": "2 and 2"},
        ]
    }
    example = train_sft_lora.read_example("x", {**row, "tools": '[{"name": "add"}]'}, None)
    assert example.tools == [{"name": "add"}]
    assert (
        example.messages[1]["tool_calls"] == call["tool_calls"]
        and example.messages[1]["content"] == ""
    )
    assert (
        example.messages[2]["role"] == "tool"
        and example.messages[3]["reasoning_content"] == "2 and 2"
    )


@pytest.mark.parametrize("calls", [["x"], "x", 5, [{"function": "f"}], [["x"]], "[" * 100_000])
def test_calls_that_are_none_are_dropped(calls):
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": calls}, ANSWER]
    with pytest.raises(train_sft_lora.Drop, match="a function call that is no JSON"):
        train_sft_lora.read_example("line 1", {"messages": turns}, None)


@pytest.mark.parametrize("none", [None, [], "", "[]", [None]])
def test_a_turn_without_calls_has_none(none):
    example = train_sft_lora.read_example(
        "line 1", {"messages": [USER, {**ANSWER, "tool_calls": none}]}, None
    )
    assert "tool_calls" not in example.messages[1]  # which some templates ask for by its name alone


@pytest.mark.parametrize(
    "form", [lambda call: call, lambda call: json.dumps([call]), lambda call: [call]]
)
def test_calls_are_read_as_one_as_json_and_as_a_list(form):
    call = {"id": "mine", "function": {"name": "add", "arguments": {"x": 1}}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": form(call)}]
    assert train_sft_lora.read_example("line 1", {"messages": turns}, None).messages[1][
        "tool_calls"
    ] == [call]


@pytest.mark.parametrize("tools", ["[]", "null", '""', " ", "{}", [], None, "[null]"])
def test_no_tools_are_none_however_they_are_written(tools):
    assert (
        train_sft_lora.read_example("x", {"messages": [USER, ANSWER], "tools": tools}, None).tools
        is None
    )


def test_tools_of_any_spelling_are_a_list():
    add = {"type": "function", "function": {"name": "add"}}
    for row in ({"tools": json.dumps(add)}, {"tools": [add]}, {"functions": [{"name": "add"}]}):
        assert train_sft_lora.read_example(
            "x", {"messages": [USER, ANSWER], **row}, None
        ).tools == [add]
    row = {"messages": [USER, ANSWER], "functions": "prose, as other data has it"}
    assert train_sft_lora.read_example("x", row, None).tools is None


def test_exchanges_keep_their_system_turn_and_their_loss_flag():
    row = {
        "conversation": [
            {"system": "Be brief.", "input": "1+1?", "output": "2", "output_with_loss": False},
            {"input": "2+2?", "output": "4"},
            {"input": "unanswered"},
        ]
    }
    assert messages_of(row) == [
        SYSTEM,
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "weight": 0},
        USER,
        ANSWER,
    ]


CALL = {"name": "add", "arguments": {"a": 2, "b": 2}}


@pytest.mark.parametrize(
    "caller, result",
    [
        (
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "4"},
        ),
        (
            {"from": "function_call", "value": json.dumps([CALL])},
            {"from": "function_response", "value": "4"},
        ),
        (
            {"role": "tool_call", "content": json.dumps({"function": CALL})},
            {"role": "tool_response", "content": "4"},
        ),
        ({"from": "function", "value": json.dumps(CALL)}, {"from": "function", "value": "4"}),
        (
            {"role": "assistant", "content": None, "function_call": CALL},
            {"role": "function", "content": "4"},
        ),
    ],
)
def test_calls_and_results_of_any_spelling_are_those_of_openai(caller, result):
    call = {"id": "call00001", "type": "function", "function": CALL}
    assert messages_of({"conversations": [USER, caller, result, ANSWER]}) == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "call00001"},
        ANSWER,
    ]


def test_a_call_joins_the_answer_before_it():
    calls = [
        {"role": "tool_call", "content": json.dumps({**CALL, "name": name})}
        for name in ("add", "sub")
    ]
    results = [{"role": "tool_response", "content": text} for text in ("4", "0")]
    found = messages_of(
        {"messages": [USER, {**ANSWER, "content": "Let me see."}, *calls, *results, ANSWER]}
    )
    assert [message["role"] for message in found] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert found[1]["content"] == "Let me see."
    assert [call["function"]["name"] for call in found[1]["tool_calls"]] == ["add", "sub"]
    assert [call["id"] for call in found[1]["tool_calls"]] == [
        message["tool_call_id"] for message in found[2:4]
    ]


@pytest.mark.parametrize(
    "turn, learnt",
    [
        ({"weight": 0}, False),
        ({"weight": "0"}, False),
        ({"loss_weight": 0.0}, False),
        ({"train": False}, False),
        ({"training": False, "weight": 1}, False),
        ({"weight": "1"}, True),
        ({"weight": None, "train": True}, True),
    ],
)
def test_a_turn_of_weight_zero_in_any_spelling_is_context(turn, learnt):
    found = messages_of({"messages": [USER, {**ANSWER, **turn}, USER, ANSWER]})
    assert found[1] == (ANSWER if learnt else {**ANSWER, "weight": 0})


def test_an_answer_of_weight_zero_is_no_reference():
    rows = [
        {"messages": [USER, ANSWER, USER, {**ANSWER, **extra}]} for extra in ({}, {"weight": 0})
    ]
    examples = [train_sft_lora.read_example(f"line {i}", row, None) for i, row in enumerate(rows)]
    args = train_sft_lora.parse_args(["--train_file", "x", "--eval_generate", "9"])
    chosen = train_sft_lora.choose_generated(args, "", examples, None)
    assert [example.where for _, example in chosen] == ["line 0"]


# reason, rows that are dropped for it
DROPS = {
    "rows whose label or kto_tag is false (KTO: answers to unlearn)": [
        {"prompt": "2+2?", "completion": "5", "label": False},
        {"messages": [USER, {"role": "assistant", "content": "5"}], "kto_tag": False},
    ],
    "rows whose answers all have weight 0": [{"messages": [USER, {**ANSWER, "weight": 0}]}],
    "rows without a turn": [
        {},
        {"messages": []},
        {"messages": None, "id": 7},
        {"prompt": None, "text": ""},
    ],
    "rows with an empty response": [{"prompt": "2+2?", "completion": None}],
    "rows with an empty prompt": [{"instruction": "", "input": "", "output": "4"}],
    'rows with a function call that is no JSON {"name", "arguments"}': [
        {"conversations": [USER, {"from": "function_call", "value": "add(2, 2)"}]}
    ],
    'rows with the unknown role "robot"': [
        {"messages": [{"role": "robot", "content": "x"}, ANSWER]}
    ],
    "rows with the unknown role null": [{"messages": [{"content": "x"}, ANSWER]}],
}


@pytest.mark.parametrize("reason", DROPS)
def test_rows_of_no_use_are_dropped_by_reason(reason, capsys):
    rows = [(f"f, line {i}", row) for i, row in enumerate(DROPS[reason])]
    good = [
        (f"f, line {7 + i}", {"prompt": f"{i}+2?", "completion": "[]"}) for i in range(len(rows))
    ]
    args = train_sft_lora.parse_args(["--train_file", "x"])
    examples, counts = train_sft_lora.read_examples(rows + good, args)
    assert [example.answer for example in examples] == ["[]"] * len(
        rows
    )  # an answer like any other
    assert counts == {reason: len(rows)}
    assert f"{reason} (first: f, line 0)" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_sft_lora, train_embed_lora])
def test_an_empty_cell_of_a_table_drops_its_row_alone(script, tmp_path, capsys):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "response": None} for i in range(3)]
    rows += [{"question": "q", "answer": None}, {"question": None, "answer": "a"}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    args = script.parse_args(["--train_file", str(path)])
    examples, dropped = script.read_examples(utils.read_rows(path), args)
    assert len(examples) == 3 and sum(dropped.values()) == 2
    assert "row 4" in capsys.readouterr().out


def test_unknown_roles_in_more_than_half_of_the_rows_refuse_the_file():
    bad = [
        (f"f, line {i}", {"messages": [{"role": "robot", "content": "x"}, ANSWER]}) for i in (1, 2)
    ]
    args = train_sft_lora.parse_args(["--train_file", "x"])
    with pytest.raises(
        utils.InputError, match='f, line 1: unknown role "robot". Known roles: human'
    ):
        train_sft_lora.read_examples([*bad, ("f, line 3", {"messages": [USER, ANSWER]})], args)


# what is wrong, the row, what is said
BAD_ROWS = {
    "text alone": (
        {"text": "2+2? 4"},
        'line 2: "text" alone does not say which part is the response',
    ),
    "no known field": (
        {"a": "2+2?", "b": "4"},
        r"line 2: none of the known formats \(fields: a, b\)",
    ),
    "half a pair": ({"prompt": "2+2?"}, r"none of the known formats \(fields: prompt\)"),
    "answer is an object": (
        {"prompt": "2+2?", "completion": {"sum": 4}},
        "line 2: completion is the dict",
    ),
    "content is an object": (
        {"messages": [USER, {"role": "assistant", "content": {"sum": 4}}]},
        "content of a assistant turn is a dict",
    ),
    "content is an image": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]},
                ANSWER,
            ]
        },
        "images cannot be trained on",
    ),
    "a part is a thought": (
        {"messages": [{"role": "user", "content": [{"type": "thinking", "text": "x"}]}, ANSWER]},
        "holds a part of type thinking",
    ),
    "a part is a number": (
        {"messages": [{"role": "user", "content": [{"text": 4}]}, ANSWER]},
        "is a int, not a text",
    ),
    "images": (
        {"prompt": "<image>What?", "completion": "A cat", "images": ["cat.png"]},
        'line 2: "images" is not',
    ),
    "a video in a text": (
        {"messages": [USER, ANSWER], "videos": '["a.mp4"]'},
        '"videos" is not empty, and only text',
    ),
    "an image of a turn": (
        {"messages": [{**USER, "images": ["cat.png"]}, ANSWER]},
        'a user turn has "images"',
    ),
    "half a weight": (
        {"messages": [USER, {**ANSWER, "weight": 0.5}]},
        "line 2: the weight of a turn is 0.5",
    ),
    "no weight": (
        {"messages": [USER, {**ANSWER, "weight": math.nan}]},
        "the weight of a turn is NaN",
    ),
    "a weight in words": (
        {"messages": [USER, {**ANSWER, "train": "no"}]},
        'the train of a turn is "no"',
    ),
    "half a turn": ({"messages": [USER, {**ANSWER, "train_detail": [{}]}]}, "learnt from in part"),
    "input is a list": (
        {"instruction": "Add", "input": [2, 2], "output": "4"},
        r"the list \[2, 2\] is not a text",
    ),
    "messages are a number": ({"messages": 7}, "messages is the int 7, not a text or a list"),
    "messages are texts": ({"messages": ["2+2?", "4"]}, "messages is the list"),
    "messages are broken JSON": (
        {"messages": '[{"role": "user", "content": "x"'},
        "line 2, messages: no valid JSON",
    ),
    "tools are broken JSON": (
        {"messages": [USER, ANSWER], "tools": "[{"},
        "line 2, tools: no valid JSON",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_is_named_by_line(name, run_sft, tmp_path):
    row, sentence = BAD_ROWS[name]
    data = write_jsonl(tmp_path / "bad.jsonl", [{"messages": [USER, ANSWER]}, row])
    with pytest.raises(utils.InputError, match=sentence):
        run_sft(data=data)


BAD_FILES = {
    "truncated JSON": (
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assis\n',
        "line 1: no valid JSON",
    ),
    "no rows": ("", "holds no rows"),
    "a list a line": ("[1, 2]\n", "line 1: a list, not a JSON object"),
    "all answers empty": ('{"prompt": "x", "completion": "  "}\n', "no row is left to train on"),
    "nobody answers": (
        '{"messages": [{"role": "user", "content": "x"}]}\n',
        "no row is left to train on",
    ),
    "nobody asks": (
        '{"messages": [{"role": "assistant", "content": "x"}]}\n',
        "no row is left to train on",
    ),
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
    "first over-long": (
        ["--max_length", 30, "--overlong", "error"],
        "line .*: longer than --max_length 30",
    ),
    "all dropped by regex": (["--drop_regex", "."], "no row is left to train on"),
    "dev file without rows": (["--dev_file", "EMPTY"], "holds no row to evaluate on"),
    "no template file": (
        ["--chat_template", "nowhere.jinja"],
        "--chat_template nowhere.jinja cannot be read",
    ),
    "template with an error": (
        ["--chat_template", "BROKEN"],
        "the chat template cannot render a simple conversation",
    ),
    "template without answers": (
        ["--chat_template", "MUTE"],
        "the chat template cannot render a simple conversation",
    ),
    "template refusing every row": (
        ["--chat_template", "REFUSES"],
        "no row has a token to learn from",
    ),
    "not a causal model": (["--model_name", "BERT"], "Choose a causal language model"),
    "adapter of another base": (["--init_adapter", "NO_ADAPTER"], SystemExit),
    "unreachable endpoint": (
        ["--eval_only", "--endpoint", "http://127.0.0.1:9"],
        "gives no answer",
    ),
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
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<|eos|>"
    )
    tokenizer.eos_token = None
    with pytest.raises(utils.InputError, match="no.* has a token that ends an answer"):
        train_sft_lora.Chat(tokenizer, False, [])


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--endpoint", "http://x"], "add --eval_only"),
        (["--sanity_overfit", "5", "--eval_only"], "pass one"),
        (["--sanity_overfit", "5", "--dev_file", "x"], "measures the rows it trains on"),
        (
            ["--sanity_overfit", "5", "--early_stopping_patience", "2"],
            "measures the rows it trains on",
        ),
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
    rows += [
        {"prompt": "say <|im_start|>", "completion": "no"},
        {"prompt": "word " * 300, "completion": "long"},
    ]
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


def test_drop_regex_reads_reasoning_and_the_arguments_of_calls(tmp_path):
    user, plain = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    call = {"function": {"name": "find", "arguments": {"for": "\u540d <br>"}}}
    odd = (
        {"content": "<br>"},
        {"reasoning_content": "<br>"},
        {"tool_calls": [call], "content": ""},
    )
    rows = [{"messages": [user, plain | part]} for part in ({}, *odd)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = train_sft_lora.parse_args(["--train_file", data, "--drop_regex", "^<br>$|\u540d <br>"])
    examples, dropped = train_sft_lora.read_examples(list(utils.read_rows(data)), args)
    assert len(examples) == 1 and dropped == {"rows that match --drop_regex": 3}


def test_a_response_of_thinking_alone_is_dropped_where_thinking_is_left_out(run_sft, tmp_path):
    thought = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "<think>a</think>\n"},
    ]
    reasoned = [{"role": "user", "content": "z"}, ANSWER | {"reasoning_content": "because"}]
    rows = [*make_chats(4), {"messages": thought}, {"messages": reasoned}]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    dev = write_jsonl(tmp_path / "dev.jsonl", make_chats(8)[6:])
    report = run_sft("--dry_run", "--enable_thinking", "false", "--dev_file", dev, data=data)
    reason = "rows with a response of thinking alone, which --enable_thinking false leaves out"
    assert report["data"]["dropped"] == {reason: 1}


def test_dev_rows_are_held_out_by_prompt(tmp_path):
    rows = [{"prompt": f"question {i % 10}", "completion": f"answer {i}"} for i in range(40)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    args = train_sft_lora.parse_args(["--train_file", data, "--dev_size", "0.25"])
    examples, dev_sets, counts = train_sft_lora.read_data(args)
    assert counts["dev"] == {"dev": 12} and len(examples) == 28  # whole prompts
    assert not {e.messages[0]["content"] for e in examples} & {
        e.messages[0]["content"] for e in dev_sets[""]
    }


def say_turns(*texts):
    """A row of user and assistant turns in alternation; a leading "system: " makes a system turn."""
    messages = [{"role": "system", "content": texts[0]}] if texts[0].startswith("system: ") else []
    rest = texts[len(messages) :]
    return {
        "messages": messages
        + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(rest)]
    }


def read_split(tmp_path, rows, *flags):
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    return train_sft_lora.read_data(train_sft_lora.parse_args(["--train_file", data, *flags]))


def test_conversations_that_begin_alike_are_held_out_together(tmp_path):
    rows = [say_turns(f"question {i % 20}", "yes", f"and {i}?", f"no {i}") for i in range(40)]
    rows += [say_turns(f"Question  {i}", "perhaps") for i in range(20)]
    examples, dev_sets, _ = read_split(tmp_path, rows, "--dev_size", "0.3")
    openings = [
        {utils.text_id(e.messages[0]["content"]) for e in part} for part in (examples, dev_sets[""])
    ]
    assert [len(part) for part in (examples, dev_sets[""])] == [42, 18] and not openings[
        0
    ] & openings[1]


def test_what_precedes_the_first_answer_is_system_and_question_and_no_greeting(tmp_path):
    hello = {"role": "assistant", "content": "Hello!"}
    greeted = [
        {"messages": [hello, *say_turns(f"question {i}", f"no {i}")["messages"]]} for i in range(20)
    ]
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
        assert len(dev_sets[""]) == 10 and "Tell a joke." not in {
            e.messages[0]["content"] for e in dev_sets[""]
        }
        assert len(examples) == 90
    said = "1 groups of rows with one prompt are never held out: each has more than a fifth of the 10 rows wanted"
    assert f"{said} (the largest: 60 rows)" in capsys.readouterr().out
    examples, dev_sets, _ = read_split(tmp_path, rows[:60])
    assert len(examples) == 60 and not dev_sets


@pytest.mark.parametrize("flags", [["--save_best", "1"], ["--early_stopping_patience", "2"]])
def test_a_best_state_needs_rows_that_could_be_held_out(flags, tmp_path, run_sft):
    data = write_jsonl(
        tmp_path / "rows.jsonl", [say_turns("Tell a joke.", f"joke {i}") for i in range(20)]
    )
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


def test_a_cell_that_looks_empty_is_an_answer(tmp_path):
    answers = ["[]", "null", "nan", "None", '["a", "b"]']
    lines = [
        f'find {i},"{answer.replace(chr(34), chr(34) * 2)}"\n' for i, answer in enumerate(answers)
    ]
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "".join(lines))
    assert [
        messages_of(row)[-1]["content"] for _, row in utils.read_rows(tmp_path / "rows.csv")
    ] == answers


def test_the_context_of_a_question_is_kept():
    row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "qa"}
    assert messages_of(row)[0]["content"] == "Who?\n\nAda wrote it."


def test_a_null_in_a_call_is_kept_and_one_that_a_table_filled_in_is_not(tmp_path):
    import pyarrow.parquet

    call = {"function": {"name": "add", "arguments": {"a": None, "b": 1}}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert messages_of(row)[1]["tool_calls"] == [call]
    other = {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "no"}}]},
        ]
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, other]), tmp_path / "rows.parquet")
    rows = utils.read_rows(tmp_path / "rows.parquet")
    assert messages_of(rows[1][1])[1]["tool_calls"] == [{"function": {"name": "no"}}]


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "unknown role"),
        ({"messages": [USER, {**ANSWER, "thinking": ["a"]}]}, "is a list, not a text"),
        ({"instruction": "x", "output": "y", "history": "abc"}, "history: no valid JSON"),
        (
            {"instruction": "x", "output": "y", "history": [["a"]]},
            "no list of .question, answer. pairs",
        ),
        ({"messages": [{"role": b"user", "content": "x"}, ANSWER]}, "unknown role"),
        ({"messages": [USER, {**ANSWER, "weight": b"1"}]}, "weight of a turn is"),
        (
            {"instruction": "x", "output": "y", "history": [1, 2]},
            "no list of .question, answer. pairs",
        ),
        (
            {"instruction": "x", "output": "y", "history": {"a": "b"}},
            "no list of .question, answer. pairs",
        ),
        ({"messages": [USER, ANSWER], "system": {"a": 1}}, "content of a system turn is a dict"),
    ],
)
def test_odd_cells_end_in_a_sentence(row, sentence):
    with pytest.raises(utils.InputError, match=sentence):
        messages_of(row)

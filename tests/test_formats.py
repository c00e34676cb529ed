"""Rows of every known format, and what is said about rows that are wrong."""

import json
import math

import utils
from conftest import write_jsonl
from parts.chats import read_example
from parts.rows import read_rows

import pytest

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def messages_of(row, system_prompt=None):
    return read_example("file, line 1", row, system_prompt).messages


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
        {"質問": "2+2?", "回答": "4"},
        {"質問": "2+2?", "答え": "4"},
        {"問い": "2+2?", "答え": "4", "番号": 7},
        {"質問文": "2+2?", "回答文": "4"},
        {"お問い合わせ": "2+2?", "ご回答": "4"},
        {"問い合わせ": "2+2?", "回答": "4"},
        {"A": "4", "Q": "2+2?"},
        {"q": "2+2?", "a": "4"},
        {"問題": "2+2?", "正解": "4"},
        {"問題": "2+2?", "解答": "4"},
        {"問題": "2+2?", "答案": "4"},
        {"问题": "2+2?", "答案": "4"},
        {"问题": "2+2?", "回答": "4"},
        {"質問": "", "回答": "", "prompt": "2+2?", "completion": "4"},
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


@pytest.mark.parametrize("tools", ["[]", "null", '""', " ", "{}", [], None, "[null]"])
def test_no_tools_are_none_however_they_are_written(tools):
    assert read_example("x", {"messages": [USER, ANSWER], "tools": tools}, None).tools is None


def test_tools_of_any_spelling_are_a_list():
    add = {"type": "function", "function": {"name": "add"}}
    for row in ({"tools": json.dumps(add)}, {"tools": [add]}, {"functions": [{"name": "add"}]}):
        assert read_example("x", {"messages": [USER, ANSWER], **row}, None).tools == [add]
    row = {"messages": [USER, ANSWER], "functions": "prose, as other data has it"}
    assert read_example("x", row, None).tools is None


def test_a_cell_that_looks_empty_is_an_answer(tmp_path):
    answers = ["[]", "null", "nan", "None", '["a", "b"]']
    lines = [
        f'find {i},"{answer.replace(chr(34), chr(34) * 2)}"\n' for i, answer in enumerate(answers)
    ]
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "".join(lines))
    assert [
        messages_of(row)[-1]["content"] for _, row in read_rows(tmp_path / "rows.csv")
    ] == answers


def test_the_context_of_a_question_is_kept():
    row = {"instruction": "Who?", "context": "Ada wrote it.", "response": "Ada", "category": "qa"}
    assert messages_of(row)[0]["content"] == "Who?\n\nAda wrote it."


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
    "Q and A beside another": ({"Q": "2+2?", "A": "4", "B": "5"}, "none of the known formats"),
    "the remedy": ({"frage": "2+2?"}, 'Rename the columns to "question" and "answer", or 質問 and'),
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

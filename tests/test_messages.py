"""Turns of any spelling: roles, texts in parts, calls of functions and their results, weights."""

import json

from parts.chats import read_example
from parts.messages import Drop
from parts.rows import read_rows

import pyarrow
import pyarrow.parquet
import pytest

USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def messages_of(row, system_prompt=None):
    return read_example("file, line 1", row, system_prompt).messages


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
    example = read_example("x", {**row, "tools": '[{"name": "add"}]'}, None)
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
    with pytest.raises(Drop, match="a function call that is no JSON"):
        read_example("line 1", {"messages": turns}, None)


@pytest.mark.parametrize("none", [None, [], "", "[]", [None]])
def test_a_turn_without_calls_has_none(none):
    example = read_example("line 1", {"messages": [USER, {**ANSWER, "tool_calls": none}]}, None)
    assert "tool_calls" not in example.messages[1]  # which some templates ask for by its name alone


@pytest.mark.parametrize(
    "form", [lambda call: call, lambda call: json.dumps([call]), lambda call: [call]]
)
def test_calls_are_read_as_one_as_json_and_as_a_list(form):
    call = {"id": "mine", "function": {"name": "add", "arguments": {"x": 1}}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": form(call)}]
    assert read_example("line 1", {"messages": turns}, None).messages[1]["tool_calls"] == [call]


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


def test_a_null_in_a_call_is_kept_and_one_that_a_table_filled_in_is_not(tmp_path):
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
    rows = read_rows(tmp_path / "rows.parquet")
    assert messages_of(rows[1][1])[1]["tool_calls"] == [{"function": {"name": "no"}}]

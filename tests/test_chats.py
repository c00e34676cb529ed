"""Rows that are dropped, held out or left out of training, and how many of each are counted."""

from functools import partial

import utils
from conftest import make_chats, write_jsonl
from parts import chats, pairs
from parts.answers import choose_asked
from parts.masks import TOO_LONG
from parts.rows import read_rows, text_id
from parts.scores import is_empty, parse_answer
from parts.splits import Sizes, Source

import pyarrow
import pyarrow.parquet
import pytest

WITHOUT_FLAGS = {"system_prompt": None, "drop_regex": None, "as_pairs": False}
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "4"}


def test_an_answer_of_weight_zero_is_no_reference():
    rows = [
        {"messages": [USER, ANSWER, USER, {**ANSWER, **extra}]} for extra in ({}, {"weight": 0})
    ]
    examples = [chats.read_example(f"line {i}", row, None) for i, row in enumerate(rows)]
    chosen = choose_asked("", examples, count=9, seed=42)
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
    examples, counts = chats.read_examples(rows + good, **WITHOUT_FLAGS)
    assert [example.answer for example in examples] == ["[]"] * len(
        rows
    )  # an answer like any other
    assert counts == {reason: len(rows)}
    assert f"{reason} (first: f, line 0)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "read",
    [
        partial(chats.read_examples, **WITHOUT_FLAGS),
        partial(pairs.read_examples, columns=pairs.Columns(), query_prefix=None),
    ],
)
def test_an_empty_cell_of_a_table_drops_its_row_alone(read, tmp_path, capsys):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "response": None} for i in range(3)]
    rows += [{"question": "q", "answer": None}, {"question": None, "answer": "a"}]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    examples, dropped = read(read_rows(path))
    assert len(examples) == 3 and sum(dropped.values()) == 2
    assert "row 4" in capsys.readouterr().out


def test_unknown_roles_in_more_than_half_of_the_rows_refuse_the_file():
    bad = [
        (f"f, line {i}", {"messages": [{"role": "robot", "content": "x"}, ANSWER]}) for i in (1, 2)
    ]
    with pytest.raises(
        utils.InputError, match='f, line 1: unknown role "robot". Known roles: human'
    ):
        good = ("f, line 3", {"messages": [USER, ANSWER]})
        chats.read_examples([*bad, good], **WITHOUT_FLAGS)


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
        TOO_LONG: 1,
    }
    said = capsys.readouterr().out
    assert f"dropped   1 duplicate rows (first: {data}, line 31)" in said
    assert f"with their prompt (first: {data}, line 35), of the training set: " in said


def test_answers_that_are_too_long_are_counted_for_each_set_with_a_remedy(
    run_sft, tmp_path, capsys
):
    short = [{"prompt": f"{i}+{i}?", "completion": f"{2 * i}"} for i in range(6)]
    long = [{"prompt": f"{i} " + "word " * 300, "completion": "long"} for i in range(2)]
    turns = [USER, ANSWER, USER, {"role": "assistant", "content": "long " * 300}]
    data = write_jsonl(tmp_path / "train.jsonl", [*short, *long, {"messages": turns}])
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"prompt": "9?", "completion": "9"}, long[0]])
    flags = ["--max_length", 120, "--dev_file", f"mine={dev}", "--dry_run"]
    run_sft(*flags, data=data)
    said = capsys.readouterr().out
    reason = f"{TOO_LONG} (first: {data}, line 8), of the training set"
    remedy = "Raise --max_length 120, or pass --overlong truncate_prompt\n"
    # the dev row's prompt is left out of training before
    assert f"dropped   2 {reason}: 22.2% of its answers, 7 are left. {remedy}" in said
    reason = f"{TOO_LONG} (first: {dev}, line 2), of the dev set mine"
    assert f"dropped   1 {reason}: 50.0% of its answers, 1 are left. {remedy}" in said


def test_columns_of_a_table_are_said_once(run_sft, tmp_path, capsys):
    lines = ["番号,質問,回答", *(f"{i},{i}+{i}?,{2 * i}" for i in range(8))]
    table = tmp_path / "faq.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    run_sft("--dry_run", data=str(table))
    assert capsys.readouterr().out.count("columns   prompt = 質問, answer = 回答\n") == 1


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
    asked = WITHOUT_FLAGS | {"drop_regex": "^<br>$|\u540d <br>"}
    examples, dropped = chats.read_examples(list(read_rows(data)), **asked)
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


def read_split(tmp_path, rows, dev_file=None, overfit=None, **sizes):
    """Return what read_data makes of rows, written as a file."""
    source = Source([write_jsonl(tmp_path / "rows.jsonl", rows)], dev_file and [dev_file])
    sizes = Sizes(**{"seed": 42, "share": 0.2} | sizes)
    return chats.read_data(source, sizes, **WITHOUT_FLAGS, overfit=overfit, trains=True)


def test_dev_rows_are_held_out_by_prompt(tmp_path):
    rows = [{"prompt": f"question {i % 10}", "completion": f"answer {i}"} for i in range(40)]
    examples, dev_sets, counts = read_split(tmp_path, rows, dev_size=0.25)
    assert counts["dev"] == {"dev": 12} and len(examples) == 28  # whole prompts
    assert not {e.messages[0]["content"] for e in examples} & {
        e.messages[0]["content"] for e in dev_sets[""]
    }


def say_turns(*texts):
    """A row of user and assistant turns in alternation, behind a "system: " turn or none."""
    messages = [{"role": "system", "content": texts[0]}] if texts[0].startswith("system: ") else []
    rest = texts[len(messages) :]
    return {
        "messages": messages
        + [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(rest)]
    }


def test_conversations_that_begin_alike_are_held_out_together(tmp_path):
    rows = [say_turns(f"question {i % 20}", "yes", f"and {i}?", f"no {i}") for i in range(40)]
    rows += [say_turns(f"Question  {i}", "perhaps") for i in range(20)]
    examples, dev_sets, _ = read_split(tmp_path, rows, dev_size=0.3)
    openings = [
        {text_id(e.messages[0]["content"]) for e in part} for part in (examples, dev_sets[""])
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
        examples, dev_sets, _ = read_split(tmp_path, rows, dev_size=0.25)
        assert (len(examples), len(dev_sets[""])) == (15, 5)
    dev = write_jsonl(tmp_path / "dev.jsonl", greeted[:2])
    examples, _, _ = read_split(tmp_path, greeted, dev)
    assert len(examples) == 18  # the greeting is no answer of the dev set


def test_a_prompt_with_many_rows_is_never_held_out(tmp_path, capsys):
    rows = [say_turns("Tell a joke.", f"joke {i}") for i in range(60)]
    rows += [say_turns(f"question {i}", f"answer {i}") for i in range(40)]
    for seed in range(5):
        examples, dev_sets, _ = read_split(tmp_path, rows, dev_size=0.1, seed=seed)
        assert len(dev_sets[""]) == 10 and "Tell a joke." not in {
            e.messages[0]["content"] for e in dev_sets[""]
        }
        assert len(examples) == 90
    said = (
        "1 groups of rows with one prompt are never held out: each has more than a fifth of the 10 "
        "rows wanted"
    )
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
    examples, _, counts = read_split(tmp_path, [*rows.values(), *kept], path)
    turns = [[message["content"] for message in row["messages"]] for row in kept]
    assert sorted([message["content"] for message in e.messages] for e in examples) == sorted(turns)
    assert counts["dropped"] == {
        "training rows whose prompt is in a dev set": 2,
        "training rows with an answer of a dev set behind the same turns": 2,
    }


def test_sanity_rows_are_those_with_something_to_find(tmp_path):
    examples, dev_sets, _ = read_split(tmp_path, make_chats(60), overfit=10, whole=True)
    assert examples == dev_sets[""] and len(examples) == 10
    parsed = [parse_answer(example.answer) for example in examples]
    assert not any(value is not None and is_empty(value) for value in parsed)

"""What a base's sentence-transformers files say, and what final/ stores of it."""

import json
import re
import shutil
from pathlib import Path

import utils
from conftest import make_rows, write_jsonl
from parts.base import Origin
from parts.dev_sets import HELD_OUT, read_data
from parts.pairs import Columns, Example
from parts.sentence_files import (
    Stored,
    choose_prompts,
    note_lower_case,
    read_sentence_files,
    write_sentence_files,
)
from parts.splits import Sizes, Source
from utils import InputError

import pytest


class Reads:
    """A tokenizer that tells cases apart, or does not."""

    def __init__(self, lowers):
        self.lowers = lowers

    def __call__(self, text):
        return {"input_ids": [ord((text.lower() if self.lowers else text)[0])]}


@pytest.fixture
def base(tmp_path):
    """Return make(file name, content, ...) -> the Origin of a folder with these JSON files."""

    def make(**files):
        for name, content in files.items():
            path = tmp_path / {"pooling": "1_Pooling/config"}.get(name, name)
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".json").write_text(json.dumps(content))
        return Origin(str(tmp_path))

    return make


MODULES = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}]
POOLINGS = [
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
    ({"pooling_mode": "lasttoken"}, "last"),
    ({"pooling_mode": ["cls"]}, "cls"),
    ({"pooling_mode": ["cls", "max"]}, "cls + max"),
    ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "mean + cls"),
    ({}, None),
]


@pytest.mark.parametrize("config, pooling", POOLINGS)
def test_the_pooling_of_a_base_is_named_as_the_flag_names_it(config, pooling, base):
    origin = base(modules=MODULES, pooling=config)
    assert read_sentence_files(origin, "mean").pooling == pooling
    if pooling in ("mean", "cls", "last"):
        assert read_sentence_files(origin, "auto").pooling == pooling
    else:
        with pytest.raises(InputError, match=f"pools by {re.escape(str(pooling))}, which is not"):
            read_sentence_files(origin, "auto")


def test_a_base_without_such_files_says_nothing(base):
    assert read_sentence_files(base(), "auto") == Stored(None, {}, False, None)


def test_what_would_get_lost_is_refused_and_what_differs_is_noted(base, capsys):
    for modules, sentence in (
        ([{"type": "x.Dense"}], "has a Dense layer"),
        ([3], "without a type"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_sentence_files(base(modules=modules), "auto")
    for prompts in (["query: "], {"query": 7}):
        with pytest.raises(InputError, match="are no texts with names"):
            read_sentence_files(
                base(modules=[], config_sentence_transformers={"prompts": prompts}), "auto"
            )
    config = {"pooling_mode": "cls", "include_prompt": False}
    prompts = {"prompts": {"query": "Q: "}, "default_prompt_name": "query"}
    lengths = {"do_lower_case": True}
    origin = base(
        modules=MODULES,
        pooling=config,
        config_sentence_transformers=prompts,
        sentence_bert_config=lengths,
    )
    stored = read_sentence_files(origin, "auto")
    assert stored == Stored("cls", {"query": "Q: "}, True, "query")
    assert (
        "note      the base leaves the tokens of a prompt out of its pooling"
        in capsys.readouterr().out
    )
    note_lower_case(stored, Reads(lowers=True))
    assert "lower case" not in capsys.readouterr().out
    note_lower_case(stored, Reads(lowers=False))
    assert "makes this base's texts lower case (do_lower_case)" in capsys.readouterr().out


def test_prefixes_are_the_flags_else_the_rows_own_else_the_bases(capsys):
    plain = [Example("q", ["p"], [])]
    prompted = [Example("q", ["p"], [], "Find: ")]
    e5 = {"query": "query: ", "passage": "passage: "}
    cases = [
        ({}, None, None, plain, ("", ""), {"query": "", "document": ""}),
        (e5, None, None, plain, ("query: ", "passage: "), e5 | {"document": "passage: "}),
        (e5, "Q: ", "", plain, ("Q: ", ""), {"query": "Q: ", "passage": "", "document": ""}),
        ({}, None, "D: ", prompted, ("Find: ", "D: "), {"query": "Find: ", "document": "D: "}),
        ({}, "Q: ", None, plain + prompted, ("Q: ", ""), {"query": "Q: ", "document": ""}),
    ]
    for stored, query, document, examples, prefixes, saved in cases:
        prompts = choose_prompts(stored, query, document, examples)
        assert ((prompts.query, prompts.document), prompts.saved) == (prefixes, saved)
    assert "the rows carry 2 query prefixes and final/ stores one, 'Q: '" in capsys.readouterr().out
    choose_prompts({}, r"Find:\nQ: ", None, plain)
    assert "holds a backslash and an n, which is no line break" in capsys.readouterr().out


def test_a_default_prompt_is_stored_where_its_prompt_is(tmp_path):
    for default, stored in (("query", "query"), ("STS", None), (None, None)):
        write_sentence_files(tmp_path, "last", 8, 16, {"query": "Q: "}, default)
        written = utils.read_json(tmp_path / "config_sentence_transformers.json")
        assert written["default_prompt_name"] == stored
    pooling = utils.read_json(tmp_path / "1_Pooling/config.json")
    assert [name for name, value in pooling.items() if value is True] == [
        "pooling_mode_lasttoken",
        "include_prompt",
    ]
    assert len(pooling) == 8


def test_prompts_of_rows_are_joined_as_they_stand_and_shown(tmp_path, run_embed, capsys):
    rows = [{**row, "prompt": "Find it:\n"} for row in make_rows(20)]
    data = write_jsonl(tmp_path / "bge.jsonl", rows)
    run_embed("--max_steps", 1, "--dev_size", 0, data=data)
    said = capsys.readouterr().out
    assert '"Find it:\\nwhere is ' in said
    assert r"'Instruct: ...\nQuery: ' write all of that into the column" in said
    stored = utils.read_json(tmp_path / "out/final/config_sentence_transformers.json")
    assert stored["prompts"] == {"query": "Find it:\n", "document": ""}
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(20))
    said = "bge.jsonl, line 1: every row has a prompt of its own.*_prefix 'Q: '"
    for source in (Source([data]), Source([other], [data])):
        with pytest.raises(InputError, match=said):
            read_data(source, Sizes(42, HELD_OUT), Columns(), "Q: ", max_negs=1)


def test_all_prompts_of_the_base_are_kept_and_named(tmp_path, tiny_bert, run_embed, capsys):
    base = {"passage": "passage: ", "Retrieval-query": "task: search\n", "STS": "alike: "}
    folder = shutil.copytree(tiny_bert, str(tmp_path / "model"))
    written = {"prompts": base, "default_prompt_name": "passage"}
    (Path(folder) / "config_sentence_transformers.json").write_text(json.dumps(written))
    flags = ["--max_steps", 1, "--dev_size", 0, "--query_prefix", "Q: ", "--query_max_len", 6]
    run_embed(*flags, model=folder)
    said = capsys.readouterr().out
    assert "note      96 queries are cut at --query_max_len 6" in said
    assert 'under other names, Retrieval-query, STS (Retrieval-query: "task: search\\n")' in said
    stored = utils.read_json(tmp_path / "out/final/config_sentence_transformers.json")
    assert stored["prompts"] == base | {"query": "Q: ", "document": "passage: "}
    assert stored["default_prompt_name"] == "passage"

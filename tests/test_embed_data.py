"""Every format is read for what it is, and every broken input ends in one sentence."""

import json
import shutil
from pathlib import Path

import train_embed_lora
import train_sft_lora
import utils
from conftest import make_rows, write_jsonl
from train_embed_lora import (
    DevSet,
    Example,
    Texts,
    dev_from_beir,
    dev_from_examples,
    note_cut_texts,
    parse_args,
    read_data,
    read_examples,
)
from utils import InputError

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

BGE = {
    "query": "q1",
    "pos": ["p1", "p2"],
    "neg": ["n1"],
    "pos_scores": [1.0, 0.5],
    "neg_scores": [0.1],
    "prompt": "Find: ",
}


def read(path, *flags):
    args = parse_args(["--train_file", str(path), "--dev_size", "0", *flags])
    return read_examples(
        [row for file in utils.expand_files(args.train_file) for row in utils.read_rows(file)], args
    )


@pytest.mark.parametrize(
    "row, expected",
    [
        (BGE, Example("q1", ["p1", "p2"], ["n1"], "Find: ")),
        ({"query": "q", "pos": ["p"], "neg": []}, Example("q", ["p"], [])),
        ({"query": "q", "pos": "p"}, Example("q", ["p"], [])),
        ({"anchor": "q", "positive": "p", "negative": "n"}, Example("q", ["p"], ["n"])),
        ({"question": "q", "answer": "p"}, Example("q", ["p"], [])),
        ({"Query": "q", "Document": "p"}, Example("q", ["p"], [])),
        (
            {"query": "q", "response": "p", "negative_1": "a", "negative_2": "b"},
            Example("q", ["p"], ["a", "b"]),
        ),
        ({"query": "q", "pos_doc": ["p"], "neg_doc": ["n"]}, Example("q", ["p"], ["n"])),
        (
            {
                "query_id": 7,
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "T", "text": "p"}],
                "negative_passages": [{"docid": "2", "title": "", "text": "n"}],
            },
            Example("q", ["T p"], ["n"]),
        ),
        (
            {
                "query": "q",
                "positive_passages": [{"docid": "1", "title": "T", "content": "p"}],
                "neg": '["a", "b"]',
            },
            Example("q", ["T p"], ["a", "b"]),
        ),
        ({"query": "q", "pos": '["p"]', "neg": "[]"}, Example("q", ["p"], [])),
        ({"query": "q", "pos": "[1] p", "neg": "[1]"}, Example("q", ["[1] p"], ["[1]"])),
        (
            {"query": "None", "pos": "nan", "neg": float("nan")},
            Example("None", ["nan"], []),
        ),  # no cells of a table
        ({"query": "q", "pos": "p", "prompt": [" Find: "]}, Example("q", ["p"], [], " Find: ")),
        (
            {"query": "q", "pos": "p", "neg_scores": [1], "neg_ids": [2], "label": "faq"},
            Example("q", ["p"], []),
        ),
    ],
)
def test_formats(tmp_path, row, expected):
    assert read(write_jsonl(tmp_path / "rows.jsonl", [row]))[0] == [expected]


def test_file_types_and_globs(tmp_path):
    rows = [
        {"query": f"q{i}", "positive": 'p, "with"\ntwo lines' if i == 1 else f"p{i}"}
        for i in range(3)
    ]
    expected = [Example(row["query"], [row["positive"]], []) for row in rows]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        lines = [
            separator.join(f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values())
            for row in rows
        ]
        (tmp_path / name).write_text(
            "\n".join(["\ufeffquery" + separator + "positive", *lines]), encoding="utf-8"
        )
    (tmp_path / "excel.csv").write_text((tmp_path / "a.tsv").read_text().replace("\t", ";"))
    for name in ("a.jsonl", "a.json", "lines.json", "a.parquet", "a.csv", "a.tsv", "excel.csv"):
        assert read(tmp_path / name)[0] == expected, name
    write_jsonl(tmp_path / "b.jsonl", [{"query": "q9", "positive": "p9"}])
    assert len(read(tmp_path / "[ab].jsonl")[0]) == 4


def test_a_name_twice_is_refused_where_a_text_would_be_lost(tmp_path):
    columns = [pa.array(["q"]), pa.array(["p"]), pa.array(["other"])]
    table = pa.Table.from_arrays(columns, names=["query", "positive", "positive"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match='a.parquet: 2 columns or keys are called "positive". Rename'
    ):
        utils.read_rows(tmp_path / "a.parquet")
    (tmp_path / "excel.csv").write_text("query,positive,,\nq,p,,\n")  # empty columns to the right
    (tmp_path / "deeper.jsonl").write_text(
        '{"query": "q", "positive": "p", "meta": {"a": 1, "a": 2}}\n'
    )
    for name in ("excel.csv", "deeper.jsonl"):
        assert read(tmp_path / name)[0] == [Example("q", ["p"], [])]


def test_columns_may_be_named(tmp_path, capsys):
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"frage": "q", "answer": "no", "positive": "p", "schlecht": "n", "id": "1"}],
    )
    flags = [
        "--query_column",
        "frage",
        "--positive_column",
        "positive",
        "--negative_column",
        "schlecht",
    ]
    assert read(path, *flags)[0] == [Example("q", ["p"], ["n"])]
    assert (
        "query = frage, positive = positive, negatives = schlecht (unused: answer, id)"
        in capsys.readouterr().out
    )


def test_scores_are_reported_as_unused(tmp_path, capsys):
    read(write_jsonl(tmp_path / "rows.jsonl", [BGE]))
    assert "unused: pos_scores, neg_scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", "negative1 neg_2 hard_neg hard_negative_1 Hard_Negatives rejected_response".split()
)
def test_names_of_negatives(tmp_path, name):
    assert read(write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "response": "p", name: "n"}]))[
        0
    ][0].neg == ["n"]


def test_an_empty_cell_of_a_table_is_no_text_and_a_list_is_a_list(tmp_path):
    cells = ["[]", "nan", "NaN", "NULL", "None", "null", "", '["a", "b"]', "No null"]
    for name, separator in (("a.csv", ","), ("A.TSV", "\t")):
        lines = [
            ["query", "positive", "negative"],
            *([f"q{i}", f"p{i}", cell] for i, cell in enumerate(cells)),
        ]
        lines += [["nan", "p", "n"], ["q", "null", "n"]]
        quoted = [
            separator.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines
        ]
        (tmp_path / name).write_text("\n".join(quoted))
        examples, drops = read(tmp_path / name)
        assert [example.neg for example in examples] == [[]] * 7 + [["a", "b"], ["No null"]]
        assert drops == {"rows with an empty query": 1, "rows with an empty positive": 1}


LABELS = [
    [1, 0, 1, 0, 0],
    ["1", "0", "1", "0", "0"],
    [1.0, 0.0, 1.0, 0.0, 0.0],
    [True, False, True, False, False],
]
LABELS += [["True", "false", " 1.0", "0", "FALSE"]]


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", ["label", "Score", "relevance"])
def test_label_0_makes_a_document_a_negative_of_its_query(tmp_path, capsys, name, labels):
    pairs = [("q", "a"), ("q", "b"), ("Q", "c"), ("r", "d"), ("q", "e")]
    rows = [
        {"query": q, "document": d, name: label}
        for (q, d), label in zip(pairs, labels, strict=True)
    ]
    rows += [{"query": "q", "document": "x", name: None}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, drops = read(path)
    assert examples == [Example("q", ["a", "c"], ["b", "e"])]
    assert drops == {"queries without a document of label 1": 1, f"rows with an empty {name}": 1}
    said = capsys.readouterr().out
    assert (
        f"negatives = none, label = {name}" in said and f"label 1 (first: {path}, line 4)" in said
    )


def test_labels_are_read_from_tables_and_tell_dev_documents_apart(tmp_path):
    (tmp_path / "dev.csv").write_text("query,document,label\n" + "q,a,0\nq,b,1\nr,a,1\nr,c,\n")
    train = write_jsonl(tmp_path / "train.jsonl", make_rows(8))
    args = parse_args(["--train_file", train, "--dev_file", str(tmp_path / "dev.csv")])
    dev = read_data(args)[1][""]
    assert pairs_of(dev) == {("q", "b"), ("r", "a")} and sorted(dev.corpus.values()) == ["a", "b"]


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"query": "q", "pos": "p", "neg": "n", "label": 0},
            {"query": "r", "pos": "s", "neg": "", "label": 3},
        ],
        [{"query": "q", "pos": "p", "label": "wrong"}, {"query": "r", "pos": "s", "label": "0"}],
        [{"query": "q", "pos": "p", "score": 5}, {"query": "r", "pos": "s", "score": 5.0}],
        [{"query": "q", "pos": "p", "score": [0.5]}, {"query": "r", "pos": "s", "score": None}],
        [{"query": "q", "pos": "p", "labels": 0}, {"query": "r", "pos": "s", "labels": 1}],
    ],
)
def test_other_labels_are_unused(tmp_path, rows):
    assert [example.query for example in read(write_jsonl(tmp_path / "rows.jsonl", rows))[0]] == [
        "q",
        "r",
    ]


def test_a_label_decides_beside_a_teachers_score(tmp_path):
    rows = [
        {"query": "q", "pos": f"p{i}", "label": i, "score": 0.3 + i, "relevance": 1} for i in (0, 1)
    ]
    assert read(write_jsonl(tmp_path / "rows.jsonl", rows))[0] == [Example("q", ["p1"], ["p0"])]


def test_drops_are_counted_with_their_place(tmp_path, capsys):
    rows = [
        {"query": "q1", "pos": ["p1"], "neg": ["n1"]},
        {"query": " ", "pos": ["p"]},
        {"query": "q2", "pos": ["", None]},
        {"query": "Q1", "pos": ["P1"], "neg": ["n1"]},
        {"query": "q3", "pos": ["p3"], "neg": ["P3 ", "n3"]},
        {"query": "q4"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, drops = read(path)
    assert [example.query for example in examples] == ["q1", "q3"]
    assert examples[1].neg == ["n3"]
    assert drops == {
        "rows with an empty query": 1,
        "rows with an empty positive": 2,
        "duplicate rows": 1,
        "negatives equal to a positive": 1,
    }
    said = capsys.readouterr().out
    assert f"1 duplicate rows (first: {path}, line 4)" in said
    assert f"2 rows with an empty positive (first: {path}, line 3)" in said


def test_rows_are_held_out_by_query_before_train_is_limited(tmp_path):
    rows = [{"query": f"q{i % 50}", "pos": [f"p{i}"]} for i in range(200)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, dev_sets, counts = read_data(parse_args(["--train_file", path, "--dev_size", "0.2"]))
    dev = dev_sets[""]
    assert len(dev.queries) == 10 and sum(map(len, dev.relevant.values())) == 40
    assert not {query for query, _ in dev.queries.values()} & {
        example.query for example in examples
    }
    assert len(examples) == 160
    limits = ["--train_sample_limit", "30", "--dev_sample_limit", "8"]
    examples, dev_sets, counts = read_data(parse_args(["--train_file", path, *limits]))
    assert len(examples) == counts["train_rows"] == 30
    assert (
        8 <= sum(map(len, dev_sets[""].relevant.values())) <= 11
    )  # whole queries, of up to four rows


def test_training_queries_in_the_dev_set_are_dropped(tmp_path):
    train = write_jsonl(
        tmp_path / "train.jsonl", [{"query": f"Q{i}", "pos": [f"p{i}"]} for i in range(10)]
    )
    dev = write_jsonl(
        tmp_path / "dev.jsonl", [{"query": "q3", "pos": ["p"]}, {"query": "q30", "pos": ["x"]}]
    )
    examples, dev_sets, counts = read_data(
        parse_args(["--train_file", train, "--dev_file", f"mine={dev}"])
    )
    assert len(examples) == 9 and list(dev_sets) == ["mine"]
    assert counts["dropped"] == {"training rows whose query is in a dev set": 1}


def pairs_of(dev):
    return {
        (dev.queries[q][0], dev.corpus[d])
        for q, documents in dev.relevant.items()
        for d in documents
    }


def test_a_pair_and_its_mirror_image_are_held_out_together(tmp_path):
    pairs = [(f"how {i}", f"in which way {i}") for i in range(30)]
    pairs += [(f"in which way {i}", f"so {i}") for i in range(5)]
    rows = [{"query": a, "pos": [b]} for a, b in pairs + [(b.upper(), a) for a, b in pairs]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, dev_sets, counts = read_data(parse_args(["--train_file", path, "--dev_size", "0.5"]))
    assert not counts["dropped"]  # each row is measured or trained
    held = {frozenset(map(utils.text_id, pair)) for pair in pairs_of(dev_sets[""])}
    trained = {frozenset(map(utils.text_id, (e.query, e.pos[0]))) for e in examples}
    assert len(held) >= 15 and len(held) + len(trained) == len(pairs) and not held & trained


def test_both_queries_of_a_mirrored_pair_count_towards_the_most_that_are_held_out():
    examples = [Example(f"{i}", [f"p{i}"], []) for i in range(40)]
    args = parse_args(["--train_file", "x"])
    held = utils.hold_out(
        examples, lambda e: int(e.query) // 2, args, "query", 0.5, 4, lambda e: e.query
    )[1]
    assert len(held[""]) == 4


def test_a_pair_of_the_dev_file_is_not_trained_the_other_way_round(tmp_path):
    rows = [
        {"query": "b ", "pos": ["x", "A"]},
        {"query": "b", "pos": ["c"]},
        {"query": "c", "pos": ["n"]},
    ]
    rows += [{"query": "d", "pos": ["a"]}]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    dev = write_jsonl(tmp_path / "dev.jsonl", [{"query": "a", "pos": ["b"], "neg": ["d", "n"]}])
    examples, _, counts = read_data(parse_args(["--train_file", train, "--dev_file", dev]))
    assert {(e.query, *e.pos) for e in examples} == {("b", "c"), ("c", "n"), ("d", "a")}
    assert counts["dropped"] == {"training rows that are a pair of a dev set turned round": 1}


def test_a_query_with_many_rows_is_never_held_out(tmp_path, capsys):
    rows = [{"query": "q", "pos": [f"p{i}"]} for i in range(60)]
    rows += [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(40)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for seed in range(5):
        flags = ["--dev_size", "0.2", "--seed", str(seed)]
        examples, dev_sets, _ = read_data(parse_args(["--train_file", path, *flags]))
        assert len(dev_sets[""].queries) == 20 and "q" not in {
            query for query, _ in dev_sets[""].queries.values()
        }
        assert len(examples) == 80
    said = "1 groups of rows with one query are never held out: each has more than a fifth of the 20 rows wanted"
    assert f"{said} (the largest: 60 rows)" in capsys.readouterr().out


def test_dev_pool_is_every_positive_and_negative_once():
    dev = dev_from_examples(
        [Example("q", ["a", "b"], ["c"]), Example("q", ["d"], ["a"]), Example("r", ["c"], [])]
    )
    assert sorted(dev.corpus.values()) == ["a", "b", "c", "d"]
    gold = {
        text: {dev.corpus[key] for key in dev.relevant[name]}
        for name, (text, _) in dev.queries.items()
    }
    assert gold == {"q": {"a", "b", "d"}, "r": {"c"}}


def beir(folder, **files):
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(
        folder / "corpus.jsonl",
        [{"_id": "10", "title": "T", "text": "x"}, {"_id": "9", "title": "", "text": "y"}],
    )
    write_jsonl(
        folder / "queries.jsonl",
        [{"_id": "1", "text": "first"}, {"_id": "2", "text": "no relevant one"}],
    )
    (folder / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\t10\t1\n1\t9\t0\n")
    return folder


def test_beir_folder(tmp_path):
    dev = dev_from_beir(beir(tmp_path / "beir"))
    assert dev == DevSet({"1": ("first", None)}, {"10": "T x", "9": "y"}, {"1": {"10"}})


@pytest.mark.parametrize(
    "qrels, relevant",
    [
        (
            "query-id\tcorpus-id\tscore\n1\t10\t1.0\n1\t9\t0.0\n2\t9\t-2\n2\t10\t0.5\n",
            {"1": {"10"}, "2": {"10"}},
        ),
        ("1\t10\t1\n1\t9\t0\n2\t9\t2\n", {"1": {"10"}, "2": {"9"}}),
        ("1\t10\n2\t9\n", {"1": {"10"}, "2": {"9"}}),
        ("q\td\n1\t10\n2\t9\n", {"1": {"10"}, "2": {"9"}}),
    ],
)
def test_beir_judgements_count_above_zero_and_need_no_header(tmp_path, qrels, relevant):
    folder = beir(tmp_path / "beir")
    (folder / "qrels/test.tsv").write_text(qrels)
    assert dev_from_beir(folder).relevant == relevant


@pytest.mark.parametrize(
    "qrels, sentence",
    [
        ("", "lines of 0 columns. Write query id"),
        ("1\n", "lines of 1 columns. Write query id"),
        ("query\tdoc\tscore\n1\t10\thigh\n", "test.tsv, line 2: .*a score that is no number"),
        ("1\t10\t1\n1\t9\n", "test.tsv, line 2: not the 3 columns"),
        ("7\t10\t1\n1\t9\t1\n", "test.tsv, line 1: 7 is in no file of"),
        ("1\t11\t0\n", "test.tsv, line 1: 11 is in no file of"),
    ],
)
def test_broken_judgements_are_named(tmp_path, qrels, sentence):
    folder = beir(tmp_path / "beir")
    (folder / "qrels/test.tsv").write_text(qrels)
    with pytest.raises(InputError, match=sentence):
        dev_from_beir(folder)


def test_texts_are_tokenised_once_and_cached(tiny_bert, tmp_path, capfd):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    datasets.enable_progress_bars()  # which a run without a terminal switches off
    for attempt in range(2):
        texts = Texts()
        places = [
            texts.add("Q: ", "where is it", True),
            texts.add("", "lamp " * 50, False),
            texts.add("Q: ", "where is it", True),
        ]
        texts.tokenise(tokenizer, 20, 10, 0)
        assert places == [0, 1, 0]
        assert texts[0].tolist() == tokenizer("Q: where is it")["input_ids"]
        assert len(texts[1]) == 10 and texts[1][-1] == tokenizer.sep_token_id
        assert ("tokenising" in capfd.readouterr().err) == (attempt == 0)


@pytest.mark.parametrize(
    "query_max_len, passage_max_len, note",
    [
        (6, 20, "2 queries are cut at --query_max_len 6, but"),
        (7, 20, "1 queries are cut at --query_max_len 7, but"),
        (8, 20, None),
        (20, 5, "1 documents are cut at --passage_max_len 5, but"),
        (20, 6, None),
        (5, 5, None),
    ],
)
def test_texts_cut_at_the_shorter_of_two_lengths_are_noted(
    tiny_bert, query_max_len, passage_max_len, note
):
    tokenizer, texts, notes = AutoTokenizer.from_pretrained(tiny_bert), Texts(), []
    for count, is_query in ((4, True), (5, True), (6, True), (4, False)):
        texts.add("", "?" * count, is_query)  # so many tokens, and [CLS] and [SEP]
    args = parse_args(["--train_file", "x"])
    args.query_max_len, args.passage_max_len = query_max_len, passage_max_len
    texts.tokenise(tokenizer, query_max_len, passage_max_len, 0)
    note_cut_texts(args, texts, tokenizer, notes)
    assert not notes if note is None else notes[0].startswith(note)


def test_per_row_prompt_replaces_the_query_prefix(tmp_path, embed_trainer):
    data = write_jsonl(
        tmp_path / "bge.jsonl",
        [{**row, "prompt": "Find it: "} for row in make_rows(20)[:10]] + make_rows(20)[10:],
    )
    trainer = embed_trainer(
        "--query_prefix", "Q: ", "--doc_prefix", "D: ", "--dev_size", 0, data=data
    )
    queries = {text for text, is_query in trainer.data_collator.texts.index if is_query}
    assert sum(text.startswith("Find it: where") for text in queries) == 10
    assert sum(text.startswith("Q: where") for text in queries) == 10
    assert all(
        text.startswith("D: ")
        for text, is_query in trainer.data_collator.texts.index
        if not is_query
    )


def test_prompts_of_rows_are_joined_as_they_stand_and_shown(tmp_path, run_embed, capsys):
    rows = [{**row, "prompt": "Find it:\n"} for row in make_rows(20)]
    data = write_jsonl(tmp_path / "bge.jsonl", rows)
    run_embed("--max_steps", 1, "--dev_size", 0, data=data)
    said = capsys.readouterr().out
    assert (
        '"Find it:\\nwhere is ' in said
        and r"'Instruct: ...\nQuery: ' write all of that into the column" in said
    )
    prompts = json.loads((tmp_path / "out/final/config_sentence_transformers.json").read_text())[
        "prompts"
    ]
    assert prompts == {"query": "Find it:\n", "document": ""}
    other = write_jsonl(tmp_path / "other.jsonl", make_rows(20))
    for flags in (["--train_file", data], ["--train_file", other, "--dev_file", data]):
        with pytest.raises(
            InputError, match="bge.jsonl, line 1: every row has a prompt of its own.*_prefix 'Q: '"
        ):
            read_data(parse_args([*flags, "--query_prefix", "Q: "]))


def test_all_prompts_of_the_base_are_kept_and_named(tmp_path, tiny_bert, run_embed, capsys):
    base = {"passage": "passage: ", "Retrieval-query": "task: search\n", "STS": "alike: "}
    folder = shutil.copytree(tiny_bert, str(tmp_path / "model"))
    written = {"prompts": base, "default_prompt_name": "passage"}
    (Path(folder) / "config_sentence_transformers.json").write_text(json.dumps(written))
    run_embed(
        "--max_steps",
        1,
        "--dev_size",
        0,
        "--query_prefix",
        "Q: ",
        "--query_max_len",
        6,
        model=folder,
    )
    said = capsys.readouterr().out
    assert "note      96 queries are cut at --query_max_len 6" in said
    assert 'under other names, Retrieval-query, STS (Retrieval-query: "task: search\\n")' in said
    stored = json.loads((tmp_path / "out/final/config_sentence_transformers.json").read_text())
    assert stored["prompts"] == base | {"query": "Q: ", "document": "passage: "}
    assert stored["default_prompt_name"] == "passage"


def test_a_language_that_the_base_cannot_read_is_noted(tmp_path, minilm, run_embed, capsys):
    rows = [
        {"query": f"序列号{i}在哪里？", "pos": [f"序列号印在电池下方的贴纸上{i}。"]}
        for i in range(8)
    ]
    run_embed("--dry_run", model=minilm, data=write_jsonl(tmp_path / "zh.jsonl", rows))
    assert "of all tokens are [UNK]: the base cannot read these texts" in capsys.readouterr().out
    rows = [{"query": f"where is number {i}?", "pos": [f"It is on sticker {i}."]} for i in range(8)]
    run_embed("--dry_run", model=minilm, data=write_jsonl(tmp_path / "en.jsonl", rows))
    assert "[UNK]" not in capsys.readouterr().out


# ---------------------------------------------------------------- broken inputs

GOOD = {"query": "q", "pos": ["p"], "neg": ["n"]}


def put(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def two(row):
    """Two rows, the second one broken."""
    return json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n"


BROKEN_FLAGS = {
    "--bacth_size 4": "unrecognized arguments: --bacth_size 4",
    "--batch 4": "unrecognized arguments: --batch 4",
    "--batch_size 0": "argument --batch_size/--per_device_train_batch_size: 0 is outside [1, inf)",
    "--batch_size two": "--per_device_train_batch_size: invalid int value: 'two'",
    "--lr 1": "argument --lr/--learning_rate: 1 is outside (0, 1)",
    "--lr nan": "argument --lr/--learning_rate: nan is outside",
    "--epochs 0": "argument --epochs/--num_train_epochs: 0 is outside (0, inf)",
    "--warmup_ratio 1": "1 is outside [0, 1)",
    "--lora_dropout 1.5": "argument --lora_dropout: 1.5 is outside [0, 1)",
    "--logging_steps -2": "-2 is outside [-1, inf)",
    "--fp16 --bf16": "--fp16, --bf16, --mixed_precision: pass one",
    "--load_in_8bit --load_in_4bit": "8 and 4 bits are both asked for",
    "--finetune_type full --load_in_8bit": "--finetune_type full: no quantisation",
    "--save_best 1 --eval_strategy no": "--save_best and --early_stopping_patience need an evaluation",
    "--early_stopping_patience 3 --dev_size 0": "need an evaluation",
    "--checkpoint_strategy no --save_best 1": "need checkpoints: drop --checkpoint_strategy no",
    "--early_stopping_patience 3 --save_best 0": "keeps the best state: drop --save_best 0",
    "--resume_from_checkpoint --output_dir x --overwrite": "--overwrite deletes what --resume_from_checkpoint needs",
    "--dataset_name x": "--train_file and --dataset_name both name training data",
    "--init_adapter nowhere": "--init_adapter nowhere has no adapter_config.json",
    "--temperature 0": "argument --temperature: 0 is outside (0",
}


@pytest.mark.parametrize("flags", BROKEN_FLAGS)
def test_broken_flags_exit_2_with_a_sentence(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train_embed_lora.main(["--train_file", "x.jsonl", *flags.split()])
    assert stop.value.code == 2
    assert BROKEN_FLAGS[flags] in capsys.readouterr().err


ALIASES = {
    "--lora_rank 3": ("lora_r", 3),
    "--quantization_bit 8 --finetune_type QLoRA": ("bits", 8),
    "--per_device_train_batch_size 5": ("batch_size", 5),
    "--max_sequence_length 99": ("max_length", 99),
    "--lr_warmup_steps 7": ("warmup_steps", 7),
    "--lr_warmup_ratio 0.2": ("warmup_ratio", 0.2),
    "--log_with wandb": ("report_to", "wandb"),
    "--flash_attention_v2": ("attn_implementation", "flash_attention_2"),
    "--disable_gradient_checkpointing": ("gradient_checkpointing", False),
    "--mixed_precision Bf16": ("mixed_precision", "bf16"),
    "--report_to None": ("report_to", "none"),
    "--optimizer AdamW": ("optimizer", "adamw"),
    "--lr_scheduler_type Cosine": ("lr_scheduler", "cosine"),
    "--finetune_type LoRA": ("finetune_type", "lora"),
    "--training_type Full": ("finetune_type", "full"),
    "--eval_strategy Epoch": ("eval_strategy", "epoch"),
    "--save_on_epoch_end 3": ("save_on_epoch_end", 3),
}


@pytest.mark.parametrize("script", [train_embed_lora, train_sft_lora])
@pytest.mark.parametrize("flags", ALIASES)
def test_names_and_values_of_other_trainers_are_understood(flags, script):
    name, value = ALIASES[flags]
    args = script.parse_args(
        ["--train_file", "x.jsonl", "--gradient_checkpointing", *flags.split()]
    )
    assert getattr(args, name) == value


def test_a_switch_of_another_trainer_changes_nothing_where_it_is_not_given():
    args = train_sft_lora.parse_args(["--train_file", "x.jsonl"])
    assert (args.attn_implementation, args.gradient_checkpointing) == ("auto", True)


def test_no_data_and_resume_without_a_folder_exit_2(capsys):
    for flags, sentence in (
        ([], "no training data"),
        (["--train_file", "x", "--resume_from_checkpoint"], "needs the run's --output_dir"),
    ):
        with pytest.raises(SystemExit) as stop:
            train_embed_lora.main(flags)
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err


BROKEN_FILES = {  # name: (content, what the message says)
    "a.jsonl": (
        two('{"query": "q", "pos": ["p"'),
        "a.jsonl, line 2: no valid JSON (Expecting ',' delimiter, column 27)",
    ),
    "b.jsonl": (two("[1, 2]"), "b.jsonl, line 2: a list, not a JSON object"),
    "c.jsonl": ("", "c.jsonl holds no rows"),
    "d.jsonl": (
        '{"query": "q", "answers": "p"}\n',
        'd.jsonl, line 1: no positive (fields: "query", "answers")',
    ),
    "e.jsonl": (
        '{"text": "q", "pos": "p"}\n',
        'no query (fields: "text", "pos"). Rename one to "query"',
    ),
    "f.jsonl": (
        '{"query": "q", "positive": "p", "answer": "a"}\n',
        "2 columns could be the positive: positive, answer",
    ),
    "g.jsonl": (
        '{"query": 17, "positive": 3, "negative": 4}\n',
        "g.jsonl, line 1: query is the int 17, an id rather than a text",
    ),
    "h.jsonl": (two({"query": "q2", "pos": [12, 13]}), "h.jsonl, line 2: pos is the int 12, an id"),
    "i.jsonl": ('{"query": "q", "pos": ["p"]}\n', "1 rows are left to train on"),
    "j.jsonl": ('{"query": "", "pos": ["p"]}\n' * 3, "0 rows are left to train on"),
    "k.csv": (
        "query,positive\nq,p\nq,p,extra\n",
        "k.csv, line 3: not the 2 columns of the first line",
    ),
    "l.csv": ("query,positive\nq\n", "l.csv, line 2: not the 2 columns of the first line"),
    "l2.tsv": ('query\tpositive\nq\t"open\nq2\tp2\n', "l2.tsv, line 2: unexpected end of data"),
    "l3.csv": ("query,positive\n17,23\n18,24\n", "every query is a number, ids rather than texts"),
    "m.json": ('{"query": "q"', "m.json, line 1: no valid JSON"),
    "n.json": ('[{"query": "q", "pos": "p"}, 3]', "n.json, row 2: a int, not a JSON object"),
    "o.parquet": ("not parquet", "o.parquet is no parquet file"),
    "p.txt": ("q\tp\n", "p.txt is none of .jsonl, .json, .csv, .tsv, .parquet"),
    "r.jsonl": (b'{"query": "\xff\xfe"}\n', "r.jsonl is not UTF-8 (byte 11)"),
    "r2.csv": (
        "query,positive,query\nq,p,other\n",
        'r2.csv, line 1: 2 columns or keys are called "query"',
    ),
    "r3.jsonl": (
        two('{"query": "q", "pos": "p", "pos": "r"}'),
        'r3.jsonl, line 2: 2 columns or keys are called "pos"',
    ),
    "r4.json": (
        '[{"query": "q", "pos": "p"}, {"query": "q", "query": "r"}]',
        "r4.json, row 2: 2 columns or keys are",
    ),
    "r5.jsonl": (
        two({"query": "q2", "pos": [{"docid": "7"}]}),
        "r5.jsonl, line 2: pos is {'docid': '7'}, an id rather than a text",
    ),
    "r6.jsonl": (
        two({"query": "q2", "pos": {"text": ["p"]}}),
        "r6.jsonl, line 2: pos has the list ['p'] where a text",
    ),
    "r7.csv": (
        "query,positive\nq,\"['a', 'b']\"\n",
        "r7.csv, line 2: positive is ['a', 'b'], a list as Python",
    ),
    "r8.jsonl": (
        two({"query": "q2", "pos": "p", "prompt": ["a", "b"]}),
        "r8.jsonl, line 2: 2 prompts in one row",
    ),
    "r9.jsonl": (
        two({"query": "q2", "pos": "p", "prompt": 3}),
        "r9.jsonl, line 2: prompt is the int 3",
    ),
    "ra.jsonl": (
        '{"query": "q", "pos": "p", "score": 1}\n{"query": "q", "pos": "r", "score": 0.25}\n',
        "ra.jsonl, line 2: score is 0.25, one of 2 different numbers. Write 1",
    ),
    "rb.csv": (
        "query,answer,label,score\nq,p,1,0\nr,s,0,1\n",
        "2 columns could be the label: label, score",
    ),
    "rc.jsonl": (
        '{"query": "q", "pos": ["p", "r"], "label": [1, 0]}\n',
        "rc.jsonl, line 1: label is a list of labels",
    ),
    "rd.jsonl": ('{"query": "q", "pos": "p", "label": 0}\n' * 3, "0 rows are left to train on"),
    "s.jsonl": (two({"query": ["q", "r"], "pos": ["p"]}), "s.jsonl, line 2: 2 queries in one row"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_named_before_a_model_is_loaded(name, tmp_path, monkeypatch):
    content, sentence = BROKEN_FILES[name]
    monkeypatch.setattr(utils, "load_base", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError) as error:
        train_embed_lora.main(
            ["--train_file", put(tmp_path, name, content), "--output_dir", str(tmp_path / "out")]
        )
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def break_model(folder, name, content):
    if content is None:
        (Path(folder) / name).unlink()
    else:
        (Path(folder) / name).write_text(content)


BROKEN_FOLDERS = {
    "missing file": (["--train_file", "nowhere.jsonl"], "nowhere.jsonl is not there"),
    "missing glob": (["--train_file", "no*where.jsonl"], "no*where.jsonl is not there"),
    "missing dev": (["--dev_file", "dev=nowhere"], "nowhere is not there"),
    "no such column": (["--query_column", "frage"], "no column frage"),
    "same positive": (
        ["--train_file", "SAME", "--dev_size", "0"],
        "has no gradient: they have nothing to tell apart",
    ),
    "dev twice": (["--dev_file", "DATA", "--dev_file", "DATA"], "it is given twice. Drop one."),
    "no BEIR": (["--dev_file", "EMPTY"], "is no BEIR folder: no corpus.jsonl, queries.jsonl"),
    "missing model": (
        ["--model_name", "./nowhere"],
        "--model_name ./nowhere: neither a folder here nor a hub model",
    ),
    "unknown hub model": (
        ["--model_name", "no/such-model"],
        "--model_name no/such-model: neither a folder here nor a hub model",
    ),
    "empty model": (["--model_name", "EMPTY"], "neither a folder here nor a hub model"),
    "unknown architecture": (
        ["--model_name", 'MODEL:config.json:{"model_type": "nonsense"}'],
        "neither a folder here nor a hub model",
    ),
    "remote code": (
        [
            "--model_name",
            'MODEL:config.json:{"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}',
        ],
        "brings Python code of its own",
    ),
    "encoder-decoder": (
        ["--model_name", 'MODEL:config.json:{"model_type": "t5"}'],
        "is an encoder-decoder",
    ),
    "no weights": (["--model_name", "MODEL:model.safetensors"], "cannot be loaded"),
    "a dense layer": (
        ["--model_name", 'MODEL:modules.json:[{"type": "x.Transformer"}, {"type": "x.Dense"}]'],
        "has a Dense layer behind its pooling",
    ),
    "wrong targets": (
        ["--target_modules", "q_proj"],
        "Linear layers here: dense, key, query, value",
    ),
    "dimension": (
        ["--matryoshka_dims", "4096"],
        "--matryoshka_dims 4096 exceeds the model's 64 dimensions",
    ),
    "hub data": (
        ["--train_file", "--dataset_name", "no/such-data"],
        "--dataset_name no/such-data cannot be read",
    ),
    "no checkpoint": (["--resume_from_checkpoint", "nowhere"], "nowhere is no complete checkpoint"),
    "empty dev": (["--dev_file", "BLANK"], "holds no query with a relevant document"),
    "full folder": (["--output_dir", "DATA_FOLDER"], "is not empty. Pass another, --overwrite"),
    "a file for a folder": (["--output_dir", "DATA"], "is a file. Name a folder"),
    "unknown metric": (
        ["--metric_for_best", "f1"],
        "--metric_for_best f1 is not measured. Choose one of accuracy@1",
    ),
    "no such report": (["--report_to", "mlflow"], "mlflow: it is not installed"),
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_broken_folders_and_models_end_in_a_sentence(case, tmp_path, tiny_bert, pairs):
    flags, sentence = BROKEN_FOLDERS[case]
    (tmp_path / "empty").mkdir()
    named = {
        "EMPTY": str(tmp_path / "empty"),
        "DATA": pairs,
        "DATA_FOLDER": str(Path(pairs).parent),
    }
    named["BLANK"] = write_jsonl(tmp_path / "blank.jsonl", [{"query": "", "pos": ["p"]}])
    named["SAME"] = write_jsonl(
        tmp_path / "same.jsonl", [{"query": f"q{i}", "pos": ["b"]} for i in range(40)]
    )
    flags = [named.get(flag, flag) for flag in flags]
    for i, flag in enumerate(flags):
        if flag.startswith("MODEL:"):
            flags[i] = shutil.copytree(tiny_bert, str(tmp_path / "model"))
            break_model(flags[i], *(flag.split(":", 2)[1:] + [None])[:2])
    base = [
        "--model_name",
        tiny_bert,
        "--train_file",
        pairs,
        "--output_dir",
        str(tmp_path / "out"),
        "--report_to",
        "none",
    ]
    if "--dataset_name" in flags:
        base, flags = base[:2] + base[4:], flags[1:]
    with pytest.raises(InputError) as error:
        train_embed_lora.main([*base, *flags])
    assert sentence in str(error.value)


def test_init_adapter_with_a_contradicting_rank_exits_2(run_embed, tmp_path, capsys):
    run_embed("--max_steps", 2, "--lora_r", 4, out=tmp_path / "one")
    with pytest.raises(SystemExit) as stop:
        run_embed("--init_adapter", tmp_path / "one/final", "--lora_r", 8)
    assert stop.value.code == 2
    assert "was trained with lora_r 4, not 8" in capsys.readouterr().err

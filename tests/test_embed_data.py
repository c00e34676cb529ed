"""Every format is read for what it is, and every broken input ends in one sentence."""

import json
import shutil
from pathlib import Path

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

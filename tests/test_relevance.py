"""Labels, a teacher's scores and types are read beside the texts that they are of, or refused."""

import csv
import json

import train_embed_lora
from conftest import write_jsonl
from parts.pairs import Columns, Example, read_examples
from parts.rows import read_hub_rows, read_rows
from utils import InputError

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets.fingerprint import Hasher


def read(path):
    """Return the Examples and drops of a file."""
    return read_examples(read_rows(path), Columns(), None)


def read_row(tmp_path, row):
    """Return the Example of one row."""
    return read(write_jsonl(tmp_path / "rows.jsonl", [row]))[0][0]


# ---------------------------------------------------------------- what belongs together


@pytest.mark.parametrize(
    "row, scores",
    [
        # texts as they are written: empty ones have a place, and none of them a score
        (
            {"pos": [" p ", "", None, "r"], "pos_scores": [1, 2, 3, 4], "neg": None},
            {"p": 1, "r": 4},
        ),
        (
            {"pos": [{"title": "T", "text": "p"}, {"text": ""}], "pos_scores": [1, 2]},
            {"T p": 1},
        ),
        ({"pos": "p", "pos_scores": 1.5, "neg": ["n"], "neg_scores": 0.5}, {"p": 1.5, "n": 0.5}),
        ({"pos": '["p", "r"]', "pos_scores": "[1, 2.5]"}, {"p": 1, "r": 2.5}),
        ({"pos": "p", "pos_scores": 1, "neg": "", "neg_scores": []}, {"p": 1}),
        # null is no score, and an empty list none of any text
        ({"pos": ["p", "r"], "pos_scores": [None, 2]}, {"r": 2}),
        ({"pos": ["p"], "pos_scores": None, "neg": ["n"], "neg_scores": [2]}, {"n": 2}),
        ({"pos": ["p"], "pos_scores": [], "neg": ["n"], "neg_scores": [2]}, {"n": 2}),
        # a positive's score is the one that stays, of texts that differ in case alone too
        (
            {"pos": ["p"], "pos_scores": [1], "neg": ["p", "P ", "n"], "neg_scores": [2, 3, 4]},
            {"p": 1, "n": 4},
        ),
        ({"docs": ["p", "n", "p"], "labels": [0, 0, 1], "scores": [1, 2, 3]}, {"p": 3, "n": 2}),
        # several columns share a list, one that is empty with or without a place in it
        ({"pos": "p", "neg_1": "a", "neg_2": "b", "neg_scores": [1, 2]}, {"a": 1, "b": 2}),
        ({"pos": "p", "neg_1": None, "neg_2": "b", "scores": [1, None, 3]}, {"p": 1, "b": 3}),
        ({"pos": "p", "neg_1": None, "neg_2": "b", "scores": [1, 3]}, {"p": 1, "b": 3}),
        ({"pos": ["p", "r"], "neg": ["n"], "scores": [1, 2, 3]}, {"p": 1, "r": 2, "n": 3}),
    ],
)
def test_a_score_travels_with_its_text(tmp_path, row, scores):
    example = read_row(tmp_path, {"query": "q"} | row)
    assert example.scores == scores
    assert all(type(score) is float for score in example.scores.values())
    assert scores.keys() <= {*example.pos, *example.neg}


def test_joined_rows_keep_their_scores(tmp_path):
    rows = [
        {"query": "q", "document": "a", "label": 0, "pos_scores": 0.1},
        {"query": "q", "document": "p", "label": 1, "pos_scores": 0.9},
        {"query": "q", "document": "b", "label": 0, "pos_scores": None},
        {"query": "q", "document": "p", "label": 0, "pos_scores": 0.3},
    ]
    expected = [Example("q", ["p"], ["a", "b"], None, {"a": 0.1, "p": 0.9})]
    for order in (rows, rows[::-1]):
        (example,), _ = read(write_jsonl(tmp_path / "rows.jsonl", order))
        example.neg.sort()
        assert [example] == expected


def test_rows_that_differ_in_scores_alone_are_one_with_the_scores_of_both(tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": ["a", "b"]}
    rows = [
        row | {"pos_scores": [1], "neg_scores": [None, 2]},
        row | {"pos_scores": [9], "neg_scores": [3, 9], "neg": ["a", "B"]},
        {"query": "other", "pos": ["p"]},
    ]
    examples, drops = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert examples[0] == Example("q", ["p"], ["a", "b"], None, {"p": 1, "a": 3, "b": 2})
    assert len(examples) == 2 and drops == {"duplicate rows": 1}


@pytest.mark.parametrize("labels", [[1, 0], [True, False], ["1", "0"], "[1, 0]", [1.0, 0.0]])
def test_a_list_of_labels_splits_its_texts(tmp_path, labels):
    row = {"query": "q", "pos": ["p", "n"], "labels": labels}
    assert read_row(tmp_path, row) == Example("q", ["p"], ["n"])


def test_labels_split_before_empty_texts_are_left_out_and_beside_negatives(tmp_path):
    row = {"query": "q", "pos": ["", "n", "p"], "neg": ["m"], "labels": [1, 0, 1]}
    assert read_row(tmp_path, row) == Example("q", ["p"], ["n", "m"])


def test_rows_without_a_match_or_labels_are_dropped(tmp_path):
    rows = [
        {"query": "q", "docs": ["p", "n"], "labels": [1, 0]},
        {"query": "r", "docs": ["p", "n"], "labels": [0, 0]},
        {"query": "s", "docs": ["p", "n"], "labels": None},
        {"query": "t", "docs": "p", "labels": 1},
        {"query": "u", "docs": []},
    ]
    examples, drops = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert examples == [Example("q", ["p"], ["n"]), Example("t", ["p"], [])]
    assert drops == {
        "rows without a document of label 1": 1,
        "rows with an empty labels": 1,
        "rows with an empty positive": 1,
    }


@pytest.mark.parametrize(
    "row, unused",
    [
        # margins of MarginMSELoss, scores of DistillKLDivLoss under another name, STS
        ({"pos": "p", "neg": "n", "scores": 0.7}, "scores"),
        ({"pos": "p", "neg": "n", "score": 0.7}, "score"),
        ({"pos": "p", "neg": "n", "labels": [8.5, 2.5]}, "labels"),
        ({"pos": "p", "scores": [0.1, 0.7, 0.2]}, "scores"),
        ({"pos": "p", "neg_scores": [0.1]}, "neg_scores"),
        ({"pos": "p", "neg": "n", "pos_scores": 2, "scores": [3]}, "scores"),
        # our own files of mined negatives: the student's cosines are no teacher's
        (
            {"pos": ["p"], "neg": ["n"], "pos_cosines": [1], "neg_cosines": [0], "source": ["own"]},
            "pos_cosines, neg_cosines, source",
        ),
        ({"pos": "p", "type": "bridge"}, "type"),
        ({"pos": "p", "type": None, "id": 3}, "type, id"),
    ],
)
def test_other_columns_are_unused(tmp_path, capsys, row, unused):
    example = read_row(tmp_path, {"query": "q"} | row)
    assert f"(unused: {unused})" in capsys.readouterr().out
    assert example.pos == ["p"]
    assert example.scores == ({"p": 2} if "pos_scores" in row else {})


# ---------------------------------------------------------------- tables and the hub


def test_tables_and_the_hub_hold_lists_of_scores_and_labels(tmp_path):
    rows = [
        {"query": "q", "answer": ["p", "n"], "labels": [1, 0], "scores": [0.5, None]},
        {"query": "r", "answer": ["p"], "labels": [1], "scores": None},
    ]
    expected = [Example("q", ["p"], ["n"], None, {"p": 0.5}), Example("r", ["p"], [])]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    assert read(tmp_path / "train.parquet")[0] == expected
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            cells = ["" if cell is None else json.dumps(cell) for cell in row.values()]
            writer.writerow([row["query"], *cells[1:]])
    assert read(tmp_path / "rows.csv")[0] == expected
    (tmp_path / "one.csv").write_text("query,pos,neg,pos_scores,neg_scores\nq,p,n,0.5,nan\n")
    assert read(tmp_path / "one.csv")[0] == [Example("q", ["p"], ["n"], None, {"p": 0.5})]


# ---------------------------------------------------------------- what is refused

BGE = {"query": "q", "pos": ["p", "r"], "neg": ["n"]}
LIST = {"query": "q", "docs": ["p", "n"]}
TUPLE = {"query": "q", "pos": "p", "neg_1": "a", "neg_2": "b", "neg_3": "c"}
NO_NUMBER = "no finite number up to 1e+20. Write one for each text, null where there is none."
TYPED = {"query": "q", "pos": ["p"], "neg": ["a", "b"]}


@pytest.mark.parametrize(
    "row, sentence",
    [
        (BGE | {"pos_scores": [1, float("nan")]}, f"pos_scores has nan, {NO_NUMBER}"),
        (BGE | {"neg_scores": [float("-inf")]}, f"neg_scores has -inf, {NO_NUMBER}"),
        (BGE | {"neg_scores": [1e30]}, f"neg_scores has 1e+30, {NO_NUMBER}"),
        (BGE | {"neg_scores": [10**400]}, "neg_scores has 1000000"),
        (BGE | {"pos_scores": [1, "0.5"]}, f"pos_scores has '0.5', {NO_NUMBER}"),
        (BGE | {"neg_scores": "0.5"}, f"neg_scores has '0.5', {NO_NUMBER}"),
        (BGE | {"pos_scores": [True, 1]}, f"pos_scores has True, {NO_NUMBER}"),
        (BGE | {"pos_scores": [[1, 2]]}, f"pos_scores has [1, 2], {NO_NUMBER}"),
        (
            BGE | {"pos_scores": [1]},
            "pos_scores has 1 numbers, and pos 2 texts. Write one for each text, null where",
        ),
        (BGE | {"neg_scores": [1, 2]}, "neg_scores has 2 numbers, and neg 1 texts."),
        (BGE | {"neg": [], "neg_scores": [1]}, "neg_scores has 1 numbers, and neg 0 texts."),
        (
            TUPLE | {"scores": [0.1, 0.2, 0.3]},
            "scores has 3 numbers, and pos, neg_1, neg_2, ... 4 texts.",
        ),
        (LIST | {"labels": [1]}, "labels has 1 labels, and docs 2 texts. Write a 1 or a 0 for"),
        (LIST | {"labels": [0.9, 0.2]}, "labels has 0.9. Write 1 (the text matches the query)"),
        (LIST | {"labels": [1, None]}, "labels has None. Write 1"),
        (LIST | {"labels": ["yes", "no"]}, "labels has 'yes'. Write 1"),
        (
            LIST | {"scores": [0.9, 0.2]},
            "2 texts of docs have scores, and which of them match the query is not known. Add "
            "labels, a list of 1s and 0s, or write pos and neg.",
        ),
        (
            {"query": "q", "positive": ["p", "n"], "scores": [0.9, 0.2]},
            "2 texts of positive have scores, and which of them match",
        ),
        (
            TYPED | {"type": "only_1neg"},
            "type is only_1neg (in FlagEmbedding: one negative of each query is shown). Pass "
            "--max_negs 1, or rename the column.",
        ),
        (TYPED | {"type": "no_in_batch_neg"}, "Pass --no-in_batch_negatives, or rename"),
        (TYPED | {"Type": "no_in_batch_neg"}, "Pass --no-in_batch_negatives, or rename"),
        (TYPED | {"type": "symmetric_class"}, "Pass --no-in_batch_negatives, or rename"),
        (TYPED | {"type": "symmetric_clustering"}, "and the prompt as --doc_prefix, or rename"),
        (TYPED | {"type": "symmetric_sts"}, "Pass it as --doc_prefix, or rename"),
    ],
)
def test_what_is_unclear_is_refused_in_a_sentence_that_names_the_line(tmp_path, row, sentence):
    asks = ("pos_scores", "neg_scores", "scores", "labels", "type", "Type")
    good = {name: cell for name, cell in row.items() if name not in asks} | {"query": "good"}
    if "labels" in row:
        good["labels"] = [1, 0]
    path = write_jsonl(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, flags, refused",
    [
        ("only_1neg", "--max_negs 1", "--max_negs 2"),
        ("no_in_batch_neg", "--no-in_batch_negatives", "--max_negs 1"),
        ("symmetric_class", "--no-in_batch_negatives", "--doc_prefix x"),
        (
            "symmetric_clustering",
            "--no-in_batch_negatives --doc_prefix x",
            "--no-in_batch_negatives",
        ),
        ("symmetric_clustering", "--no-in_batch_negatives --doc_prefix x", "--doc_prefix x"),
        ("symmetric_sts", "--doc_prefix x", "--no-in_batch_negatives"),
    ],
)
def test_a_type_is_taken_where_flags_do_what_it_says(tmp_path, kind, flags, refused):
    rows = [TYPED | {"query": f"q{i}", "pos": [f"p{i}"], "type": kind} for i in range(4)]
    argv = ["--train_file", write_jsonl(tmp_path / "rows.jsonl", rows)]

    def read_with(given):
        args = train_embed_lora.parse_args([*argv, *given.split()])
        return train_embed_lora.read_rows(args)

    examples, _, _ = read_with(flags)
    assert examples[0].neg == ["a", "b"]
    with pytest.raises(InputError, match=f"line 1: type is {kind}"):
        read_with(refused)


# ---------------------------------------------------------------- where a row stands


def test_an_example_knows_its_file(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(2)]
    (tmp_path / "a, b").mkdir()
    paths = [write_jsonl(tmp_path / "a, b/1.jsonl", rows[:1]), str(tmp_path / "2.csv")]
    (tmp_path / "2.csv").write_text("query,positive\nq1,p1\n")
    read_from = [row for path in paths for row in read_rows(path)]
    assert [example.file for example in read_examples(read_from, Columns(), None)[0]] == paths


def test_a_row_may_say_of_which_file_it_is(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(3)]
    rows[0]["train_file"] = "a.jsonl"
    rows[1]["train_file"] = " "
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert [example.file for example in read(path)[0]] == ["a.jsonl", path, path]
    ids = [row | {"query": f"{i}", "train_file": "a.jsonl"} for i, row in enumerate(rows)]
    with pytest.raises(InputError, match="every query is a number"):
        read(write_jsonl(tmp_path / "ids.jsonl", ids))


def test_an_example_of_the_hub_knows_its_data_set_and_split(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(2)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    source = train_embed_lora.HubSet(str(tmp_path))
    examples, _ = read_examples(read_hub_rows(source, "train", seed=0), Columns(), None)
    assert [example.file for example in examples] == [f"{tmp_path}[train]"] * 2


def test_a_joined_row_stands_where_its_first_one_stands(tmp_path):
    pairs = [[("q", "a", 1)], [("q", "b", 1), ("r", "c", 1), ("r", "d", 0)]]
    read_from = []
    for i, file in enumerate(pairs):
        rows = [{"query": query, "answer": text, "label": label} for query, text, label in file]
        read_from += read_rows(write_jsonl(tmp_path / f"{i}.jsonl", rows))
    examples, _ = read_examples(read_from, Columns(), None)
    assert [example.pos for example in examples] == [["a", "b"], ["c"]]
    assert [example.file[-7:] for example in examples] == ["0.jsonl", "1.jsonl"]


def test_runs_begun_without_scores_are_resumed_and_other_scores_are_other_data():
    bare = {"query": "q", "pos": ["p"], "neg": ["n"], "prompt": None}

    def fingerprint(**more):
        return train_embed_lora.fingerprint_of([Example(**bare, **more)], {}, [])

    assert fingerprint(file="a.jsonl") == f"rows:{Hasher.hash([[bare], {}])}"
    scored = fingerprint(scores={"p": 1.0})
    assert scored == fingerprint(scores={"p": 1.0}, file="moved.jsonl")
    assert len({fingerprint(), scored, fingerprint(scores={"p": 2.0})}) == 3

"""Every format of training rows is read for what it is."""

from conftest import write_jsonl
from parts.pairs import Columns, Example, read_examples
from parts.rows import read_rows
from utils import InputError

import pytest

BGE = {
    "query": "q1",
    "pos": ["p1", "p2"],
    "neg": ["n1"],
    "pos_scores": [1.0, 0.5],
    "neg_scores": [0.1],
    "prompt": "Find: ",
}
PLAIN = Example("q", ["p"], ["a", "b"])


def read(path, **columns):
    """Return the Examples and drops of a file."""
    return read_examples(read_rows(path), Columns(**columns), None)


@pytest.mark.parametrize(
    "row, expected",
    [
        (
            BGE,
            Example("q1", ["p1", "p2"], ["n1"], "Find: ", {"p1": 1.0, "p2": 0.5, "n1": 0.1}),
        ),
        # sentence-transformers' triplet and n-tuple with scores, labeled-list with labels
        (
            {"anchor": "q", "positive": "p", "negative": "n", "scores": [0.9, 0.2]},
            Example("q", ["p"], ["n"], None, {"p": 0.9, "n": 0.2}),
        ),
        (
            {
                "query": "q",
                "answer": "p",
                "negative_1": "a",
                "negative_2": "b",
                "scores": [3, 2, 1],
            },
            Example("q", ["p"], ["a", "b"], None, {"p": 3, "a": 2, "b": 1}),
        ),
        (
            {"query": "q", "answer": ["p", "a", "b"], "labels": [1, 0, 0]},
            Example("q", ["p"], ["a", "b"]),
        ),
        # what its rerankers are trained on
        (
            {"query": "q", "docs": ["a", "p", "b", "r"], "labels": [0, 1, 0, 1]},
            Example("q", ["p", "r"], ["a", "b"]),
        ),
        (
            {"query": "q", "documents": ["a", "p"], "labels": [0, 1], "scores": [-1.5, 2]},
            Example("q", ["p"], ["a"], None, {"p": 2, "a": -1.5}),
        ),
        # FlagEmbedding's types that say nothing new
        ({"query": "q", "pos": ["p"], "neg": ["a", "b"], "type": "normal"}, PLAIN),
        (
            {"query": "q", "pos": ["p"], "neg": ["n"], "type": "only_1neg"},
            Example("q", ["p"], ["n"]),
        ),
        ({"query": "q", "pos": ["p"], "neg": []}, Example("q", ["p"], [])),
        ({"query": "q", "pos": "p"}, Example("q", ["p"], [])),
        ({"anchor": "q", "positive": "p", "negative": "n"}, Example("q", ["p"], ["n"])),
        ({"question": "q", "answer": "p"}, Example("q", ["p"], [])),
        ({"Query": "q", "Document": "p"}, Example("q", ["p"], [])),
        ({"問い": "q", "答え": "p"}, Example("q", ["p"], [])),
        ({"質問文": "q", "回答文": "p"}, Example("q", ["p"], [])),
        ({"お問い合わせ": "q", "ご回答": "p"}, Example("q", ["p"], [])),
        ({"問い合わせ": "q", "回答": "p"}, Example("q", ["p"], [])),
        ({"Q": "q", "A": "p"}, Example("q", ["p"], [])),
        ({"a": "p", "question": "q", "answer": "p"}, Example("q", ["p"], [])),  # "a": unused
        ({"問題": "q", "正解": "p", "解説": "x"}, Example("q", ["p"], [])),
        ({"問題": "q", "解答": "p"}, Example("q", ["p"], [])),
        ({"问题": "q", "答案": "p"}, Example("q", ["p"], [])),
        ({"質問": "q", "文書": "p", "neg": "n"}, Example("q", ["p"], ["n"])),
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


def test_a_text_stands_in_a_row_once(tmp_path):
    row = {"query": "q", "pos": ["p", "p"], "neg": ["n", "m", "n", "p", "p"]}
    row |= {"pos_scores": [4, 5], "neg_scores": [None, 2, 1, 3, 3]}
    examples, drops = read(write_jsonl(tmp_path / "rows.jsonl", [row]))
    assert examples == [Example("q", ["p"], ["n", "m"], None, {"p": 4, "m": 2, "n": 1})]
    assert drops == {"negatives equal to a positive": 1}


def test_columns_may_be_named(tmp_path, capsys):
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"frage": "q", "answer": "no", "positive": "p", "schlecht": "n", "id": "1"}],
    )
    named = {"query": "frage", "positive": "positive", "negative": "schlecht"}
    assert read(path, **named)[0] == [Example("q", ["p"], ["n"])]
    assert (
        "query = frage, positive = positive, negatives = schlecht (unused: answer, id)"
        in capsys.readouterr().out
    )


def test_columns_of_scores_and_labels_are_named(tmp_path, capsys):
    read(write_jsonl(tmp_path / "rows.jsonl", [BGE]))
    said = "negatives = neg, scores = pos_scores, neg_scores, query prefix = prompt\n"
    assert said in capsys.readouterr().out
    row = {"query": "q", "docs": ["p", "n"], "labels": [1, 0], "scores": [1, 0], "id": "7"}
    read(write_jsonl(tmp_path / "rows.jsonl", [row]))
    said = "positive = docs, negatives = none, labels = labels, scores = scores (unused: id)"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", "negative1 neg_2 hard_neg hard_negative_1 Hard_Negatives rejected_response".split()
)
def test_names_of_negatives(tmp_path, name):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"query": "q", "response": "p", name: "n"}])
    assert read(path)[0][0].neg == ["n"]


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
@pytest.mark.parametrize("name", ["label", "Score", "relevance", "labels", "scores"])
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
        [{"query": "q", "pos": "p", "gold": 0}, {"query": "r", "pos": "s", "gold": 1}],
    ],
)
def test_other_labels_are_unused(tmp_path, rows):
    examples, _ = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [example.query for example in examples] == ["q", "r"]


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


def test_rows_that_teach_something_else_are_no_duplicates(tmp_path):
    row = {"query": "q", "pos": ["p"], "neg": ["n"]}
    files = [[row, row | {"prompt": "Find: "}], [row | {"prompt": "Find: "}, row]]
    files[1].append({"query": "q", "pos": ["n", "p"]})
    files[1].append({"query": "q", "pos": ["p", "n"]})
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(files)]
    rows = [pair for path in paths for pair in read_rows(path)]
    examples, drops = read_examples(rows, Columns(), None)
    assert [(example.prompt, example.pos) for example in examples] == [
        (None, ["p"]),
        ("Find: ", ["p"]),
        (None, ["n", "p"]),
    ]
    assert drops == {"duplicate rows": 3}


LABELLED = [{"query": "r", "pos": text, "label": i} for i, text in enumerate("yz")]
PLAIN_ROW = {"query": "q", "pos": ["p"]}
SCORED = {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [2], "neg_scores": [1]}


@pytest.mark.parametrize(
    "files, expected",
    [
        # columns that the first thousand rows have not
        (
            [[PLAIN_ROW | {"query": f"q{i}"} for i in range(1000)], [SCORED]],
            Example("q", ["p"], ["n"], None, {"p": 2, "n": 1}),
        ),
        ([[PLAIN_ROW | {"query": f"q{i}"} for i in range(1000)] + [SCORED]], None),
        # beside negatives in another file labels are labels
        ([[SCORED], LABELLED], Example("r", ["z"], ["y"])),
        (
            [[SCORED], [{"question": "r", "docs": ["y", "z"], "labels": [0, 1]}]],
            Example("r", ["z"], ["y"]),
        ),
        ([[SCORED], [{"anchor": "r", "positive": "z"}]], Example("r", ["z"], [])),
    ],
)
def test_files_have_formats_of_their_own(tmp_path, capsys, files, expected):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate(files)]
    rows = [row for path in paths for row in read_rows(path)]
    examples, drops = read_examples(rows, Columns(), None)
    assert examples[-1] == (expected or Example("q", ["p"], ["n"], None, {"p": 2, "n": 1}))
    assert not drops and len({example.file for example in examples}) == len(paths)
    said = capsys.readouterr().out
    assert all((f"columns   {path}: query = " in said) == (len(paths) > 1) for path in paths)


def test_rows_stand_as_their_files_do_and_a_flag_names_columns_where_they_are(tmp_path, capsys):
    files = [
        [{"query": "a", "pos": "p", "bad": "n"}],
        [{"query": "a", "pos": "p", "label": 1}, {"query": "b", "pos": "o", "label": 1}],
        [{"query": "c", "pos": "p", "bad": "n"}],
        [{"query": "b", "pos": "q", "label": 0}],
    ]
    rows = []
    for i, each in enumerate(files):
        rows += read_rows(write_jsonl(tmp_path / f"{i}.jsonl", each))
    examples, _ = read_examples(rows, Columns(negative="bad"), None)
    assert examples == [
        Example("a", ["p"], ["n"]),
        Example("a", ["p"], []),
        Example("b", ["o"], ["q"]),
        Example("c", ["p"], ["n"]),
    ]
    assert "0.jsonl and 1 more: query = query, " in capsys.readouterr().out
    with pytest.raises(InputError, match='no --negative_column worse .fields: "query", "pos"'):
        read_examples(rows, Columns(negative="worse"), None)


def test_ids_of_one_file_among_others_are_refused(tmp_path):
    words = write_jsonl(tmp_path / "words.jsonl", [{"query": "q", "pos": "p"}] * 2)
    triples = [{"query": f"{i}", "positive": f"1{i}", "negative": "2"} for i in range(2)]
    rows = read_rows(words) + read_rows(write_jsonl(tmp_path / "ids.jsonl", triples))
    with pytest.raises(InputError, match="ids.jsonl, line 1: every query is a number"):
        read_examples(rows, Columns(), None)

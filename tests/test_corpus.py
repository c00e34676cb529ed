"""Files of documents alone: each text once, title in front, and what is no document."""

import json

from conftest import write_jsonl
from parts.beir import read_beir_texts
from parts.cells import texts_of
from parts.corpus import read_corpus
from utils import InputError

import pyarrow as pa
import pyarrow.parquet
import pytest


def test_each_kind_of_file_gives_the_same_documents(tmp_path):
    rows = [
        {"_id": "1", "title": "Kettle", "text": "It boils,\nand whistles."},
        {"_id": "2", "title": "", "text": "A door"},
    ]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name, sign in (("a.csv", ","), ("a.tsv", "\t")):
        lines = [["_id", "title", "text"], *(row.values() for row in rows)]
        quoted = [sign.join(f'"{cell}"' for cell in line) for line in lines]
        (tmp_path / name).write_text("\n".join(quoted))
    for name in ("a.jsonl", "a.json", "a.parquet", "a.csv", "a.tsv"):
        found = read_corpus([str(tmp_path / name)])
        assert found == ["Kettle It boils,\nand whistles.", "A door"], name
    assert list(read_beir_texts(tmp_path / "a.jsonl").values()) == found
    # a {title, text} passage of a training row is the same text
    passage = {"title": rows[0]["title"], "text": rows[0]["text"]}
    assert texts_of(passage, "a row", "pos") == found[:1]


def test_each_text_stands_once_in_the_order_of_files(tmp_path, capsys):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}, {"text": " The  KETTLE"}, {"text": "one"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "the kettle"}, {"text": "Two "}])
    last = write_jsonl(tmp_path / "last.jsonl", [{"text": "zero"}])
    found = read_corpus([last, str(tmp_path / "[ab].jsonl"), last])
    assert found == ["zero", "the kettle", "Two", "one"]
    said = capsys.readouterr().out
    assert (
        f"dropped   3 documents whose text stood before (first: {tmp_path}/b.jsonl, line 1)" in said
    )


def test_empty_documents_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"text": text} for text in ("", " \n", "\u200b", None, "seen", "nan", "null")]
    rows += [{"text": "", "title": "a title alone"}, {"text": None, "title": None}]
    found = read_corpus([write_jsonl(tmp_path / "a.jsonl", rows)])
    assert found == ["seen", "nan", "null", "a title alone"]
    where = f"(first: {tmp_path}/a.jsonl, line 1)"
    assert f"dropped   5 documents without a text {where}" in capsys.readouterr().out
    (tmp_path / "a.csv").write_text("title,text\nnan,body\nNULL,nan\n,\nnan,['x'\n")
    assert read_corpus([str(tmp_path / "a.csv")]) == ["body", "['x'"]
    assert "dropped   2 documents without a text" in capsys.readouterr().out
    table = pa.Table.from_pydict({"text": ["a", None], "score": [float("nan"), 1.0]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_corpus([str(tmp_path / "a.parquet")]) == ["a"]
    (tmp_path / "b.jsonl").write_text('{"text": NaN, "title": "a"}\n')
    assert read_corpus([str(tmp_path / "b.jsonl")]) == ["a"]


def test_a_text_that_reads_as_a_list_is_one_document(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": '["a", "b"]'}, {"text": "[1]"}])
    assert read_corpus([file]) == ['["a", "b"]', "[1]"]


BROKEN_FILES = {  # name: (content, what the message says)
    "a.jsonl": ("", "a.jsonl holds no rows"),
    "b.jsonl": (
        '{"text": "a"}\n{"contents": "b", "id": 7}\n',
        'b.jsonl, line 2: no text (fields: "contents", "id"). Rename the one that holds the '
        'document to "text".',
    ),
    "c.jsonl": ('{"text": ""}\n{"text": "  "}\n', "c.jsonl: not one row has a text that shows"),
    "d.jsonl": ('{"text": 17}\n', "d.jsonl, line 1: the document has the int 17 where a text"),
    "e.jsonl": ('{"text": ["a", "b"]}\n', "line 1: the document has the list ['a', 'b'] where a"),
    "f.jsonl": ('{"text": "a", "title": 3}\n', "f.jsonl, line 1: the document has the int 3 where"),
    "g.csv": ("text\n", "g.csv holds no rows"),
    "h.csv": ("query,pos\nq,p\n", 'h.csv, line 2: no text (fields: "query", "pos"; does the first'),
    "i.txt": ("a\n", "i.txt is none of .jsonl"),
    "j.jsonl": ('{"text": "a"}\n["b"]\n', "j.jsonl, line 2: a list, not a JSON object"),
    "k.jsonl": ('{"text": "a", "text": "b"}\n', '2 columns or keys are called "text"'),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files_are_named(name, tmp_path):
    content, sentence = BROKEN_FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        read_corpus([str(tmp_path / name)])
    assert sentence in str(error.value)


def test_what_is_no_file_is_named(tmp_path):
    for folder in (tmp_path / "beir", tmp_path / "name.jsonl"):
        folder.mkdir()
        with pytest.raises(InputError, match=f"{folder.name} is a folder, not a file of documents"):
            read_corpus([str(folder)])
    with pytest.raises(InputError, match="nowhere.* is not there"):
        read_corpus([str(tmp_path / "nowhere*.jsonl")])

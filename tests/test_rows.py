"""Rows of every kind of file, each for what it is."""

import json

from conftest import write_jsonl
from parts.pairs import Columns, Example, read_examples
from parts.rows import HubSet, expand_files, read_hub_rows, read_rows
from utils import InputError

import pyarrow as pa
import pyarrow.parquet
import pytest


def read(pattern):
    """Return the Examples and drops of files."""
    rows = [row for file in expand_files([str(pattern)]) for row in read_rows(file)]
    return read_examples(rows, Columns(), None)


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


JAPANESE = "質問,回答\nどこ?,棚の上です。\n"
CHINESE = "问题,回答\n在哪里?,在架子上。\n"


def test_a_csv_of_japanese_excel_is_read_in_either_of_its_encodings(tmp_path, capsys):
    expected = [Example("どこ?", ["棚の上です。"], [])]
    (tmp_path / "a.csv").write_text(JAPANESE, encoding="utf-8-sig")  # Excel's "CSV UTF-8"
    assert read(tmp_path / "a.csv")[0] == expected
    assert "Shift_JIS" not in capsys.readouterr().out
    (tmp_path / "b.csv").write_text(JAPANESE, encoding="cp932", newline="\r\n")  # Excel's "CSV"
    assert read(tmp_path / "b.csv")[0] == expected
    assert "b.csv is not UTF-8 (byte 0) and is read as Shift_JIS" in capsys.readouterr().out


@pytest.mark.parametrize(
    "data",
    [
        JAPANESE.encode("euc_jp"),
        JAPANESE.encode()[:-2],  # a download that broke off within a letter
        JAPANESE.encode("cp932")[:-2],
        "質問,回答\n住所,東京都\n".encode("cp932"),  # as likely as not Chinese
        CHINESE.encode("gb18030"),
        "問題,回答\n在哪裡?,在架子上。\n".encode("big5"),
        "질문,답변\n어디?,선반 위에.\n".encode("euc_kr"),
        "query,answer\noù ?,déjà là\n".encode("cp1252"),
    ],
)
def test_bytes_that_may_be_in_another_encoding_are_refused(tmp_path, data):
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(InputError, match="a.csv is not UTF-8 .*Save it as UTF-8."):
        read(tmp_path / "a.csv")


def test_a_name_twice_is_refused_where_a_text_would_be_lost(tmp_path):
    columns = [pa.array(["q"]), pa.array(["p"]), pa.array(["other"])]
    table = pa.Table.from_arrays(columns, names=["query", "positive", "positive"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match='a.parquet: 2 columns or keys are called "positive". Rename'
    ):
        read_rows(tmp_path / "a.parquet")
    (tmp_path / "excel.csv").write_text("query,positive,,\nq,p,,\n")  # empty columns to the right
    (tmp_path / "deeper.jsonl").write_text(
        '{"query": "q", "positive": "p", "meta": {"a": 1, "a": 2}}\n'
    )
    for name in ("excel.csv", "deeper.jsonl"):
        assert read(tmp_path / name)[0] == [Example("q", ["p"], [])]


def test_a_glob_stands_for_no_mined_negatives_unless_it_names_them(tmp_path, capsys):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"query": "q", "pos": "p"}])
    mined = [write_jsonl(tmp_path / f"mined_negatives-{epoch}.jsonl", []) for epoch in (1, 2)]
    assert expand_files([f"{tmp_path}/*.jsonl"]) == [pairs]
    assert f"*.jsonl leaves out {mined[0]}, which a run has mined" in capsys.readouterr().out
    assert expand_files([f"{tmp_path}/mined_negatives-*.jsonl"]) == mined
    assert expand_files([mined[1]]) == mined[1:]
    assert "leaves out" not in capsys.readouterr().out
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(InputError, match="jsonl is not there"):
        expand_files([f"{tmp_path}/*.jsonl"])


def test_a_folder_whose_files_differ_in_columns_is_told_so(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": "p"}])
    write_jsonl(tmp_path / "b.jsonl", [{"query": "q", "pos": "p", "pos_scores": 1}])
    with pytest.raises(InputError, match="names don't match.. Pass the files of the folder"):
        read_hub_rows(HubSet(str(tmp_path)), "train", seed=0)


def test_spaces_around_the_names_of_columns_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("\u3000質問\u3000, 回答 \nどこ?, 棚\n", encoding="utf-8")
    assert read_rows(tmp_path / "a.csv") == [
        (f"{tmp_path}/a.csv, line 2", {"質問": "どこ?", "回答": " 棚"})
    ]
    (tmp_path / "b.csv").write_text("query,query \na,b\n")
    with pytest.raises(InputError, match='2 columns or keys are called "query"'):
        read_rows(tmp_path / "b.csv")


def test_a_name_that_a_shell_has_cut_at_its_space_is_told_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "よくある 質問.csv").write_text(JAPANESE, encoding="utf-8")
    for given in (["よくある", "質問.csv"], ["*.csv", "よくある", "質問.csv"]):
        with pytest.raises(
            InputError, match='よくある is not there, but "よくある 質問.csv" is. A name'
        ):
            expand_files(given)
    (tmp_path / "よくある").touch()
    with pytest.raises(InputError, match="^質問.csv is not there, but"):
        expand_files(["よくある", "質問.csv"])
    with pytest.raises(InputError, match="c.csv is not there .looked in"):
        expand_files(["よくある", "c.csv", "質問.csv"])

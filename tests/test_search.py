"""examples/search.py: which texts of a file are searched, and that the best come first."""

import csv
import sys

from conftest import write_jsonl
from examples import search
from utils import InputError

import pytest
from sentence_transformers import SentenceTransformer

ROWS = [
    ("where is the lamp", "the lamp stands\nbehind the door"),
    ("is there a lamp", "the lamp stands\nbehind the door"),
    ("where is the apple", "look for apple"),
    ("where is the bread", "no bread here"),
]
ANSWERS = list(dict.fromkeys(answer for _, answer in ROWS))


@pytest.fixture
def table(tmp_path):
    """A CSV of Japanese Excel's, with the columns named in Japanese."""
    path = tmp_path / "よくある 質問.csv"
    with path.open("w", encoding="cp932", newline="") as file:
        csv.writer(file).writerows([("質問", "回答"), *ROWS, ("どこですか", "棚の上です")])
    return path


def test_answers_are_those_of_a_training_file_or_a_column_of_texts(table, tmp_path):
    assert search.answers_of(table) == [*ANSWERS, "棚の上です"]
    rows = [{"text": answer, "title": "A"} for answer in ANSWERS]
    assert search.answers_of(write_jsonl(tmp_path / "texts.jsonl", rows)) == [
        f"A {answer}" for answer in ANSWERS
    ]
    with pytest.raises(InputError, match="is not there|cannot be read"):
        search.answers_of(tmp_path / "none.csv")


def test_each_question_finds_the_answers_nearest_by_cosine(run_embed, table, tmp_path, capsys):
    run_embed("--max_steps", 2, "--query_prefix", "Q: ", "--doc_prefix", "D: ")
    final = tmp_path / "out/final"
    capsys.readouterr()
    questions = ["where is the apple", "is there a lamp"]
    found = search.main([str(final), str(table), *questions, "--top", "2"])
    model = SentenceTransformer(str(final))
    answers = search.answers_of(table)
    documents = model.encode([f"D: {answer}" for answer in answers], normalize_embeddings=True)
    for question, hits in zip(questions, found, strict=True):
        scores = documents @ model.encode(f"Q: {question}", normalize_embeddings=True)
        nearest = (-scores).argsort()[:2]
        assert [answer for _, answer in hits] == [answers[place] for place in nearest]
        assert [score for score, _ in hits] == pytest.approx(scores[nearest].tolist(), abs=1e-5)
    said = capsys.readouterr().out
    assert "searched  4 answers of " in said
    assert f"{found[0][0][0]:.3f}  {' '.join(found[0][0][1].split())}\n" in said


def test_what_is_missing_is_said_in_a_sentence(table, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty cannot be loaded: "):
        search.main([str(tmp_path / "empty"), str(table), "q"])
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match="pip install sentence-transformers"):
        search.main([str(tmp_path / "empty"), str(table), "q"])
    with pytest.raises(SystemExit):
        search.parse_args(["model", "file.csv", "q", "--top", "0"])

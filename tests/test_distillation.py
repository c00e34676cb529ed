"""A teacher's scores teach the order of a row's documents; the gradient is that of a naive loop."""

import json
import math
import random
from pathlib import Path

from conftest import (
    gradient,
    gradients_of_two_processes,
    make_rows,
    mined_rows,
    relative,
    write_jsonl,
)
from parts import teacher
from parts.pairs import Columns, Example, read_examples
from parts.rows import read_rows
from parts.texts import TextRules, Texts
from train_embed_lora import LossRules, TrainSet, losses_of_queries
from utils import InputError

import pytest
import torch
import torch.nn.functional as F
from test_embed_step import naive_gradient

DISTILL = "--max_negs 3 --distill_weight 0.7 --teacher_temperature 3"


@pytest.fixture
def scored(tmp_path):
    """A file of 96 rows, of which the first of each four have no scores, and others lack some."""
    rng = random.Random(0)
    rows = make_rows(96)
    for i, row in enumerate(rows):
        row["neg"] = [f"{text} no. {k}" for text in row["pos"] for k in range(i % 4)]
        if i % 4:
            row["pos_scores"] = [rng.uniform(0, 9) for _ in row["pos"]]
            row["neg_scores"] = [rng.uniform(0, 9) for _ in row["neg"]]
        if i % 8 == 3:
            row["neg_scores"][0] = None
        if i % 16 == 5:
            row["pos_scores"][0] = None
    return write_jsonl(tmp_path / "scored.jsonl", rows)


def taught(rows):
    """Return how many rows show two documents with scores."""
    return sum(sum(not math.isnan(score) for score in row.scores) > 1 for row in rows)


@pytest.mark.parametrize("batch_size", [32, 8, 2])
def test_the_gradient_of_distillation_does_not_depend_on_the_cut(embed_trainer, scored, batch_size):
    trainer = embed_trainer(*DISTILL.split(), data=scored)
    rows = [trainer.train_dataset[i] for i in range(32)]
    assert 0 < taught(rows) < 32
    loss, expected = naive_gradient(trainer, rows, distill=(0.7, 3))
    plain, undistilled = naive_gradient(trainer, rows)
    assert loss > plain and relative(undistilled, expected) > 1e-2
    trainer.batch_size = batch_size
    found_loss, found = gradient(trainer, trainer.data_collator(rows))
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("switch", ["--negatives_cross_device", "--no-negatives_cross_device"])
def test_two_processes_take_the_mean_over_all_rows_with_scores(
    embed_trainer, scored, tmp_path, tiny_bert, switch
):
    trainer = embed_trainer(*DISTILL.split(), data=scored)
    train_set = trainer.train_dataset
    # one process has more rows with scores than the other
    first = next(
        i
        for i in range(len(train_set) - 15)
        if taught([train_set[j] for j in range(i, i + 8)])
        > taught([train_set[j] for j in range(i + 8, i + 16)]) + 1
    )
    rows = [train_set[i] for i in range(first, first + 16)]
    _, expected = naive_gradient(trainer, rows, distill=(0.7, 3))
    if switch.startswith("--no"):
        halves = [naive_gradient(trainer, half)[1] for half in (rows[:8], rows[8:])]
        expected += (halves[0] + halves[1]) / 2 - naive_gradient(trainer, rows)[1]
    flags = (
        f"--model_name {tiny_bert} --train_file {scored} --report_to none {DISTILL} "
        f"--batch_size 4 --gradient_accumulation 2 {switch}"
    )
    for found in gradients_of_two_processes(tmp_path, "train_embed_lora", flags, first, 8, 0):
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("weight", [1, 5, 1e6])
def test_a_step_without_scores_has_the_contrastive_gradient_alone(embed_trainer, scored, weight):
    trainer = embed_trainer("--max_negs", 3, "--distill_weight", weight, data=scored)
    rows = [row for row in map(trainer.train_dataset.__getitem__, range(60)) if not taught([row])]
    loss, found = gradient(trainer, trainer.data_collator(rows[:16]))
    plain, expected = naive_gradient(trainer, rows[:16])
    assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert relative(found, expected) < 1e-4


def test_distillation_is_the_mean_over_the_prefixes():
    torch.manual_seed(0)
    query_emb = F.normalize(torch.randn(2, 8), dim=1)
    doc_emb = F.normalize(torch.randn(4, 8), dim=1)
    own = torch.tensor([[0, 1, 2], [3, 1, 3]])
    teacher_scores = torch.tensor([[1.0, 2, 3], [2, 1, math.nan]])
    ids = torch.arange(1, 5)
    rules = LossRules(0.1, dims=[3], distill_weight=1, teacher_temperature=0.5)
    columns = [own, ids[own], ids[own], teacher_scores]
    _, found = losses_of_queries(query_emb, doc_emb, *columns, ids, rules)
    expected = torch.zeros(2)
    for dim in (8, 3):
        for i, shown in enumerate([[0, 1, 2], [3, 1]]):
            cosines = F.cosine_similarity(query_emb[i, :dim], doc_emb[shown, :dim], dim=1)
            wanted = (teacher_scores[i, : len(shown)] / 0.5).softmax(0)
            expected[i] += (wanted * (wanted.log() - (cosines / 0.1).log_softmax(0))).sum() / 2
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_rows_alone_with_their_negatives_have_the_gradient_of_a_naive_loop(embed_trainer, scored):
    trainer = embed_trainer("--max_negs", 2, "--no-in_batch_negatives", data=scored)
    assert all(row.neg for row in trainer.train_dataset.rows)
    rows = [trainer.train_dataset[i] for i in range(32)]
    trainer.batch_size = 8
    loss, expected = naive_gradient(trainer, rows, in_batch=False)
    found_loss, found = gradient(trainer, trainer.data_collator(rows))
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert relative(found, expected) < 1e-4


def test_rows_without_negatives_are_left_out_and_counted(run_embed, scored, tmp_path, capsys):
    report = run_embed("--no-in_batch_negatives", "--dry_run", "--dev_size", 0, data=scored)
    assert report["data"]["train_rows"] == 72
    said = capsys.readouterr().out
    assert "dropped   24 rows without negatives of their own (--no-in_batch_negatives)" in said
    assert "negatives 1 per query: those of its own row" in said
    rows = [{"query": f"q {i}", "pos": [f"p {i}"]} for i in range(4)]
    bare = write_jsonl(tmp_path / "bare.jsonl", rows)
    with pytest.raises(InputError, match="0 rows are left to train on, --no-in_batch_negatives"):
        run_embed("--no-in_batch_negatives", "--dry_run", data=bare)


def test_rows_for_which_nothing_is_mined_are_counted(run_embed, tmp_path, capsys):
    flags = ["--mine_negatives", 1, "--max_steps", 1, "--dev_size", 0]
    run_embed(*flags, "--no-in_batch_negatives")
    bare = sum(not row["neg"] for row in mined_rows(tmp_path / "out"))
    assert 0 < bare < 32  # that have none of their own
    assert f"note      {bare} rows have no negatives, neither mined" in capsys.readouterr().out
    run_embed(*flags, "--overwrite")
    assert "neither mined" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--max_negs 0 --no-in_batch_negatives", "leave no negatives"),
        ("--max_negs 0 --distill_weight 1", "of which --max_negs 0 shows one"),
        ("--teacher_temperature 1e-7", "1e-7 is outside"),
        ("--distill_weight -1", "-1 is outside"),
    ],
)
def test_flags_that_leave_nothing_to_learn_are_refused(embed_argv, flags, said, capsys):
    from train_embed_lora import parse_args

    with pytest.raises(SystemExit):
        parse_args(embed_argv(*flags.split()))
    assert said in capsys.readouterr().err


def test_texts_that_differ_in_case_keep_scores_of_their_own():
    example = Example("q", ["p"], ["n", "N"], scores={"p": 3.0, "n": 2.0, "N": 1.0})
    train_set = TrainSet([example], texts := Texts(), TextRules("", "", 8, 8), 2, seed=0)
    shown = train_set[0]
    words = [text for text, _ in texts.index]
    found = {
        words[index]: score for (index, _), score in zip(shown.documents, shown.scores, strict=True)
    }
    assert found == example.scores


def test_the_preflight_tells_what_a_teacher_says(capsys):
    # the first rows of BGE's toy file, as far as scores go
    rows = [[102.0, 98, 95, 84], [103, 90, 97, 99], [math.nan] * 4]
    teacher.show_teacher(rows, 1, 5)
    said = capsys.readouterr().out
    shares = []
    for scores in rows[:2]:
        shares.append(1 / sum(math.exp((score - scores[0]) / 5) for score in scores))
    mean = sum(shares) / 2
    assert f"2 of 3 rows show documents with scores; it puts {mean:.2f} on the positive" in said
    assert "(all alike: 0.25)" in said and "note" not in said and "has none" not in said
    # rows whose positive has no score say nothing of it
    teacher.show_teacher([*rows, [math.nan, 98, 95, 84], [math.nan, 7, 7]], 1, 5)
    said = capsys.readouterr().out
    told = "4 of 5 rows show documents with scores, in 2 of them the positive has none; it puts"
    assert f"{told} {mean:.2f} on the positive" in said and "(all alike: 0.25)" in said
    teacher.show_teacher([[math.nan, 9, 5, 3]] * 2, 1, 1)
    said = capsys.readouterr().out
    assert (
        said
        == "teacher   2 of 2 rows show documents with scores, in 2 of them the positive has none\n"
    )
    teacher.show_teacher(rows, 1, 1)
    said = capsys.readouterr().out
    assert "the teacher says little beyond the label at --teacher_temperature 1: pass 5" in said
    teacher.show_teacher([[0.9, 0.5, 0.3, 0.2]] * 3, 1, 1)
    assert "tells nearly nothing at --teacher_temperature 1: pass 0.2" in capsys.readouterr().out
    teacher.show_teacher([[0.5, 0.5, 0.5, 0.5]] * 3, 1, 1)
    said = "tells nearly nothing at --teacher_temperature 1: no other helps"
    assert said in capsys.readouterr().out
    teacher.show_teacher([[1, 0.5]] * 3, 1, 1)  # at 0.2, too, it would be a label
    assert "tells nearly nothing at --teacher_temperature 1: pass 0.5" in capsys.readouterr().out
    teacher.show_teacher([[0.9, 0.5]] * 3, 1, 0.2)
    assert "of which a step shows 2: little beyond the label" in capsys.readouterr().out
    teacher.show_teacher(rows, 0, 1)
    assert "unused without --distill_weight" in capsys.readouterr().out
    teacher.show_teacher([[math.nan] * 2], 0, 1)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match="no row shows two documents that have scores"):
        teacher.show_teacher([[1.0, math.nan]], 1, 1)


def test_mined_negatives_have_no_score(run_embed, scored, tmp_path, capsys):
    flags = "--mine_negatives 2 --max_negs 5 --distill_weight 1 --max_steps 1 --dev_size 0"
    run_embed(*flags.split(), data=scored)
    # six have a score of their one negative alone
    assert "66 of 96 rows show documents with scores" in capsys.readouterr().out
    mined = tmp_path / "out/mined_negatives-1.jsonl"
    given = {}
    for row in map(json.loads, Path(scored).read_text().splitlines()):
        numbers = row.get("pos_scores", []) + row.get("neg_scores", [])
        given[row["query"]] = dict(zip(row["pos"] + row["neg"], numbers, strict=False))
    assert '"mined"' in mined.read_text()
    for row in map(json.loads, mined.read_text().splitlines()):
        numbers = row.get("pos_scores", []) + row.get("neg_scores", [])
        assert bool(numbers) == bool(given[row["query"]])
        for text, number in zip(row["pos"] + row["neg"], numbers, strict=bool(numbers)):
            assert number == given[row["query"]].get(text)
    # as a training file it teaches the same
    examples, _ = read_examples(read_rows(mined), Columns(), None)
    for example in examples:
        kept = {text: number for text, number in given[example.query].items() if number is not None}
        assert example.scores == kept

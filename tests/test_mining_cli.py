"""A run that mines: what it finds, writes down and shows; stopped, resumed, in several processes."""

import json
import os
import subprocess
import sys

import train_embed_lora
from conftest import (
    ROOT,
    back_to,
    make_rows,
    mined_rows,
    naive_mined,
    same,
    weights_of,
    write_jsonl,
)
from parts import mining
from utils import InputError

import pytest
import torch

EPOCHS = "--mine_every epoch --epochs 2 --batch_size 8 --gradient_accumulation 1 --save_steps 2"
EPOCHS = [*EPOCHS.split(), "--eval_strategy", "no", "--lr", "1e-2", "--mine_negatives", 2]


@pytest.fixture
def rows(tmp_path):
    """32 rows, two of one query, of which every third has no negative: four steps of 8."""
    rows = make_rows(32)
    rows[9]["query"] = rows[8]["query"]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("margin, found", [(0.97, {0, 3}), (1.01, {3})])
def test_rows_draw_from_what_the_base_finds(embed_argv, rows, tmp_path, margin, found):
    corpus = [{"text": f"look behind the {word}"} for word in ("door", "lamp", "chair")]
    files = ["--mine_corpus", write_jsonl(tmp_path / "corpus.jsonl", corpus)]
    # the vectors of a random model are all alike: most are as near as the positive
    flags = ["--mine_negatives", 3, "--mine_margin", margin, "--max_steps", 1, *files]
    prepared = train_embed_lora.prepare(embed_argv(*flags, "--eval_strategy", "no", data=rows))
    trainer = prepared.trainer
    examples = trainer.miner.examples
    documents = []
    for example in examples:
        documents += [text for text in [*example.pos, *example.neg] if text not in documents]
    documents += [row["text"] for row in corpus]
    expected = naive_mined(trainer, examples, documents, 3, margin)
    assert {len(mined) for mined in expected} >= found
    train_embed_lora.train_and_prove(prepared)
    words = [text for text, _ in trainer.texts.index]
    written = mined_rows(tmp_path / "out")
    drawn_from = trainer.train_dataset.negatives
    for row, example, mined, drawn in zip(written, examples, expected, drawn_from, strict=True):
        own = example.neg
        assert row["neg"] == own + mined
        assert row["source"] == ["own"] * len(own) + ["mined"] * len(mined)
        assert len(row["pos_cosines"]) == len(example.pos)
        of_mined = row["neg_cosines"][len(own) :]
        assert len(of_mined) == len(mined) and of_mined == sorted(of_mined, reverse=True)
        assert [words[i] for i, _ in drawn] == row["neg"]


def test_a_file_of_mined_negatives_is_training_data(run_embed, rows, tmp_path, capsys):
    run_embed("--mine_negatives", 2, "--max_steps", 1, "--eval_strategy", "no", data=rows)
    capsys.readouterr()
    mined = tmp_path / "out/mined_negatives-1.jsonl"
    run_embed("--dry_run", out=tmp_path / "again", data=str(mined))
    said = capsys.readouterr().out
    columns = "query = query, positive = pos, negatives = neg, file = train_file (unused: "
    assert f"{columns}pos_cosines, neg_cosines, source)" in said and "label" not in said


def test_three_queries_are_shown_and_how_many_found_fewer(run_embed, rows, capsys):
    run_embed("--mine_negatives", 30, "--max_steps", 1, "--eval_strategy", "no", data=rows)
    said = capsys.readouterr().out
    assert said.count("\nquery     ") == 3 and said.count("\n  positive ") >= 3
    assert "found fewer than 30: " in said and "as near as their positives" in said


def test_each_epoch_mines_with_the_model_so_far(run_embed, rows, tmp_path):
    run_embed(*EPOCHS, data=rows)
    first, second = mined_rows(tmp_path / "out"), mined_rows(tmp_path / "out", 2)
    assert [row["query"] for row in first] == [row["query"] for row in second]
    assert [row["neg"] for row in first] != [row["neg"] for row in second]
    run_embed(*EPOCHS, "--mine_every", "run", "--overwrite", data=rows)
    assert not (tmp_path / "out/mined_negatives-2.jsonl").exists()


@pytest.mark.parametrize("every", ["epoch", "run"])
@pytest.mark.parametrize("step", [2, 4, 6])  # within the first epoch, behind it, within the second
def test_a_resumed_run_draws_from_the_same(run_embed, rows, tmp_path, every, step):
    flags = [*EPOCHS, "--mine_every", every, "--save_total_limit", 9]
    run_embed(*flags, data=rows)
    whole = weights_of(tmp_path / "out")
    back_to(tmp_path / "out", step)
    if every == "epoch" and step < 6:
        (tmp_path / "out/mined_negatives-2.jsonl").unlink()  # killed before it was mined
    run_embed(*flags, "--resume_from_checkpoint", data=rows)
    assert same(whole, weights_of(tmp_path / "out"))


def test_a_run_resumed_in_another_folder_takes_the_file_along(run_embed, rows, tmp_path):
    run_embed(*EPOCHS, "--save_total_limit", 9, data=rows)
    whole = weights_of(tmp_path / "out")
    again = tmp_path / "again"
    checkpoint = tmp_path / "out/checkpoint-6"
    run_embed(*EPOCHS, "--resume_from_checkpoint", checkpoint, data=rows, out=again)
    assert same(whole, weights_of(again))
    assert mined_rows(again, 2) == mined_rows(tmp_path / "out", 2)


def test_a_run_killed_while_mining_mines_again(run_embed, rows, tmp_path, monkeypatch):
    run_embed(*EPOCHS, data=rows, out=tmp_path / "whole")
    write = train_embed_lora.write_mined

    def killed(path, *rest):
        if path.name == "mined_negatives-2.jsonl":
            (path.parent / "mined_negatives-2.jsonl.part").write_text('{"query": "')
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(train_embed_lora, "write_mined", killed)
    with pytest.raises(KeyboardInterrupt):
        run_embed(*EPOCHS, data=rows)
    monkeypatch.setattr(train_embed_lora, "write_mined", write)
    run_embed(*EPOCHS, "--resume_from_checkpoint", data=rows)
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "out"))
    assert mined_rows(tmp_path / "whole", 2) == mined_rows(tmp_path / "out", 2)


def test_a_file_that_is_gone_or_another_cannot_be_resumed_with(run_embed, rows, tmp_path):
    run_embed(*EPOCHS, data=rows)
    back_to(tmp_path / "out", 6)
    mined = tmp_path / "out/mined_negatives-2.jsonl"
    lines = mined.read_text().splitlines()
    for content, sentence in (
        ("\n".join(lines[:-1]), "has 31 rows of 32"),
        ("\n".join([lines[1], lines[0], *lines[2:]]), "line 1: not what this run has mined"),
        (None, "is not there, and the model that mined it has been trained on"),
    ):
        mined.unlink()
        if content:
            mined.write_text(content)
        with pytest.raises(InputError, match=sentence):
            run_embed(*EPOCHS, "--resume_from_checkpoint", data=rows)


def test_another_corpus_cannot_be_resumed_with(run_embed, rows, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    write_jsonl(corpus, [{"text": "behind the lamp"}])
    flags = ["--mine_negatives", 2, "--mine_corpus", corpus, "--max_steps", 2, "--save_steps", 1]
    run_embed(*flags, "--eval_strategy", "no", data=rows)
    back_to(tmp_path / "out", 1)
    write_jsonl(corpus, [{"text": "behind the door"}])
    with pytest.raises(InputError, match="data_fingerprint was .* and is"):
        run_embed(*flags, "--eval_strategy", "no", "--resume_from_checkpoint", data=rows)


def test_workers_see_what_each_epoch_mined(run_embed, rows, tmp_path):
    run_embed(*EPOCHS, data=rows)
    run_embed(*EPOCHS, "--num_workers", 2, data=rows, out=tmp_path / "workers")
    assert same(weights_of(tmp_path / "out"), weights_of(tmp_path / "workers"))


def test_a_dry_run_mines_for_the_first_queries_and_leaves_nothing(
    run_embed, rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_embed_lora, "TRIED", 5)
    run_embed("--mine_negatives", 2, "--dry_run", data=rows)
    assert "negatives for 5 queries in" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/mined*"))


def test_mining_and_the_first_evaluation_embed_a_text_once(embed_argv, rows, monkeypatch):
    flags = ["--mine_negatives", 2, "--dev_size", 0.5, "--max_steps", 1, "--batch_size", 4]
    prepared = train_embed_lora.prepare(embed_argv(*flags, data=rows))
    trainer = prepared.trainer
    embedded = []
    embed = trainer.embed_texts
    monkeypatch.setattr(
        trainer.vectors, "embed", lambda indices: embedded.extend(indices) or embed(indices)
    )
    trainer.mine(0)
    mined = len(embedded)
    trainer.measure_dev_sets()
    assert len(embedded) > mined and len(embedded) == len(set(embedded))
    trainer.training_step(trainer.model, trainer.data_collator([trainer.train_dataset[0]] * 2))
    embedded.clear()
    trainer.measure_dev_sets()
    assert embedded  # the model is another


def test_the_rehearsal_has_the_longest_documents_of_the_pool(embed_argv, rows, tmp_path):
    corpus = [{"text": "look behind the door and " * 9}, {"text": "look behind the lamp and " * 8}]
    files = ["--mine_corpus", write_jsonl(tmp_path / "corpus.jsonl", corpus)]
    prepared = train_embed_lora.prepare(embed_argv("--mine_negatives", 1, *files, data=rows))
    texts = prepared.trainer.texts
    longest = len(texts[texts.index[corpus[0]["text"].strip(), False]])
    assert longest > 50
    assert max(prepared.row_tokens) > longest


@pytest.mark.parametrize(
    "flags, corpus, sentence",
    [
        ("--mine_negatives 99", None, "the pool has 65 documents"),
        ("--mine_negatives 2 --mine_corpus CORPUS", "", "holds no rows"),
        ("--mine_negatives 2 --mine_corpus CORPUS", '{"txt": "a"}', "line 1: no text"),
        ("--mine_negatives 2 --mine_corpus nowhere.jsonl", None, "nowhere.jsonl is not there"),
        ("--mine_negatives 2 --mine_margin 0", None, "no query found one among"),
    ],
)
def test_what_cannot_be_mined_is_told_in_a_sentence(
    run_embed, rows, tmp_path, flags, corpus, sentence
):
    path = tmp_path / "corpus.jsonl"
    if corpus is not None:
        path.write_text(corpus)
    with pytest.raises(InputError, match=sentence):
        run_embed(*flags.replace("CORPUS", str(path)).split(), "--max_steps", 1, data=rows)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--mine_corpus x.jsonl", "--mine_corpus is where --mine_negatives N looks"),
        ("--mine_negatives 2 --max_negs 0", "--mine_negatives finds what --max_negs 0 leaves out"),
        ("--mine_negatives -1", "-1 is outside"),
        ("--mine_negatives 1 --mine_margin -1", "-1 is outside"),
    ],
)
def test_flags_of_mining_that_contradict_are_refused(flags, sentence, capsys):
    with pytest.raises(SystemExit):
        train_embed_lora.parse_args(["--train_file", "x.jsonl", *flags.split()])
    assert sentence in capsys.readouterr().err


def test_two_processes_find_what_one_finds(tiny_bert, rows, tmp_path):
    flags = f"--model_name {tiny_bert} --train_file {rows} --report_to none --mine_negatives 2"
    flags += " --max_steps 1 --batch_size 4 --gradient_accumulation 1 --eval_strategy no"
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        script = [str(ROOT / "train_embed_lora.py"), "--output_dir", str(tmp_path / str(count))]
        done = subprocess.run(
            [sys.executable, *launcher, *script, *flags.split()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = mined_rows(tmp_path / "1"), mined_rows(tmp_path / "2")
    assert [row["neg"] for row in one] == [row["neg"] for row in two]
    assert json.dumps(one[0]["source"]) == json.dumps(two[0]["source"])


@pytest.mark.parametrize("every, searches", [("run", 1), ("epoch", 2)])
def test_memory_that_runs_out_in_the_search_is_told_in_a_sentence(
    run_embed, monkeypatch, every, searches
):
    begun = []
    search = mining.hard_negatives

    def fail_at_last(*args, **kwargs):
        begun.append(1)
        if len(begun) == searches:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return search(*args, **kwargs)

    monkeypatch.setattr(mining, "hard_negatives", fail_at_last)
    flags = ["--mine_negatives", 1, "--mine_every", every, "--eval_strategy", "no", "--epochs", 2]
    with pytest.raises(InputError, match="Name fewer documents in --mine_corpus"):
        run_embed(*flags)
    assert len(begun) == searches

"""Steps of one file each: whose rows they hold, how many an epoch has, mined, resumed, shared."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

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
from parts.batches import FileBatches, FileSteps, mean_fullness, rows_of_files, shared_out
from parts.pairs import Columns, Example, read_examples
from parts.rehearsal import heaviest_rows
from parts.rows import read_rows
from utils import InputError

import pytest
import torch
from accelerate import skip_first_batches

SIZES = {"a": 41, "b": 18, "c": 5}  # rows of three files; a step has 8
STEPS = {"a": 5, "b": 2, "c": 1}
FLAGS = "--steps_from one_file --batch_size 4 --gradient_accumulation 2 --eval_strategy no".split()


@pytest.fixture
def files(tmp_path):
    """Three files; the rows of b have a prompt of their own."""
    rows = make_rows(sum(SIZES.values()))
    paths = {}
    for name, count in SIZES.items():
        own, rows = rows[:count], rows[count:]
        if name == "b":
            own = [row | {"prompt": "find: "} for row in own]
        paths[name] = write_jsonl(tmp_path / f"{name}.jsonl", own)
    return paths


@pytest.fixture
def prepared(embed_argv, files):
    """Return make(flags): a run over the three files, before its first step."""

    def make(*flags):
        argv = embed_argv(*FLAGS, "--train_file", *files.values(), *flags)
        return train_embed_lora.prepare(argv)

    return make


def groups_of(sizes):
    """Return {file: rows} whose rows stand in turn among those of the others."""
    owners = [name for name, count in sizes.items() for _ in range(count)]
    random.Random(0).shuffle(owners)
    return {name: [i for i, owner in enumerate(owners) if owner == name] for name in sizes}


# ---------------------------------------------------------------- steps


def test_a_step_is_of_one_file_and_files_come_in_proportion():
    groups = groups_of(SIZES)
    owner = {row: name for name, rows in groups.items() for row in rows}
    steps = FileSteps(groups, 8, seed=1)
    drawn = [steps.of_epoch(epoch) for epoch in (0, 1)]
    for epoch in drawn:
        assert all(len({owner[row] for row in step}) == 1 for step in epoch)
        assert Counter(owner[step[0]] for step in epoch) == STEPS
        assert {owner[step[0]]: len(step) for step in epoch} == {"a": 8, "b": 8, "c": 5}
        rows = [row for step in epoch for row in step]
        assert len(rows) == len(set(rows)) == 61  # 1 of a and 2 of b fill no step
    left = [set(owner) - {row for step in epoch for row in step} for epoch in drawn]
    assert left[0] != left[1]
    first = [[owner[step[0]] for step in epoch] for epoch in drawn]
    assert first[0] != first[1] and first[0] != sorted(first[0])
    assert FileSteps(groups, 8, seed=1).of_epoch(1) == drawn[1]
    assert FileSteps(groups, 8, seed=2).of_epoch(1) != drawn[1]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_out_the_rows_of_each_step(processes):
    steps = FileSteps(groups_of(SIZES), 8, seed=1)
    train_set = SimpleNamespace(epoch=0)
    batches_of_all = FileBatches(steps, train_set, processes)
    for epoch in (0, 1):
        train_set.epoch = epoch
        found = list(batches_of_all)
        assert len(found) == len(batches_of_all) == 8 * processes
        for i, step in enumerate(steps.of_epoch(epoch)):
            shares = found[i * processes : (i + 1) * processes]
            assert sum(shares, []) == step
            sizes = set(map(len, shares))
            assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1
    assert [len(share) for share in shared_out(range(7), 3)] == [2, 2, 3]


def test_what_makes_no_step_of_its_own_is_told(capsys):
    examples = [Example("q", ["p"], [], file=name) for name in "aab"]
    with pytest.raises(InputError, match="b has 1 rows to train on, and a step needs 2.* let dev"):
        rows_of_files(examples, 1)
    with pytest.raises(InputError, match="a has 2 rows to train on, .* over 4 processes needs 4"):
        rows_of_files(examples, 4)
    assert rows_of_files([*examples, examples[2]], 2) == {"a": [0, 1], "b": [2, 3]}
    assert rows_of_files(examples[:2], 1) is None
    assert "all rows are of one file" in capsys.readouterr().out


def test_labels_join_a_querys_rows_of_one_file_alone():
    rows = []
    for place, document, label in (
        ("a, line 1", "p", 1),
        ("a, line 2", "n", 0),
        ("b, line 1", "o", 1),
    ):
        rows.append((place, {"query": "q", "document": document, "label": label}))
    joined, _ = read_examples(rows, Columns(), None)
    assert [(row.pos, row.neg) for row in joined] == [(["p", "o"], ["n"])]
    apart, _ = read_examples(rows, Columns(), None, by_file=True)
    found = [(row.file, row.pos, row.neg) for row in apart]
    assert found == [("a", ["p"], ["n"]), ("b", ["o"], [])]


def test_rows_that_change_files_are_other_data():
    examples = [Example(f"q{i}", ["p"], [], file="ab"[i // 2]) for i in range(4)]
    moved = [Example(f"q{i}", ["p"], [], file="ab"[i // 3]) for i in range(4)]
    renamed = [Example(f"q{i}", ["p"], [], file="cd"[i // 2]) for i in range(4)]
    prints = [train_embed_lora.fingerprint_of(rows, {}, []) for rows in (examples, moved)]
    assert prints[0] == prints[1]
    by_file = []
    for rows in (examples, moved, renamed):
        by_file.append(train_embed_lora.fingerprint_of(rows, {}, [], by_file=True))
    assert by_file[0] == by_file[2] != by_file[1]


def test_how_full_the_step_of_a_row_is():
    groups = groups_of(SIZES)
    sizes = [len(step) for step in FileSteps(groups, 8, seed=1).of_epoch(0)]
    met = [size for size in sizes for _ in range(size)]
    assert mean_fullness(groups, 8) == pytest.approx(sum(met) / len(met) / 8)


def test_the_heaviest_rows_are_of_one_file():
    groups = groups_of({"long": 20, "short": 180})
    tokens = [1] * 200
    for row in groups["long"]:
        tokens[row] = 50
    plan = SimpleNamespace(step_rows=16, total_steps=50, steps_per_epoch=12)
    drawn = heaviest_rows(tokens, plan, 1, 16, FileSteps(groups, 16, seed=1))
    assert sum(tokens[row] for row in drawn) == 16 * 50
    mixed = heaviest_rows(tokens, plan, 1, 16)
    assert sum(tokens[row] for row in mixed) < 12 * 50


# ---------------------------------------------------------------- a run


def queries_of(batches, trainer):
    """Return the queries of each batch, prompt included."""
    words = [text for text, _ in trainer.texts.index]
    return [[words[i] for i in batch["indices"].tolist()] for batch in batches]


def loader_of_queries(trainer):
    """Return the loader that trains, whose batches say what the rows' queries are."""

    def collate(rows):
        return {"indices": torch.tensor([train_embed_lora.text_indices(row)[0] for row in rows])}

    trainer.data_collator = collate
    return trainer.get_train_dataloader()


def test_what_will_be_run_is_printed(prepared, files, capsys):
    run = prepared("--epochs", 1.5)
    said = capsys.readouterr().out
    assert f"steps     {files['a']}: 5 an epoch, of 41 rows, 1 left out, drawn anew" in said
    assert f"steps     {files['b']}: 2 an epoch, of 18 rows, 2 left out, drawn anew" in said
    assert f"steps     {files['c']}: 1 an epoch, of its 5 rows\n" in said
    assert "1 of 3 files have fewer rows than a step" in said
    assert said.count("left out") == 2 and "leaves out" not in said  # each once
    plan = run.plan
    assert (plan.steps_per_epoch, plan.total_steps, plan.examples_per_step) == (8, 12, 8)
    train_embed_lora.rehearse(run.trainer, plan, run.row_tokens, run.seed)
    assert "12 steps, 8 an epoch, of at most 8 examples" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_steps_of_one_file_with_its_rows_own_prompts(prepared, files, workers):
    trainer = prepared("--num_workers", workers).trainer
    own = {}
    for name, path in files.items():
        prompt = "find: " if name == "b" else ""
        own[name] = {prompt + row["query"] for _, row in read_rows(path)}
    loader = loader_of_queries(trainer)
    seen = []
    for epoch in (0, 1):
        trainer.begin_epoch(epoch, 0)
        steps = queries_of(loader, trainer)
        names = []
        for step in steps:
            [name] = [name for name in own if own[name].issuperset(step)]
            names.append(name)
        assert Counter(names) == STEPS and len(loader) == 8
        assert sum(map(len, steps)) == len(set(sum(steps, []))) == 61
        assert queries_of(skip_first_batches(loader, 3), trainer) == steps[3:]
        seen.append(steps)
    assert seen[0] != seen[1]


@pytest.mark.parametrize("step", [3, 8, 11])  # within the first epoch, behind it, within the second
def test_a_resumed_run_goes_on_with_the_same_steps(run_embed, files, tmp_path, step):
    flags = [*FLAGS, "--train_file", *files.values(), "--epochs", 1.6, "--lr", "1e-2"]
    flags += ["--save_steps", 1, "--save_total_limit", 99, "--lora_dropout", 0.1]
    assert run_embed(*flags)["steps"] == 13
    whole = weights_of(tmp_path / "out")
    back_to(tmp_path / "out", step)
    run_embed(*flags, "--num_workers", 2, "--resume_from_checkpoint")
    assert same(whole, weights_of(tmp_path / "out"))
    with pytest.raises(InputError, match="steps_from was one_file and is all"):
        run_embed(*flags, "--steps_from", "all", "--resume_from_checkpoint")


IN_EACH_PROCESS = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import utils
import train_embed_lora
from accelerate import skip_first_batches
from test_steps_from import loader_of_queries, queries_of

trainer = train_embed_lora.prepare(json.loads(sys.argv[1])).trainer
loader = loader_of_queries(trainer)
seen = []
for epoch in (0, 1):
    trainer.begin_epoch(epoch, 0)
    seen.append([queries_of(loader, trainer), queries_of(skip_first_batches(loader, 3), trainer)])
with open(f"{{sys.argv[2]}}/{{trainer.accelerator.process_index}}.json", "w") as file:
    json.dump([len(loader), *seen], file)
utils.leave_process_group()
"""


def test_two_processes_take_the_same_file(embed_argv, files, tmp_path):
    script = tmp_path / "seen.py"
    script.write_text(IN_EACH_PROCESS.format(root=str(ROOT)))
    argv = embed_argv(*FLAGS, "--train_file", *files.values(), "--gradient_accumulation", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), json.dumps(argv), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    own = {}
    for name, path in files.items():
        prompt = "find: " if name == "b" else ""
        own[name] = {prompt + row["query"] for _, row in read_rows(path)}
    assert first[0] == second[0] == 8
    for (whole, tail), (other, other_tail) in zip(first[1:], second[1:], strict=True):
        assert tail == whole[3:] and other_tail == other[3:]
        names = []
        for half, other_half in zip(whole, other, strict=True):
            [name] = [name for name in own if own[name].issuperset(half + other_half)]
            names.append(name)
            assert not set(half) & set(other_half)
            assert (len(half), len(other_half)) == ((2, 3) if name == "c" else (4, 4))
        assert Counter(names) == STEPS
    assert first[1] != first[2]


# ---------------------------------------------------------------- mined negatives


def test_a_query_mines_in_its_own_file_and_the_corpus(embed_argv, tmp_path, capsys):
    rows = make_rows(24)
    rows[20]["query"] = rows[2]["query"]  # one query in two files
    corpus = [{"text": f"look behind the {word}"} for word in ("door", "lamp", "chair")]
    corpus.append({"text": rows[15]["pos"][0]})  # also a document of the second file
    paths = [write_jsonl(tmp_path / "a.jsonl", rows[:14])]
    paths.append(write_jsonl(tmp_path / "b.jsonl", rows[14:]))
    flags = [*FLAGS, "--train_file", *paths, "--max_steps", 1, "--mine_negatives", 3]
    flags += ["--mine_corpus", write_jsonl(tmp_path / "corpus.jsonl", corpus)]
    flags += ["--mine_margin", 1.01]  # the vectors of a random model are all alike
    prepared = train_embed_lora.prepare(embed_argv(*flags))
    miner = prepared.trainer.miner
    expected = {}
    for path in paths:
        examples = [example for example in miner.examples if example.file == path]
        documents = []
        for text in [text for each in examples for text in (*each.pos, *each.neg)]:
            documents += [text] * (text not in documents)
        documents += [row["text"] for row in corpus if row["text"] not in documents]
        # in the order of all, which decides between equal cosines
        documents.sort(key=miner.pool.words.index)
        found = naive_mined(prepared.trainer, examples, documents, 3, 1.01)
        for example, mined in zip(examples, found, strict=True):
            expected[path, example.query] = mined
    assert expected[paths[0], rows[2]["query"]] != expected[paths[1], rows[2]["query"]]
    assert {len(mined) for mined in expected.values()} >= {3}
    train_embed_lora.train_and_prove(prepared)
    for example, row in zip(miner.examples, mined_rows(tmp_path / "out"), strict=True):
        assert row["neg"] == example.neg + expected[example.file, example.query]
    # as a training file its rows are of the files that they were read of
    mined, _ = read_examples(read_rows(tmp_path / "out/mined_negatives-1.jsonl"), Columns(), None)
    assert rows_of_files(mined, 1) == rows_of_files(miner.examples, 1)
    assert "file = train_file (unused: pos_cosines" in capsys.readouterr().out


def test_a_file_with_too_few_documents_to_mine_is_named(embed_argv, files):
    flags = [*FLAGS, "--train_file", *files.values(), "--mine_negatives", 12]
    with pytest.raises(InputError, match=r"12: .*c.jsonl, with --mine_corpus, has 1. documents"):
        train_embed_lora.prepare(embed_argv(*flags))

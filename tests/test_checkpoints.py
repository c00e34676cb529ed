"""A run goes on only from a checkpoint of which nothing is missing."""

import json
import shutil

import utils
from conftest import back_to
from parts.checkpoints import (
    FREE_ON_RESUME,
    describe,
    find_checkpoint,
    parts_lacking,
    refuse_changes,
)
from utils import InputError

import pytest
import torch
from safetensors.torch import save_file

PARTS = [
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "adapter_model.safetensors",
    "trainer_state.json",
]


def write_checkpoint(
    folder, processes=1, weights=("adapter_model.safetensors",), scaler=False, **state
):
    """Write what Trainer writes; the last of several weights files are shards of an index."""
    folder.mkdir(parents=True)
    names = ["optimizer.pt", "scheduler.pt"] + ["scaler.pt"] * scaler
    names += (
        [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    )
    for name in names:
        torch.save({"step": torch.arange(100)}, folder / name)
    for name in weights:
        save_file({name: torch.arange(100)}, folder / name)
    if len(weights) > 1:
        utils.write_json(
            folder / "model.safetensors.index.json",
            {"weight_map": {name: name for name in weights}},
        )
    if weights[0].startswith("adapter"):
        utils.write_json(folder / "adapter_config.json", {})
    utils.write_json(
        folder / "trainer_state.json", {"global_step": int(folder.name.split("-")[1])} | state
    )


def cut_off(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def zeroed(file):
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("harm", [lambda file: file.unlink(), cut_off, emptied, zeroed])
def test_the_newest_complete_checkpoint_is_taken(part, harm, tmp_path, capsys):
    for step in (9, 30, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    assert find_checkpoint(tmp_path).name == "checkpoint-100"
    harm(tmp_path / f"checkpoint-100/{part}")
    assert find_checkpoint(tmp_path).name == "checkpoint-30"
    assert f"checkpoint-100 is not complete: it lacks {part}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "run, folder, part",
    [
        ({"processes": 2}, {"processes": 2}, "rng_state_1.pth"),
        ({"processes": 2}, {"processes": 2}, "rng_state_0.pth"),
        ({"precision": "fp16"}, {"scaler": True}, "scaler.pt"),
        ({}, {"weights": ["model.safetensors"]}, "model.safetensors"),
        ({}, {"weights": ["model-1.safetensors", "model-2.safetensors"]}, "model-2.safetensors"),
        (
            {},
            {"weights": ["model-1.safetensors", "model-2.safetensors"]},
            "model.safetensors.index.json",
        ),
    ],
)
def test_what_a_checkpoint_must_hold_depends_on_the_run(run, folder, part, tmp_path):
    utils.write_json(tmp_path / "training_config.json", run)
    write_checkpoint(tmp_path / "checkpoint-5", **folder)
    assert parts_lacking(tmp_path / "checkpoint-5") == []
    cut_off(tmp_path / "checkpoint-5" / part)
    assert parts_lacking(tmp_path / "checkpoint-5") == [part]


def test_a_run_that_keeps_the_best_state_needs_it_as_well(tmp_path):
    best = {"best_global_step": 2, "best_model_checkpoint": "where/the/run/was/checkpoint-2"}
    for step in (2, 3, 4):
        write_checkpoint(tmp_path / f"checkpoint-{step}", **best if step > 2 else {})
    assert find_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-2/optimizer.pt").unlink()  # its weights are all that is needed of it
    assert find_checkpoint(tmp_path).name == "checkpoint-4"
    cut_off(tmp_path / "checkpoint-2/adapter_model.safetensors")
    assert parts_lacking(tmp_path / "checkpoint-4") == ["checkpoint-2/adapter_model.safetensors"]
    assert find_checkpoint(tmp_path) is None


def test_other_folders_are_no_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert find_checkpoint(tmp_path).name == "checkpoint-7"


@pytest.mark.parametrize("content", [[], "text", {"weight_map": None}, {}])
def test_files_that_hold_something_else_are_no_crash(content, tmp_path, capsys):
    write_checkpoint(tmp_path / "checkpoint-7")
    utils.write_json(tmp_path / "training_config.json", content)
    assert find_checkpoint(tmp_path).name == "checkpoint-7"
    shards = ("one.safetensors", "two.safetensors")
    write_checkpoint(tmp_path / "checkpoint-9", weights=shards)
    utils.write_json(tmp_path / "checkpoint-9/model.safetensors.index.json", content)
    assert find_checkpoint(tmp_path).name == "checkpoint-7"
    assert "it lacks model.safetensors.index.json" in capsys.readouterr().out


def test_a_run_goes_on_from_the_newest_complete_checkpoint(run_embed, tmp_path, capsys):
    flags = [
        "--max_steps",
        4,
        "--checkpoint_steps",
        1,
        "--save_total_limit",
        9,
        "--eval_strategy",
        "no",
    ]
    whole, out = run_embed(*flags), tmp_path / "out"
    weights = (out / "final/adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "final")
    (out / "training_summary_report.json").unlink()
    (out / "checkpoint-4/optimizer.pt").unlink()
    (out / "checkpoint-3/rng_state.pth").unlink()
    with pytest.raises(
        InputError,
        match="checkpoint-3 is no complete checkpoint: it lacks rng_state.pth. Give",
    ):
        run_embed(*flags, "--resume_from_checkpoint", out / "checkpoint-3")
    capsys.readouterr()
    again = run_embed(*flags, "--resume_from_checkpoint")
    said = capsys.readouterr().out
    assert f"resume    {out}/checkpoint-4 is not complete: it lacks optimizer.pt" in said
    assert f"resume    from {out}/checkpoint-2" in said
    assert again["steps"] == whole["steps"] == 4
    assert (out / "final/adapter_model.safetensors").read_bytes() == weights


def test_a_named_checkpoint_that_is_not_there_is_said_to_be_so(run_embed, tmp_path):
    with pytest.raises(
        InputError, match=r"checkpoint-7 is no complete checkpoint: there is no such folder"
    ):
        run_embed("--resume_from_checkpoint", tmp_path / "out/checkpoint-7")


def test_a_checkpoint_of_another_folder(run_embed, tmp_path):
    whole = run_embed("--max_steps", 4, "--checkpoint_steps", 2, "--eval_strategy", "no")
    more, new = ["--resume_from_checkpoint", tmp_path / "out/checkpoint-2"], tmp_path / "new"
    flags = ["--max_steps", 4, "--checkpoint_steps", 2, "--eval_strategy", "no", *more]
    with pytest.raises(InputError, match="lr was 0.0002 and is 0.001. Give the flags of that run"):
        run_embed(*flags, "--lr", 1e-3, out=new)
    assert run_embed(*flags, out=new)["last_loss"] == whole["last_loss"]
    other = tmp_path / "other"
    report = run_embed("--max_steps", 1, "--eval_strategy", "no", out=other)
    with pytest.raises(InputError, match="is of another run than what --output_dir .*other holds"):
        run_embed(*flags, out=other)
    assert (
        json.loads((other / "training_summary_report.json").read_text())["steps"]
        == report["steps"]
        == 1
    )


def test_a_run_whose_folder_moved_ends_with_its_best_state(run_embed, tmp_path, monkeypatch):
    import train_embed_lora

    scores = iter([0.1, 0.9, 0.3])
    monkeypatch.setattr(
        train_embed_lora,
        "retrieval_metrics",
        lambda *_: {"ndcg@10": next(scores), "recall@10": 0.5},
    )
    flags = ["--max_steps", 2, "--eval_every", 1]
    run_embed(*flags)
    out, moved = tmp_path / "out", tmp_path / "moved"
    best = (out / "checkpoint-1/adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "final")
    (out / "training_summary_report.json").unlink()
    shutil.move(out, moved)
    report = run_embed(*flags, "--resume_from_checkpoint", out=moved)
    assert report["best_step"] == 1
    assert (moved / "final/adapter_model.safetensors").read_bytes() == best
    assert json.loads((moved / "training_config.json").read_text())["flags"]["output_dir"] == str(
        moved
    )


ASKED = {"lr": 2e-4, "max_length": 9999, "pooling": "auto", "output_dir": "out", "bits": None}
SETTLED = {"max_length": 128, "pooling": "mean"}


def record_of(asked=(), settled=(), **more):
    """What `describe` says of a run; `more` replaces what is no flag."""
    plain = {"data_fingerprint": "d", "base_fingerprint": {}, "processes": 1} | more
    precision = plain.pop("precision", "none")
    return describe(ASKED | dict(asked), SETTLED | dict(settled), precision, **plain)


def written(record):
    """A record as a later run reads it."""
    return json.loads(json.dumps(record))


def older(record):
    """The same of a version that wrote settled values among the flags."""
    plain = written(record) | {"flags": utils.recorded_flags(record)}
    del plain["settled"]
    return plain


def test_a_run_is_described_by_what_was_asked_and_what_was_settled():
    record = record_of()
    assert record["flags"]["max_length"] == 9999 and record["settled"]["max_length"] == 128
    assert "bits" not in record["flags"]  # readers take such a base for not quantised
    assert record_of({"bits": 4}, {"bits": None})["settled"]["bits"] is None  # it failed
    assert {"python", "torch", "transformers", "peft"} <= set(record["versions"])


@pytest.mark.parametrize("stored", [written, older])
def test_a_run_with_the_same_values_goes_on(stored):
    refuse_changes("checkpoint-1", stored(record_of()), record_of(), {})
    again = record_of({"max_length": 128, "pooling": "mean"})  # what the base decided, typed
    refuse_changes("checkpoint-1", stored(record_of()), again, {})
    for name in FREE_ON_RESUME:
        refuse_changes("checkpoint-1", stored(record_of()), record_of({name: "other"}), {})


@pytest.mark.parametrize("stored", [written, older])
@pytest.mark.parametrize(
    "change, said",
    [
        ({"asked": {"lr": 1e-3}}, "lr was 0.0002 and is 0.001"),
        ({"settled": {"max_length": 100}}, "max_length was 128 and is 100"),
        ({"settled": {"pooling": "cls"}}, "pooling was mean and is cls"),
        ({"asked": {"bits": 8}}, "bits was None and is 8"),
        ({"data_fingerprint": "e"}, "data_fingerprint was d and is e"),
        ({"precision": "fp16"}, "precision was none and is fp16"),
        ({"processes": 2}, "processes was 1 and is 2"),
    ],
)
def test_a_run_that_changed_is_refused(stored, change, said):
    with pytest.raises(InputError, match=rf"^cannot resume checkpoint-1: {said}. Give the flags"):
        refuse_changes("checkpoint-1", stored(record_of()), record_of(**change), {})


def test_all_that_changed_is_named_in_one_sentence():
    changed = record_of({"lr": 1e-3}, {"pooling": "cls"}, processes=2)
    with pytest.raises(InputError, match="lr was .* 0.001, pooling was .* cls, processes was"):
        refuse_changes("checkpoint-1", record_of(), changed, {})


@pytest.mark.parametrize("stored", [written, older])
def test_a_flag_that_a_run_did_not_know_had_its_default(stored):
    old = stored(record_of())
    new = record_of({"new_flag": "auto"}, {"new_flag": "on", "newly_settled": True})
    refuse_changes("checkpoint-1", old, new, {"new_flag": "auto", "lr": 1})
    with pytest.raises(InputError, match="checkpoint-1: new_flag was off and is auto. Give"):
        refuse_changes("checkpoint-1", old, new, {"new_flag": "off"})
    old["flags"]["dropped_flag"] = 5
    with pytest.raises(InputError, match="dropped_flag was 5 and is None"):
        refuse_changes("checkpoint-1", old, record_of(), {"dropped_flag": 5})


def without_flags(out, names):
    """Rewrite a run's record as of a version that did not have these flags."""
    record = utils.read_json(out / "training_config.json")
    for name in names:
        del record["flags"][name]
    utils.write_json(out / "training_config.json", record)


def test_a_run_that_was_begun_before_a_flag_existed_goes_on(run_embed, run_sft, tmp_path):
    flags = ["--max_steps", 2, "--checkpoint_steps", 1, "--eval_strategy", "no"]
    changes = {
        run_embed: (["--mine_margin", 0.5], "mine_margin was 0.95 and is 0.5"),
        run_sft: (["--max_new_tokens", 9], "max_new_tokens was 256 and is 9"),
    }
    for number, (run, (changed, said)) in enumerate(changes.items()):
        out = tmp_path / f"{number}"
        whole = run(*flags, out=out)
        back_to(out, 1)
        names = [changed[0].removeprefix("--"), "use_rslora", "target_modules", "lr_scheduler"]
        without_flags(out, names)
        with pytest.raises(InputError, match=f"cannot resume .*checkpoint-1: {said}. Give"):
            run(*flags, *changed, "--resume_from_checkpoint", out=out)
        again = run(*flags, "--resume_from_checkpoint", out=out)
        assert again["resumed_after"] == 1 and again["last_loss"] == whole["last_loss"]


def as_older_run(out):
    """Rewrite a run's files as a version wrote them that knew no `settled`; return its flags."""
    for file in (out / "training_config.json", out / "final/training_config.json"):
        if file.exists():
            record = utils.read_json(file)
            record["flags"] = utils.recorded_flags(record)
            del record["settled"]
            utils.write_json(file, record)
    return record["flags"]


def test_an_older_run_goes_on_and_a_settled_value_may_not_change(run_embed, tmp_path):
    out = tmp_path / "out"
    flags = ["--max_steps", 2, "--checkpoint_steps", 1, "--eval_strategy", "no"]
    flags += ["--query_max_len", 9999]  # above the base's 128 positions
    whole = run_embed(*flags)
    weights = (out / "final/adapter_model.safetensors").read_bytes()
    assert whole["flags"]["query_max_len"] == 9999 and whole["flags"]["pooling"] == "auto"
    assert whole["settled"]["query_max_len"] == 128 and whole["settled"]["pooling"] == "mean"
    old = as_older_run(out)
    assert old["query_max_len"] == 128 and old["pooling"] == "mean"
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoint-2")
    (out / "training_summary_report.json").unlink()
    for changed, said in (
        (["--query_max_len", 100], "query_max_len was 128 and is 100"),
        (["--pooling", "cls"], "pooling was mean and is cls"),
    ):
        with pytest.raises(InputError, match=f"cannot resume .*checkpoint-1: .*{said}"):
            run_embed(*flags, *changed, "--resume_from_checkpoint")
    again = run_embed(*flags, "--resume_from_checkpoint")
    assert again["steps"] == 2 and again["resumed_after"] == 1
    assert (out / "final/adapter_model.safetensors").read_bytes() == weights
    assert utils.read_json(out / "training_config.json")["settled"]["query_max_len"] == 128


@pytest.mark.parametrize("is_older", [False, True])
def test_an_adapter_is_continued_with_what_its_run_settled(is_older, run_sft, tmp_path):
    first, flags = tmp_path / "first", ["--max_steps", 1, "--eval_strategy", "no"]
    run_sft(*flags, "--enable_thinking", "true", out=first)
    if is_older:
        as_older_run(first)
    report = run_sft(*flags, "--init_adapter", first / "final")
    assert report["flags"]["enable_thinking"] == "auto"
    assert report["settled"]["enable_thinking"] == "true"
    (tmp_path / "first/final/training_config.json").unlink()
    again = run_sft(*flags, "--init_adapter", first / "final", out=tmp_path / "again")
    assert again["settled"]["enable_thinking"] == "false"  # no row has reasoning

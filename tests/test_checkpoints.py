"""A run goes on only from a checkpoint of which nothing is missing."""

import json
import shutil

import merge
import utils

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
    assert utils.find_checkpoint(tmp_path).name == "checkpoint-100"
    harm(tmp_path / f"checkpoint-100/{part}")
    assert utils.find_checkpoint(tmp_path).name == "checkpoint-30"
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
    assert utils.parts_lacking(tmp_path / "checkpoint-5") == []
    cut_off(tmp_path / "checkpoint-5" / part)
    assert utils.parts_lacking(tmp_path / "checkpoint-5") == [part]


def test_a_run_that_keeps_the_best_state_needs_it_as_well(tmp_path):
    best = {"best_global_step": 2, "best_model_checkpoint": "where/the/run/was/checkpoint-2"}
    for step in (2, 3, 4):
        write_checkpoint(tmp_path / f"checkpoint-{step}", **best if step > 2 else {})
    assert utils.find_checkpoint(tmp_path).name == "checkpoint-4"
    (tmp_path / "checkpoint-2/optimizer.pt").unlink()  # its weights are all that is needed of it
    assert utils.find_checkpoint(tmp_path).name == "checkpoint-4"
    cut_off(tmp_path / "checkpoint-2/adapter_model.safetensors")
    assert utils.parts_lacking(tmp_path / "checkpoint-4") == [
        "checkpoint-2/adapter_model.safetensors"
    ]
    assert utils.find_checkpoint(tmp_path) is None


def test_other_folders_are_no_checkpoints(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-old").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert utils.find_checkpoint(tmp_path).name == "checkpoint-7"


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
        merge.InputError,
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
        merge.InputError, match=r"checkpoint-7 is no complete checkpoint: there is no such folder"
    ):
        run_embed("--resume_from_checkpoint", tmp_path / "out/checkpoint-7")


def test_a_checkpoint_of_another_folder(run_embed, tmp_path):
    whole = run_embed("--max_steps", 4, "--checkpoint_steps", 2, "--eval_strategy", "no")
    more, new = ["--resume_from_checkpoint", tmp_path / "out/checkpoint-2"], tmp_path / "new"
    flags = ["--max_steps", 4, "--checkpoint_steps", 2, "--eval_strategy", "no", *more]
    with pytest.raises(
        merge.InputError, match="lr was 0.0002 and is 0.001. Give the flags of that run"
    ):
        run_embed(*flags, "--lr", 1e-3, out=new)
    assert run_embed(*flags, out=new)["last_loss"] == whole["last_loss"]
    other = tmp_path / "other"
    report = run_embed("--max_steps", 1, "--eval_strategy", "no", out=other)
    with pytest.raises(
        merge.InputError, match="is of another run than what --output_dir .*other holds"
    ):
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

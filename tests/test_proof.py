"""What was saved is read back from disk, and compared with the live model."""

from parts import proof, run
from utils import InputError

import pytest


def test_what_is_saved_must_give_the_trained_outputs(run_embed, monkeypatch):
    def reloaded(prepared, folder, ids):
        return prepared.outputs(ids) * 1.001  # a hundred times what rounding may leave

    monkeypatch.setattr(proof, "reloaded_outputs", reloaded)
    with pytest.raises(RuntimeError, match="final does not give the trained model's outputs: "):
        run_embed("--max_steps", 2)


def test_a_model_that_gives_no_numbers_is_refused(run_embed, monkeypatch):
    """NaN passes a comparison with a largest error, and differs from what was before training."""
    train = run.train

    def broken(prepared):
        found = train(prepared)
        name, weight = next(iter(prepared.trainer.model.named_parameters()))
        weight.data.fill_(float("nan"))
        return found

    monkeypatch.setattr(run, "train", broken)
    with pytest.raises(InputError, match="final gives NaN or infinity: .* lower --lr"):
        run_embed("--max_steps", 2)


def test_a_model_that_is_read_back_as_nan_is_refused(run_embed, monkeypatch):
    def reloaded(prepared, folder, ids):
        return prepared.outputs(ids) * float("nan")

    monkeypatch.setattr(proof, "reloaded_outputs", reloaded)
    with pytest.raises(RuntimeError, match="final does not give the trained model's outputs: "):
        run_embed("--max_steps", 2)


def test_a_run_that_changed_nothing_is_told_so(run_embed, tmp_path):
    with pytest.raises(InputError, match="final changes nothing: .* Raise --lr or --epochs"):
        run_embed("--max_steps", 2, "--lr", "1e-12")
    assert (tmp_path / "out/final/adapter_model.safetensors").exists()


def test_after_the_proof_the_trained_adapter_is_the_active_one(embed_trainer):
    trainer = embed_trainer("--max_steps", 2)
    live = trainer.embed([[2, 5, 3], [2, 6, 3]])

    class Prepared:
        outputs = trainer.embed

    Prepared.trainer = trainer
    folder = f"{trainer.args.output_dir}/final"
    trainer.save_model(folder)
    read_back = proof.reloaded_outputs(Prepared, folder, [[2, 5, 3], [2, 6, 3]])
    assert proof.relative_difference(read_back, live) < 1e-5
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.active_adapter == "default"

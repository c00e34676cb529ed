"""Before the first step the heaviest rows are rehearsed, and their gradients must be finite."""

import math
from functools import partial
from types import SimpleNamespace

import train_embed_lora
from conftest import make_rows, write_jsonl
from parts import rehearsal
from utils import InputError

import pytest
import torch


@pytest.mark.parametrize("slope, scale", [(1.0, 32768), (8.0, 4096), (60000.0, 1), (70000.0, None)])
def test_the_loss_scale_falls_until_half_precision_gradients_are_finite(slope, scale):
    weight = torch.ones(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu")

    def attempt():  # the gradient, slope x scale, passes through float16, which ends at 65504
        scaler.scale((weight.half().float() * slope).sum()).backward()

    assert scaler.get_scale() == 65536
    assert rehearsal.finite_gradients(attempt, [weight], scaler) == (scale is not None)
    if scale:
        assert scaler.get_scale() == scale and weight.grad.tolist() == [slope * scale] * 3


def test_without_a_loss_scaler_a_gradient_is_finite_or_not():
    weight = torch.ones(2, requires_grad=True)
    assert rehearsal.finite_gradients(lambda: weight.sum().backward(), [weight], None)
    assert not rehearsal.finite_gradients(
        lambda: (weight * math.inf).sum().backward(), [weight], None
    )


def test_a_process_whose_gradient_is_finite_goes_on_with_those_whose_is_not():
    weight = torch.ones(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu")
    accelerator = SimpleNamespace(num_processes=2, device="cpu")
    others = [False, False, True]
    accelerator.gather = lambda own: torch.cat([own, torch.tensor([others.pop(0)])])
    found = rehearsal.finite_gradients(
        lambda: scaler.scale(weight.sum()).backward(),
        [weight],
        scaler,
        partial(rehearsal.on_all_processes, accelerator),
    )
    assert found is True and others == [] and scaler.get_scale() == 65536 / 4


def test_training_begins_at_the_scale_of_the_rehearsal(run_embed, tmp_path, monkeypatch, capsys):
    rehearse, scales = rehearsal.rehearse, []

    def rehearse_scaled(trainer, *rest):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.register_hook(lambda grad: grad.half().float())  # infinite from 65520 on
        settled = rehearse(trainer, *rest)
        scales.append(trainer.accelerator.scaler.get_scale())
        return settled

    monkeypatch.setattr(train_embed_lora, "rehearse", rehearse_scaled)
    data = write_jsonl(tmp_path / "eight.jsonl", make_rows(8))  # one step, which is rehearsed whole
    flags = ["--max_steps", 1, "--batch_size", 8, "--eval_strategy", "no", "--max_grad_norm", 0]
    run_embed(*flags, data=data)
    assert 1 < scales[0] < 2.0**40
    assert f"finite gradients at a loss scale of {scales[0]:g}" in capsys.readouterr().out
    stored = torch.load(tmp_path / "out/checkpoint-1/scaler.pt")
    assert stored["scale"] == scales[0]  # no step was skipped


@pytest.mark.parametrize("script", ["embed", "sft"])
@pytest.mark.parametrize(
    "flags, cause",
    [
        (["--lora_dropout", 0.1], "dropout"),
        (["--model_dropout"], "dropout"),
        (["--load_in_8bit"], None),
        ([], None),
    ],
)
def test_what_makes_a_gradient_depend_on_the_cut_is_noted(
    script, flags, cause, run_embed, run_sft, capsys
):
    run = {"embed": run_embed, "sft": run_sft}[script]
    notes = run("--dry_run", *flags)["plan"]["notes"]
    begins = "a step's gradient depends on how it is cut into pieces: "
    found = [note for note in notes if note.startswith(begins)]
    assert found == ([begins + cause] if cause else [])
    assert capsys.readouterr().out.count(begins) == len(found)


def weight_with(gradient):
    """Return a weight of three numbers that all have this gradient, or, of None, none."""
    weight = torch.ones(3, requires_grad=True)
    if gradient is not None:
        weight.grad = torch.full((3,), float(gradient))
    return weight


@pytest.mark.parametrize(
    "gradients, is_finite, sentence",
    [
        ({"a.lora_A": 0, "a.lora_B": 1}, True, None),
        ({"a.lora_A": 0, "a.lora_B": 0}, True, "they have nothing to tell apart"),
        ({"a.lora_A": None, "a.lora_B": None}, True, "they have nothing to tell apart"),
        ({"a.lora_B": 1, "b.lora_B": 0}, True, r"1 trainable weights get no gradient \(b.lora_B"),
        ({"a.weight": 1, "b.weight": 0}, True, None),  # of full fine-tuning, a token not in a row
        ({"a.weight": 1, "b.weight": None}, True, r"get no gradient \(b.weight, ...\): narrow"),
        ({"a.lora_B": math.inf}, False, "the first gradient is not finite"),
    ],
)
def test_weights_that_training_would_not_change_are_told(gradients, is_finite, sentence):
    trained = {name: weight_with(gradient) for name, gradient in gradients.items()}
    if not sentence:
        rehearsal.check_gradients(trained, is_finite)
        return
    with pytest.raises(InputError, match=sentence):
        rehearsal.check_gradients(trained, is_finite)

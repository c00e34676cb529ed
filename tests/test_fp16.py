"""Half precision with a loss scaler, put together on a CPU: no step of a run is skipped."""

import train_embed_lora
import train_sft_lora
from parts import run as runs

import pytest
import torch


def put_in_fp16(prepared, monkeypatch):
    """Give a run what accelerate has on a GPU in fp16; return a list that its steps go into.

    Of each: (whether it was skipped, the loss scale).
    """
    trainer = prepared.trainer
    for parameter in trainer.model.parameters():
        if not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.half()  # as the base is loaded
    accelerator = trainer.accelerator
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr(accelerator.state, "_mixed_precision", "fp16")  # of all accelerators
    trainer.args.fp16 = True
    steps = []
    end_of_step = runs.RunCallback.on_step_end

    def on_step_end(self, *args, **kwargs):
        end_of_step(self, *args, **kwargs)
        steps.append((accelerator.optimizer_step_was_skipped, accelerator.scaler.get_scale()))

    monkeypatch.setattr(runs.RunCallback, "on_step_end", on_step_end)
    return steps


@pytest.mark.parametrize("script", [train_embed_lora, train_sft_lora])
def test_twenty_steps_none_skipped(script, embed_argv, sft_argv, monkeypatch):
    argv = {train_embed_lora: embed_argv, train_sft_lora: sft_argv}[script]
    flags = "--max_steps 20 --batch_size 2 --gradient_accumulation 4 --eval_strategy no --lr 1e-3"
    prepared = script.prepare(argv(*flags.split()))
    steps = put_in_fp16(prepared, monkeypatch)
    multiplied = set()
    for layer in prepared.trainer.model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, __, out: multiplied.add(out.dtype))
    report = script.train_and_prove(prepared)
    assert multiplied == {torch.float16}
    assert len(steps) == 20 and not any(skipped for skipped, _ in steps)
    assert all(scale > 1 for _, scale in steps)
    assert report["last_loss"] < report["first_loss"]

"""A step is looked at when the next one is queued, and at once before anything that stays."""

import math
import signal

import train_sft_lora
import utils
from parts.figures import Figures
from train_sft_lora import SftTrainer
from utils import InputError

import pytest
import torch
from safetensors.torch import load_file

QUIET = ["--batch_size", 4, "--gradient_accumulation", 1, "--max_steps", 6, "--logging_steps", 0]
QUIET += ["--eval_strategy", "no"]
EVERY_THIRD = [*QUIET, "--checkpoint_steps", 3]


@pytest.fixture
def run_broken(run_sft, monkeypatch):
    """Return run(step, spoil, flags): a run whose loss of one step is spoil(loss).

    It returns the error, and how many steps were begun.
    """
    run_step = SftTrainer.run_step
    share_of_loss = train_sft_lora.share_of_loss

    def run(broken_step, spoil, *flags):
        steps = [0]

        def counted(trainer, *args):
            if trainer.is_in_train:  # no rehearsal
                steps.append(trainer.state.global_step + 1)
            return run_step(trainer, *args)

        def spoilt(*args):
            loss = share_of_loss(*args)
            return spoil(loss) if steps[-1] == broken_step else loss

        monkeypatch.setattr(SftTrainer, "run_step", counted)
        monkeypatch.setattr(train_sft_lora, "share_of_loss", spoilt)
        with pytest.raises(InputError) as error:
            run_sft(*flags)
        return str(error.value), steps[-1]

    return run


def is_nan(loss):
    return loss * math.nan


def has_no_gradient(loss):
    """Return the loss, with a gradient of NaN."""
    return loss + (loss * 0).sqrt()


def checkpoints(folder):
    """Return the steps of a run's checkpoints, none of which may hold a broken weight."""
    steps = []
    for checkpoint in folder.glob("checkpoint-*"):
        weights = load_file(checkpoint / "adapter_model.safetensors")
        assert all(weight.isfinite().all() for weight in weights.values())
        assert utils.read_json(checkpoint / "trainer_state.json")["log_history"]
        steps.append(int(checkpoint.name.split("-")[1]))
    assert not (folder / "final").exists()
    return sorted(steps)


@pytest.mark.parametrize(
    "broken_step, flags, begun, kept",
    [
        (1, EVERY_THIRD, 1, []),  # the first, in which the base itself may be broken
        (2, EVERY_THIRD, 3, []),  # before that of a checkpoint
        (3, EVERY_THIRD, 3, []),  # of a checkpoint
        (4, EVERY_THIRD, 5, [3]),  # one in the middle
        (6, EVERY_THIRD, 6, [3]),  # the last
        (6, [*QUIET, "--checkpoint_strategy", "no"], 6, []),
        (4, [*EVERY_THIRD, "--logging_steps", 4], 4, [3]),  # of a log line
        (4, [*EVERY_THIRD, "--logging_steps", -1], 4, [3]),
    ],
)
def test_no_checkpoint_holds_a_step_that_was_not_looked_at(
    broken_step, flags, begun, kept, run_broken, tmp_path, capsys
):
    error, steps = run_broken(broken_step, is_nan, *flags)
    assert error == f"the loss is nan in step {broken_step}: lower --lr."
    assert steps == begun
    assert checkpoints(tmp_path / "out") == kept
    assert "loss nan" not in capsys.readouterr().out


@pytest.mark.parametrize("broken_step, begun", [(2, 3), (3, 3), (4, 5)])
def test_no_evaluation_measures_a_step_that_was_not_looked_at(
    broken_step, begun, run_broken, tmp_path, monkeypatch
):
    measured = []
    score = SftTrainer.score

    def counted(trainer, samples):
        measured.append(trainer.state.global_step)
        return score(trainer, samples)

    monkeypatch.setattr(SftTrainer, "score", counted)
    flags = [*QUIET, "--eval_strategy", "steps", "--eval_every", 3]
    error, steps = run_broken(broken_step, is_nan, *flags)
    assert f"in step {broken_step}:" in error and steps == begun
    assert measured == [0, 3][: 1 + (broken_step > 3)]
    assert checkpoints(tmp_path / "out") == measured[1:]


def test_a_signal_leaves_no_checkpoint_of_a_broken_step(run_broken, tmp_path):
    sent = []

    def is_nan_as_a_signal_comes(loss):
        if not sent:  # the step has several pieces, and a second signal stops at once
            sent.append(signal.raise_signal(signal.SIGTERM))
        return loss * math.nan

    error, steps = run_broken(2, is_nan_as_a_signal_comes, *EVERY_THIRD)
    assert error == "the loss is nan in step 2: lower --lr." and steps == 2
    assert checkpoints(tmp_path / "out") == []


def test_no_checkpoint_holds_weights_that_a_finite_loss_has_broken(run_broken, tmp_path):
    error, steps = run_broken(3, has_no_gradient, *EVERY_THIRD)
    assert error == "step 3 has left NaN or infinity in the weights: lower --lr."
    assert steps == 3 and checkpoints(tmp_path / "out") == []


def test_an_epoch_begins_with_a_step_that_was_looked_at(embed_trainer):
    trainer = embed_trainer()
    trainer.figures = Figures(3, torch.tensor([math.nan]), trainer.figures_of)
    with pytest.raises(InputError, match="the loss is nan in step 3"):
        trainer.begin_epoch(1, 0)  # which may mine negatives, and write them down


@pytest.mark.parametrize("logging_steps", [0, 3, -1])
def test_the_log_has_every_step_in_its_order(run_sft, tmp_path, logging_steps):
    run_sft(*EVERY_THIRD, "--logging_steps", logging_steps)
    log = utils.read_json(tmp_path / "out/detailed_training_logs.json")
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5, 6]
    assert all(list(entry)[0] in ("loss", "grad_norm") or "loss" in entry for entry in log)
    state = utils.read_json(tmp_path / "out/checkpoint-3/trainer_state.json")
    assert state["log_history"] == log[:3]


def test_reading_waits_for_the_steps_own_numbers_alone(monkeypatch):
    calls = []

    class Event:
        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

    class OnGpu:
        device = torch.device("cuda")

        def to(self, device, non_blocking):
            calls.append((device, non_blocking))
            return torch.tensor([2.0])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    figures = Figures(7, OnGpu(), lambda numbers: {"loss": numbers[0]})
    # the event stands behind the copy; what is queued later stands behind the event
    assert calls == [("cpu", True), "record"] and figures.known is None
    assert figures.read() == {"loss": 2.0}
    assert figures.read() == {"loss": 2.0}
    assert calls[2:] == ["synchronize"]


def test_with_a_loss_scaler_a_step_is_looked_at_before_its_weights_change(sft_trainer):
    trainer = sft_trainer()
    step = trainer.data_collator(trainer.train_dataset[:4])
    trainer.state.global_step = 4
    trainer.training_step(trainer.model, step)
    assert trainer.figures.step == 5 and trainer.figures.known is None
    trainer.args.fp16 = True
    trainer.training_step(trainer.model, step)
    assert trainer.figures.known is not None

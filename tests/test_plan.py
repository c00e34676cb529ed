"""The numbers of a run, worked out of its flags."""

import re
from types import SimpleNamespace

from parts.plan import advice, chosen_metric, make_plan, named
from utils import InputError

import pytest

DEFAULTS = {
    "batch_size": 4,
    "gradient_accumulation": 4,
    "epochs": 2,
    "max_steps": None,
    "warmup_steps": None,
    "warmup_ratio": 0.05,
    "eval_strategy": None,
    "eval_every": None,
    "checkpoint_strategy": "steps",
    "checkpoint_steps": None,
    "save_on_epoch_end": 0,
    "save_best": None,
    "save_total_limit": None,
    "early_stopping_patience": None,
    "logging_steps": 10,
    "finetune_type": "lora",
    "lora_r": 16,
    "lora_alpha": 32,
    "use_rslora": False,
    "lr": 2e-4,
    "lr_scheduler": "cosine",
    "optimizer": "adamw",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
}
FOUND = {
    "has_dev": True,
    "metric": "loss",
    "greater_is_better": False,
    "watched": [["loss", False]],
    "shown": {"loss": ""},
    "drop_last": False,
}


def plan_of(rows, processes=1, found=(), **flags):
    """A plan, and what a user is told about it."""
    args = SimpleNamespace(**DEFAULTS | flags)
    plan = make_plan(args, rows, processes, **FOUND | dict(found))
    return plan, list(advice(args, plan, rows))


def test_an_epochs_last_step_is_kept_or_left_out():
    plan, told = plan_of(100)
    assert (plan.step_rows, plan.examples_per_step) == (16, 16)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (7, 14, 0)
    assert told == []
    plan, told = plan_of(100, processes=2, found={"drop_last": True})
    assert (plan.examples_per_step, plan.steps_per_epoch, plan.total_steps) == (32, 3, 6)
    assert told == ["each epoch leaves out 4 rows, drawn anew, that do not fill a step"]


def test_a_step_that_no_epoch_fills_is_shrunk():
    plan, told = plan_of(11, processes=2, found={"drop_last": True})
    assert (plan.step_rows, plan.examples_per_step, plan.steps_per_epoch) == (5, 10, 1)
    assert told == [
        "11 rows are less than one step of 32: the step is shrunk to them",
        "each epoch leaves out 1 rows, drawn anew, that do not fill a step",
    ]
    assert plan_of(11, processes=2)[0].step_rows == 16


@pytest.mark.parametrize(
    "flags, eval_steps, save_steps",
    [
        ({}, 20, 20),
        ({"eval_every": 0}, 100, 100),
        ({"eval_every": 7}, 7, 7),
        ({"eval_strategy": "epoch", "eval_every": 7}, 100, 100),
        ({"eval_strategy": "steps"}, 10, 10),
        ({"eval_strategy": "steps", "logging_steps": -1}, 1, 1),
        ({"save_on_epoch_end": 2}, 200, 200),
        ({"save_on_epoch_end": 2, "eval_every": 7}, 7, 7),
        ({"checkpoint_steps": 30}, 20, 20),  # checkpoints follow the evaluations
        ({"checkpoint_steps": 30, "save_best": 0}, 20, 30),
        ({"checkpoint_strategy": "epoch", "save_best": 0}, 20, 100),
        ({"checkpoint_strategy": "epoch", "checkpoint_steps": 30, "save_best": 0}, 20, 30),
        ({"save_on_epoch_end": 1, "checkpoint_strategy": "epoch", "save_best": 0}, 100, 100),
    ],
)
def test_when_dev_sets_are_measured_and_checkpoints_written(flags, eval_steps, save_steps):
    plan, _ = plan_of(1600, **flags)
    assert (plan.steps_per_epoch, plan.total_steps) == (100, 200)
    assert (plan.eval_steps, plan.save_steps) == (eval_steps, save_steps)


@pytest.mark.parametrize("total, every", [(2, 2), (5, 5), (22, 5), (64, 6), (1000, 100)])
def test_a_tenth_of_a_short_run_is_five_steps(total, every):
    plan, _ = plan_of(1600, max_steps=total, save_best=0)
    assert (plan.eval_steps, plan.save_steps) == (every, every)


def test_the_best_is_kept_where_something_tells_which_it_is():
    plan, _ = plan_of(1600)
    assert plan.has_dev and plan.saves and plan.save_best and plan.save_total_limit == 2
    assert not plan_of(1600, eval_strategy="no")[0].has_dev
    for flags in ({"eval_strategy": "no"}, {"save_best": 0}, {"checkpoint_strategy": "no"}):
        assert not plan_of(1600, **flags)[0].save_best
    assert not plan_of(1600, checkpoint_strategy="no")[0].saves
    assert not plan_of(1600, found={"has_dev": False})[0].save_best
    assert plan_of(1600, save_on_epoch_end=1)[0].save_total_limit is None
    assert plan_of(1600, save_on_epoch_end=1)[0].epoch_save_steps == 100


def test_the_scale_of_an_adapter():
    assert plan_of(16)[0].lora_scale == 2
    assert plan_of(16, use_rslora=True)[0].lora_scale == 8


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(InputError, match="3 rows cannot be shared out over 4 processes"):
        plan_of(3, processes=4)
    for flags in ({"save_best": 1}, {"early_stopping_patience": 2}):
        with pytest.raises(InputError, match="no rows could be held out for one. Pass --dev_file"):
            plan_of(16, found={"has_dev": False}, **flags)


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"eval_every": 150}, "--eval_every 150 evaluates once in 200 steps, besides before"),
        ({"eval_every": 300}, "evaluates never in 200 steps, .* --eval_every 40 gives two or"),
        ({"checkpoint_steps": 30}, "checkpoints follow the evaluations"),
        ({"lr": 1e-5}, "--lr 1e-05 is low for LoRA"),
        ({"lr": 1e-2}, "--lr 0.01 is very high"),
        ({"lora_alpha": 128}, "a LoRA scale of 8.0 at --lr 0.0002 is strong"),
    ],
)
def test_what_a_user_is_told(flags, told):
    (sentence,) = plan_of(1600, **flags)[1]
    assert re.search(told, sentence)


def test_names_of_metrics():
    assert (named("", "loss"), named("first", "loss")) == ("loss", "first_loss")
    assert chosen_metric("eval_loss", ["loss", "f1"]) == "loss"
    assert chosen_metric("eval_loss", ["eval_loss", "loss"]) == "eval_loss"  # a set called eval
    with pytest.raises(InputError, match="f2 is not measured. Choose one of loss, f1. More"):
        chosen_metric("f2", ["loss", "f1"], " More are elsewhere.")

"""What a run of the SFT trainer is measured by, and what of that is shown."""

from parts.answers import DevSet
from parts.chats import Example
from parts.samples import TrainSet
from train_sft_lora import parse_args, plan_run
from utils import InputError

import pytest

EMPTY, ONE = '{"persons": []}', '{"persons": ["A"]}'


def plan_of(dev_names, *flags):
    """The plan of a run with dev sets whose references are JSON, half of them empty."""
    question = {"role": "user", "content": "?"}
    generated = []
    for text in (EMPTY, ONE):
        answer = {"role": "assistant", "content": text}
        generated.append((None, Example("x", [question, answer])))
    dev_sets = {name: DevSet([], generated) for name in dev_names}
    args = parse_args(["--train_file", "x", *flags])
    train_set = TrainSet([{"input_ids": [1], "supervised": [True]}] * 40)
    return plan_run(args, train_set, dev_sets, 1)


def test_what_two_stages_are_for_is_shown_of_each_dev_set():
    shown = plan_of(["all", "pos"], "--metric_for_best", "all_f1").shown
    wanted = ("loss", "f1", "recall", "false_positive_rate", "json_valid")
    assert next(iter(shown)) == "all_f1"
    assert shown == {f"{name}_{key}": name for name in ("all", "pos") for key in wanted}


@pytest.mark.parametrize(
    "dev_names, asked, meant, greater_is_better",
    [
        ([""], "eval_loss", "loss", False),
        ([""], "eval_f1", "f1", True),
        (["all"], "eval_all_false_positive_rate", "all_false_positive_rate", False),
        (["eval"], "eval_loss", "eval_loss", False),
        (["eval"], "eval_eval_f1", "eval_f1", True),
        ([""], "f1", "f1", True),
    ],
)
def test_trainers_name_of_a_metric_means_ours(dev_names, asked, meant, greater_is_better):
    plan = plan_of(dev_names, "--metric_for_best_model", asked)
    assert plan.metric == meant and plan.greater_is_better == greater_is_better


def test_a_metric_that_is_not_measured_is_refused_under_trainers_name_too():
    with pytest.raises(
        InputError, match="--metric_for_best eval_f2 is not measured. Choose one of loss"
    ):
        plan_of([""], "--metric_for_best", "eval_f2")

"""What a run leaves to be read."""

import copy
import json
import pickle

from parts.report import Report, write_logs
from utils import read_json


def test_epoch_losses_are_means_over_steps(tmp_path):
    log = [{"step": 3, "loss": 3.0}, {"step": 4, "loss": 7.0}, {"step": 8, "loss": 1.0}]
    write_logs(tmp_path, log, 4)
    assert read_json(tmp_path / "training_losses.json") == [
        {"epoch": 1, "loss": 4.0},
        {"epoch": 2, "loss": 1.0},
    ]


def test_a_cell_shows_the_main_figures_of_a_report_and_no_page_of_them():
    metrics = {f"map@{k}": k / 1000 for k in range(100)}
    report = Report(
        flags={"output_dir": "runs/mine", "lr": 1e-3},
        plan={"shown": {"ndcg@10": "", "recall@10": ""}, "notes": ["x" * 500]},
        metrics={
            "before": metrics | {"ndcg@10": 0.5, "recall@10": 0.75},
            "after": metrics | {"ndcg@10": 0.625, "recall@10": 1.0},
        },
        steps=59,
    )
    shown = """\
Report of runs/mine, 59 steps
  ndcg@10   0.5000 before, 0.6250 after, +0.1250
  recall@10 0.7500 before, 1.0000 after, +0.2500
its keys: flags, plan, metrics, steps; all of it: dict(report)"""
    assert repr(report) == str(report) == f"{report}" == shown
    assert report["metrics"]["after"]["recall@10"] == 1.0
    assert report == dict(report) == json.loads(json.dumps(report))
    assert repr(dict(report)) == repr(json.loads(json.dumps(report)))
    for again in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert type(again) is Report and again == report


def test_reports_without_training_or_figures_are_shown_too():
    assert repr(Report(flags={"output_dir": "a"}, metrics={"loss": 1.5, "f1": 0.5})) == (
        "Report of a\n  loss  1.5000\n  f1    0.5000\nits keys: flags, metrics; all of it: dict(report)"
    )
    many = Report(metrics={f"f1.{i}": 0.5 for i in range(100)})
    assert len(repr(many).splitlines()) == 13 and "  ... 90 more" in repr(many)
    assert repr(Report()) == "Report\nits keys: ; all of it: dict(report)"

"""What a run leaves to be read."""

from parts.report import write_logs
from utils import read_json


def test_epoch_losses_are_means_over_steps(tmp_path):
    log = [{"step": 3, "loss": 3.0}, {"step": 4, "loss": 7.0}, {"step": 8, "loss": 1.0}]
    write_logs(tmp_path, log, 4)
    assert read_json(tmp_path / "training_losses.json") == [
        {"epoch": 1, "loss": 4.0},
        {"epoch": 2, "loss": 1.0},
    ]

"""What a run says while it trains."""

import signal
import sys
import threading
from types import SimpleNamespace

from parts.callbacks import RunCallback, caught_signals, worsening

import pytest
import torch
from tqdm import tqdm


def test_warning_when_the_loss_falls_while_recall_worsens():
    def log(losses, metrics):
        entries = [{"step": 0, "eval_m": metrics[0]}]
        for i, (loss, metric) in enumerate(zip(losses, metrics[1:], strict=True), 1):
            entries += [{"step": i, "loss": loss}, {"step": i, "eval_m": metric}]
        return entries

    assert "overfitting" in worsening(log([2.0, 1.0, 0.5], [0.5, 0.6, 0.55, 0.5]), "m", True)
    assert worsening(log([2.0, 1.0, 0.5], [0.5, 0.6, 0.55, 0.56]), "m", True) is None
    assert worsening(log([0.5, 1.0, 2.0], [0.5, 0.6, 0.55, 0.5]), "m", True) is None
    assert "overfitting" in worsening(log([2.0, 1.0, 0.5], [0.5, 0.4, 0.45, 0.5]), "m", False)


def test_whoever_follows_a_log_file_sees_each_line_at_once(tmp_path, monkeypatch):
    plan = SimpleNamespace(metric="m", greater_is_better=True, shown={"m": ""})
    callback = RunCallback(None, plan, tmp_path, {"eval_m": 0.25})
    callback.training_bar = tqdm(disable=True)
    log = [{"step": 0, "eval_m": 0.25}, {"step": 3, "eval_m": 0.125}]
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, log_history=log)
    with open(tmp_path / "log", "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
        callback.on_log(None, state, None, log[-1])
        written = (tmp_path / "log").read_text("utf-8")
    assert written == "step      3  m  0.1250 -0.1250  best so far\n"
    state.global_step = 5
    log.append({"step": 5, "eval_m": 0.0625})
    assert callback.lines_of(state, log[-1]) == ["step      5  m  0.0625 -0.1875"]
    state.is_world_process_zero = False
    callback.on_log(None, state, None, log[-1])  # to a file that is closed


def test_a_signal_that_another_process_got_stops_this_one_too(tmp_path):
    signs = torch.tensor([False, True])  # of this process, of the other
    accelerator = SimpleNamespace(num_processes=2, gather=lambda own: signs)
    callback = RunCallback(SimpleNamespace(accelerator=accelerator), None, tmp_path, {})
    assert callback.must_stop("cpu") and callback.signal == signal.SIGTERM
    signs.fill_(False)
    assert not RunCallback(callback.trainer, None, tmp_path, {}).must_stop("cpu")


def test_a_second_signal_stops_at_once(tmp_path, capsys):
    callback = RunCallback(None, None, tmp_path, {})
    callback.catch(signal.SIGINT, None)
    assert callback.signal == signal.SIGINT
    assert "stopping after this step, with a checkpoint" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        callback.catch(signal.SIGTERM, None)


def test_signals_are_caught_in_the_main_thread_alone_and_given_back():
    earlier = signal.getsignal(signal.SIGTERM)
    found = []

    def catch(number, frame):
        pass

    def work():
        with caught_signals(catch):
            found.append(signal.getsignal(signal.SIGTERM))

    with pytest.raises(ValueError), caught_signals(catch):
        found.append(signal.getsignal(signal.SIGTERM))
        raise ValueError
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [catch, earlier] and signal.getsignal(signal.SIGTERM) == earlier

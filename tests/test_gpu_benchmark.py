"""benchmarks/gpu.py goes all its ways on a CPU: what it would measure on a GPU is there, and finite."""

import json
import math
import signal
import time

from conftest import DOCUMENTS, ROOT

import pytest


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Return measure(part, only): the figures of a part's measurements of that name, tiny models."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    import gpu

    def measure(part, only):
        out = tmp_path / "gpu.json"
        assert gpu.main([part, "--smoke", "--only", only, "--out", str(out)]) == 0
        found = json.loads(out.read_text())["CPU"][part]
        assert found["command"] == f"python benchmarks/gpu.py {part} --smoke"
        assert found["versions"]["transformers"]
        return found["cases"]

    return measure


def check_run(figures):
    """Assert that a training was timed and profiled to its end."""
    assert 0 < figures["seconds_per_step"] < 60 and 0 < figures["peak_gib"] < 64
    assert figures["queue_stops"] > 0 and figures["kernel_seconds"] > 0
    assert len(figures["largest_kernels"]) == 3


def test_exact_compares_gradients_however_they_are_cut(measure):
    [figures] = measure("exact", "embed encoder --load_in_4bit").values()
    assert figures["within_limit"] and figures["limit"] == 1e-5
    # of a sum in another order: all of it could not be the same
    assert 0 < figures["cut"] <= figures["difference"] < 1e-5 and figures["done_again"] == 0


def test_exact_runs_out_of_memory_and_goes_on(measure):
    [figures] = measure("exact", "embed decoder, out").values()
    assert figures["goes_on"] and figures["within_limit"]
    assert figures["halvings"] > 0 and figures["halvings_of_run"] > 0


def test_exact_fails_where_a_cut_changes_the_gradient(measure, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "FLOAT32_LIMIT", 0.0)
    figures = gpu.judged(1e-9, "none")
    assert gpu.has_failed(figures) and not gpu.has_failed(gpu.judged(1e-9, "bf16"))


def test_bench_runs_both_sides_and_tells_which_goals_are_met(measure):
    cases = measure("bench", "MiniLM-L6")
    ours, theirs = cases["MiniLM-L6, ours, round 1"], cases["MiniLM-L6, theirs, round 1"]
    check_run(ours)
    check_run(theirs)
    both = cases["MiniLM-L6"]
    ratio = theirs["seconds_per_step"] / ours["seconds_per_step"]
    assert both["speed_ratio"] == pytest.approx(ratio)
    assert both["goals"] == {"speed_ratio >= 2.0": ratio >= 2}
    assert (
        both["sides"]["ours"]["tokens_per_second"]
        == ours["work"]["tokens"] / ours["seconds_per_step"]
    )


def test_t4_runs_a_command_of_the_readme(measure):
    [figures] = measure("t4", "MiniLM in 8 bits").values()
    check_run(figures)
    assert "--load_in_8bit" in figures["flags"] and math.isfinite(figures["last_loss"])


def test_ideas_switch_each_idea_on_and_off(measure):
    cases = measure("ideas", "shared prompts")
    for side in ("on", "off"):
        check_run(cases[f"shared prompts, {side}, round 1"])
    # a prompt that is computed with each answer: more tokens
    on, off = (
        cases[f"shared prompts, {side}, round 1"]["work"]["tokens"] for side in ("on", "off")
    )
    assert on < off


def test_every_idea_has_a_toggle_that_patches_a_name_and_puts_it_back(measure):
    import gpu
    import gpu_toggles

    from transformers import AttentionInterface

    assert set(gpu.IDEAS) == set(gpu_toggles.TOGGLES)
    before = dict(AttentionInterface._global_mapping)
    for toggle in gpu_toggles.TOGGLES.values():
        with toggle():
            pass
    assert dict(AttentionInterface._global_mapping) == before


def test_the_commands_for_a_t4_are_those_of_the_documents(measure):
    import gpu

    for name, (_, _, batch, accumulation, *_) in gpu.README_COMMANDS.items():
        if "e5" not in name:  # without a flag of either
            assert f"--batch_size {batch} --gradient_accumulation {accumulation}" in DOCUMENTS, name


def test_what_does_not_fit_into_the_time_is_skipped(measure, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "BUDGET_SECONDS", -1)
    [figures] = measure("exact", "attention").values()
    assert "skipped" in figures


def test_what_takes_too_long_is_cut_off_although_trials_set_alarms(measure, monkeypatch):
    import gpu

    monkeypatch.setattr(gpu, "LAST_SECOND", 0.2)

    def endless(report, folder, smoke):
        report.measure("endless", sleep_behind_an_alarm)

    def sleep_behind_an_alarm():
        signal.setitimer(signal.ITIMER_REAL, 0)  # as parts/trials.py ends its own
        time.sleep(20)

    monkeypatch.setitem(gpu.PARTS, "exact", endless)
    [figures] = measure("exact", "endless").values()
    assert "cut off" in figures["skipped"]


def test_flops_are_those_of_a_hand_worked_model(measure):
    """One token of a MiniLM: 4 FLOP for each of 10.6 million weights, and attention to itself."""
    import gpu_models

    work = {"tokens": 1, "squared_lengths": 1, "supervised": 0}
    layer = 4 * 384 * 384 + 2 * 384 * 1536
    assert gpu_models.useful_flops("MiniLM-L6", work) == 4 * 6 * layer + 12 * 6 * 384
    assert gpu_models.peak_of_card("Tesla T4") == 65e12
    assert gpu_models.peak_of_card("NVIDIA L40S") is None

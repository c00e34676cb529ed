"""Measure both scripts on a GPU: whether steps are exact, how fast, on a T4, what each idea brings.

    python benchmarks/gpu.py exact     # gradients on CUDA, cut and uncut; a forced out of memory
    python benchmarks/gpu.py bench     # against TRL and sentence-transformers; MFU, peak memory
    python benchmarks/gpu.py t4        # commands of the documents, on a T4 as torch can play one
    python benchmarks/gpu.py ideas     # what was built for GPUs, each switched on and off; profiles
    make gpu                           # all four
    python benchmarks/gpu.py exact --smoke      # tiny models, on a CPU: the same code, no figures

Nothing of this was ever run on CUDA: it was written on a CPU, where --smoke goes the same ways.

Needs no network; models are random, of known shapes, in the compute dtype of the card. Figures go
to benchmarks/results/gpu.json (with --smoke: runs/gpu_smoke.json) by the card's name, each as soon
as it is known. A call ends within nine minutes: what would take longer is recorded as skipped. TRL
is compared with if it is installed: pip install "trl>=1.16,<2" in an environment of its own.

exact: relative differences of gradients, of a step cut in four against the uncut one. In float32,
also behind a base in 8 or 4 bits, they are limited to 1e-5, and the exit code is 1 where that is
exceeded; in half precision the cut changes what is rounded, and they are reported. bench: medians
of rounds in which the sides alternate; MFU: gpu_models.useful_flops over the card's peak. t4: fp16,
no flash kernels, 14.56 GiB; seconds are the present card's. ideas: gpu_toggles.TOGGLES.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import gpu_toggles
import layouts
from gpu_models import DECODERS, ENCODERS, peak_of_card, useful_flops, write_rows_of
from gpu_sides import (
    CUDA,
    DEVICE,
    SCRIPTS,
    Job,
    prepare,
    start_clean,
    train_ours,
    train_theirs,
)
from parts.rehearsal import EVERYTHING, finite_gradients
from utils import write_json

import torch

RESULTS = Path(__file__).parent / "results/gpu.json"
SMOKE_RESULTS = Path("runs/gpu_smoke.json")
BUDGET_SECONDS = 500  # no measurement is begun that is likely to end behind it
LAST_SECOND = 525  # one under way is cut off, so that a call ends within nine minutes
FLOAT32_LIMIT = 1e-5  # relative difference of gradients
KINDS = {  # of what `exact` trains
    "sft decoder": "sft",
    "preference decoder": "preference",
    "embed encoder": "embed",
    "embed decoder": "embed",
}
BENCHED = {  # kind, examples in memory, accumulation, length in tokens, words of a long text
    "Qwen3-0.6B": ("sft", 2, 8, 2048, 200),
    "Qwen3-1.7B": ("sft", 2, 8, 2048, 200),
    "MiniLM-L6": ("embed", 64, 1, 512, 40),
    "e5-large": ("embed", 64, 1, 512, 120),
}
EPOCH_STEPS = 4
ROUNDS = 2
NOT_GROWN_FLAGS = "--gradient_checkpointing off --no-grow_pieces"
NOT_GROWN = "ours, as many rows in memory"
SFT_GOALS = {"speed_ratio": (True, 1.5), "memory_ratio_not_grown": (False, 0.7)}
LARGE_GOALS = {"mfu": (True, 0.4)}
EMBED_GOALS = {"speed_ratio": (True, 2.0)}
README_COMMANDS = {  # kind, shape, --batch_size, --gradient_accumulation, --max_length, more, words
    "Colab T4: Qwen3-Embedding-0.6B": ("embed", "Qwen3-0.6B", 4, 16, 512, "--load_in_4bit", 160),
    "Colab T4: multilingual-e5-small": (
        "embed",
        "e5-small",
        32,
        1,
        512,
        "--query_prefix 'query: ' --doc_prefix 'passage: '",
        160,
    ),
    "Settings for SFT: Qwen3-4B": ("sft", "Qwen3-4B", 1, 16, 1024, "--load_in_4bit", 350),
    "Settings: MiniLM in 8 bits": (
        "embed",
        "MiniLM-L6",
        2,
        8,
        192,
        "--max_negs 0 --lora_r 4 --lr 2e-5 --fp16 --load_in_8bit",
        40,
    ),
}
IDEAS = {  # a key of gpu_toggles.TOGGLES: kind, shape, flags, words
    "8-bit weights alone": ("sft", "Qwen3-0.6B", "--load_in_8bit", 400),
    "norms in bf16": ("sft", "Qwen3-0.6B", "--load_in_4bit", 400),
    "repeated keys": ("sft", "Qwen3-0.6B", "--fp16", 400),
    "pieces that grow": ("sft", "Qwen3-0.6B", "", 200),
    "room for the optimizer": ("sft", "Qwen3-0.6B", "", 200),
    "fused AdamW": ("sft", "Qwen3-0.6B", "--optimizer adamw", 200),
    "one copy a step": ("sft", "Qwen3-0.6B", "--no-grow_pieces", 200),
    "losses looked at late": ("sft", "Qwen3-0.6B", "", 200),
    "no argmax": ("sft", "Qwen3-0.6B", "", 200),
    "shared prompts": ("preference", "Qwen3-0.6B", "", 400),
}
LIBRARIES = "torch transformers peft accelerate bitsandbytes datasets trl sentence-transformers"


# ---------------------------------------------------------------- the report


class OutOfTime(BaseException):
    """The call has used up its time; no library is to catch it as an error of its own."""


class Report:
    """The figures of one part, written as they come; also the time that is left for others."""

    def __init__(self, path, part, smoke, only, log):
        """only: part of the names of what to measure; log: a file for what the runs print."""
        self.only = only
        self.path = path
        self.log = log
        self.started = time.perf_counter()
        self.longest = 0  # seconds of a measurement
        self.results = json.loads(path.read_text()) if path.exists() else {}
        card = torch.cuda.get_device_name() if CUDA else "CPU"
        parts = self.results.setdefault(card, {})
        # of others that were asked for one by one, the figures stay
        self.cases = parts[part]["cases"] if only and part in parts else {}
        self.part = {
            "command": f"python benchmarks/gpu.py {part}" + " --smoke" * smoke,
            "capability": torch.cuda.get_device_capability() if CUDA else None,
            "versions": versions(),
            "cases": self.cases,
        }
        parts[part] = self.part

    def wants(self, name):
        """Tell whether a measurement, or those whose names begin with `name`, were asked for."""
        return self.only in name or name in self.only

    def measure(self, name, function, *arguments):
        """Record and return what function(*arguments) returns, or why there is nothing."""
        if not self.wants(name):
            return {}
        elapsed = time.perf_counter() - self.started
        if elapsed + self.longest > BUDGET_SECONDS:
            return self.record(name, {"skipped": f"{elapsed:.0f} s had passed"})
        try:
            with contextlib.redirect_stdout(self.log):
                figures = function(*arguments)
        except OutOfTime:
            figures = {"skipped": f"cut off after {LAST_SECOND} s"}
        except Exception as error:  # of whatever kind: the others are still to be measured
            figures = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        took = time.perf_counter() - self.started - elapsed
        self.longest = max(self.longest, took)
        return self.record(name, figures)

    def record(self, name, figures):
        """Write a measurement's figures, and show them; return them."""
        self.cases[name] = figures
        self.part["seconds"] = time.perf_counter() - self.started
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)  # whole, should the call be killed in it
        print(f"[{self.part['seconds']:4.0f} s] {name}: {in_short(figures)}", flush=True)
        return figures


def in_short(figures):
    """Return the figures of a measurement that fit into a line."""
    shown = []
    for name, value in figures.items():
        if isinstance(value, float):
            shown.append(f"{name} {value:.3g}")
        elif isinstance(value, bool | int | str) and name != "flags":
            shown.append(f"{name} {value}")
    return ", ".join(shown)


def shape_of(name, smoke):
    """Return the shape that is measured in the place of `name`: the same, or a tiny one."""
    if not smoke:
        return name
    return "tiny encoder" if name in ENCODERS else "tiny decoder"


def versions():
    """Return the versions of the libraries that are installed."""
    found = {}
    for name in LIBRARIES.split():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return found | {"cuda": torch.version.cuda, "allocator": allocator}


@contextlib.contextmanager
def time_limit(seconds):
    """Context that OutOfTime ends."""

    def end(number, frame):
        raise OutOfTime

    # not an alarm: the trials of chat templates set theirs, and with it any other's, to zero
    before = signal.signal(signal.SIGUSR1, end)
    main_thread = threading.main_thread().ident
    timer = threading.Timer(seconds, signal.pthread_kill, (main_thread, signal.SIGUSR1))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR1, before)


# ---------------------------------------------------------------- exact


def trainer_of(job, folder, flags=""):
    """Return what prepare() of a job's script makes, its adapters no longer zero."""
    start_clean()
    prepared, _ = prepare(job, folder, flags)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in prepared.trainer.model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide most of a gradient
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return prepared


def gradient_of(trainer, batch_size, piece_tokens=None):
    """Return the flat gradient of a step of all rows, cut as the last two arguments say."""
    data = trainer.train_dataset
    step = trainer.data_collator([data[i] for i in range(len(data))])
    trainer.batch_size = batch_size
    trainer.piece_tokens = piece_tokens
    trainer.device_tokens = EVERYTHING  # nothing but these two cuts the step
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    scaler = trainer.accelerator.scaler
    if not finite_gradients(lambda: trainer.training_step(trainer.model, step), weights, scaler):
        raise ValueError("the gradient is not finite")
    scale = scaler.get_scale() if scaler else 1
    return torch.cat([weight.grad.flatten() for weight in weights]).float().cpu() / scale


def relative(found, wanted):
    """Return the relative difference of two gradients."""
    return ((found - wanted).norm() / wanted.norm()).item()


def judged(difference, precision):
    """Return a difference with the limit that it must keep, None in half precision."""
    limit = FLOAT32_LIMIT if precision == "none" else None
    kept = None if limit is None else difference <= limit
    return {"difference": difference, "limit": limit, "within_limit": kept}


def compare_cuts(job, folder, flags, known):
    """Return how far a step is from the uncut one if it is cut, grown, recomputed or done again.

    known: {precision: gradient} of the same model so far, to which this one is added.
    """
    trainer = trainer_of(job, folder, flags).trainer
    precision = flags.split()[-1]
    uncut = gradient_of(trainer, job.batch)
    again = gradient_of(trainer, job.batch)
    gradients = {"cut": gradient_of(trainer, job.batch // 4)}
    gradients["grown"] = gradient_of(trainer, job.batch // 4, EVERYTHING)
    trainer.recompute_activations(True)
    gradients["recomputed"] = gradient_of(trainer, job.batch)
    found = {name: relative(gradient, uncut) for name, gradient in gradients.items()}
    found |= judged(max(found.values()), precision) | {"done_again": relative(again, uncut)}
    known[precision] = uncut
    if "none" in known:
        found["from_float32"] = relative(uncut, known["none"])
    return found


def run_out_of_memory(job, folder):
    """Return how far the gradient is off where memory runs out, and whether a run goes on.

    What is left is three fifths of what the uncut step takes.
    """
    prepared = trainer_of(job, folder, "--mixed_precision none " + NOT_GROWN_FLAGS)
    trainer = prepared.trainer
    start_clean()
    before = torch.cuda.memory_allocated() if CUDA else 0  # bytes
    uncut = gradient_of(trainer, job.batch)
    taken = torch.cuda.max_memory_allocated() - before if CUDA else 0
    trainer.model.zero_grad()
    if CUDA:
        memory = gpu_toggles.memory_capped(before + 0.6 * taken)
    else:
        memory = gpu_toggles.pieces_that_fit(trainer, 0.6 * sum(prepared.row_tokens))
    halved = trainer.halvings  # on a card that is too small for the uncut step
    with memory:
        found = judged(relative(gradient_of(trainer, job.batch), uncut), "none")
        halvings = trainer.halvings
        trainer.halvings = halved  # it is to run out in the run, too
        report = SCRIPTS[job.kind].train_and_prove(prepared)
    ran_out = halvings > halved and trainer.halvings > halved
    finished = trainer.state.global_step == job.total_steps
    return {
        **found,
        "goes_on": ran_out and finished,
        "halvings": halvings,
        "halvings_of_run": trainer.halvings,
        "proof": report["proof"]["relative_error"],
        "taken_gib": taken / 2**30,
    }


def compare_attention(job, folder, precision):
    """Return how far repeated keys are from transformers' own attention with grouped queries."""
    trainer = trainer_of(job, folder, f"--mixed_precision {precision}").trainer
    with gpu_toggles.stock_attention():
        stock = gradient_of(trainer, job.batch)
    with gpu_toggles.repeated_keys():
        repeated = gradient_of(trainer, job.batch)
    return judged(relative(repeated, stock), precision)


def exact(report, folder, smoke):
    """Record the gradients of all kinds, widths and precisions; then memory, then attention."""
    shape = "tiny" if smoke else "small"
    precisions = ("none", "bf16", "fp16") if CUDA else ("none",)
    jobs = {}
    for name, kind in KINDS.items():
        rows = write_rows_of(folder, kind, 8, 20 if smoke else 60)
        jobs[name] = Job(kind, f"{shape} {name.split()[-1]}", rows, 8, 1, 512, 1)
        for bits in ("", "--load_in_8bit", "--load_in_4bit"):
            known = {}
            for precision in precisions:
                flags = f"{bits} --mixed_precision {precision}".strip()
                label = f"{name} {flags}"
                report.measure(label, compare_cuts, jobs[name], folder, flags, known)
    for name in ("sft decoder", "embed decoder"):
        large = shape_of("Qwen3-0.6B", smoke)
        rows = write_rows_of(folder, KINDS[name], 16, 20 if smoke else 60)
        job = replace(jobs[name], shape=large, rows_file=rows, batch=16)
        report.measure(f"{name}, out of memory", run_out_of_memory, job, folder)
    for precision in precisions:
        label = f"attention below capability 8.0 --mixed_precision {precision}"
        report.measure(label, compare_attention, jobs["sft decoder"], folder, precision)


# ---------------------------------------------------------------- bench


def alternate(report, label, sides, rounds):
    """Run {side: (function, job, folder)} in turn; return {side: figures of its runs}."""
    runs = {side: [] for side in sides}
    for i in range(rounds):
        for side, (function, *arguments) in sides.items():
            figures = report.measure(f"{label}, {side}, round {i + 1}", function, *arguments)
            if "seconds_per_step" in figures:
                runs[side].append(figures)
    return runs


def medians(runs):
    """Return the medians of a side's runs, or {} of none."""
    names = ("seconds_per_step", "peak_gib", "queue_stops")
    return {name: statistics.median(run[name] for run in runs) for name in names if runs}


def compare_sides(name, job, runs, goals):
    """Return medians of all sides, ours by theirs, MFU, and which goals are met.

    goals: {figure: (whether more is better, number)}.
    """
    sides = {side: medians(each) for side, each in runs.items()}
    work = runs["ours"][0]["work"] if runs["ours"] else {}
    for figures in sides.values():
        if figures and work:
            figures["tokens_per_second"] = work["tokens"] / figures["seconds_per_step"]
            figures["rows_per_second"] = job.step_rows / figures["seconds_per_step"]
    ours, theirs, fewer = sides["ours"], sides["theirs"], sides.get(NOT_GROWN)
    found = {"sides": sides}
    peak = peak_of_card(torch.cuda.get_device_name()) if CUDA else None
    if ours and peak:
        found["mfu"] = useful_flops(name, work) / ours["seconds_per_step"] / peak
    if ours and theirs:
        found["speed_ratio"] = theirs["seconds_per_step"] / ours["seconds_per_step"]
        found["memory_ratio"] = ours["peak_gib"] / theirs["peak_gib"]
    if fewer and theirs:
        found["memory_ratio_not_grown"] = fewer["peak_gib"] / theirs["peak_gib"]
    met = {}
    for figure, (more, number) in goals.items():
        if figure in found:
            reached = found[figure] >= number if more else found[figure] <= number
            met[f"{figure} {'>=' if more else '<='} {number}"] = reached
    return found | {"goals": met}


def theirs(job, folder):
    """Return the figures of the other side, without what ours has registered for old GPUs."""
    with gpu_toggles.stock_attention():
        return train_theirs(job, folder)


def bench(report, folder, smoke):
    """Record both sides of four models, and what they come to."""
    for name, (kind, batch, accumulation, length, words) in BENCHED.items():
        if not report.wants(name):
            continue
        epoch_steps = 1 if smoke else EPOCH_STEPS
        count = epoch_steps * batch * accumulation
        rows = write_rows_of(folder, kind, count, 8 if smoke else words)
        shape = shape_of(name, smoke)
        job = Job(kind, shape, rows, batch, accumulation, length, epoch_steps)
        sides = {"ours": (train_ours, job, folder), "theirs": (theirs, job, folder)}
        goals = EMBED_GOALS
        if kind == "sft":
            # with checkpointing, as theirs
            not_grown = replace(job, flags="--gradient_checkpointing on --no-grow_pieces")
            sides[NOT_GROWN] = (train_ours, not_grown, folder)
            goals = SFT_GOALS | (LARGE_GOALS if name == "Qwen3-1.7B" else {})
        runs = alternate(report, name, sides, 1 if smoke else ROUNDS)
        report.record(name, compare_sides(name, job, runs, goals))


# ---------------------------------------------------------------- t4


def on_t4(job, folder):
    """Return the figures of our side on a played T4."""
    with gpu_toggles.played_t4():
        return train_ours(job, folder)


def t4(report, folder, smoke):
    """Record the documents' commands for a T4."""
    for name, (kind, shape, batch, accumulation, length, flags, words) in README_COMMANDS.items():
        if not report.wants(name):
            continue
        epoch_steps = 1 if smoke else 2
        count = epoch_steps * batch * accumulation
        rows = write_rows_of(folder, kind, count, 8 if smoke else words)
        shape = shape_of(shape, smoke)
        job = Job(kind, shape, rows, batch, accumulation, length, epoch_steps, flags)
        report.measure(name, on_t4, job, folder)


# ---------------------------------------------------------------- ideas


def with_idea(idea, on, job, folder):
    """Return the figures of our side with an idea on or off."""
    with contextlib.ExitStack() as stack:
        if idea == "repeated keys":  # for GPUs without flash kernels; on another they are played
            stack.enter_context(gpu_toggles.kernels_of_t4())
            stack.enter_context(gpu_toggles.repeated_keys())
        if not on:
            stack.enter_context(gpu_toggles.TOGGLES[idea]())
        return train_ours(job, folder)


def compare_idea(runs):
    """Return the medians with an idea and without, and the ratios: above 1 it is a gain."""
    on, off = medians(runs["on"]), medians(runs["off"])
    found = {"on": on, "off": off}
    if on and off:
        found["speed_ratio"] = off["seconds_per_step"] / on["seconds_per_step"]
        found["memory_ratio"] = off["peak_gib"] / on["peak_gib"]
    return found


def crossover(report, folder, smoke):
    """Record at which prompts two rows are faster than a shared prompt, which parts/preference.py
    could be told.
    """
    shape = DECODERS[shape_of("Qwen3-0.6B", smoke)]
    with contextlib.redirect_stdout(report.log):
        trainer = layouts.make_trainer(f"{folder}/layouts", shape, DEVICE, 2)
    faster = []  # prompts at which two rows are
    for prompt in (64,) if smoke else (256, 512, 1024, 1536, 2048, 3072):
        pairs = layouts.random_pairs(4, prompt, 16 if smoke else 128)
        label = f"layouts, prompt of {prompt} tokens"
        figures = report.measure(label, layouts.compare, trainer, pairs, 1 if smoke else 5)
        if figures.get("ratio", 1) < 1:
            faster.append(prompt)
    report.record("layouts", {"two_rows_are_faster_at": faster})


def ideas(report, folder, smoke):
    """Record what each idea brings; how the largest kernels share a step; both layouts of pairs."""
    for idea, (kind, shape, flags, words) in IDEAS.items():
        if not report.wants(idea):
            continue
        epoch_steps = 1 if smoke else EPOCH_STEPS
        rows = write_rows_of(folder, kind, 16 * epoch_steps, 8 if smoke else words)
        job = Job(kind, shape_of(shape, smoke), rows, 2, 8, 2048, epoch_steps, flags)
        sides = {
            "on": (with_idea, idea, True, job, folder),
            "off": (with_idea, idea, False, job, folder),
        }
        report.record(idea, compare_idea(alternate(report, idea, sides, 1 if smoke else ROUNDS)))
    if report.wants("profile Qwen3-1.7B"):
        rows = write_rows_of(folder, "sft", 16, 8 if smoke else 200)
        job = Job("sft", shape_of("Qwen3-1.7B", smoke), rows, 2, 8, 2048, 1)
        report.measure("profile Qwen3-1.7B", train_ours, job, folder)
    if report.wants("layouts"):
        crossover(report, folder, smoke)


# ---------------------------------------------------------------- main

PARTS = {"exact": exact, "bench": bench, "t4": t4, "ideas": ideas}


def has_failed(figures):
    """Tell whether a measurement found an error, or a limit that was not kept."""
    return "error" in figures or False in (figures.get("within_limit"), figures.get("goes_on"))


def parse_args(argv):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny models: the same code, quickly")
    parser.add_argument("--only", default="", help="part of the names of what to measure [all]")
    parser.add_argument("--out", type=Path, help="JSON file of all figures")
    return parser.parse_args(argv)


def main(argv=None):
    """Measure one part; return how many of its measurements failed."""
    args = parse_args(argv)
    if not CUDA and not args.smoke:
        sys.exit("no GPU was found, and this measures one. Pass --smoke to try the code on a CPU.")
    path = args.out or (SMOKE_RESULTS if args.smoke else RESULTS)
    log = Path("runs") / f"gpu_{args.part}.log"
    log.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as words:
        report = Report(path, args.part, args.smoke, args.only, words)
        with contextlib.suppress(OutOfTime), time_limit(LAST_SECOND):
            PARTS[args.part](report, folder, args.smoke)
    failed = [name for name, figures in report.cases.items() if has_failed(figures)]
    print(f"{len(failed)} of {len(report.cases)} failed: {failed}" if failed else "none failed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(bool(main()))

"""One measured training of benchmarks/gpu.py: ours, TRL's or sentence-transformers'."""

import gc
import importlib.util
import os
import shlex
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import embed
import sft

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
import train_embed_lora
import train_sft_lora
from gpu_models import make_model
from parts.base import DTYPES, choose_precision
from parts.report import peak_gib

import torch
from transformers import TrainerCallback

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SCRIPTS = {"sft": train_sft_lora, "preference": train_sft_lora, "embed": train_embed_lora}
STOPS = {  # what waits for the GPU; on a CPU, which does not, what would ask a GPU for a number
    True: {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"},
    False: {"aten::_local_scalar_dense", "aten::nonzero"},
}[CUDA]


@dataclass(frozen=True)
class Job:
    """A training to be measured, the same on both sides."""

    kind: str  # a key of SCRIPTS
    shape: str  # of gpu_models
    rows_file: str
    batch: int  # examples in memory at once
    accumulation: int
    length: int  # tokens
    epoch_steps: int  # of as many rows; the first epoch warms up, the second is timed
    flags: str = ""  # more of ours

    @property
    def step_rows(self):
        return self.batch * self.accumulation

    @property
    def total_steps(self):
        return 2 * self.epoch_steps + 1  # the last is profiled

    def model(self, folder):
        """Return the path of the random model, which is made where `folder` does not have it."""
        return make_model(folder, self.shape, DEVICE)

    def command_line(self, folder):
        """Return the flags of our script, whose output goes to a folder in `folder`."""
        words = (
            f"--model_name {self.model(folder)} --train_file {self.rows_file} "
            f"--output_dir {folder}/ours --overwrite --batch_size {self.batch} "
            f"--gradient_accumulation {self.accumulation} --max_length {self.length} "
            f"--max_steps {self.total_steps} --lora_r {sft.RANK} --lora_alpha {sft.ALPHA} "
            "--dev_size 0 --checkpoint_strategy no --report_to none --logging_steps 0 "
        )
        if self.kind == "preference":
            words += "--pref_loss sigmoid "
        return shlex.split(words + self.flags)


def synchronise():
    """Wait for the GPU."""
    if CUDA:
        torch.cuda.synchronize()


def start_clean():
    """Free what earlier trainings left, and count the peak anew; return the GiB left over."""
    gc.collect()
    if not CUDA:
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


# ---------------------------------------------------------------- what is watched


class Watch(TrainerCallback):
    """Times the second epoch of a run, of `epoch_steps` steps, and profiles the step after it.

    Of a whole epoch, since both sides draw their rows in an order of their own. The GPU is waited
    for at both ends alone: a wait in each step would hide what stops the queue.
    """

    def __init__(self, epoch_steps):
        self.epoch_steps = epoch_steps
        self.times = []
        self.peak = None
        self.profiler = None

    def on_step_end(self, args, state, control, **kwargs):
        last = 2 * self.epoch_steps  # that is timed
        if state.global_step in (self.epoch_steps, last):
            synchronise()
            self.times.append(time.perf_counter())
        if state.global_step == last:
            self.peak = peak_gib()
            self.profiler = start_profiler()
        elif state.global_step == last + 1:
            synchronise()
            self.profiler.__exit__(None, None, None)

    @property
    def ends(self):  # as benchmarks/sft.py's timer has it
        return self.times

    def figures(self):
        """Return seconds a step, the peak in GiB, and what the profiler saw of one step."""
        seconds = (self.times[1] - self.times[0]) / self.epoch_steps
        found = {"seconds_per_step": seconds, "peak_gib": self.peak}
        return found | profile_of(self.profiler)


def start_profiler():
    """Return a profiler that has begun: of the GPU alone where there is one, for it slows less."""
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU
    return profile(activities=[activity]).__enter__()


def profile_of(profiler):
    """Return how often a step stopped the queue, and its three largest kernels by their time.

    On a CPU operations stand for kernels, those within others counted twice.
    """
    stops = Counter()
    seconds = Counter()
    calls = Counter()
    # not key_averages(), which takes 0.2 ms an event: minutes for a step of 28 layers in 8 pieces
    for event in profiler.profiler.kineto_results.events():
        name = event.name()
        is_kernel = event.device_type() == torch.autograd.DeviceType.CUDA
        if name in STOPS:
            stops[name] += 1
        if is_kernel == CUDA and not event.is_user_annotation():
            seconds[name] += event.duration_ns() / 1e9
            calls[name] += 1
    total = seconds.total()
    largest = []
    for name, took in seconds.most_common(3):
        largest.append({"kernel": name[:80], "share": took / total, "calls": calls[name]})
    return {
        "queue_stops": stops.total(),
        "stops": stops,
        "kernel_seconds": total,
        "largest_kernels": largest,
    }


# ---------------------------------------------------------------- ours


def prepare(job, folder, flags=""):
    """Return the run that our script makes of a job, and the flags; `flags`: more of them.

    Raises RuntimeError for a base that was not quantised as asked, which the script notes.
    """
    argv = [*job.command_line(folder), *flags.split()]
    prepared = SCRIPTS[job.kind].prepare(argv)
    is_quantised = prepared.record["settled"]["bits"] is not None
    if is_quantised != any(word.startswith("--load_in_") for word in argv):
        raise RuntimeError("the base is not quantised as asked: is bitsandbytes made for this GPU?")
    return prepared, argv


def work_of(trainer, rows):
    """Return the tokens, squared lengths and supervised tokens of a mean step of `rows`."""
    data = trainer.train_dataset
    step = trainer.data_collator([data[i] for i in range(len(data))])
    lengths = trainer.lengths_of(step)
    supervised = 0
    for sample in data:
        if isinstance(sample, dict):  # an embedder's row has no answer
            supervised += sum(
                int(side["supervised"].sum()) for side in sample.get("sides", [sample])
            )
    sums = {
        "tokens": sum(lengths),
        "squared_lengths": sum(length**2 for length in lengths),
        "supervised": supervised,
    }
    return {name: value * rows / len(data) for name, value in sums.items()}


def train_ours(job, folder):
    """Train with our script, rehearsal and proof included; return the figures."""
    left_over = start_clean()
    script = SCRIPTS[job.kind]
    prepared, argv = prepare(job, folder)
    trainer = prepared.trainer
    watch = Watch(job.epoch_steps)
    trainer.add_callback(watch)
    work = work_of(trainer, job.step_rows)
    try:
        report = script.train_and_prove(prepared)
    finally:
        shutil.rmtree(f"{folder}/ours", ignore_errors=True)
    return {
        "flags": shlex.join(argv).replace(str(folder), "TMP"),
        **watch.figures(),
        "precision": trainer.accelerator.mixed_precision,
        **trainer.settled(),
        "work": work,
        "last_loss": report["last_loss"],
        "proof": report["proof"]["relative_error"],
        "left_over_gib": left_over,
    }


# ---------------------------------------------------------------- theirs


def their_arguments(job, folder):
    """Return the arguments of a Trainer's child that are those of our side."""
    precision, _ = choose_precision(None)
    return {
        "output_dir": f"{folder}/theirs",
        "max_steps": job.total_steps,
        "learning_rate": 2e-4,
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": not CUDA,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def train_trl(job, folder):
    """Train with TRL's SFTTrainer; return the figures."""
    if importlib.util.find_spec("trl") is None:
        return {"missing": "trl is not installed"}
    from trl import SFTConfig, SFTTrainer

    left_over = start_clean()
    settings = SFTConfig(
        **their_arguments(job, folder),
        per_device_train_batch_size=job.batch,
        gradient_accumulation_steps=job.accumulation,
        max_length=job.length,
        gradient_checkpointing=True,  # TRL's default
        completion_only_loss=True,
    )
    watch = Watch(job.epoch_steps)
    data = sft.their_data(job.rows_file)
    dtype = DTYPES[choose_precision(None)[0]]
    sft.their_training(SFTTrainer, job.model(folder), settings, data, watch, dtype)
    return watch.figures() | {"left_over_gib": left_over}


def train_sentence_transformers(job, folder):
    """Train with SentenceTransformerTrainer, the whole step in memory; return the figures."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return {"missing": "sentence-transformers is not installed"}
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    left_over = start_clean()
    dtype = DTYPES[choose_precision(None)[0]]
    model = embed.their_model(job.model(folder), job.length, False, DEVICE, dtype)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # as ours: an update in bf16 would be rounded away
    settings = SentenceTransformerTrainingArguments(
        **their_arguments(job, folder),
        per_device_train_batch_size=job.step_rows,
        dataloader_drop_last=True,
    )
    watch = Watch(job.epoch_steps)
    SentenceTransformerTrainer(
        model,
        settings,
        train_dataset=embed.their_data(job.rows_file),
        loss=embed.their_loss("plain", model),
        callbacks=[watch],
    ).train()
    return watch.figures() | {"left_over_gib": left_over}


def train_theirs(job, folder):
    """Train with the library that ours is compared with; return the figures."""
    train = train_sentence_transformers if job.kind == "embed" else train_trl
    try:
        return train(job, folder)
    finally:
        shutil.rmtree(f"{folder}/theirs", ignore_errors=True)

"""A run from its rehearsal to its proof: what both mains go through line by line.

The only room that knows merge.py: by its fingerprint a base is known again, and what it could not
merge is said before training.
"""

import importlib.util
import math
import os
import shlex
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import merge
import utils
from parts.adapters import add_adapter, make_trainable
from parts.base import Origin, base_folder
from parts.callbacks import RunCallback, caught_signals, last_warnings, worsenings
from parts.checkpoints import (
    begin_output_dir,
    best_checkpoint,
    describe,
    open_output_dir,
    refuse_changes,
)
from parts.memory import memory_errors_as_ours
from parts.plan import Plan
from parts.step import StepTrainer
from parts.token_cache import trim_token_cache
from utils import InputError, Stopped, note, read_json, say

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass
class Prepared:
    """A run before its first step, as prepare(argv) of both scripts returns it."""

    trainer: StepTrainer
    plan: Plan
    origin: Origin
    auto_class: type  # that loads the base
    output_dir: Path  # the same for all processes
    record: dict  # what final/training_config.json will hold
    checkpoint: Path | None  # to resume from
    row_tokens: list  # tokens of each training row
    inputs: Callable  # inputs(tokenizer): token ids of a few texts, to compare models by
    outputs: Callable  # outputs(token ids): what the trainer's model makes of them, (N, D)
    write_files: Callable  # write_files(folder) adds the script's own files to final/
    seed: int
    dry_run: bool
    overwrite: bool
    merges: bool  # --merge_adapter


def start(output_dir, resume, overwrite, seed):
    """Begin a run in this process: (accelerate's state, the folder of all, checkpoint or None).

    resume, overwrite: as the flags have them.
    """
    state = utils.start_process()
    if state.is_local_main_process:  # one a machine, whose disk it is
        trim_token_cache()
    folder = Path(utils.agreed(output_dir))  # the default has the time in it
    # before the data are read: a folder that is refused costs no minutes
    checkpoint = open_output_dir(folder, resume, overwrite, state)
    set_seed(seed)  # of the weights of adapters, and of dropout
    return state, folder, checkpoint


# ---------------------------------------------------------------- merge.py


@contextmanager
def merge_errors_as_ours():
    """Raise merge.py's errors as ours: a file that can be copied away has a class of its own."""
    try:
        yield
    except merge.InputError as error:
        raise InputError(str(error)) from None


def base_fingerprint(origin):
    """Return the hash by which merge.py knows the base's weights again; None without safetensors.

    The base's files are here once it was loaded.
    """
    with merge_errors_as_ours():
        return merge.fingerprint(base_folder(origin))


def is_same_base(origin, recorded):
    """Tell whether `recorded` can be the fingerprint of the base, as an earlier run took it."""
    with merge_errors_as_ours():
        return merge.is_base(base_folder(origin), recorded)


def check_base_of_adapter(origin):
    """Raise InputError if --init_adapter was trained on other weights than this base's."""
    if not origin.adapter:
        return
    # adapters of other trainers have no such file: any base may be theirs
    trained = read_json(Path(origin.adapter) / "training_config.json") or {}
    if not is_same_base(origin, trained.get("base_fingerprint")):
        name = utils.recorded_flags(trained).get("model_name")
        raise InputError(
            f"{origin.name} is not the base that --init_adapter {origin.adapter} was trained on: "
            f"its weights are not those of {name}. Pass that one as --model_name; if it is the "
            "same model in other files, delete base_fingerprint from "
            f"{origin.adapter}/training_config.json."
        )


def check_base_of_checkpoint(origin, checkpoint, stored):
    """Raise InputError if the run that is resumed has trained on other weights than this base's."""
    if not is_same_base(origin, stored.get("base_fingerprint")):
        raise InputError(
            f"cannot resume {checkpoint}: the weights of {origin.name} are not those that it was "
            "trained with. Put those back (of a hub model: --model_revision), or start anew."
        )


def record_of(origin, checkpoint, asked, defaults, settled, precision, data_fingerprint):
    """Return what makes a run repeatable, for training_config.json.

    asked: {flag: value} as parsed, defaults: where none is given, settled: what it became. Raises
    InputError if the run of `checkpoint` had others, or other data, precision, processes or base.
    """
    record = describe(
        asked,
        settled,
        precision=precision,
        data_fingerprint=data_fingerprint,
        base_fingerprint=base_fingerprint(origin),
        processes=PartialState().num_processes,
    )
    stored = checkpoint and utils.checked_json(checkpoint.parent / "training_config.json")
    if stored:
        refuse_changes(checkpoint, stored, record, defaults)
        check_base_of_checkpoint(origin, checkpoint, stored)
    return record


def check_mergeable(model, origin, merges):
    """Say before training what merge.py could not merge: an InputError if the run ends in that."""
    if not isinstance(model, PeftModel):
        return
    shapes = {}
    # save_embedding_layers: peft would ask the hub whether the base's vocabulary has grown
    for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        shapes[name] = tensor.to("meta")  # their shapes are enough
    config = model.peft_config["default"].to_dict()
    with merge_errors_as_ours():
        obstacle = merge.unmergeable(config, shapes, base_folder(origin))
    if obstacle and merges:
        raise InputError(
            f"--merge_adapter: merge.py could not merge this adapter ({obstacle}). Drop the flag, "
            "or mend what it names."
        )
    if obstacle:
        note(f"merge.py could not merge this adapter: {obstacle}")


def merge_or_tell(prepared):
    """Merge what was trained into OUTPUT_DIR/merged if that was asked for, else say how."""
    trainer = prepared.trainer
    has_adapter = isinstance(trainer.model, PeftModel)  # full fine-tuning leaves a whole model
    if not has_adapter or not trainer.is_world_process_zero():
        return
    folder = prepared.output_dir
    command = ["--lora_adapter_path", f"{folder}/final", "--output_path", f"{folder}/merged"]
    if prepared.origin.trust_remote_code:
        command.append("--trust_remote_code")
    if not prepared.merges:
        say(f"next      python merge.py {shlex.join(command)}")
        return
    utils.leave_process_group()  # the others end, and need not wait for a merge of minutes
    with merge_errors_as_ours():
        merge.main(command)


def wrapped(model, origin, lora, unused, *, full, merges):
    """Return (the base with the adapter to train, the adapter's dropout).

    unused: layers that get none; full: all weights are trained, without an adapter. Raises
    InputError for an adapter of another base, and if `merges` for one that merge.py cannot merge.
    """
    check_base_of_adapter(origin)  # first: of another base's adapter all shapes may fit
    model, dropout = add_adapter(model, origin, lora, unused, full=full)
    check_mergeable(model, origin, merges)
    make_trainable(model, unused)
    return model, dropout


# ---------------------------------------------------------------- Trainer's arguments


def logger_of(report_to):
    """Return the name of the logger as a list for Trainer; raises InputError if it is missing."""
    if report_to is None:
        report_to = "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    if report_to == "none":
        return []
    if importlib.util.find_spec(report_to) is None:
        raise InputError(
            f"--report_to {report_to}: it is not installed. Run: pip install {report_to}"
        )
    return [report_to]


def optimizer_of(name, precision):
    """Return Trainer's name of --optimizer; fused, AdamW hides steps that a loss scaler skips."""
    adamw = "adamw_torch" if precision == "fp16" else "adamw_torch_fused"
    return {"adamw": adamw, "adamw_8bit": "adamw_bnb_8bit", "sgd": "sgd"}[name]


def training_arguments(plan, precision, *, seed, workers, report_to, full_determinism):
    """Translate a plan into Trainer's arguments; a batch of Trainer's is a whole step of ours."""
    arguments = TrainingArguments(
        output_dir=os.curdir,  # `begin` names the run's: Trainer makes it as soon as it is built
        per_device_train_batch_size=plan.step_rows,  # StepTrainer cuts it to what fits
        max_steps=plan.total_steps,
        learning_rate=plan.lr,
        lr_scheduler_type=SCHEDULERS[plan.lr_scheduler],
        warmup_steps=plan.warmup_steps,
        optim=optimizer_of(plan.optimizer, precision),
        weight_decay=plan.weight_decay,
        max_grad_norm=plan.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=PartialState().device.type == "cpu",
        seed=seed,
        full_determinism=full_determinism,
        dataloader_drop_last=plan.drop_last,
        dataloader_num_workers=workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps" if plan.has_dev else "no",
        eval_steps=plan.eval_steps,
        save_strategy="steps" if plan.saves else "no",
        save_steps=plan.save_steps,
        save_total_limit=plan.save_total_limit,
        load_best_model_at_end=plan.save_best,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on
        metric_for_best_model=f"eval_{plan.metric}" if plan.save_best else None,
        greater_is_better=plan.greater_is_better,
        logging_strategy="steps" if plan.logging_steps else "no",
        logging_steps=abs(plan.logging_steps) or 1,  # -1: every step; 0: off, by the line above
        logging_nan_inf_filter=False,  # it shows a NaN run as loss 0
        report_to=logger_of(report_to),
        disable_tqdm=True,  # the bar is RunCallback's; a notebook would get another table beside it
        remove_unused_columns=False,  # rows are ours, no table whose columns forward() names
        ddp_find_unused_parameters=False,  # layers that get no gradient have none, or are frozen
        ddp_broadcast_buffers=False,  # none of them changes
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never nn.DataParallel
    return arguments


# ---------------------------------------------------------------- training


def finished_report(prepared):
    """Return the report of a run that is resumed although it is finished, else None."""
    if not prepared.checkpoint:
        return None
    # written once final/ is proved: without it, all behind the last checkpoint is done again
    report = read_json(prepared.output_dir / "training_summary_report.json")
    if report:
        say(f"resume    {prepared.output_dir} is finished: final/ and the report are there")
        is_merged = (prepared.output_dir / "merged").exists()
        if prepared.merges and not prepared.dry_run and not is_merged:  # asked for only now
            merge_or_tell(prepared)
    return report


def dry_report(prepared):
    """Return what is known before training, for --dry_run."""
    return prepared.record | {"plan": asdict(prepared.plan) | {"notes": list(utils.NOTES)}}


def begin(prepared):
    """Write training_config.json, and do what needs the model as it is before the first step.

    Until here nothing is written: a run that is dry, or refused, leaves no folder behind.
    """
    prepared.trainer.args.output_dir = str(prepared.output_dir)
    if prepared.trainer.is_world_process_zero():
        begin_output_dir(prepared.output_dir, prepared.overwrite, prepared.record)
    prepared.trainer.before_training()


def train(prepared):
    """Train; return (metrics before, metrics of what final/ will hold, warnings in words).

    Raises Stopped if a signal came.
    """
    trainer, plan, checkpoint = prepared.trainer, prepared.plan, prepared.checkpoint
    # Trainer would read it, too, but only after the untrained model was measured once more
    stored = read_json(checkpoint / "trainer_state.json") if checkpoint else None
    before = metrics_before(trainer, plan, stored)
    callback = RunCallback(trainer, plan, prepared.output_dir, before)
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm leaves
    trainer.add_callback(callback)
    if plan.patience:
        trainer.add_callback(EarlyStoppingCallback(plan.patience))
    if stored and is_finished(stored, plan):  # killed between its last checkpoint and final/
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(best_checkpoint(checkpoint, stored)))
    else:
        fit(trainer, callback, checkpoint)
    step = trainer.state.global_step
    if callback.signal and step < plan.total_steps:
        # not after the last step, behind which a run is saved, proved and reported alone
        how = "and --resume_from_checkpoint"
        if prepared.overwrite:  # the two exclude one another
            how += " in place of --overwrite"
        raise Stopped(
            f"stopped after step {step} in {prepared.output_dir}. Go on with the same command "
            f"{how}",
            callback.signal,
        )
    after = metrics_after(trainer.state, plan)
    last = last_warnings(trainer, plan, before, after)
    for text in last:
        say(f"warning   {text}")
    return before, after, worsenings(trainer.state.log_history, plan.watched) + last


def metrics_before(trainer, plan, stored):
    """Measure the untrained model, or take what a resumed run's `stored` state says of it."""
    if stored:  # RunCallback begins the log with them
        first = next(iter(stored["log_history"]), {})
        return dev_metrics(first)
    return trainer.measure_dev_sets() if plan.has_dev else {}


def dev_metrics(entry):
    """Return the metrics of dev sets in an entry of the log."""
    return {name: value for name, value in entry.items() if name.startswith("eval_")}


def is_finished(stored, plan):
    """Tell whether a trainer_state.json is that of a run's last step, early stopping included."""
    # a patience that has run out: the run is over, and must not train on as it is resumed
    stopping = stored["stateful_callbacks"].get("EarlyStoppingCallback", {})
    waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return stored["global_step"] >= plan.total_steps or waited >= (plan.patience or math.inf)


def fit(trainer, callback, checkpoint):
    """Run Trainer's loop; SIGINT and SIGTERM end it after the step under way, with a checkpoint."""
    try:
        with caught_signals(callback.catch), memory_errors_as_ours():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        if callback.training_bar:  # left open by an error, which would stand in its line
            callback.training_bar.close()


def metrics_after(state, plan):
    """Return the metrics of the state that final/ will hold: the best, else the last."""
    step = state.best_global_step if plan.save_best else state.global_step
    after = {}
    for entry in state.log_history:
        if f"eval_{plan.metric}" in entry and entry["step"] == step:
            after = dev_metrics(entry)  # of several the last, should a step be measured twice
    return after


def resumed_after(checkpoint):
    """Return after which step a run goes on: 0 without a checkpoint."""
    return read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0

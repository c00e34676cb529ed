"""The folder of a run: what it must hold to go on, whether it may be written, what made the run."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

from parts.machines import refuse_unshared
from utils import InputError, note, read_json, recorded_flags, say, write_json

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open

# may differ between a run and its continuation without changing the weights
FREE_ON_RESUME = {
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "num_workers",
    "grow_pieces",
    "gradient_checkpointing",
    "piece_tokens",
    "halvings",
    "shares_prompts",
    "zero_stage",
    "report_to",
    "save_total_limit",
    "dry_run",
    "merge_adapter",
}
# where a checkpoint's trainer_state.json holds how steps are cut, beside the callbacks' states
CUT = "StepTrainer"
COMPARED = ("data_fingerprint", "precision", "processes")  # on resuming, beside the flags
VERSIONS = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def is_whole(file):
    """Tell whether a file of a checkpoint is there and not cut off."""
    if not file.is_file():
        return False
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)  # torch.save writes an archive whose index is at its end
    try:
        with safe_open(file, framework="numpy") as weights:  # compares the header with the size
            return bool(weights.keys())
    except SafetensorError:
        return False


def weights_lacking(folder):
    """Return the weights files that a checkpoint lacks, of all shards that its index names."""
    is_adapter = (folder / "adapter_config.json").is_file()
    name = "adapter_model.safetensors" if is_adapter else "model.safetensors"
    names = [name]
    index_name = f"{name}.index.json"
    if (folder / index_name).exists():
        shards = json_object(folder / index_name).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, dict) else [index_name]
    return [name for name in names if not is_whole(folder / name)]


def json_object(path):
    """Return the object that a file holds, {} where it holds none."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def parts_lacking(checkpoint):
    """Return the files that a run needs to go on from a checkpoint as if it had not stopped."""
    record = json_object(checkpoint.parent / "training_config.json")
    state = read_json(checkpoint / "trainer_state.json")
    needed = ["optimizer.pt", "scheduler.pt"]
    if record.get("precision") == "fp16":
        needed.append("scaler.pt")
    processes = record.get("processes", PartialState().num_processes)
    if processes > 1:
        needed += [f"rng_state_{rank}.pth" for rank in range(processes)]
    else:
        needed.append("rng_state.pth")
    lacking = [name for name in needed if not is_whole(checkpoint / name)]
    lacking += weights_lacking(checkpoint)
    if not isinstance(state, dict) or "global_step" not in state:  # Trainer writes it last
        return ["trainer_state.json", *lacking]
    best = best_checkpoint(checkpoint, state)
    if best != checkpoint:  # of the best state only the weights are needed, for final/
        lacking += [f"{best.name}/{name}" for name in weights_lacking(best)]
    return lacking


def best_checkpoint(checkpoint, state):
    """Return the checkpoint that was the best one when `checkpoint` was written.

    It is looked for beside this one: the run's folder may have moved since.
    """
    step = state.get("best_global_step")
    if step and state.get("best_model_checkpoint"):
        return checkpoint.with_name(f"checkpoint-{step}")
    return checkpoint


def find_checkpoint(output_dir):
    """Return the newest complete checkpoint or None; says what newer ones lack."""
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            steps[path] = int(number)
    for path in sorted(steps, key=steps.get, reverse=True):
        lacking = parts_lacking(path)
        if not lacking:
            return path
        say(f"resume    {path} is not complete: it lacks {', '.join(lacking)}")
    return None


def check_writable(folder):
    """Raise InputError if `folder` cannot be made, or written to; nothing is written here."""
    try:
        # about the longest name of a run's files
        os.stat(folder / "checkpoint-1000000" / "adapter_model.safetensors")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError as error:
        raise InputError(
            f"--output_dir {folder} may not be written to ({error.strerror}). Name another."
        ) from None
    except OSError as error:  # a name that is too long, links in a circle
        raise InputError(
            f"--output_dir {str(folder)[:99]} cannot be a folder ({error.strerror})."
        ) from None
    absolute = folder.absolute()
    there = next(path for path in (absolute, *absolute.parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--output_dir {folder}: {there.name} is a file. Name a folder.")
    # /proc passes os.access, and refuses all the same
    if not os.access(there, os.W_OK | os.X_OK) or there.is_relative_to("/proc"):
        raise InputError(f"--output_dir {folder}: {there} may not be written to. Name another.")


def holds_files(folder):
    """Tell whether a folder is there and not empty."""
    return folder.is_dir() and any(folder.iterdir())


def open_output_dir(folder, resume, overwrite, state):
    """Return the checkpoint to resume from, or None; raises InputError rather than mix two runs.

    resume: "last", the folder of a checkpoint, or None; state: accelerate's. Nothing of the run is
    written yet.
    """
    folder = Path(folder)
    check_writable(folder)
    refuse_unshared(folder, state)
    if resume:
        return checkpoint_to_resume(folder, resume)
    if not overwrite and holds_files(folder):
        raise InputError(
            f"--output_dir {folder} is not empty. Pass another, --overwrite or "
            "--resume_from_checkpoint."
        )
    return None


def checkpoint_to_resume(folder, resume):
    """Return the checkpoint that --resume_from_checkpoint means, None where "last" finds none."""
    if resume == "last":
        checkpoint = find_checkpoint(folder)
        if checkpoint is None:
            say(f"resume    {folder} holds no complete checkpoint: starting at step 0")
            return None
    else:
        checkpoint = Path(resume)
        check_named_checkpoint(checkpoint)
    is_own = checkpoint.resolve().parent == folder.resolve()
    if not is_own and holds_files(folder):
        raise InputError(
            f"--resume_from_checkpoint {checkpoint} is of another run than what --output_dir "
            f"{folder} holds. Name a new folder, or give --resume_from_checkpoint no name to go "
            "on with that."
        )
    say(f"resume    from {checkpoint}")
    return checkpoint


def stored_cut(checkpoint):
    """Return how steps were cut when a checkpoint was written, None where nothing says so."""
    if not checkpoint:
        return None
    state = json_object(checkpoint / "trainer_state.json")
    return state.get("stateful_callbacks", {}).get(CUT)


def check_named_checkpoint(checkpoint):
    """Raise InputError if a checkpoint that the user named is not there, or lacks a file."""
    named = f"--resume_from_checkpoint {checkpoint} is no complete checkpoint"
    otherwise = "Give no name, and the newest complete one is taken."
    if not checkpoint.is_dir():
        where = f"there is no such folder (looked in {Path.cwd()})"
        raise InputError(f"{named}: {where}. {otherwise}")
    lacking = parts_lacking(checkpoint)
    if lacking:
        raise InputError(f"{named}: it lacks {', '.join(lacking)}. {otherwise}")


def begin_output_dir(folder, overwrite, record):
    """Write training_config.json, with `overwrite` after the old run's files are deleted.

    It is called once nothing can be refused any more: until then the old run stays.
    """
    folder = Path(folder)
    if overwrite and (folder / "training_config.json").exists():
        delete_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "training_config.json", record)


def delete_run(folder):
    """Delete what a run writes, and nothing else that a user keeps in the folder."""
    folders = [*folder.glob("checkpoint-*"), folder / "final", folder / "merged", folder / "runs"]
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
    names = ("training_*", "predictions-*", "mined_negatives-*")
    files = [path for name in names for path in folder.glob(name)]
    for path in [*files, folder / "detailed_training_logs.json", folder / "report.html"]:
        path.unlink(missing_ok=True)


def describe(asked, settled, precision, *, data_fingerprint, base_fingerprint, processes):
    """Return what makes a run repeatable, as training_config.json holds it.

    asked: {flag: value} as parsed, defaults filled in; settled: {flag: value} of those that the
    base, the rows or the process decided, in values that JSON keeps (lists, no tuples).
    """
    # readers take a base for not quantised where nothing says how many bits
    asked = {name: value for name, value in asked.items() if (name, value) != ("bits", None)}
    versions = {"python": sys.version.split()[0]}
    for name in VERSIONS:
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    device = f"CPU, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {
        "flags": asked,
        "settled": settled,
        "versions": versions,
        "precision": precision,
        "processes": processes,
        "device": device,
        "data_fingerprint": data_fingerprint,
        "base_fingerprint": base_fingerprint,
    }


def refuse_changes(checkpoint, stored, record, defaults):
    """Raise InputError if a run is resumed with other flags, data, precision or processes.

    stored: the training_config.json beside the checkpoint; record: what `describe` says of this
    run; defaults: {flag: value}. A flag's value is the settled one where there is one: a
    --max_length that the base lowers and one that names the same limit are the same run.
    """
    old = recorded_flags(stored)
    new = recorded_flags(record)
    for name in record["flags"].keys() - old.keys():
        # the flag came later, and that run did what is its default. It has written down no settled
        # value to compare with
        old[name] = defaults.get(name)
        new[name] = record["flags"][name]
    new = {name: value for name, value in new.items() if name in old}
    for name in COMPARED:
        old[name] = stored.get(name)
        new[name] = record[name]
    if kind_of(old["data_fingerprint"]) != kind_of(new["data_fingerprint"]):
        note("this run was begun by an older version: whether its data are these cannot be told")
        del old["data_fingerprint"], new["data_fingerprint"]
    changed = []
    for name in sorted((old.keys() | new.keys()) - FREE_ON_RESUME):
        before = old.get(name)
        now = new.get(name)
        if before != now:
            changed.append(f"{name} was {before} and is {now}")
    if changed:
        raise InputError(
            f"cannot resume {checkpoint}: {', '.join(changed)}. Give the flags of that run."
        )


def kind_of(fingerprint):
    """Return how a fingerprint of data was taken, which stands before its colon, if it has one."""
    return (fingerprint or "").rpartition(":")[0]

"""What both trainers would be wrong to disagree on: flags, rows, the base model, the exact step, the files of a run.

Shapes: B sequences, T tokens.
"""

# ruff: noqa: E402  two libraries are quieted before they are imported
import argparse
import csv
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import linecache
import logging
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import Counter, defaultdict
from contextlib import nullcontext, suppress
from datetime import datetime
from errno import EDQUOT, EFBIG, ENOSPC
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names an optional CPU kernel at every import
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate|peft")

import merge
from merge import InputError

import datasets
import numpy as np
import tokenizers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import get_dataset_split_names, load_dataset
from datasets.exceptions import DatasetsError
from datasets.fingerprint import Hasher
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, NoMatchingPeftModuleError, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PreTrainedConfig,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, is_in_notebook
from transformers.utils import logging as transformers_logging

TOKEN_CACHE_BYTES = 10 * 2**30
PIECE_TOKENS = {"cpu": 448, "cuda": 32768}  # padded tokens of one forward pass at which a device is fastest
MAX_SKIPPED_STEPS = 20  # fp16: the loss scale falls from 65536 to below 1 in 17 skipped steps
# may differ between a run and its continuation without changing the weights
FREE_ON_RESUME = {"output_dir", "overwrite", "resume_from_checkpoint", "num_workers", "report_to", "save_total_limit",
                  "dry_run", "merge_adapter"}


def say(*parts):
    """Print on the first process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*parts, flush=True)


NOTES = []  # of the run that this process is in


def note(text):
    """Tell the user what is worth knowing, where it is found; the report lists it again."""
    NOTES.append(text)
    say(f"note      {text}")


checked_json = merge.read_json


def recorded_flags(run):
    """Return {name: value} of the flags in a training_config.json, as they were settled in the run."""
    return run.get("flags", {}) | run.get("settled", {})


def reason(error):
    """Return the first line of a library's error message."""
    return str(error).strip().split("\n")[0]


# ---------------------------------------------------------------- arguments


def bounded(kind, low, high=math.inf, without=()):
    """Argparse type: a number of `kind` (int or float) from `low` to `high`, the ends in `without` excluded."""
    excluded = {math.inf, *without}

    def number(text):
        value = kind(text)
        if not low <= value <= high or value in excluded:
            ends = "(" if low in excluded else "[", ")" if high in excluded else "]"
            raise argparse.ArgumentTypeError(f"{text} is outside {ends[0]}{low}, {high}{ends[1]}")
        return value

    number.__name__ = kind.__name__
    return number


integer, real = partial(bounded, int), partial(bounded, float)


def one_of(*names):
    """Keyword arguments of a flag that takes one of `names`, typed in any case: Bf16, AdamW, None."""
    return {"type": str.lower, "choices": list(names)}


def add_switch(add, name, flag, value, meaning):
    """Declare a switch of other trainers that sets `flag` to `value`."""
    add(name, dest=flag, action="store_const", const=value, default=argparse.SUPPRESS, help=f"the same as {meaning}")


def add_input_flags(parser, model, dev_size):
    """Declare what both trainers read: base model, data, adapters; `model` and `dev_size`, in words, are defaults."""
    add = parser.add_argument_group("model").add_argument
    add("--model_name", "--model_name_or_path", metavar="ID", help=f"hub id or local folder [{model}]")
    add("--model_revision", metavar="REV", help="branch, tag or commit of a hub model [main]")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the base model")
    add("--attn_implementation", default="auto", **one_of("auto", "eager", "sdpa", "flash_attention_2"),
        help="how attention is computed [auto: as the model prefers]")
    add_switch(add, "--flash_attention_v2", "attn_implementation", "flash_attention_2",
               "--attn_implementation flash_attention_2")
    add("--finetune_type", "--training_type", default="lora", **one_of("lora", "qlora", "full"),
        help="train adapters, adapters on a quantised base (qlora), or all weights (full) [lora]")
    add("--load_in_8bit", action="store_true", help="quantise the base to 8 bits (bitsandbytes)")
    add("--load_in_4bit", action="store_true", help="quantise the base to 4 bits (bitsandbytes NF4)")
    add("--quantization_bits", "--quantization_bit", type=int, choices=[4, 8],
        help="the same as a number [qlora alone means 4]")
    add("--init_adapter", metavar="DIR", help="go on training an adapter, with a fresh optimizer and its own rank")

    add = parser.add_argument_group("data").add_argument
    add("--train_file", "--train_dataset", nargs="+", metavar="FILE", help=".jsonl .json .csv .tsv .parquet, or globs")
    add("--dev_file", action="append", metavar="[NAME=]PATH", help="evaluation set, repeatable [held out of train]")
    add("--dataset_name", metavar="ID", help="data set on the hub, or a local folder of one")
    add("--dataset_subset", metavar="NAME", help="configuration of that data set")
    add("--dataset_split", default="train", metavar="NAME", help="split to train on [train]")
    add("--dataset_dev_split", metavar="NAME", help="split to evaluate on; if it is missing, rows are held out")
    add("--hf_revision", metavar="REV", help="branch, tag or commit of a hub data set")
    add("--train_sample_limit", type=integer(1), metavar="N", help="train on N rows, drawn with --seed [all]")
    add("--dev_sample_limit", type=integer(1), metavar="N", help="evaluate on (or hold out) N rows [all, --dev_size]")
    add("--dev_size", type=real(0, 1, {1}), metavar="X", help=f"else this share [{dev_size}]")
    add("--num_workers", type=integer(0), default=0, metavar="N", help="extra processes that tokenise and load [0]")

    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_r", "--lora_rank", type=integer(1), metavar="N", help="rank [16]")
    add("--lora_alpha", type=integer(1), metavar="N", help="scale is alpha/r: larger is stronger [32]")
    add("--lora_dropout", type=real(0, 1, {1}), metavar="P", help="dropout on the adapters' inputs [0]")
    add("--target_modules", metavar="NAMES", help="comma-separated names of linear layers [all-linear]")
    add("--use_rslora", action="store_true", help="scale is alpha/sqrt(r) instead")
    add("--model_dropout", action="store_true", help="keep the base's own dropout on; steps are then not exact")
    add("--merge_adapter", action="store_true", help="run merge.py at the end, into OUTPUT_DIR/merged")


def add_training_flags(parser, batch, step, epochs, checkpointing, metric):
    """Declare how both trainers train, evaluate and save; the arguments are the defaults in which they differ."""
    add = parser.add_argument_group("training").add_argument
    add("--batch_size", "--per_device_train_batch_size", type=integer(1), default=batch, metavar="N",
        help=f"examples in memory, per process [{batch}]")
    add("--gradient_accumulation", "--gradient_accumulation_steps", type=integer(1), metavar="N",
        help=f"pieces that make one exact step of batch_size x N examples [a step of {step} examples]")
    add("--epochs", "--num_train_epochs", type=real(0, without={0}), default=epochs, metavar="X",
        help=f"passes over the training rows; fractions are fine [{epochs}]")
    add("--max_steps", type=integer(1), metavar="N", help="optimizer steps, in place of --epochs")
    add("--lr", "--learning_rate", type=real(0, 1, {0, 1}), metavar="X", help="peak [2e-4; full fine-tuning 2e-5]")
    add("--lr_scheduler", "--lr_scheduler_type", default="cosine", **one_of("linear", "cosine", "constant"),
        help="after the warm-up [cosine]")
    add("--warmup_steps", "--lr_warmup_steps", type=integer(0), metavar="N",
        help="steps of linear warm-up; beats --warmup_ratio")
    add("--warmup_ratio", "--warmup_proportion", "--lr_warmup_ratio", type=real(0, 1, {1}), default=0.05,
        metavar="X", help="share of the steps that warm up [0.05]")
    add("--optimizer", "--optim", default="adamw", **one_of("adamw", "adamw_8bit", "sgd"), help="optimizer [adamw]")
    add("--weight_decay", type=real(0), default=0.01, metavar="X", help="decoupled weight decay [0.01]")
    add("--max_grad_norm", type=real(0), default=1.0, metavar="X", help="clip the gradient's norm; 0 = off [1.0]")
    add("--fp16", action="store_true", help="float16 with loss scaling")
    add("--bf16", action="store_true", help="bfloat16, on GPUs of compute capability 8.0 and newer")
    add("--mixed_precision", **one_of("bf16", "fp16", "none"), help="the same as a name [what the GPU is made for]")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=checkpointing,
        help=f"recompute activations to save memory [{'on' if checkpointing else 'off'}]")
    add_switch(add, "--disable_gradient_checkpointing", "gradient_checkpointing", False, "--no-gradient_checkpointing")
    add("--seed", type=integer(0, 2**32 - 1), default=42, metavar="N", help="of rows, adapters and dropout [42]")
    add("--full_determinism", action="store_true", help="bit-for-bit repeatable kernels on a GPU (slower)")
    add("--resume_from_checkpoint", nargs="?", const="last", metavar="DIR", help="go on where --output_dir stopped")

    add = parser.add_argument_group("evaluation and output").add_argument
    add("--output_dir", metavar="DIR", help="where everything goes [runs/<script>-<date-time>]")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --output_dir")
    add("--save_best", type=int, choices=[0, 1], help="final/ is the best state, not the last [1 with a dev set]")
    add("--eval_every", "--eval_steps", type=integer(0), metavar="N", help="steps; 0 = each epoch [a tenth of the run]")
    add("--eval_strategy", **one_of("no", "epoch", "steps"), help="steps without --eval_every: every --logging_steps")
    add("--early_stopping_patience", type=integer(1), metavar="N", help="evaluations without a new best, 3-5 [off]")
    add("--metric_for_best", "--metric_for_best_model", metavar="NAME", help=f"what best means [{metric}]")
    add("--checkpoint_strategy", default="steps", **one_of("no", "epoch", "steps"),
        help="when checkpoints are written; with a dev set they follow the evaluations [steps]")
    add("--save_on_epoch_end", type=integer(0), default=0, metavar="N",
        help="checkpoint every N epochs and keep them all; 0 = off [0]")
    add("--checkpoint_steps", "--save_steps", type=integer(1), metavar="N", help="in steps [a tenth of the run]")
    add("--save_total_limit", type=integer(1), metavar="N", help="checkpoints kept [2; all with --save_on_epoch_end]")
    add("--logging_steps", type=integer(-1), default=10, metavar="N", help="in steps; -1 = every step, 0 = off [10]")
    add("--report_to", "--log_with", **one_of("none", "tensorboard", "mlflow", "wandb"),
        help="logs go to [tensorboard, if installed]")
    add("--dry_run", action="store_true", help="check everything, train nothing")


def finish_flags(parser, args, model, step):
    """Check the flags that depend on one another and fill in the defaults that do; exits 2 through `parser.error`."""
    given_bits = {args.quantization_bits, 8 if args.load_in_8bit else None, 4 if args.load_in_4bit else None} - {None}
    no_eval = args.eval_strategy == "no" or not (
        args.dev_size != 0 or args.dev_sample_limit or args.dev_file or args.dataset_dev_split
    )
    no_save, full = args.checkpoint_strategy == "no", args.finetune_type == "full"
    patience, resume = args.early_stopping_patience, args.resume_from_checkpoint
    for wrong, sentence in (
        (not args.train_file and not args.dataset_name and not getattr(args, "eval_only", False),
         "no training data: pass --train_file or --dataset_name"),
        (args.train_file and args.dataset_name, "--train_file and --dataset_name both name training data: pass one"),
        (args.fp16 + args.bf16 + bool(args.mixed_precision) > 1, "--fp16, --bf16, --mixed_precision: pass one"),
        (len(given_bits) > 1, "8 and 4 bits are both asked for: pass one of the three quantisation flags"),
        (full and (given_bits or args.init_adapter), "--finetune_type full: no quantisation and no --init_adapter"),
        (full and args.merge_adapter, "--finetune_type full trains no adapter: drop --merge_adapter"),
        ((args.save_best or patience) and no_eval, "--save_best and --early_stopping_patience need an evaluation"),
        (no_save and (args.save_best or patience or args.save_on_epoch_end),
         "--save_best, --early_stopping_patience, --save_on_epoch_end need checkpoints: drop --checkpoint_strategy no"),
        (patience and args.save_best == 0, "--early_stopping_patience keeps the best state: drop --save_best 0"),
        (resume and not args.output_dir, "--resume_from_checkpoint needs the run's --output_dir"),
        (resume and args.overwrite, "--overwrite deletes what --resume_from_checkpoint needs"),
    ):
        if wrong:
            parser.error(sentence)
    if (args.target_modules or "all-linear") != "all-linear":
        args.target_modules = sorted(filter(None, map(str.strip, args.target_modules.split(","))))
    try:
        stored = merge.read_json(Path(args.init_adapter) / "adapter_config.json", dict) if args.init_adapter else {}
    except InputError as error:
        parser.error(f"--init_adapter {args.init_adapter}: {error}")
    if stored is None:
        parser.error(f"--init_adapter {args.init_adapter} has no adapter_config.json: name a folder a trainer wrote")
    for flag, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("use_rslora", "use_rslora"),
                      ("target_modules", "target_modules")):
        if key in stored:  # a continued adapter keeps its own
            old = sorted(stored[key]) if isinstance(stored[key], list) else stored[key]
            if getattr(args, flag) not in (None, False, old):
                parser.error(f"--init_adapter was trained with {flag} {old}, not {getattr(args, flag)}: drop the flag")
            setattr(args, flag, old)
    args.bits = given_bits.pop() if given_bits else 4 if args.finetune_type == "qlora" else None
    args.model_name = args.model_name or stored.get("base_model_name_or_path") or model
    if os.path.isdir(args.model_name):  # the adapter stores it, and is loaded from elsewhere
        args.model_name = os.path.abspath(args.model_name)
    args.lora_r, args.lora_alpha = args.lora_r or 16, args.lora_alpha or 32
    args.target_modules = args.target_modules or "all-linear"
    args.lr = args.lr or (2e-5 if full else 2e-4)
    args.gradient_accumulation = args.gradient_accumulation or max(1, step // args.batch_size)
    args.output_dir = args.output_dir or f"runs/{Path(parser.prog).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    return args


# ---------------------------------------------------------------- the process


def run(main, parse_args):
    """Start `main` as a command: several GPUs through torchrun, the user's mistakes in one sentence, exit code 1."""
    if sys.argv[0].endswith("kernel_launcher.py"):  # the file was pasted whole into a notebook cell
        say('Defined. Now call main(["--train_file", "pairs.jsonl"]) with the flags you want.')
        return
    parse_args()  # what is wrong with the flags is said once, not by every process
    gpus = torch.cuda.device_count()
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        command = [sys.executable, *launcher, *sys.argv]
        say(f"{gpus} GPUs are visible: a step has {gpus} times the examples. Restarting as\n  {' '.join(command)}")
        os.execv(sys.executable, command)
    try:
        main()
        leave_process_group()
    except SystemExit:  # all processes stop after the same step
        leave_process_group()
        raise
    except Exception as error:
        text = error if isinstance(error, InputError) else refusal(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def leave_process_group():
    """Leave the process group, if there is one: an interpreter that ends beside gloo's threads may abort.

    https://github.com/pytorch/pytorch/issues/190489
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def shows_bars():
    """Tell whether somebody watches: bars would be glued to the lines of a log file."""
    return int(os.environ.get("RANK", 0)) == 0 and (sys.stderr.isatty() or is_in_notebook())


def quiet_libraries():
    """Leave the terminal to this program: its checks say what matters of what transformers would note."""
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers_logging.set_verbosity_error()
    if not shows_bars():
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()


def refusal(error):
    """Return in a sentence what the system refused (a full disk, a missing permission), or None if it was not that."""
    number = getattr(error, "errno", None)
    text = str(error)  # libraries in Rust have no number
    writing = isinstance(error, SafetensorError) or "PytorchStreamWriter" in text or "(os error " in text
    if writing or number in (ENOSPC, EDQUOT, EFBIG):
        return (f"a file cannot be written: {reason(error)}. Make room; complete checkpoints stay, and the same "
                "command with --resume_from_checkpoint goes on from the last one.")
    return f"a file cannot be read or written: {reason(error)}. Mend that, and start again." if number else None


def start_process(args):
    """Join the process group, if there is one, and return accelerate's state of this process."""
    quiet_libraries()
    state = PartialState(cpu=not torch.cuda.is_available() and not torch.backends.mps.is_available())
    if torch.cuda.device_count() > state.num_processes:
        say("note      several GPUs are visible and this call uses the first: start the script from a shell to use all")
    if state.num_processes > 1:
        args.output_dir = broadcast_object_list([args.output_dir])[0]  # the default has the time in it
    if state.is_local_main_process:
        trim_token_cache()
    return state


def read_json(path):
    """Return the parsed file, or None where there is none or it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a power cut may leave any bytes
        return None


def write_json(path, content):
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


# ---------------------------------------------------------------- data


def read_rows(path):
    """Read one file into [(where, row)], where naming the file and the line; raises InputError on what is no row."""
    path, kind = Path(path), Path(path).suffix.lower()
    repeats = {}
    if kind == ".parquet":
        import pyarrow.parquet

        try:
            refuse_repeats(pyarrow.parquet.read_schema(path).names, path)
            table = pyarrow.parquet.read_table(path).to_pylist()
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(rows_of_table(table), 1)]
        except (pyarrow.ArrowException, OSError, ValueError) as error:  # no parquet, a broken page, no permission
            raise InputError(f"{path} is no parquet file that can be read ({reason(error)}). Write it again.") from None
    elif kind not in {".jsonl", ".ndjson", ".json", ".csv", ".tsv"}:
        raise InputError(f"{path} is none of .jsonl, .json, .csv, .tsv, .parquet. Convert it to JSON Lines.")
    elif kind in {".csv", ".tsv"}:
        (where, names), *lines = read_table(path) or [(path, [])]
        refuse_repeats(names, where)
        for where, cells in lines:
            if len(cells) != len(names):
                raise InputError(f"{where}: not the {len(names)} columns of the first line. Quote the text.")
        rows = [(where, dict(zip(names, cells, strict=True))) for where, cells in lines]
    else:
        text = read_text(path)
        if kind == ".json" and text.lstrip().startswith("["):
            rows = [(f"{path}, row {i}", row) for i, row in enumerate(parse_json(text, path, repeats), 1)]
        else:
            rows = parse_lines(text, path, repeats)
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: a {type(row).__name__}, not a JSON object. Write one {{...}} a row.")
        if id(row) in repeats:
            refuse_repeats(repeats[id(row)][1], where)
    if not rows:
        raise InputError(f"{path} holds no rows. Write one JSON object a line.")
    return rows


def read_text(path):
    """Return the text of a UTF-8 file; raises InputError where it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: Excel starts a CSV with a byte order mark
    except OSError as error:  # a folder, links in a circle, no permission
        raise InputError(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}). {save_as_utf8(path)}") from None


def save_as_utf8(path):
    """Return what to do with a text file that is not UTF-8; Japanese Windows and its Excel write Shift_JIS."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "It is UTF-16: save it as UTF-8."
    try:
        data.decode("cp932")
    except UnicodeDecodeError:
        return "Save it as UTF-8."
    return 'It reads as Shift_JIS: in Excel, save it as "CSV UTF-8"; elsewhere, as UTF-8.'


def read_table(path):
    """Read a .csv or .tsv file into [(where, [cell, ...])], the line of the column names first."""
    text = read_text(path)
    csv.field_size_limit(2**31 - 1)
    header = text.partition("\n")[0]
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    delimiter = next((sign for sign in (usual, ";", "\t", ",") if sign in header), usual)  # Excel may write any of them
    reader, lines, end = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True), [], 0
    try:
        for cells in reader:
            end = reader.line_num
            if cells:
                lines.append((f"{path}, line {end}", cells))
    except csv.Error as error:
        raise InputError(f"{path}, line {end + 1}: {error}. Double the quotes.") from None
    return lines


def refuse_repeats(names, where):
    """Raise InputError for a name that a row or a table has more than once: one of the two would be lost unseen."""
    for name, count in Counter(names).items():
        if count > 1 and name:  # Excel writes empty columns without a name
            raise InputError(f'{where}: {count} columns or keys are called "{name}". Rename or delete all but one.')


def parse_json(text, where, repeats=None):
    """Parse JSON; raises InputError naming `where`. Objects with a key twice: `repeats` gets {id: (object, keys)}."""

    def read_object(pairs):
        row = dict(pairs)
        if len(row) < len(pairs):
            repeats[id(row)] = row, [key for key, _ in pairs]  # kept there, so that no other object gets its id
        return row

    try:
        return json.loads(text, object_pairs_hook=None if repeats is None else read_object)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: no valid JSON ({error.msg}, column {error.colno}). Mend or delete it.") from None
    except (RecursionError, ValueError) as error:  # brackets in brackets, an integer of thousands of digits
        why = reason(error).partition(";")[0]
        raise InputError(f"{where}: no valid JSON ({why}). Mend or delete it.") from None


def parse_lines(text, path, repeats):
    """Read JSON Lines into [(where, value)]; raises InputError naming the line."""
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and spans_lines(text):
        raise InputError(f"{path}, line {lines[0][0]}: a JSON value over several lines. Write each row on a line of "
                         "its own (jq -c . FILE), or one list into a .json.")
    return [(f"{path}, line {i}", parse_json(line, f"{path}, line {i}", repeats)) for i, line in lines]


def spans_lines(text):
    """Tell whether the first line of a text is not valid JSON, but begins a value that is."""
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return False
    return "\n" in text.lstrip()[:end]


def expand_files(patterns):
    """Return the files that names and globs stand for; raises InputError for one that stands for none."""
    files = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{pattern} is not there (looked in {Path.cwd()}). Check the path.")
        files += found
    return files


def read_hub_rows(args, split, count=math.inf):
    """Read one split of --dataset_name into [(where, row)]; None where there is no such split, which is said.

    Of a split with more than `count` rows that many are drawn with --seed, and no other is read.
    """
    # datasets does not notice that a file of a local folder has changed
    fresh = {"download_mode": "force_redownload", "verification_mode": "no_checks"}
    try:
        splits = get_dataset_split_names(args.dataset_name, args.dataset_subset, revision=args.hf_revision)
        if split not in splits:
            say(f"data      {args.dataset_name} has no split '{split}' (there are: {', '.join(splits)})")
            return None
        data = load_dataset(args.dataset_name, args.dataset_subset, split=split, revision=args.hf_revision,
                            **fresh if os.path.isdir(args.dataset_name) else {})
    except (ValueError, OSError, DatasetsError) as error:  # no such data set, subset or revision; no network
        raise InputError(f"--dataset_name {args.dataset_name} cannot be read: {reason(error)}") from None
    order = range(len(data))
    if count < len(data):
        order = np.random.default_rng(args.seed).permutation(len(data))[:count]  # as data.shuffle(args.seed)
        data = data.select(order, keep_in_memory=True)
    try:
        return [(f"{args.dataset_name}[{split}], row {i + 1}", row)
                for i, row in zip(order, rows_of_table(list(data)), strict=True)]
    except ImportError as error:  # sounds and films are decoded by packages that nothing here needs
        raise InputError(f"--dataset_name {args.dataset_name} holds more than text: {reason(error)}") from None


def rows_of_table(rows):
    """Return rows as a file of JSON would have them: without the columns that are empty throughout.

    An empty cell of another column stays, as None: its row lacks a text, its format is that of the others.
    """
    filled = {name for row in rows for name, cell in row.items() if cell is not None}
    return [{name: without_none(cell) for name, cell in row.items() if name in filled} for row in rows]


def without_none(value):
    """Leave out the keys without a value, which tables fill in at every depth."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def read_enough(args, split_rows, share):
    """Return split_rows(rows, dev sources), what the data make; with --train_sample_limit N of no more than are needed.

    Of a data set on the hub 2 (N + what is held out) + 1000 rows are drawn; if that leaves fewer than N, all are read.
    """
    dev, limit = dev_sources(args), args.train_sample_limit
    if not args.dataset_name:
        return split_rows([pair for file in expand_files(args.train_file or []) for pair in read_rows(file)], dev)
    if args.dataset_dev_split and (dev_rows := read_hub_rows(args, args.dataset_dev_split)):
        dev[""] = dev_rows
    held_out = 0 if dev else dev_wanted(args, limit or 0, share)
    count = 2 * (limit + held_out) + 1000 if limit and not getattr(args, "sanity_overfit", None) else math.inf
    rows = read_hub_rows(args, args.dataset_split, count)
    if rows is None:
        raise InputError(f"--dataset_split {args.dataset_split} does not exist. Pass one of the splits named above.")
    found = split_rows(rows, dict(dev))
    if len(rows) == count and len(found[0]) < limit:
        say(f"data      {len(rows)} rows, drawn with --seed, leave {len(found[0])} of {limit} to train on: reading all")
        found = split_rows(read_hub_rows(args, args.dataset_split), dict(dev))
    return found


def dev_wanted(args, rows, share):
    """Return how many of `rows` to hold out: --dev_sample_limit, or a share of those that are trained on."""
    share = share if args.dev_size is None else args.dev_size
    return args.dev_sample_limit or math.ceil(share * min(rows, args.train_sample_limit or rows))


def dev_sources(args):
    """Name the dev sets of --dev_file: {name: path}."""
    dev = {}
    for source in args.dev_file or []:
        name, _, path = ("", "", source) if "=" not in source or os.path.exists(source) else source.partition("=")
        files = expand_files([path])
        if len(files) > 1:
            raise InputError(f"--dev_file {source} stands for {len(files)} files ({', '.join(files[:3])}"
                             f"{', ...' if len(files) > 3 else ''}). Write --dev_file NAME=PATH for each.")
        if re.search(r"[^\w.-]", name):
            raise InputError(f"--dev_file {source}: '{name}' cannot name files and metrics. Use letters, digits, "
                             "'_', '-', '.' alone.")
        if name in dev:
            known = f"a dev set is called '{name}' already" if name else "there is another dev set without a name"
            twice = files[0] == dev[name]
            raise InputError(f"--dev_file {source}: " + ("it is given twice. Drop one." if twice else
                                                         f"{known}. Write --dev_file NAME=PATH."))
        dev[name] = files[0]
    if len(dev) > 1 and "" in dev:
        dev["dev"] = dev.pop("")
    return dev


def text_id(text):
    """Return 63 bits that two texts share if they differ in case and white space alone."""
    normal = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "big") >> 1


def say_drops(drops):
    """Print what was dropped, {reason: [where]}; return {reason: count}."""
    for reason, places in drops.items():
        say(f"dropped   {len(places)} {reason} (first: {places[0]})")
    return {reason: len(places) for reason, places in drops.items()}


def hold_out(examples, key, args, by, share, most=math.inf, unit=None):
    """Hold examples out of training, all of one key(example) together: (rest, {"": held}).

    --dev_sample_limit or --dev_size say how many; else it is `share` of them, with at most `most` unit(example) values.
    A group larger than a fifth of what is wanted stays in training, since a dev set of a few groups tells little; where
    all are larger, the smallest size may be held out.
    """
    if args.dev_sample_limit or args.dev_size is not None:
        most = math.inf
    wanted = dev_wanted(args, len(examples), share)
    if not wanted or len(examples) <= 3 or args.eval_strategy == "no":
        return examples, {}
    by_key = defaultdict(list)
    for example in examples:
        by_key[key(example)].append(example)
    smallest = min(map(len, by_key.values()))
    largest_held = max(min(wanted, most) / 5, smallest if smallest <= wanted else 0)
    held, rest, units, too_large = [], [], 0, []
    for group in by_key.values():
        fits = len(group) <= largest_held
        if not fits:
            too_large.append(len(group))
        side = held if fits and len(held) < wanted and units < most else rest
        side.extend(group)
        if side is held:
            units += len(set(map(unit or key, group)))
    if too_large:
        say(f"note      {len(too_large)} groups of rows with one {by} are never held out: each has more than a fifth "
            f"of the {min(wanted, most)} rows wanted (the largest: {max(too_large)} rows)")
    say(f"dev       {len(held)} rows held out of the training set, by {by}")
    return rest, {"": held} if held else {}


def too_few(args, left, dropped, dev_sets, need):
    """Return the InputError for `left` rows to train on, which says whether dev sets have taken the others."""
    held_out = dev_sets and not args.dev_file and not args.dataset_dev_split
    if held_out or any("a dev set" in reason for reason in dropped):
        advice = "The dev sets took the others: pass a smaller --dev_size or --dev_sample_limit, or other dev rows"
    else:
        advice = "Add rows, or look at what was dropped, above"
    return InputError(f"{left} rows are left to train on, {need}. {advice}.")


def leave_out(examples, leak, dropped):
    """Return the examples of which leak(example), the reason to leave it out, is None; counts others in `dropped`."""
    reasons = [leak(example) for example in examples]
    for reason, count in Counter(filter(None, reasons)).items():
        dropped[reason] = count
        say(f"dropped   {count} {reason}")
    return [example for example, reason in zip(examples, reasons, strict=True) if not reason]


def named(dev_name, metric):
    """Return the metric's name with the dev set's in front, if that has one."""
    return f"{dev_name}_{metric}" if dev_name else metric


def measured(metric, known, hint=""):
    """Return which `known` metric is meant by a name, Trainer's eval_loss say; raises InputError for none."""
    for name in (metric, metric.removeprefix("eval_")):  # a dev set may be called eval
        if name in known:
            return name
    raise InputError(f"--metric_for_best {metric} is not measured. Choose one of {', '.join(known)}.{hint}")


def token_cache():
    """Return the folder where tokens are kept from run to run."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lora_tokens"


def trim_token_cache(limit=TOKEN_CACHE_BYTES):
    """Delete the files of the token cache whose last use is longest ago, until the others have at most `limit` bytes.

    A run that has one of them open keeps it until it ends.
    """
    files = []
    for path in token_cache().glob("*"):
        with suppress(OSError):  # another process may trim, too
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > limit:
            with suppress(OSError):
                path.unlink()


def cached_map(columns, encode, key, workers, features=None):
    """Return a Dataset of `columns` with encode(batch) applied, cached by `datasets` under a hash of `key`."""
    folder, name = token_cache(), Hasher.hash(key)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{name}*"):
        with suppress(OSError):
            path.touch()  # the time of the last use: not every disk keeps one
    return datasets.Dataset.from_dict(columns).map(
        encode, batched=True, remove_columns=list(columns), new_fingerprint=name, num_proc=workers or None,
        features=features, desc="tokenising", cache_file_name=str(folder / f"{name}.arrow"))


def tokens_key(tokenizer, function):
    """Return what tokens depend on beside texts and flags: the tokenizer, versions, and the file that holds `function`.

    Where no source is to be seen, nothing returned here is ever the same again.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules["truncation"] = rules["padding"] = None  # what the last call asked for
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            rules = [(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir()) if path.is_file()]
    file = function.__code__.co_filename
    linecache.checkcache(file)
    source = linecache.getlines(file) or os.urandom(16)  # linecache knows a notebook's cells, too
    return [type(tokenizer).__name__, rules, tokenizers.__version__, transformers.__version__, source]


def ragged(dataset, column):
    """Return a column of lists as (values, offsets), numpy arrays: row i is values[offsets[i] : offsets[i + 1]]."""
    lists = dataset.data.column(column).combine_chunks()
    return lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()


# ---------------------------------------------------------------- the base model


def base_json(args, filename, kind=dict):
    """Return a JSON file of --init_adapter or else of the base model, local or on the hub; None if neither has it.

    Raises InputError for one that does not hold a `kind`.
    """
    for source, revision in ((args.init_adapter, None), (args.model_name, args.model_revision)):
        try:
            path = source and cached_file(source, filename, revision=revision,
                                          _raise_exceptions_for_missing_entries=False)
        except OSError:
            path = None
            say(f"note      the hub could not be asked whether {source} has a {filename}: going on as if not")
        if path:
            return merge.read_json(path, kind)
    return None


def is_adapter(name, revision):
    """Tell whether a folder or hub id, which is no model, holds an adapter."""
    try:
        found = cached_file(name, "adapter_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        return False
    return found is not None


def load_config(args):
    """Read the base model's config; raises InputError where there is none or its code may not be run."""
    try:
        stored, _ = PreTrainedConfig.get_config_dict(args.model_name, revision=args.model_revision)
        if "auto_map" in stored and stored.get("model_type") not in CONFIG_MAPPING and not args.trust_remote_code:
            raise InputError(f"{args.model_name} brings Python code of its own: read it, pass --trust_remote_code.")
        config = AutoConfig.from_pretrained(
            args.model_name, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, KeyError, ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        if is_adapter(args.model_name, args.model_revision):
            raise InputError(f"--model_name {args.model_name} is an adapter, not a model. Pass --init_adapter "
                             f"{args.model_name} to train it on, or merge it into its base first.") from None
        raise InputError(f"--model_name {args.model_name}: neither a folder here nor a hub model with a config of a "
                         f"known model ({reason(error)})") from None
    if config.is_encoder_decoder:
        raise InputError(f"{args.model_name} is an encoder-decoder. Choose an encoder or a decoder.")
    return config


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tekken.json")


def load_tokenizer(args):
    """Load the tokenizer of --init_adapter if that has one, else of the base; it pads on the right."""
    saved = args.init_adapter and (Path(args.init_adapter) / "tokenizer_config.json").exists()
    source, revision = (args.init_adapter, None) if saved else (args.model_name, args.model_revision)
    nothing = InputError(f"{source} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}, *.model. Copy the files of "
                         "the base it was made from into it, or choose another base.")
    if os.path.isdir(source) and not has_tokenizer(source):
        raise nothing  # transformers would make one up
    try:
        tokenizer = read_tokenizer(source, args, revision)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{source} has no tokenizer that can be read: {reason(error)}") from None
    config = cached_file(source, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if config and not os.path.isdir(source) and not has_tokenizer(Path(config).parent):
        raise nothing
    return tokenizer


def has_tokenizer(folder):
    """Tell whether a folder, of a model or of the hub's cache, has a file that a tokenizer is read from."""
    return any((Path(folder) / name).is_file() for name in TOKENIZER_FILES) or any(Path(folder).glob("*.model"))


def read_tokenizer(source, args, revision=None):
    """Return the tokenizer of a folder or of a hub model; it pads on the right."""
    return AutoTokenizer.from_pretrained(
        source, revision=revision, trust_remote_code=args.trust_remote_code, padding_side="right"
    )


def saved_inputs(args, folder, tokenizer, inputs):
    """Return inputs(the tokenizer read back from `folder`), lists of token ids.

    Raises InputError if those of the `tokenizer` that was saved there are others: the model would be served with
    tokens that it was not trained on.
    """
    try:
        saved = read_tokenizer(folder, args)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the tokenizer of {args.model_name}, saved, cannot be read back: {reason(error)}") from None
    found, expected = ([[int(i) for i in ids] for ids in inputs(each)] for each in (saved, tokenizer))
    for ids, live in zip(found, expected, strict=False):
        if ids != live:
            text, other = (repr(tokenizer.decode(side))[-60:] for side in (live, ids))
            raise InputError(f"the {type(tokenizer).__name__} of {args.model_name}, saved and read back, gives other "
                             f"tokens than in training: ...{other} in place of ...{text}. Choose another base.")
    if len(found) != len(expected):
        raise InputError(f"the chat template of {args.model_name}, saved and read back, takes other rows than in "
                         "training. Choose another base, or pass another --chat_template.")
    return found


def check_vocabulary(model, args, tokenizer, largest):
    """Raise InputError if `largest`, a token id of the data, has no row in the model's embedding."""
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # a model that hashes its input, say
        return
    if largest >= rows:
        raise InputError(f"{args.model_name} has embeddings for {rows} tokens, and its tokenizer, of {len(tokenizer)}, "
                         f"gives the data token {largest} ({tokenizer.convert_ids_to_tokens(int(largest))!r}): they do "
                         "not belong together. Put the model's own tokenizer into its folder.")


def position_limit(config, tokenizer):
    """Return the longest sequence the base can take, in tokens (math.inf if nothing says so)."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or math.inf
    if any(name in config.model_type for name in ("roberta", "camembert", "mpnet")):
        limit -= (config.pad_token_id or 0) + 1  # their positions start behind the padding index
    return min(limit, tokenizer.model_max_length)


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}


def choose_precision(args):
    """Return ("bf16" | "fp16" | "none", in words): bf16 from compute capability 8.0 on, fp16 below, none on a CPU."""
    asked = args.mixed_precision or ("fp16" if args.fp16 else "bf16" if args.bf16 else None)
    if not torch.cuda.is_available():
        return "none", "float32, no GPU" + (f" for --{asked}" if asked in ("fp16", "bf16") else "")
    # not torch.cuda.is_bf16_supported(): it counts emulation, as on a T4
    major, minor = torch.cuda.get_device_capability()
    chosen = asked or ("bf16" if major >= 8 else "fp16")
    if chosen == "bf16" and major < 8:
        chosen = "fp16"
    why = f"{'as asked' if chosen == asked else 'chosen'} for a GPU of compute capability {major}.{minor}"
    return chosen, f"{'float32' if chosen == 'none' else chosen}, {why}"


def without_dropout(config):
    """Set every dropout of a config, and of the configs inside it, to 0: steps become exact, and faster."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


# of weights files that are cut off, of pickles that are none, of sizes in the config that no layer can have
LOADING_ERRORS = (OSError, ValueError, ImportError, RuntimeError, LookupError, TypeError, AttributeError, EOFError,
                  pickle.UnpicklingError, SafetensorError, ZeroDivisionError)


def load_base(args, auto_class, config, precision, notes):
    """Load the base in the compute dtype (float32 for full fine-tuning), quantised if asked; adds to `notes`.

    Returns (model, {name: in words}) of the model and of the weights that its files do not hold.
    """
    dtype = DTYPES[precision]
    device, attention = PartialState().device, args.attn_implementation
    if attention == "flash_attention_2":
        modern = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        if not modern or importlib.util.find_spec("flash_attn") is None:
            attention = "sdpa"
            notes.append("flash attention 2 needs the flash-attn package and compute capability 8.0: SDPA instead")
    if not args.model_dropout:
        without_dropout(config)
    config.use_cache = False  # a decoder would build a key-value cache in every training step
    options = {"config": config, "revision": args.model_revision, "trust_remote_code": args.trust_remote_code,
               "dtype": torch.float32 if args.finetune_type == "full" else dtype,
               # else transformers draws such weights at random and prints a table
               "output_loading_info": True, "ignore_mismatched_sizes": True}
    if attention != "auto":
        options["attn_implementation"] = attention
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    for bits in dict.fromkeys((args.bits, None)):  # where quantising fails, without
        try:
            if bits:
                how = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, **nf4)
                placed = {"quantization_config": how, "device_map": {"": device}}
                model, info = auto_class.from_pretrained(args.model_name, **options, **placed)
                absent = not_loaded(info)
                return frozen(model, absent), absent
            model, info = auto_class.from_pretrained(args.model_name, **options)
            return model.to(device), not_loaded(info)
        except LOADING_ERRORS as error:
            if not bits:
                why = reason(error) or type(error).__name__
                if "Unrecognized configuration class" in why:
                    raise InputError(f"{args.model_name} is a {config.model_type} model, which {auto_class.__name__} "
                                     "does not know. Choose a base of another kind.") from None
                raise InputError(f"{args.model_name} cannot be loaded: {why}. Are its files whole?") from None
            notes.append(f"{bits}-bit loading failed, so the base is not quantised: {reason(error)}")
            args.bits = None


def not_loaded(info):
    """Return {name: in words} of the weights that transformers did not load; one that is tied to another it did."""
    found = {name: name for name in sorted(info["missing_keys"])}
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        found[name] = f"{name}, there {tuple(stored)} in place of {tuple(wanted)}"
    return found


def leaves_of(output):
    """Return the ids of the leaf tensors that require a gradient and that `output` was computed from."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


def without_numbers(name):
    """Return a weight's name with # for the numbers of layers and experts."""
    return re.sub(r"\d+", "#", name)


def check_loaded(model, absent, outputs, args, notes):
    """Refuse a base that would be trained on random weights.

    absent: as load_base returns it; outputs(): a tensor computed with gradients. Raises InputError if one of them, or
    its like in another layer or expert, takes part in that; adds the others to `notes`.
    """
    if not absent:
        return
    weights = dict(model.named_parameters())
    trainable = {name: weight.requires_grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(weight.is_floating_point())  # a quantised weight has no gradient
    reached = leaves_of(outputs())
    for name, weight in weights.items():
        weight.requires_grad_(trainable[name])
    needed = {without_numbers(name) for name, weight in weights.items() if id(weight) in reached}
    random_ones = [name for name in absent if without_numbers(name) in needed]
    if random_ones:
        few = "; ".join(absent[name] for name in random_ones[:3])
        remedy = "Fetch it again, or mend its config.json"
        if getattr(model.config, "auto_map", None) and not args.trust_remote_code:
            remedy = "It brings Python code of its own: read that, pass --trust_remote_code"
        raise InputError(f"{args.model_name}: {len(random_ones)} of {len(weights)} weights are not in its files and "
                         f"would be random ({few}{'; ...' if len(random_ones) > 3 else ''}). {remedy}.")
    notes.append(f"not in the base's files, and not needed by the outputs: {', '.join(absent)}")


def frozen(model, absent):
    """Freeze a quantised model; norms and biases become float32, embeddings and head stay small.

    The `absent` weights, which are not in its files, were not quantised: their layers become plain ones, which run.
    """
    for name in absent:
        path, _, kind = name.rpartition(".")
        layer = model.get_submodule(path)
        if kind == "weight" and isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight, plain.bias = layer.weight, layer.bias
            model.set_submodule(path, plain)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50: after one evaluation its bf16 kernel, which has no gradient, stays on in training
            module.support_avx512bf16_for_cpu = False
    return model


def base_folder(args):
    """Return the folder of the base's files; they are here once the base was loaded."""
    return Path(cached_file(args.model_name, "config.json", revision=args.model_revision)).parent


def base_fingerprint(args):
    """Return the hash by which merge.py knows the base's weights again, or None if it has no safetensors."""
    return merge.fingerprint(base_folder(args))


def with_adapter(model, folder, model_name):
    """Return the base with the adapter of a folder, to go on training it; raises InputError unless all of it fits."""
    fits_not = f"--init_adapter {folder} does not fit {model_name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, which are an error below
            model = PeftModel.from_pretrained(model, folder, is_trainable=True)
        # once more: from_pretrained does not return what was missing and what was left over
        mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", {})
        loaded = model.load_adapter(folder, "default", is_trainable=True, key_mapping=mapping)
    except KeyError as error:  # a module that adapter_config.json says is saved whole
        raise InputError(f"{fits_not}: it lacks {error}. Copy the adapter again.") from error
    except SafetensorError as error:
        raise InputError(f"--init_adapter {folder}: its weights cannot be loaded ({reason(error)}). Copy the adapter "
                         "again.") from None
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"{fits_not} ({reason(error)}). Pass the base that its adapter_config.json names.") from error
    for keys, what in ((loaded.missing_keys, "it lacks"), (loaded.unexpected_keys, "the model has no place for")):
        if keys:
            few = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise InputError(f"{fits_not}: {what} {len(keys)} of its weights ({few}). Pass the base that it was "
                             "trained on, or copy the adapter again.")
    model.peft_config["default"].base_model_name_or_path = model_name  # it may have moved
    return model


def check_base_of(adapter, base, model_name):
    """Raise InputError if what a trainer recorded beside the adapter is not the fingerprint of the folder `base`."""
    trained = read_json(Path(adapter) / "training_config.json") or {}
    if not merge.is_base(base, trained.get("base_fingerprint")):
        name = merge.flags_of(trained).get("model_name")
        raise InputError(f"{model_name} is not the base that --init_adapter {adapter} was trained on: its weights are "
                         f"not those of {name}. Pass that one as --model_name; if it is the same model in other files, "
                         f"delete base_fingerprint from {adapter}/training_config.json.")


def with_new_adapter(model, config, unused):
    """Return the base with LoRA on the layers that config.target_modules names; the `unused` layers get none.

    Raises InputError if one of the names gets none either: peft is content as long as one does.
    """
    layers = [name for name, _ in model.named_modules()]
    weights = [name for name, _ in model.named_parameters()]
    linear = {name.split(".")[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    names = set() if isinstance(config.target_modules, str) else set(config.target_modules)
    if unused:  # a list would also exclude whatever ends in one of the names
        config.exclude_modules = "|".join(map(re.escape, unused))
    why = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that match nothing, which are an error below
            model = get_peft_model(model, config)
        names &= set(config.target_modules)  # peft makes parameters of fused experts of the others
    except NoMatchingPeftModuleError:
        pass
    except ValueError as error:
        kind = re.match(r"Target module (\w+)", str(error))
        why = f"a {kind[1]} is no layer that peft adapts" if kind else reason(error).rstrip(".")
    for name in sorted(names):
        why = why or untrained(name, layers, weights, unused)
    if why or not isinstance(model, PeftModel):
        raise InputError(f"--target_modules: {why or 'there is nothing to put an adapter on'}. "
                         f"Linear layers here: {', '.join(sorted(linear))}.")
    return model


def matches(name, target):
    """Tell whether a name of --target_modules stands for the layer called `name`, as peft sees it."""
    return name == target or name.endswith(f".{target}")


def untrained(target, layers, weights, unused):
    """Return in words why a name of --target_modules gets no adapter, or "" if it does."""
    found = [name for name in layers if matches(name, target)]
    stored = [name for name in weights if matches(name, target)]
    if set(found) - set(unused):
        return ""
    if found:
        return f"the outputs do not depend on {', '.join(found[:3])}, which is all that {target} matches"
    if stored:
        return f"{target} is no layer but a parameter ({stored[0]}), as fused experts are: peft leaves it alone here"
    return f"no layer is called {target}"


def left_out(model, targets, unused):
    """Return the linear layers and fused experts that peft put no adapter on although `targets` stands for them."""
    base = model.get_base_model()
    head, layers = base.get_output_embeddings(), dict(base.named_modules())
    adapted = {name for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)}
    names = [name for name, m in layers.items() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    names += [name for name, weight in base.named_parameters() if weight.ndim == 3 and "experts." in name]
    found = []
    for name in names:
        parts = name.split(".")
        inside = any(".".join(parts[:i]) in adapted for i in range(1, len(parts) + 1))
        meant = targets == "all-linear" or any(matches(name, target) for target in targets)
        if meant and not inside and name not in unused:
            found.append(name)
    return found


def add_adapter(model, args, task, unused, notes):
    """Wrap the base with a new LoRA adapter or with --init_adapter's; the `unused` linear layers get none.

    With --finetune_type full the model stays as it is, its unused layers frozen. Trainable weights become float32.
    """
    if args.finetune_type == "full":
        for name in unused:
            model.get_submodule(name).requires_grad_(False)
    elif args.init_adapter:
        check_base_of(args.init_adapter, base_folder(args), args.model_name)
        model = with_adapter(model, args.init_adapter, args.model_name)
        stored = model.peft_config["default"]
        if args.lora_dropout is not None:  # peft would keep the stored one
            stored.lora_dropout = args.lora_dropout
            for module in model.modules():
                if "default" in getattr(module, "lora_dropout", {}):
                    module.lora_dropout["default"] = nn.Dropout(args.lora_dropout)
        args.lora_dropout = stored.lora_dropout
    else:
        config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout or 0.0,
                            target_modules=args.target_modules, use_rslora=args.use_rslora, task_type=task)
        model = with_new_adapter(model, config, unused)
        if left := left_out(model, args.target_modules, unused):
            few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
            notes.append(f"peft puts no adapter on {len(left)} of the layers that --target_modules names ({few})")
    check_mergeable(model, args, notes)
    if unused:
        notes.append(f"not trained, because the outputs do not depend on it: {', '.join(unused)}")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the loss scaler cannot unscale fp16 gradients
    if args.gradient_checkpointing:
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model


def check_mergeable(model, args, notes):
    """Say before training what merge.py could not merge: an InputError with --merge_adapter, else a note."""
    if args.finetune_type == "full":
        return
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: tensor.to("meta") for name, tensor in tensors.items()}  # their shapes are enough
    obstacle = merge.unmergeable(model.peft_config["default"].to_dict(), tensors, base_folder(args))
    if obstacle and args.merge_adapter:
        raise InputError(f"--merge_adapter: merge.py could not merge this adapter ({obstacle}). Drop the flag, or mend "
                         "what it names.")
    if obstacle:
        notes.append(f"merge.py could not merge this adapter: {obstacle}")


# ---------------------------------------------------------------- the exact step


def cut(lengths, budget):
    """Cut sequences, longest first, into pieces of at most `budget` padded tokens (or of one): lists of indices."""
    pieces = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if pieces and (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] <= budget:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces


def is_out_of_memory(error):
    """Tell whether a RuntimeError means that memory ran out, on any device."""
    return any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory"))


def broken_weight(model, untrained):
    """Return the name of a weight that is not finite and that training did not change, or None.

    untrained: no step was taken, so that no weight was changed.
    """
    for name, parameter in model.named_parameters():
        if (untrained or not parameter.requires_grad) and not parameter.isfinite().all():
            return name.removeprefix("base_model.model.").replace(".base_layer", "")
    return None


class StepTrainer(Trainer):
    """A Trainer whose batch is one whole optimizer step: {"sequences": [token ids], "rows": number of examples, ...}.

    The step is cut into pieces of at most --batch_size examples' tokens. A subclass' run_step(model, step, pieces,
    tokens_at_once) runs forward and backward so that the gradient is that of the uncut step. When memory runs out,
    the step starts again from zero gradients with half the tokens in memory, and so do all later ones.
    """

    def __init__(self, *, batch_size, measure, **kwargs):
        super().__init__(**kwargs)
        self.batch_size, self.measure = batch_size, measure
        self.device_tokens = PIECE_TOKENS.get(self.args.device.type, PIECE_TOKENS["cuda"])
        self.halvings = self.evaluation_halvings = 0  # of a piece's size, since memory ran out
        self.real_tokens = self.padded_tokens = self.evaluation_seconds = 0

    def training_step(self, model, step, num_items_in_batch=None):
        """Run forward and backward of one step; return its loss."""
        model.train()
        step = self._prepare_inputs(step)
        loss = self.until_it_fits(lambda: self.run_step(model, step, *self.cut_step(step)))
        if not torch.isfinite(loss):
            if broken := broken_weight(model, self.state.global_step == 0):
                raise InputError(f"the loss is {loss.item()}, because {broken} of the base or adapter holds NaN or "
                                 "infinity: fetch it again, or take an earlier checkpoint.")
            half = ", or pass --mixed_precision none" if self.args.fp16 else ""
            raise InputError(f"the loss is {loss.item()} in step {self.state.global_step + 1}: lower --lr{half}.")
        self.step_figures = self.figures_of_step(loss)
        return loss

    def figures_of_step(self, loss):
        """Return {name: number} of the step that was just run, over all processes."""
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "mean")
        return {"loss": loss.item()}

    def log(self, logs, *args, **kwargs):
        """Show training figures as means over the last --logging_steps steps, whether or not the run was resumed.

        The history holds each step's own figures, which RunCallback has put there: what Trainer knows of a step beside
        them, the gradient's norm, joins its entry.
        """
        history = self.state.log_history
        is_of_training = "loss" in logs
        if is_of_training:
            steps = [entry for entry in history if "loss" in entry][-self.args.logging_steps :]
            logs |= {name: sum(entry[name] for entry in steps) / len(steps) for name in self.step_figures}
        super().log(logs, *args, **kwargs)
        if is_of_training:
            shown = history.pop()
            history[-1] = shown | history[-1]

    def until_it_fits(self, attempt):
        """Return attempt(), called again from zero gradients with pieces half the size each time memory runs out."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.accelerator.num_processes > 1 or 2**self.halvings > self.device_tokens:
                    raise InputError("out of memory: lower --max_length or --batch_size, or quantise.") from error
            # outside the except block, where the error no longer holds the graph
            self.halvings += 1
            self.model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            say(f"memory    ran out: this again, and what follows, in pieces 1/{2**self.halvings} the size")

    @torch.no_grad()
    def evaluated(self, attempt):
        """Return until_it_fits(attempt) in evaluation mode; the pieces of training steps stay as large as they were."""
        training, halvings = self.model.training, self.halvings
        self.halvings = max(halvings, self.evaluation_halvings)
        self.model.eval()
        try:
            return self.until_it_fits(attempt)
        finally:
            self.model.train(training)
            self.evaluation_halvings, self.halvings = self.halvings, halvings

    def cut_step(self, step):
        """Return the step's pieces, and how many padded tokens may be in memory at once."""
        lengths = self.lengths_of(step)
        parts = math.ceil(step["rows"] / self.batch_size) * 2**self.halvings
        pieces = cut(lengths, min(self.device_tokens // 2**self.halvings, math.ceil(sum(lengths) / parts)))
        padded = sum(len(piece) * lengths[piece[0]] for piece in pieces)
        self.real_tokens += sum(map(len, step["sequences"]))
        self.padded_tokens += padded
        return pieces, padded / parts

    def lengths_of(self, step):
        """Return how many tokens each sequence takes in a piece."""
        return [len(ids) for ids in step["sequences"]]

    def pad(self, step, piece):
        """Return a piece's input_ids (B, T), padded on the right with 0, and lengths (B,), on the device."""
        rows = [torch.tensor(step["sequences"][i]) for i in piece]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
        return input_ids.to(self.args.device), lengths.to(self.args.device)

    def unsynced(self, model, more):
        """Context in which processes do not add up their gradients yet, because there is `more` to come."""
        return self.accelerator.no_sync(model) if more else nullcontext()

    def before_training(self):
        """Do what needs the model as it is before the first step, on which a resumed run starts too."""

    def warnings_about(self, after):
        """Return what the last metrics should warn a user of, in words."""
        return []

    def measure_dev_sets(self):
        """Return {"eval_<metric>": value} over all dev sets."""
        started = time.perf_counter()
        metrics = {f"eval_{name}": value for name, value in self.measure(self).items()}
        self.evaluation_seconds += time.perf_counter() - started
        return metrics

    def evaluate(self, *args, **kwargs):
        """Measure and log; Trainer's own evaluation would average per-batch means of a loss."""
        metrics = self.measure_dev_sets()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class RunCallback(ProgressCallback):
    """What happens around the steps: progress and log lines, stops on signals, the logs on disk, warnings in words."""

    def __init__(self, trainer, args, plan, before):
        super().__init__()
        self.trainer, self.args, self.plan, self.before = trainer, args, plan, before
        self.signal, self.skipped = None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = self.first_step = state.global_step
        self.started = time.perf_counter()
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True,
                                     disable=not shows_bars())
        if state.global_step == 0 and self.before:
            self.trainer.log(dict(self.before))

    def time_left(self, state):
        """Return how long the rest will take at the pace so far, as "02:31 left"; "" before the first step."""
        done = state.global_step - self.first_step
        if not done:
            return ""
        seconds = (time.perf_counter() - self.started) / done * (state.max_steps - state.global_step)
        return f"{tqdm.format_interval(seconds)} left"

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = ["loss", "learning_rate", *(f"eval_{name}" for name in self.plan.shown)]
        labels = {"eval_loss": "dev_loss"}  # a dev set without a name, beside the training loss
        shown = [f"{labels.get(name, name.removeprefix('eval_'))} {logs[name]:.4g}" for name in names if name in logs]
        if "loss" in logs and not shows_bars():
            shown.append(self.time_left(state))
        if shown and state.is_world_process_zero:
            self.training_bar.write(f"step {state.global_step:6}  {'   '.join(shown)}")

    def catch(self, number, frame):
        """Handle SIGINT or SIGTERM: stop after this step; the second time at once."""
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        say("\nstopping after this step, with a checkpoint; once more stops at once")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.train_dataset.epoch = state.global_step // self.plan.steps_per_epoch

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        state.log_history.append({**self.trainer.step_figures, "learning_rate": self.learning_rate,
                                  "epoch": state.epoch, "step": state.global_step})
        self.skipped = self.skipped + 1 if self.trainer.accelerator.optimizer_step_was_skipped else 0
        if self.skipped == MAX_SKIPPED_STEPS:
            raise InputError(f"fp16 gradients overflowed in {self.skipped} steps running: pass --mixed_precision none.")
        stop = self.signal is not None
        if self.trainer.accelerator.num_processes > 1:  # all processes must stop after the same step
            stop = self.trainer.accelerator.gather(torch.tensor([stop], device=args.device)).any().item()
        if stop:
            self.signal = self.signal or signal.SIGTERM  # it may have reached another process
            args.save_total_limit = None  # at 1, Trainer would delete the checkpoint that we stop with
        every = self.plan.epoch_save_steps
        if stop or every and state.global_step % every == 0:
            control.should_save = True
            control.should_training_stop |= stop
            control.should_evaluate |= self.plan.save_best and not stop

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        for metric, greater_is_better in self.plan.watched:
            if text := worsening(state.log_history, metric, greater_is_better):
                say(f"warning   {text}")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_logs(self.args.output_dir, state.log_history, self.plan.steps_per_epoch)


def worsening(log, metric, greater_is_better):
    """Return a warning in words if the last three evaluations got worse while the training loss fell, else None."""
    points = [(entry["step"], entry[f"eval_{metric}"]) for entry in log if f"eval_{metric}" in entry][-3:]
    if len(points) < 3:
        return None
    values = [value if greater_is_better else -value for _, value in points]
    first, middle, _ = (step for step, _ in points)
    trained = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry and entry["step"] >= first]
    early = [loss for step, loss in trained if step <= middle]
    late = [loss for step, loss in trained if step > middle]
    worse = values[0] > values[1] > values[2] and values[0] - values[2] > 0.01 * abs(values[0])
    if worse and early and late and fmean(late) < fmean(early):
        return (f"the loss fell from {fmean(early):.3f} to {fmean(late):.3f} while {metric} worsened from "
                f"{points[0][1]:.4f} to {points[2][1]:.4f}: overfitting. Fewer epochs, or a lower --lr.")
    return None


def worsenings(log, watched):
    """Return the warnings of all evaluations of a run, those before it was resumed too; watched: a plan's."""
    found = []
    for count, entry in enumerate(log, 1):
        for metric, greater_is_better in watched:
            if f"eval_{metric}" in entry:
                found.append(worsening(log[:count], metric, greater_is_better))
    return [text for text in found if text]


# ---------------------------------------------------------------- plan, preflight, training, proof


def make_plan(args, rows, has_dev, metric, greater_is_better, drop_last, notes):
    """Work out a run's steps from its flags: a namespace, which keeps `notes`, things a user would want to know."""
    plan = SimpleNamespace(metric=metric, greater_is_better=greater_is_better, notes=notes)
    plan.watched = [[metric, greater_is_better]]  # warned about if they worsen while the loss falls
    world = PartialState().num_processes
    if rows < world:
        raise InputError(f"{rows} rows cannot be shared out over {world} processes. Add rows, or use one GPU.")
    plan.step_rows = args.batch_size * args.gradient_accumulation  # examples of a step, per process
    if drop_last and rows < plan.step_rows * world:
        plan.notes.append(f"{rows} rows are less than one step of {plan.step_rows * world}: the step is shrunk to them")
        plan.step_rows = rows // world
    plan.examples_per_step = plan.step_rows * world
    plan.steps_per_epoch = rows // plan.examples_per_step if drop_last else math.ceil(rows / plan.examples_per_step)
    plan.total_steps = args.max_steps or math.ceil(args.epochs * plan.steps_per_epoch)
    plan.warmup_steps = int(args.warmup_ratio * plan.total_steps) if args.warmup_steps is None else args.warmup_steps
    tenth, epoch = max(1, round(plan.total_steps / 10)), plan.steps_per_epoch
    plan.epoch_save_steps = epoch * args.save_on_epoch_end  # 0 = off
    if args.eval_strategy == "epoch" or args.eval_every == 0:
        plan.eval_steps = epoch
    elif args.save_on_epoch_end and not args.eval_every:
        plan.eval_steps = plan.epoch_save_steps
    else:
        plan.eval_steps = args.eval_every or (max(1, args.logging_steps) if args.eval_strategy == "steps" else tenth)
    plan.has_dev = has_dev and args.eval_strategy != "no"
    if not plan.has_dev and (args.save_best or args.early_stopping_patience):
        raise InputError("--save_best and --early_stopping_patience need an evaluation, and no rows could be held out "
                         "for one. Pass --dev_file.")
    plan.save_best = bool(plan.has_dev and args.save_best != 0 and args.checkpoint_strategy != "no")
    by_epoch = epoch if args.checkpoint_strategy == "epoch" else None
    plan.save_steps = args.checkpoint_steps or plan.epoch_save_steps or by_epoch or tenth
    if plan.save_best:
        plan.save_steps = plan.eval_steps
    plan.lora_scale = args.lora_alpha / (math.sqrt(args.lora_r) if args.use_rslora else args.lora_r)
    left = rows - epoch * plan.examples_per_step
    if drop_last and left:
        plan.notes.append(f"each epoch leaves out {left} rows, drawn anew, that do not fill a step")
    if plan.save_best and (args.checkpoint_steps or args.checkpoint_strategy == "epoch"):
        plan.notes.append("checkpoints follow the evaluations, so that the best can be kept (--save_best 0: as asked)")
    if plan.has_dev and args.eval_every and args.eval_every * 2 > plan.total_steps:
        better, times = max(1, round(epoch / 2.5)), "once" if args.eval_every <= plan.total_steps else "never"
        better = round(better, -int(math.log10(better)))
        plan.notes.append(f"--eval_every {args.eval_every} evaluates {times} in {plan.total_steps} steps, besides "
                          f"before and after; --eval_every {better} gives two or three an epoch")
    if args.finetune_type != "full" and args.lr < 5e-5:
        plan.notes.append(f"--lr {args.lr:g} is low for LoRA, which wants ten times full fine-tuning's: 1e-4 to 3e-4")
    if args.lr > 5e-3 and args.optimizer != "sgd":
        plan.notes.append(f"--lr {args.lr:g} is very high: 1e-4 to 3e-4 is usual for LoRA")
    if args.finetune_type != "full" and plan.lora_scale > 4 and args.lr >= 2e-4:
        plan.notes.append(f"a LoRA scale of {plan.lora_scale:.1f} at --lr {args.lr:g} is strong")
    return plan


def training_arguments(args, plan, precision, drop_last):
    """Translate flags and plan into Trainer's arguments; a batch of Trainer's is a whole step of ours."""
    report_to = args.report_to or ("tensorboard" if importlib.util.find_spec("tensorboard") else "none")
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise InputError(f"--report_to {report_to}: it is not installed. Run: pip install {report_to}")
    arguments = TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=plan.step_rows,
        max_steps=plan.total_steps,
        learning_rate=args.lr,
        lr_scheduler_type="constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler,
        warmup_steps=plan.warmup_steps,
        optim={"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "sgd": "sgd"}[args.optimizer],
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=PartialState().device.type == "cpu",
        seed=args.seed,
        full_determinism=args.full_determinism,
        dataloader_drop_last=drop_last,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy="steps" if plan.has_dev else "no",
        eval_steps=plan.eval_steps,
        save_strategy="no" if args.checkpoint_strategy == "no" else "steps",
        save_steps=plan.save_steps,
        save_total_limit=args.save_total_limit or (None if args.save_on_epoch_end else 2),
        load_best_model_at_end=plan.save_best,
        restore_callback_states_from_checkpoint=True,
        metric_for_best_model=f"eval_{plan.metric}" if plan.save_best else None,
        greater_is_better=plan.greater_is_better,
        logging_strategy="steps" if args.logging_steps else "no",
        logging_steps=abs(args.logging_steps) or 1,
        logging_nan_inf_filter=False,  # it shows a NaN run as loss 0
        report_to=[] if report_to == "none" else [report_to],
        disable_tqdm=True,  # the bar is RunCallback's; a notebook would get transformers' table beside it
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never nn.DataParallel
    return arguments


def preflight(args, trainer, plan, heaviest):
    """Print the plan and rehearse the `heaviest` rows: memory and gradients are checked before hour three.

    Raises InputError if a gradient is not finite or an adapter gets none.
    """
    model = trainer.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    say(f"trains    {trainable:,} weights ({trainable / total:.1%})"
        + ("" if args.finetune_type == "full" else f", LoRA r {args.lora_r}, scale {plan.lora_scale:g}"))
    parts, processes = -(-plan.step_rows // args.batch_size), trainer.accelerator.num_processes
    say(f"plan      {plan.total_steps} steps, {plan.steps_per_epoch} an epoch, of {plan.examples_per_step} examples"
        f" ({args.batch_size} in memory x {parts}{f' x {processes} processes' if processes > 1 else ''});"
        f" lr {args.lr:g} {args.lr_scheduler}, {plan.warmup_steps} steps of warm-up")
    evaluation = f"evaluation every {plan.eval_steps} steps" if plan.has_dev else "no evaluation"
    saving = "no checkpoints" if args.checkpoint_strategy == "no" else f"checkpoint every {plan.save_steps} steps"
    best = f"; final/ is the best by {plan.metric}" if plan.save_best else ""
    say(f"          {evaluation}; {saving}{best}")
    for cause, present in (
        ("dropout", args.lora_dropout or args.model_dropout),
        ("8-bit weights, by about 5 %", args.bits == 8),
        ("half precision, by about 1 %", trainer.args.fp16 or trainer.args.bf16),
    ):
        if present:
            plan.notes.append(f"a step's gradient depends on how it is cut into pieces: {cause}")
    for note in plan.notes:
        say(f"note      {note}")
    rng, started = torch.get_rng_state(), time.perf_counter()
    accelerator, trained = trainer.accelerator, [p for p in model.parameters() if p.requires_grad]
    is_finite = finite_gradients(lambda: trainer.training_step(model, trainer.data_collator(heaviest)), trained,
                                 accelerator.scaler)
    seconds = time.perf_counter() - started
    torch.set_rng_state(rng)
    weights = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    if not any(grad is not None and grad.any() for grad in weights.values()):
        raise InputError("the loss of the heaviest rows has no gradient: they have nothing to tell apart.")
    if idle := [name for name, grad in weights.items() if grad is None or "lora_B" in name and not grad.any()]:
        raise InputError(f"{len(idle)} trainable weights get no gradient ({idle[0]}, ...): narrow --target_modules.")
    if not is_finite:
        raise InputError("the first gradient is not finite: pass --mixed_precision none, or check the base model.")
    scaled = ""
    if accelerator.scaler is not None:  # training begins at this scale, which all processes must share
        scale = torch.tensor([accelerator.scaler.get_scale()], device=trainer.args.device)
        accelerator.scaler.update(accelerator.gather(scale).min().item())
        scaled = f" at a loss scale of {accelerator.scaler.get_scale():g}"
    model.zero_grad()
    trainer.real_tokens = trainer.padded_tokens = 0
    say(f"rehearsal of {len(heaviest)} heavy examples: {seconds:.1f} s, {peak_gib():.1f} GiB, finite gradients{scaled}")


def finite_gradients(attempt, weights, scaler):
    """Call attempt(), a forward and backward pass; return whether it leaves finite gradients in all `weights`.

    With a loss scaler (fp16, else None) again at half the scale until it does, or does not at a scale of 1.
    """
    while True:
        for weight in weights:
            weight.grad = None
        attempt()
        if all(weight.grad is None or weight.grad.isfinite().all() for weight in weights):
            return True
        if scaler is None or scaler.get_scale() <= 1:
            return False
        scaler.update(scaler.get_scale() / 2)


def heaviest_rows(tokens, plan, args):
    """Return as many rows as are in memory at once: the longest, and the heaviest of as many draws as the run makes.

    At least two rows: one has nothing to contrast.
    """
    rng, count = random.Random(args.seed), min(len(tokens), max(2, min(args.batch_size, plan.step_rows)))
    draws = min(1000, plan.total_steps * -(-plan.step_rows // count))
    samples = (rng.sample(range(len(tokens)), count) for _ in range(draws))
    heaviest = max(samples, key=lambda rows: sum(tokens[i] for i in rows))
    longest = max(range(len(tokens)), key=tokens.__getitem__)
    return list(dict.fromkeys([longest, *heaviest]))[:count]


def peak_gib():
    """Return the most memory this process has had, in GiB: the GPU's if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def train(trainer, args, plan, checkpoint):
    """Train; returns (metrics before, those of what final/ will hold, warnings). Exits if a signal stopped the run."""
    stored = read_json(checkpoint / "trainer_state.json") if checkpoint else None
    if stored:
        first = next(iter(stored["log_history"]), {})
        before = {key: value for key, value in first.items() if key.startswith("eval_")}
    else:
        before = trainer.measure_dev_sets() if plan.has_dev else {}
    callback = RunCallback(trainer, args, plan, before)
    trainer.remove_callback(PrinterCallback)  # what disable_tqdm leaves
    trainer.add_callback(callback)
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if stored and is_finished(stored, args, plan):  # killed between its last checkpoint and final/
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(str(best_checkpoint(checkpoint, stored)))
    else:
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        handlers = {number: signal.signal(number, callback.catch) for number in signals}
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if callback.training_bar:  # left open by an error, which would stand in its line
                callback.training_bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    state, name = trainer.state, f"eval_{plan.metric}"
    if callback.signal and state.global_step < plan.total_steps:
        say(f"stopped after step {state.global_step}. Go on with the same command and --resume_from_checkpoint")
        sys.exit(128 + callback.signal)
    evaluated = [entry for entry in state.log_history if name in entry and entry["step"] == (
        state.best_global_step if plan.save_best else state.global_step)]
    after = {key: value for key, value in evaluated[-1].items() if key.startswith("eval_")} if evaluated else {}
    losses = running_mean([entry["loss"] for entry in state.log_history if "loss" in entry])
    final = trainer.warnings_about(after)
    if after and (before[name] - after[name]) * (1 if plan.greater_is_better else -1) > 0:
        final.append(f"{plan.metric} is worse than before training: lower --lr, and look at the data")
    if not plan.has_dev and len(losses) > 1 and losses[-1] < 0.1 * losses[0]:
        final.append(f"the loss fell by {1 - losses[-1] / losses[0]:.0%} with no dev set to tell learning from "
                     "learning by heart: pass --dev_file or --dev_size")
    for text in final:
        say(f"warning   {text}")
    return before, after, worsenings(state.log_history, plan.watched) + final


def is_finished(stored, args, plan):
    """Tell whether a checkpoint's trainer_state.json is that of a run's last step, early stopping included."""
    waited = stored["stateful_callbacks"].get("EarlyStoppingCallback", {}).get("attributes", {})
    patience = args.early_stopping_patience or math.inf
    return stored["global_step"] >= plan.total_steps or waited.get("early_stopping_patience_counter", 0) >= patience


def prove(trainer, folder, base, inputs, outputs, auto_class):
    """Load what was saved from disk and compare its outputs (B, D) with the live model's and with the `base`'s.

    inputs(tokenizer): token ids of a few texts; outputs(token ids): of the trainer's model. Returns {"relative_error",
    "relative_change"}; raises RuntimeError if the model on disk differs from the live one, and InputError if its
    tokenizer does, or if it does not differ from the base.
    """
    ids, model = saved_inputs(trainer.flags, folder, trainer.processing_class, inputs), trainer.model
    live = outputs(inputs(trainer.processing_class))
    if isinstance(model, PeftModel):
        model.load_adapter(folder, adapter_name="reloaded")
        model.set_adapter("reloaded")
        reloaded = outputs(ids)
        model.set_adapter("default")
        model.delete_adapter("reloaded")
    else:
        trainer.model = auto_class.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trainer.flags.trust_remote_code
        ).to(model.device)
        reloaded, trainer.model = outputs(ids), model
    error, change = ((x - live).norm().item() / live.norm().item() for x in (reloaded, base))
    if error > (1e-2 if trainer.args.fp16 or trainer.args.bf16 else 1e-5):
        raise RuntimeError(f"{folder} does not give the trained model's outputs: relative error {error:.1e}.")
    if change == 0:
        raise InputError(f"{folder} changes nothing: its outputs are those before training. Raise --lr or --epochs.")
    say(f"proof     {folder}, read back from disk, gives the trained outputs (relative error {error:.0e}); "
        f"training moved them by {change:.1%}")
    return {"relative_error": error, "relative_change": change}


# ---------------------------------------------------------------- the files of a run


def is_whole(file):
    """Tell whether a file of a checkpoint is there and not cut off."""
    if not file.is_file():
        return False
    if file.suffix != ".safetensors":
        return zipfile.is_zipfile(file)  # torch.save writes an archive whose index stands at its end
    try:
        return bool(merge.read_header(file))
    except InputError:
        return False


def weights_lacking(folder):
    """Return the weights files that a checkpoint lacks, every shard that its index names among them."""
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").is_file() else "model.safetensors"
    if (folder / f"{name}.index.json").exists():
        index = read_json(folder / f"{name}.index.json")
        names = sorted(set(index["weight_map"].values())) if index else [f"{name}.index.json"]
    else:
        names = [name]
    return [name for name in names if not is_whole(folder / name)]


def parts_lacking(checkpoint):
    """Return the files without which a run cannot go on from a checkpoint as if it had not stopped."""
    run = read_json(checkpoint.parent / "training_config.json") or {}
    processes = run.get("processes", PartialState().num_processes)
    state = read_json(checkpoint / "trainer_state.json")
    parts = ["optimizer.pt", "scheduler.pt"] + ["scaler.pt"] * (run.get("precision") == "fp16")
    parts += [f"rng_state_{i}.pth" for i in range(processes)] if processes > 1 else ["rng_state.pth"]
    lacking = [name for name in parts if not is_whole(checkpoint / name)] + weights_lacking(checkpoint)
    if not isinstance(state, dict) or "global_step" not in state:  # Trainer writes it last
        return ["trainer_state.json", *lacking]
    best = best_checkpoint(checkpoint, state)
    return lacking + [f"{best.name}/{name}" for name in (weights_lacking(best) if best != checkpoint else [])]


def best_checkpoint(checkpoint, state):
    """Return the checkpoint that was the best one when `checkpoint` was written; a run's folder may have moved."""
    step = state.get("best_global_step") if state.get("best_model_checkpoint") else None
    return checkpoint.with_name(f"checkpoint-{step}") if step else checkpoint


def find_checkpoint(output_dir):
    """Return the newest complete checkpoint or None; says what newer ones lack."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in Path(output_dir).glob("checkpoint-*")}
    newest_first = sorted((path for path in steps if steps[path].isdecimal()), key=lambda path: -int(steps[path]))
    for path in newest_first:
        lacking = parts_lacking(path)
        if not lacking:
            return path
        say(f"resume    {path} is not complete: it lacks {', '.join(lacking)}")
    return None


def check_writable(folder):
    """Raise InputError if `folder` cannot be made, or nothing can be written in it; nothing is."""
    try:
        os.stat(folder / "checkpoint-1000000" / "adapter_model.safetensors")  # about the longest name of a run's files
    except (FileNotFoundError, NotADirectoryError):
        pass
    except PermissionError as error:
        raise InputError(f"--output_dir {folder} may not be written to ({error.strerror}). Name another.") from None
    except OSError as error:  # a name that is too long, links in a circle
        raise InputError(f"--output_dir {str(folder)[:99]} cannot be a folder ({error.strerror}).") from None
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--output_dir {folder}: {there.name} is a file. Name a folder.")
    if not os.access(there, os.W_OK | os.X_OK) or there.is_relative_to("/proc"):
        raise InputError(f"--output_dir {folder}: {there} may not be written to. Name another.")


def open_output_dir(args):
    """Return the checkpoint to resume from, or None; raises InputError rather than mix two runs in one folder."""
    folder = Path(args.output_dir)
    check_writable(folder)
    if args.resume_from_checkpoint:
        last = args.resume_from_checkpoint == "last"
        checkpoint = find_checkpoint(folder) if last else Path(args.resume_from_checkpoint)
        if checkpoint is None:
            say(f"resume    {folder} holds no complete checkpoint: starting at step 0")
            return None
        if not checkpoint.is_dir():
            raise InputError(f"--resume_from_checkpoint {checkpoint} is no complete checkpoint: there is no such "
                             f"folder (looked in {Path.cwd()}). Give no name, and the newest complete one is taken.")
        if not last and (lacking := parts_lacking(checkpoint)):
            raise InputError(f"--resume_from_checkpoint {checkpoint} is no complete checkpoint: it lacks "
                             f"{', '.join(lacking)}. Give no name, and the newest complete one is taken.")
        is_own = checkpoint.resolve().parent == folder.resolve()
        if not is_own and folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"--resume_from_checkpoint {checkpoint} is of another run than what --output_dir {folder} "
                             "holds. Name a new folder, or give --resume_from_checkpoint no name to go on with that.")
        say(f"resume    from {checkpoint}")
        return checkpoint
    if not args.overwrite and folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"--output_dir {folder} is not empty. Pass another, --overwrite or --resume_from_checkpoint.")
    return None


def begin_output_dir(args, run):
    """Write training_config.json; with --overwrite, and once nothing can be refused any more, delete the old run."""
    folder = Path(args.output_dir)
    if args.overwrite and (folder / "training_config.json").exists():
        for path in [*folder.glob("checkpoint-*"), folder / "final", folder / "merged", folder / "runs"]:
            shutil.rmtree(path, ignore_errors=True)
        for path in [*folder.glob("training_*"), *folder.glob("predictions-*"), folder / "detailed_training_logs.json"]:
            path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "training_config.json", run)


def describe_run(args, precision, data_fingerprint, checkpoint):
    """Return what makes a run repeatable: flags, versions, fingerprints of data and base.

    Raises InputError if the run is resumed with flags, data, base, precision or processes other than its own.
    """
    names = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
    installed = {name: importlib.metadata.version(name) for name in names if importlib.util.find_spec(name)}
    run = {
        # the base is not quantised where nothing says how many bits
        "flags": {name: value for name, value in vars(args).items() if (name, value) != ("bits", None)},
        "versions": {"python": sys.version.split()[0]} | installed,
        "precision": precision,
        "processes": PartialState().num_processes,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "data_fingerprint": data_fingerprint,
        "base_fingerprint": base_fingerprint(args),
    }
    stored = merge.read_json(checkpoint.parent / "training_config.json") if checkpoint else None
    if stored:
        compared = ("data_fingerprint", "precision", "processes")
        old, new = (each["flags"] | {name: each[name] for name in compared} for each in (stored, run))
        changed = [f"{name} was {old.get(name)} and is {new.get(name)}" for name in sorted(old.keys() | new.keys())
                   if name not in FREE_ON_RESUME and old.get(name) != new.get(name)]
        if changed:
            raise InputError(f"cannot resume {checkpoint}: {', '.join(changed)}. Give the flags of that run.")
        if not merge.is_base(base_folder(args), stored.get("base_fingerprint")):
            raise InputError(f"cannot resume {checkpoint}: the weights of {args.model_name} are not those that it was "
                             "trained with. Put those back (of a hub model: --model_revision), or start anew.")
    return run


def save_final(trainer, folder, run):
    """Save the trained weights and tokenizer, and what made them, in files that everybody may read."""
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        write_json(folder / "training_config.json", run)
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes 0600, which a server's user cannot read


def carry_out(trainer, args, plan, run, checkpoint, tokens, inputs, outputs, auto_class, write_files):
    """Rehearse, train, save, prove and report; return the report, with --dry_run what is known before training.

    tokens: number of them in each training row; inputs(tokenizer): token ids of a few texts, outputs(token ids) (B, D):
    what the proof compares; write_files(folder) adds the script's own files to final/.
    """
    folder = Path(args.output_dir)
    if checkpoint and (report := read_json(folder / "training_summary_report.json")):
        say(f"resume    {folder} is finished: final/ and the report are there")
        return report
    with tempfile.TemporaryDirectory() as trial:  # not after hours of training
        trainer.processing_class.save_pretrained(trial)
        saved_inputs(args, trial, trainer.processing_class, inputs)
    preflight(args, trainer, plan, [trainer.train_dataset[i] for i in heaviest_rows(tokens, plan, args)])
    if args.dry_run:
        return run | {"plan": vars(plan)}
    resumed_after = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    started = time.perf_counter()
    if trainer.is_world_process_zero():
        begin_output_dir(args, run)
    trainer.before_training()
    base = outputs(inputs(trainer.processing_class))
    before, after, warnings = train(trainer, args, plan, checkpoint)
    seconds = time.perf_counter() - started
    save_final(trainer, folder / "final", run)
    if trainer.is_world_process_zero():
        write_files(folder / "final")
    trainer.accelerator.wait_for_everyone()
    proof = prove(trainer, str(folder / "final"), base, inputs, outputs, auto_class)
    report = write_report(trainer, args, run, {
        "plan": vars(plan), "metrics": (before, after), "proof": proof, "warnings": warnings, "seconds": seconds,
        "resumed_after": resumed_after})
    if args.finetune_type != "full" and trainer.is_world_process_zero():
        flags = ["--lora_adapter_path", str(folder / "final"), "--output_path", str(folder / "merged")]
        flags += ["--trust_remote_code"] * args.trust_remote_code
        if args.merge_adapter:
            merge.main(flags)
        else:
            say(f"next      python merge.py {shlex.join(flags)}")
    return report


def write_logs(folder, log, steps_per_epoch):
    """Write every logged step, and the mean training loss of each epoch."""
    sums, counts, last = defaultdict(float), defaultdict(int), 0
    for entry in log:
        if "loss" in entry:  # the mean since the last one
            epoch, steps, last = (entry["step"] - 1) // steps_per_epoch + 1, entry["step"] - last, entry["step"]
            sums[epoch] += entry["loss"] * steps
            counts[epoch] += steps
    write_json(Path(folder) / "detailed_training_logs.json", [entry for entry in log if "train_runtime" not in entry])
    losses = [{"epoch": epoch, "loss": total / counts[epoch]} for epoch, total in sums.items()]
    write_json(Path(folder) / "training_losses.json", losses)


def running_mean(values):
    """Return the mean of each value and those before it, over at most a tenth of all and 50 values."""
    window = max(1, min(50, len(values) // 10))
    means = []
    for i in range(len(values)):
        means.append(fmean(values[max(0, i + 1 - window) : i + 1]))
    return means


def can_be_drawn(text):
    """Tell whether the fonts of the figure have every character: Japanese is missing from matplotlib's own."""
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = [get_font(findfont(FontProperties(family=[name]))) for name in rcParams["font.family"]]
    return all(any(font.get_char_index(ord(character)) for font in fonts) for character in text)


def draw_curves(path, log, metrics, best_step):
    """Draw the training loss of each step, its running mean, and the named metrics over the steps."""
    from matplotlib.figure import Figure  # not pyplot, whose backend belongs to the notebook

    figure = Figure(figsize=(8, 7), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True)
    trained = [entry for entry in log if "loss" in entry]
    if trained:
        steps = [entry["step"] for entry in trained]
        losses = [entry["loss"] for entry in trained]
        smooth = running_mean(losses)
        top.plot(steps, losses, color="C0", alpha=0.3)
        top.plot(steps, smooth, color="C0", label=f"loss: {smooth[0]:.3f} to {smooth[-1]:.3f} (running mean)")
    for name in metrics:
        points = [(entry["step"], entry[f"eval_{name}"]) for entry in log if f"eval_{name}" in entry]
        if points:
            label = f"{name}: {points[0][1]:.3f} to {points[-1][1]:.3f}"
            bottom.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    for axes in (top, bottom):
        if best_step:
            axes.axvline(best_step, color="grey", linestyle=":", label=f"best, step {best_step}")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    title = str(path.parent)
    top.set(ylabel="training loss", title=title if can_be_drawn(title) else "")
    bottom.set(xlabel="optimizer step", ylabel="dev sets")
    figure.savefig(path, dpi=120)


def write_report(trainer, args, run, results):
    """Write logs, curves and report of a finished run, print three lines, and return the report."""
    folder, state, plan = Path(args.output_dir), trainer.state, results["plan"]
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    before, after = ({key.removeprefix("eval_"): value for key, value in side.items()} for side in results["metrics"])
    seconds = results["seconds"] - trainer.evaluation_seconds
    tokens = torch.tensor([trainer.real_tokens, trainer.padded_tokens], device=trainer.args.device)
    real_tokens, padded_tokens = trainer.accelerator.reduce(tokens).tolist()  # of all processes
    report = run | results | {
        "metrics": {"before": before, "after": after},
        "steps": state.global_step, "best_step": state.best_global_step if plan["save_best"] else None,
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "tokens_per_second": real_tokens / seconds, "peak_gib": peak_gib(),
        "padded_per_real_token": padded_tokens / max(1, real_tokens),
    }
    if trainer.is_world_process_zero():
        write_logs(folder, state.log_history, plan["steps_per_epoch"])
        draw_curves(folder / "training_curves.png", state.log_history, plan["shown"], report["best_step"])
        write_json(folder / "training_summary_report.json", report)
    for name in plan["shown"]:
        if name in before and name in after:
            say(f"result    {name} {before[name]:.4f} before, {after[name]:.4f} after")
    first = results["resumed_after"]  # the seconds and tokens are those of the steps behind it
    steps = f"{report['steps'] - first} steps" + (f" after step {first}" if first else "")
    say(f"          {steps} in {seconds:.0f} s and {trainer.evaluation_seconds:.0f} s of evaluation, "
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['padded_per_real_token']:.2f} padded per real token, "
        f"{report['peak_gib']:.1f} GiB")
    return report

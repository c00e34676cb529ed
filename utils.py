"""What both trainers would be wrong to disagree on: flags, rows, the base model, the exact step, the files of a run.

Shapes: B sequences, T tokens.
"""

import argparse
import csv
import gc
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names an optional CPU kernel at every import
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate|peft")

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from accelerate.utils.memory import should_reduce_batch_size  # noqa: E402
from datasets import get_dataset_split_names, load_dataset  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    PreTrainedConfig,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.utils import cached_file  # noqa: E402

PIECE_TOKENS = {"cpu": 448, "cuda": 32768}  # padded tokens of one forward pass at which each device is fastest
MAX_SKIPPED_STEPS = 20  # fp16: the loss scale falls from 65536 to below 1 in 17 skipped steps
# flags that may differ between a run and its continuation without changing the weights
FREE_ON_RESUME = {"output_dir", "overwrite", "resume_from_checkpoint", "num_workers", "report_to", "save_total_limit"}


class InputError(ValueError):
    """A flag, file or folder of the user's is wrong: shown as one sentence, without a traceback, exit code 1."""


def say(*parts):
    """Print on the first process alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*parts, flush=True)


# ---------------------------------------------------------------- arguments


def integer(least):
    """Argparse type: a whole number of at least `least`."""

    def whole_number(text):
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    return whole_number


def real(low, high=math.inf, without=""):
    """Argparse type: a number from `low` to `high`; `without` names the ends that are excluded ("low", "high")."""

    def number(text):
        value = float(text)
        inside = low <= value <= high and not (value == low and "low" in without or value == high and "high" in without)
        if not inside or math.isinf(value):
            brackets = "(" if "low" in without else "[", ")" if "high" in without or high == math.inf else "]"
            raise argparse.ArgumentTypeError(f"{text} is outside {brackets[0]}{low}, {high}{brackets[1]}")
        return value

    return number


def add_shared_flags(parser, model, batch, step, epochs, dev_size, checkpointing, metric):
    """Declare the flags both trainers have; the arguments are the defaults in which they differ."""
    add = parser.add_argument_group("model").add_argument
    add("--model_name", "--model_name_or_path", metavar="ID", help=f"hub id or local folder [{model}]")
    add("--model_revision", metavar="REV", help="branch, tag or commit of a hub model [main]")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the base model")
    add("--attn_implementation", default="auto", choices=["auto", "eager", "sdpa", "flash_attention_2"], help="[auto]")
    add("--finetune_type", "--training_type", default="lora", choices=["lora", "qlora", "full"], help="[lora]")
    add("--load_in_8bit", action="store_true", help="quantise the base to 8 bits (bitsandbytes)")
    add("--load_in_4bit", action="store_true", help="quantise the base to 4 bits (bitsandbytes NF4)")
    add("--quantization_bits", type=int, choices=[4, 8], help="the same as a number [qlora alone means 4]")
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
    add("--dev_size", type=real(0, 1, "high"), default=dev_size, metavar="X", help=f"share held out [{dev_size}]")
    add("--num_workers", type=integer(0), default=0, metavar="N", help="extra processes that tokenise and load [0]")

    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_r", type=integer(1), metavar="N", help="rank [16]")
    add("--lora_alpha", type=integer(1), metavar="N", help="scale is alpha/r: larger is stronger [32]")
    add("--lora_dropout", type=real(0, 1), metavar="P", help="dropout on the adapters' inputs [0]")
    add("--target_modules", metavar="NAMES", help="comma-separated names of linear layers [all-linear]")
    add("--use_rslora", action="store_true", help="scale is alpha/sqrt(r) instead")
    add("--model_dropout", action="store_true", help="keep the base's own dropout on; steps are then not exact")

    add = parser.add_argument_group("training").add_argument
    add("--batch_size", type=integer(1), default=batch, metavar="N", help=f"examples in memory, per process [{batch}]")
    add("--gradient_accumulation", "--gradient_accumulation_steps", type=integer(1), metavar="N",
        help=f"pieces that make one exact step of batch_size x N examples [a step of {step} examples]")  # fmt: skip
    add("--epochs", "--num_train_epochs", type=real(0, without="low"), default=epochs, metavar="X", help=f"[{epochs}]")
    add("--max_steps", type=integer(1), metavar="N", help="optimizer steps, in place of --epochs")
    add("--lr", "--learning_rate", type=real(0, 1, "low high"), metavar="X", help="peak [2e-4; full fine-tuning 2e-5]")
    add("--lr_scheduler", "--lr_scheduler_type", default="cosine", choices=["linear", "cosine", "constant"],
        help="after the warm-up [cosine]")  # fmt: skip
    add("--warmup_steps", type=integer(0), metavar="N", help="steps of linear warm-up; beats --warmup_ratio")
    add("--warmup_ratio", "--warmup_proportion", type=real(0, 1, "high"), default=0.05, metavar="X",
        help="share of the steps that warm up [0.05]")  # fmt: skip
    add("--optimizer", "--optim", default="adamw", choices=["adamw", "adamw_8bit", "sgd"], help="[adamw]")
    add("--weight_decay", type=real(0), default=0.01, metavar="X", help="decoupled weight decay [0.01]")
    add("--max_grad_norm", type=real(0), default=1.0, metavar="X", help="clip the gradient's norm; 0 = off [1.0]")
    add("--fp16", action="store_true", help="float16 with loss scaling")
    add("--bf16", action="store_true", help="bfloat16, on GPUs of compute capability 8.0 and newer")
    add("--mixed_precision", choices=["bf16", "fp16", "none"], help="the same as a name [what the GPU is made for]")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=checkpointing,
        help=f"recompute activations to save memory [{'on' if checkpointing else 'off'}]")  # fmt: skip
    add("--seed", type=integer(0), default=42, metavar="N", help="of rows, adapters and dropout [42]")
    add("--full_determinism", action="store_true", help="bit-for-bit repeatable kernels on a GPU (slower)")
    add("--resume_from_checkpoint", nargs="?", const="last", metavar="DIR", help="go on where --output_dir stopped")

    add = parser.add_argument_group("evaluation and output").add_argument
    add("--output_dir", metavar="DIR", help="where everything goes [runs/<script>-<date-time>]")
    add("--overwrite", action="store_true", help="delete what an earlier run left in --output_dir")
    add("--save_best", type=int, choices=[0, 1], help="final/ is the best state, not the last [1 with a dev set]")
    add("--eval_every", "--eval_steps", type=integer(0), metavar="N", help="steps; 0 = each epoch [10 %% of the run]")
    add("--eval_strategy", choices=["no", "epoch", "steps"], help="steps without --eval_every: every --logging_steps")
    add("--early_stopping_patience", type=integer(1), metavar="N", help="evaluations without a new best, 3-5 [off]")
    add("--metric_for_best", "--metric_for_best_model", metavar="NAME", help=f"[{metric}]")
    add("--checkpoint_strategy", default="steps", choices=["no", "epoch", "steps"], help="[steps]")
    add("--save_on_epoch_end", type=int, choices=[0, 1], default=0, help="checkpoint every epoch and keep them all [0]")
    add("--checkpoint_steps", "--save_steps", type=integer(1), metavar="N", help="steps [10 %% of the run]")
    add("--save_total_limit", type=integer(1), metavar="N", help="checkpoints kept [2; all with --save_on_epoch_end 1]")
    add("--logging_steps", type=integer(-1), default=10, metavar="N", help="steps; -1 = every step, 0 = off [10]")
    add("--report_to", choices=["none", "tensorboard", "mlflow", "wandb"], help="[tensorboard if installed]")
    add("--dry_run", action="store_true", help="check everything, train nothing")


def finish_shared_flags(parser, args, model, step):
    """Check the flags that depend on one another and fill in the defaults that do; exits 2 through `parser.error`."""
    if not args.train_file and not args.dataset_name:
        parser.error("no training data: pass --train_file FILE or --dataset_name ID")
    if args.train_file and args.dataset_name:
        parser.error("--train_file and --dataset_name both name training data: pass one")
    if args.fp16 + args.bf16 + (args.mixed_precision is not None) > 1:
        parser.error("--fp16, --bf16 and --mixed_precision exclude one another: pass one")
    bits = {args.quantization_bits, 8 if args.load_in_8bit else None, 4 if args.load_in_4bit else None} - {None}
    if len(bits) > 1:
        parser.error("8 and 4 bits are both asked for: pass one of --load_in_8bit, --load_in_4bit, --quantization_bits")
    args.bits = bits.pop() if bits else 4 if args.finetune_type == "qlora" else None
    if args.finetune_type == "full" and (args.bits or args.init_adapter):
        parser.error("--finetune_type full trains all weights: it takes neither quantisation nor --init_adapter")
    no_eval = args.eval_strategy == "no" or not (
        args.dev_size or args.dev_sample_limit or args.dev_file or args.dataset_dev_split
    )
    if (args.save_best or args.early_stopping_patience) and no_eval:
        parser.error("--save_best and --early_stopping_patience need an evaluation: leave --eval_strategy, set --dev_size")
    if args.checkpoint_strategy == "no" and (args.save_best or args.early_stopping_patience or args.save_on_epoch_end):
        parser.error("--checkpoint_strategy no leaves nothing to come back to: --save_best, early stopping and "
                     "--save_on_epoch_end need checkpoints")  # fmt: skip
    if args.early_stopping_patience and args.save_best == 0:
        parser.error("--early_stopping_patience keeps the best state: drop --save_best 0")
    if args.resume_from_checkpoint == "last" and not args.output_dir:
        parser.error("--resume_from_checkpoint needs the --output_dir of the run that stopped")
    if args.resume_from_checkpoint and args.overwrite:
        parser.error("--resume_from_checkpoint goes on with a run that --overwrite would delete: pass one")
    given = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "use_rslora": args.use_rslora or None}
    if args.target_modules and args.target_modules != "all-linear":
        args.target_modules = sorted(filter(None, map(str.strip, args.target_modules.split(","))))
        given["target_modules"] = args.target_modules
    stored = {}
    if args.init_adapter:
        stored = read_json(Path(args.init_adapter) / "adapter_config.json", missing=None)
        if stored is None:
            parser.error(f"--init_adapter {args.init_adapter} has no adapter_config.json: name a folder a trainer wrote")
        stored["target_modules"] = sorted(stored["target_modules"] or [])
        for name, value in given.items():
            if value is not None and stored[name] != value:
                parser.error(f"--init_adapter was trained with {name} {stored[name]}, not {value}: drop that flag")
    args.model_name = args.model_name or stored.get("base_model_name_or_path") or model
    args.lora_r = stored.get("r") or args.lora_r or 16
    args.lora_alpha = stored.get("lora_alpha") or args.lora_alpha or 32
    args.use_rslora = stored.get("use_rslora", args.use_rslora)
    args.target_modules = stored.get("target_modules") or args.target_modules or "all-linear"
    args.lr = args.lr or (2e-5 if args.finetune_type == "full" else 2e-4)
    args.gradient_accumulation = args.gradient_accumulation or max(1, step // args.batch_size)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    args.output_dir = args.output_dir or f"runs/{Path(parser.prog).stem}-{stamp}"
    return args


# ---------------------------------------------------------------- the process


def run(main):
    """Start `main` as a command: several GPUs through torchrun, the user's mistakes in one sentence, exit code 1."""
    if sys.argv[0].endswith("kernel_launcher.py"):  # the file was pasted whole into a notebook cell
        return say('Defined. Now call main(["--train_file", "pairs.jsonl"]) with the flags you want.')
    gpus = torch.cuda.device_count()
    if gpus > 1 and "LOCAL_RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        command += sys.argv
        say(f"{gpus} GPUs are visible: a step has {gpus} times the examples. Restarting as\n  {' '.join(command)}")
        os.execv(sys.executable, command)
    try:
        main()
    except InputError as error:
        say(f"error: {error}")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def start_process(args):
    """Join the process group if there is one; return this process' accelerate state."""
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    state = PartialState(cpu=on_cpu)
    if torch.cuda.device_count() > 1 and state.num_processes == 1:
        say("several GPUs are visible, this call uses the first; start the script from a shell to use all")
    return state


def read_json(path, missing=None):
    """Return the parsed file, or `missing` where there is none or it does not parse."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return missing


def write_json(path, content):
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    part.replace(path)


# ---------------------------------------------------------------- data


def read_rows(path):
    """Read one file into [(where, row)], where naming the file and the line; raises InputError on what is no row."""
    path, kind = Path(path), Path(path).suffix.lower()
    if kind not in {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}:
        raise InputError(f"{path} is none of .jsonl, .json, .csv, .tsv, .parquet. Convert it to JSON Lines.")
    if kind == ".parquet":
        import pyarrow.parquet

        try:
            return [(f"{path}, row {i}", row) for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)]
        except pyarrow.ArrowInvalid as error:
            raise InputError(f"{path} is no parquet file ({error}). Write it again.") from None
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: Excel starts a CSV with a byte order mark
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    if kind in {".csv", ".tsv"}:
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(text.splitlines(keepends=True), delimiter="\t" if kind == ".tsv" else ",")
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
        for where, row in rows:
            if None in row or None in row.values():
                raise InputError(f"{where}: not the {len(reader.fieldnames)} columns of the first line. Quote the text.")
    elif kind == ".json" and text.lstrip().startswith("[") and (whole := _parse(text, path)) is not None:
        rows = [(f"{path}, row {i}", row) for i, row in enumerate(whole, 1)]
    else:
        lines = ((f"{path}, line {i}", line) for i, line in enumerate(text.splitlines(), 1) if line.strip())
        rows = [(where, _parse(line, where)) for where, line in lines]
    for where, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where}: a {type(row).__name__}, not a JSON object. Write one {{...}} a row.")
    if not rows:
        raise InputError(f"{path} holds no rows. Write one JSON object a line.")
    return rows


def _parse(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: no valid JSON ({error.msg}, column {error.colno}). Mend or delete it.") from None


def expand_files(patterns):
    """Return the files that names and globs stand for; raises InputError for one that stands for none."""
    files = []
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise InputError(f"{pattern} is not there (looked in {Path.cwd()}). Check the path.")
        files += found
    return files


def read_hub_rows(args, split):
    """Read one split of --dataset_name into [(where, row)], or None where there is no such split, which is said."""
    try:
        splits = get_dataset_split_names(args.dataset_name, args.dataset_subset, revision=args.hf_revision)
        if split not in splits:
            say(f"data      {args.dataset_name} has no split '{split}' (there are: {', '.join(splits)})")
            return None
        # datasets does not notice that a file of a local folder has changed
        fresh = {"download_mode": "force_redownload", "verification_mode": "no_checks"}
        data = load_dataset(args.dataset_name, args.dataset_subset, split=split, revision=args.hf_revision,
                            **fresh if os.path.isdir(args.dataset_name) else {})  # fmt: skip
    except (ValueError, OSError) as error:  # no such data set, subset or revision; no network
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--dataset_name {args.dataset_name} cannot be read: {reason}") from None
    return [(f"{args.dataset_name}[{split}], row {i}", row) for i, row in enumerate(data, 1)]


def read_sources(args):
    """Read the training rows and the named dev sources: ([(where, row)], {name: path or [(where, row)]})."""
    dev = {}
    for source in args.dev_file or []:
        name, _, path = ("", "", source) if os.path.exists(source) else source.partition("=")
        path = path or name
        if name in dev:
            raise InputError(f"--dev_file {source}: a dev set is called '{name}' already. Write --dev_file NAME=PATH.")
        dev[name] = expand_files([path])[0]
    if args.train_file:
        return [pair for file in expand_files(args.train_file) for pair in read_rows(file)], dev
    rows = read_hub_rows(args, args.dataset_split)
    if rows is None:
        raise InputError(f"--dataset_split {args.dataset_split} does not exist. Pass one of the splits named above.")
    if args.dataset_dev_split and (dev_rows := read_hub_rows(args, args.dataset_dev_split)):
        dev[""] = dev_rows
    return rows, dev


def text_id(text):
    """Return 63 bits that two texts share if they differ in case and white space alone."""
    normal = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "big") >> 1


# ---------------------------------------------------------------- the base model


def base_json(args, filename):
    """Return a JSON file of the base model, local or on the hub, or None where it has none."""
    for folder in filter(None, [args.init_adapter, args.model_name]):
        path = cached_file(folder, filename, revision=None if folder == args.init_adapter else args.model_revision,
                           _raise_exceptions_for_missing_entries=False,
                           _raise_exceptions_for_connection_errors=False)  # fmt: skip
        if path:
            return read_json(path)
    return None


def load_config(args):
    """Read the base model's config; raises InputError where there is none or its code may not be run."""
    where = {"revision": args.model_revision}
    if not os.path.isdir(args.model_name) and args.model_name.startswith((".", "/", "~")):
        raise InputError(f"--model_name {args.model_name} is not there. Check the path.")
    try:
        stored, _ = PreTrainedConfig.get_config_dict(args.model_name, **where)
    except OSError as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--model_name {args.model_name} has no config.json that can be read: {reason}") from None
    if not stored:
        raise InputError(f"--model_name {args.model_name} has no config.json. Name the folder that holds it.")
    if "auto_map" in stored and stored.get("model_type") not in CONFIG_MAPPING and not args.trust_remote_code:
        raise InputError(f"{args.model_name} comes with Python code of its own. Read it, then pass --trust_remote_code.")
    try:
        config = AutoConfig.from_pretrained(args.model_name, trust_remote_code=args.trust_remote_code, **where)
    except (ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{args.model_name}/config.json is of no known model: {reason}") from None
    if config.is_encoder_decoder:
        raise InputError(f"{args.model_name} is an encoder-decoder. Choose an encoder or a decoder.")
    return config


def load_tokenizer(args):
    """Load the tokenizer of the base (of --init_adapter where that has one), padding on the right."""
    saved = args.init_adapter and (Path(args.init_adapter) / "tokenizer_config.json").exists()
    source, revision = (args.init_adapter, None) if saved else (args.model_name, args.model_revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{source} has no tokenizer that can be read: {reason}") from None
    tokenizer.padding_side = "right"
    return tokenizer


def position_limit(config, tokenizer):
    """Return the longest sequence the base can take, in tokens (math.inf if nothing says so)."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or math.inf
    if any(name in config.model_type for name in ("roberta", "camembert", "mpnet")):
        limit -= (config.pad_token_id or 0) + 1  # their positions start behind the padding index
    return min(limit, tokenizer.model_max_length)


def choose_precision(args):
    """Return ("bf16" | "fp16" | "none", the reason): bf16 from compute capability 8.0 on, fp16 below, none on a CPU."""
    asked = args.mixed_precision or ("fp16" if args.fp16 else "bf16" if args.bf16 else None)
    if not torch.cuda.is_available():
        return "none", "float32, no GPU" + (f" for --{asked}" if asked in ("fp16", "bf16") else "")
    # torch.cuda.is_bf16_supported() is no help: it counts emulation, as on a T4
    modern = torch.cuda.get_device_capability() >= (8, 0)
    if asked == "bf16" and not modern:
        return "fp16", "fp16, this GPU only emulates bf16"
    chosen = asked or ("bf16" if modern else "fp16")
    return chosen, {"none": "float32", "fp16": "fp16 with loss scaling", "bf16": "bf16"}[chosen]


def without_dropout(config):
    """Set every dropout of a config, and of the configs inside it, to 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and ("drop" in name):
            setattr(config, name, 0.0)


def load_base(args, auto_class, config, precision, notes):
    """Load the base model in the compute dtype (float32 for full fine-tuning), quantised if asked; adds to `notes`."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}[precision]
    attention = None if args.attn_implementation == "auto" else args.attn_implementation
    if attention == "flash_attention_2":
        modern = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        if not modern or importlib.util.find_spec("flash_attn") is None:
            attention = "sdpa"
            notes.append("flash attention 2 needs the flash-attn package and compute capability 8.0: SDPA instead")
    if not args.model_dropout:
        without_dropout(config)
    config.use_cache = False  # a decoder would build a key-value cache in every training step
    options = dict(config=config, revision=args.model_revision, trust_remote_code=args.trust_remote_code,
                   dtype=torch.float32 if args.finetune_type == "full" else dtype)  # fmt: skip
    if attention:
        options["attn_implementation"] = attention
    device = PartialState().device
    if args.bits:
        quantisation = BitsAndBytesConfig(load_in_8bit=args.bits == 8, load_in_4bit=args.bits == 4,
                                          bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
                                          bnb_4bit_use_double_quant=True)  # fmt: skip
        try:
            model = auto_class.from_pretrained(
                args.model_name, quantization_config=quantisation, device_map={"": device}, **options
            )
            for parameter in model.parameters():
                parameter.requires_grad_(False)
                if parameter.ndim == 1:  # norms and biases; embeddings and head stay small
                    parameter.data = parameter.data.float()
            for module in model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu"):
                    # bitsandbytes 0.50: after one evaluation its bf16 kernel, without a gradient, stays on in training
                    module.support_avx512bf16_for_cpu = False
            return model
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            notes.append(f"{args.bits}-bit loading failed, so the base is not quantised: {str(error).splitlines()[0]}")
            args.bits = None
    try:
        return auto_class.from_pretrained(args.model_name, **options).to(device)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{args.model_name} cannot be loaded: {reason}") from None


def add_lora(model, args, task, unused, notes):
    """Wrap the base with a new LoRA adapter, or with --init_adapter's; `unused` linear layers get none.

    With --finetune_type full the model comes back as it is, its unused layers frozen. All trainable weights are float32.
    """
    if args.finetune_type == "full":
        for name in unused:
            model.get_submodule(name).requires_grad_(False)
    elif args.init_adapter:
        model = PeftModel.from_pretrained(model, args.init_adapter, is_trainable=True)
        if args.lora_dropout is not None:  # peft would keep the stored one
            for module in model.modules():
                if "default" in getattr(module, "lora_dropout", {}):
                    module.lora_dropout["default"] = nn.Dropout(args.lora_dropout) if args.lora_dropout else nn.Identity()
            model.peft_config["default"].lora_dropout = args.lora_dropout
        args.lora_dropout = model.peft_config["default"].lora_dropout
    else:
        config = LoraConfig(
            r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout or 0.0,
            target_modules=args.target_modules, exclude_modules=unused or None, use_rslora=args.use_rslora,
            task_type=task,
        )  # fmt: skip
        try:
            model = get_peft_model(model, config)
        except ValueError as error:
            linear = sorted({n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise InputError(f"--target_modules {args.target_modules}: {str(error).splitlines()[0]} "
                             f"Linear layers here: {', '.join(linear)}.") from None  # fmt: skip
    if unused:
        notes.append(f"not trained, because the forward pass never uses it: {', '.join(unused)}")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # fp16 weights cannot be unscaled
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.activation_checkpointing_enable({"use_reentrant": False})
    return model


# ---------------------------------------------------------------- the exact step


def cut(lengths, budget):
    """Cut sequences into pieces, longest first, each of at most `budget` padded tokens (or of one sequence).

    Returns lists of indices into `lengths`.
    """
    pieces = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if pieces and (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] <= budget:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces


def is_out_of_memory(error):
    """Tell whether a RuntimeError means that memory ran out, on any device."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    )


class StepTrainer(Trainer):
    """A Trainer whose batch is one whole optimizer step: {"sequences": [token ids], "rows": examples, ...}.

    The step is cut into pieces of at most --batch_size examples' tokens; a subclass' `run_step(model, step, pieces,
    at_once)` runs forward and backward so that the gradient is that of the uncut step. When memory runs out the step
    starts again from zero gradients with pieces half the size, and so do all later ones.
    """

    def __init__(self, *, batch_size, measure, **kwargs):
        super().__init__(**kwargs)
        self.batch_size, self.measure = batch_size, measure
        self.device_tokens = PIECE_TOKENS.get(self.args.device.type, PIECE_TOKENS["cuda"])
        self.halvings = 0  # how often memory ran out
        self.real_tokens = self.padded_tokens = 0

    def training_step(self, model, step, num_items_in_batch=None):
        """Run forward and backward of one step; return its loss."""
        model.train()
        loss = self.until_it_fits(lambda: self.run_step(model, step, *self.cut_step(step)))
        if not torch.isfinite(loss):
            raise InputError(f"the loss is {loss.item()} in step {self.state.global_step + 1}: lower --lr"
                             + (", or pass --mixed_precision none." if self.args.fp16 else "."))  # fmt: skip
        return loss

    def until_it_fits(self, attempt):
        """Return attempt(), called again from zero gradients with pieces half the size each time memory runs out."""
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.accelerator.num_processes > 1 or 2**self.halvings > self.device_tokens:
                    raise InputError("out of memory: lower --max_length or --batch_size, or pass --load_in_4bit.") from error
            # outside the except block, where the error no longer holds the graph
            self.halvings += 1
            self.model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            say(f"memory    ran out: this step again, and the next ones, with pieces 1/{2**self.halvings} the size")

    def cut_step(self, step):
        """Return the step's pieces and whether all of them may be in memory at once (no accumulation)."""
        lengths = [len(ids) for ids in step["sequences"]]
        parts = math.ceil(step["rows"] / self.batch_size)
        budget = min(self.device_tokens, math.ceil(sum(lengths) / parts))
        pieces = cut(lengths, budget // 2**self.halvings)
        self.real_tokens += sum(lengths)
        self.padded_tokens += sum(len(piece) * lengths[piece[0]] for piece in pieces)
        return pieces, parts == 1 and not self.halvings

    def pad(self, step, piece):
        """Return a piece's input_ids (B, T), padded on the right with 0, and lengths (B,), on the device."""
        rows = [torch.tensor(step["sequences"][i]) for i in piece]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
        return input_ids.to(self.args.device), lengths.to(self.args.device)

    def evaluate(self, *args, **kwargs):
        """Measure the dev sets; Trainer's own evaluation would average per-batch means of a loss."""
        metrics = {f"eval_{name}": value for name, value in self.measure(self).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Progress(ProgressCallback):
    """Trainer's progress bar, with log lines a person can read."""

    def __init__(self, names):
        super().__init__()
        self.names = ["loss", "learning_rate", *(f"eval_{name}" for name in names)]

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = [f"{name.removeprefix('eval_')} {logs[name]:.4g}" for name in self.names if name in logs]
        if shown and state.is_world_process_zero:
            (self.training_bar.write if self.training_bar else say)(f"step {state.global_step:6}  {'   '.join(shown)}")


class RunCallback(TrainerCallback):
    """What happens around the steps: log where checkpoints are, stop on signals, write the logs, warn in words."""

    def __init__(self, trainer, args, plan, before):
        self.trainer, self.args, self.plan, self.before = trainer, args, plan, before
        self.signal, self.skipped, self.handlers, self.warnings = None, 0, {}, []

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and self.before:
            self.trainer.log(dict(self.before))
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.catch)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def catch(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt  # asked twice
        self.signal = number
        say("\nstopping after this step, with a checkpoint; once more stops at once")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.train_dataset.epoch = state.global_step // self.plan.steps_per_epoch

    def on_step_end(self, args, state, control, **kwargs):
        self.skipped = self.skipped + 1 if self.trainer.accelerator.optimizer_step_was_skipped else 0
        if self.skipped == MAX_SKIPPED_STEPS:
            raise InputError(f"fp16 gradients overflowed in {self.skipped} steps running: pass --mixed_precision none.")
        stop = self.signal is not None
        if self.trainer.accelerator.num_processes > 1:  # all processes must stop after the same step
            stop = self.trainer.accelerator.gather(torch.tensor([stop], device=args.device)).any().item()
        epoch_ends = state.global_step % self.plan.steps_per_epoch == 0
        if stop or epoch_ends and self.args.save_on_epoch_end:
            control.should_save = True
            control.should_training_stop |= stop
            control.should_evaluate |= self.plan.save_best and not stop
        # a resumed run begins a new window of losses where its checkpoint is: let every run do so
        if self.args.logging_steps and (control.should_save or epoch_ends):
            control.should_log = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        text = worsening(state.log_history, self.plan.metric, self.plan.greater_is_better)
        if text and text not in self.warnings:
            self.warnings.append(text)
            say(f"warning   {text}")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_logs(self.args.output_dir, state.log_history, self.plan)


def worsening(log, metric, greater_is_better):
    """Return a warning in words if the last three evaluations got worse while the training loss fell, else None."""
    points = [(entry["step"], entry[f"eval_{metric}"]) for entry in log if f"eval_{metric}" in entry][-3:]
    sign = 1 if greater_is_better else -1
    if len(points) < 3 or not all(sign * (b[1] - a[1]) < 0 for a, b in zip(points, points[1:], strict=False)):
        return None
    losses = [entry["loss"] for entry in log if "loss" in entry and points[0][0] <= entry["step"]]
    if len(losses) < 2 or losses[-1] >= losses[0]:
        return None
    return (f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} while {metric} worsened from {points[0][1]:.4f} to "
            f"{points[-1][1]:.4f}: overfitting. Fewer epochs, a lower --lr, or --lora_dropout 0.1.")  # fmt: skip


# ---------------------------------------------------------------- plan, preflight, proof


def make_plan(args, rows, dev, default_metric, greater_is_better, drop_last):
    """Work out a run's steps from its flags: a namespace of step_rows (per process), steps_per_epoch, total_steps, ..."""
    plan, notes = SimpleNamespace(metric=args.metric_for_best or default_metric), []
    world = PartialState().num_processes
    plan.step_rows = args.batch_size * args.gradient_accumulation
    if drop_last and rows < plan.step_rows * world:
        notes.append(f"{rows} rows are less than one step of {plan.step_rows * world}: the step is shrunk to them")
        plan.step_rows = rows // world
    per_epoch = rows / (plan.step_rows * world)
    plan.steps_per_epoch = math.floor(per_epoch) if drop_last else math.ceil(per_epoch)
    plan.dropped_rows = rows - plan.steps_per_epoch * plan.step_rows * world if drop_last else 0
    plan.total_steps = args.max_steps or math.ceil(args.epochs * plan.steps_per_epoch)
    tenth = max(1, round(plan.total_steps / 10))
    every_epoch = args.eval_strategy == "epoch" or args.eval_every == 0 or (args.save_on_epoch_end and not args.eval_every)
    steps_alone = max(1, args.logging_steps) if args.eval_strategy == "steps" else tenth
    plan.eval_steps = plan.steps_per_epoch if every_epoch else args.eval_every or steps_alone
    plan.has_dev = dev and args.eval_strategy != "no"
    plan.save_best = bool(plan.has_dev and args.save_best != 0 and args.checkpoint_strategy != "no")
    by_epoch = args.checkpoint_strategy == "epoch" or args.save_on_epoch_end
    plan.save_steps = args.checkpoint_steps or (plan.steps_per_epoch if by_epoch else tenth)
    if plan.save_best:
        plan.save_steps = plan.eval_steps
    plan.warmup_steps = args.warmup_steps
    if args.warmup_steps is None:
        plan.warmup_steps = int(args.warmup_ratio * plan.total_steps)
    plan.greater_is_better = greater_is_better(plan.metric)
    if plan.has_dev and args.eval_every and args.eval_every * 2 > plan.total_steps:
        better = max(1, round(plan.steps_per_epoch / 2.5))
        better = max(1, round(better, -int(math.log10(better))))
        times = "once" if args.eval_every <= plan.total_steps else "never"
        notes.append(f"--eval_every {args.eval_every} evaluates {times} in {plan.total_steps} steps, besides before "
                     f"and after; --eval_every {better} gives two or three an epoch")  # fmt: skip
    if args.lr < 5e-5 and args.finetune_type != "full":
        notes.append(f"--lr {args.lr:g} is low for LoRA, which wants about ten times the rate of full fine-tuning: 1e-4 to 3e-4")
    scale = args.lora_alpha / (math.sqrt(args.lora_r) if args.use_rslora else args.lora_r)
    if scale > 4 and args.lr >= 2e-4 and args.finetune_type != "full":
        notes.append(f"the LoRA scale {scale:.1f} at --lr {args.lr:g} is strong: lower --lora_alpha or --lr")
    if plan.dropped_rows:
        notes.append(f"each epoch leaves out {plan.dropped_rows} rows, drawn anew, that do not fill a step")
    plan.lora_scale, plan.notes = scale, notes
    return plan


def training_arguments(args, plan, precision, drop_last):
    """Translate flags and plan into Trainer's arguments; a batch of Trainer's is a whole step of ours."""
    report_to = args.report_to or ("tensorboard" if importlib.util.find_spec("tensorboard") else "none")
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise InputError(f"--report_to {report_to}: it is not installed. Run: pip install {report_to}")
    scheduler = "constant_with_warmup" if args.lr_scheduler == "constant" else args.lr_scheduler
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=plan.step_rows,
        gradient_accumulation_steps=1,
        max_steps=plan.total_steps,
        learning_rate=args.lr,
        lr_scheduler_type=scheduler,
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
        dataloader_pin_memory=cuda,
        eval_strategy="steps" if plan.has_dev else "no",
        eval_steps=plan.eval_steps,
        save_strategy="no" if args.checkpoint_strategy == "no" else "steps",
        save_steps=plan.save_steps,
        save_total_limit=args.save_total_limit or (None if args.save_on_epoch_end else 2),
        load_best_model_at_end=plan.save_best,
        metric_for_best_model=plan.metric if plan.save_best else None,
        greater_is_better=plan.greater_is_better,
        logging_strategy="steps" if args.logging_steps else "no",
        logging_steps=abs(args.logging_steps) or 1,
        logging_nan_inf_filter=False,  # it shows a NaN run as loss 0
        report_to=[] if report_to == "none" else [report_to],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # never nn.DataParallel
    return arguments


def rehearse(trainer, step):
    """Run the longest step's forward and backward; check the gradients; return (seconds, peak GiB).

    Raises InputError if a gradient is not finite or an adapter gets none.
    """
    rng, started = torch.get_rng_state(), time.perf_counter()
    model = trainer.model
    trainer.training_step(model, step)
    seconds = time.perf_counter() - started
    torch.set_rng_state(rng)
    bad = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or "lora_B" in name and not p.grad.any())]
    if bad:
        raise InputError(f"{len(bad)} trainable weights get no gradient ({bad[0]}, ...): narrow --target_modules.")
    if not trainer.args.fp16 and not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        raise InputError("the first gradient is not finite: pass --mixed_precision none, or check the base model.")
    model.zero_grad()
    trainer.real_tokens = trainer.padded_tokens = 0
    return seconds, peak_gib()


def peak_gib():
    """Return the most memory this process has had, in GiB: the GPU's if there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 / (2**10 if sys.platform == "darwin" else 1)


def prove(trainer, folder, base, outputs, auto_class):
    """Load what was saved from disk and compare its outputs() (B, D) with the live model's and with the `base`'s.

    Returns {"relative_error": ..., "relative_change": ...}; raises RuntimeError if the saved model differs from the
    live one, or does not differ from the base.
    """
    live, model = outputs(), trainer.model
    if isinstance(model, PeftModel):
        model.load_adapter(folder, adapter_name="reloaded")
        model.set_adapter("reloaded")
        reloaded = outputs()
        model.set_adapter("default")
        model.delete_adapter("reloaded")
    else:
        trainer.model = auto_class.from_pretrained(folder, dtype=torch.float32).to(model.device)
        reloaded, trainer.model = outputs(), model
    error, change = ((x - live).norm().item() / live.norm().item() for x in (reloaded, base))
    if error > (1e-5 if not (trainer.args.fp16 or trainer.args.bf16) else 1e-2):
        raise RuntimeError(f"{folder} does not give the trained model's outputs: relative error {error:.1e}.")
    if change == 0:
        raise InputError(f"{folder} changes nothing: its outputs are those before training. Raise --lr or --epochs.")
    say(f"proof     {folder}, loaded from disk, gives the trained outputs to {error:.0e}; training moved them by {change:.1%}")
    return {"relative_error": error, "relative_change": change}


def preflight(args, trainer, plan, rows, precision, notes):
    """Print the plan and rehearse the step made of `rows`, the longest ones; returns the plan as a dict for the report."""
    model, world = trainer.model, trainer.accelerator.num_processes
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trainable / sum(p.numel() for p in model.parameters())
    scale = "" if args.finetune_type == "full" else f", LoRA r {args.lora_r}, scale {plan.lora_scale:g}"
    plan.examples_per_step = plan.step_rows * world
    say(f"model     {args.model_name}: {trainable:,} weights train ({share:.2%}){scale}; {precision}"
        + (f"; {args.bits}-bit base" if args.bits else ""))  # fmt: skip
    say(f"plan      {plan.total_steps} steps of {plan.examples_per_step} examples ({args.batch_size} in memory x "
        f"{-(-plan.step_rows // args.batch_size)}" + (f" x {world} processes" if world > 1 else "")
        + f"), {plan.steps_per_epoch} an epoch; {plan.warmup_steps} warm up; lr {args.lr:g} {args.lr_scheduler}")  # fmt: skip
    say("          " + (f"evaluation before, every {plan.eval_steps} steps and at the end" if plan.has_dev else "no evaluation")
        + ("" if args.checkpoint_strategy == "no" else f"; checkpoint every {plan.save_steps}")
        + (f"; final/ is the best by {plan.metric}" if plan.save_best else ""))  # fmt: skip
    if args.lora_dropout or args.model_dropout or args.bits == 8 or trainer.args.fp16 or trainer.args.bf16:
        why = "dropout: exact for its own cut only" if args.lora_dropout or args.model_dropout else "8-bit: about 5 %"
        why = why if args.lora_dropout or args.model_dropout or args.bits == 8 else "half precision: about 1 %"
        notes.append(f"a step's gradient depends on the cut a little ({why})")
    for note in notes + plan.notes:
        say(f"note      {note}")
    seconds, peak = rehearse(trainer, trainer.data_collator(rows))
    say(f"rehearsal longest {len(rows)} examples: {seconds:.1f} s, {peak:.1f} GiB, gradients finite")
    return vars(plan) | {"notes": notes + plan.notes, "precision": precision}


def train(trainer, args, plan, checkpoint):
    """Train; returns (metrics before, metrics of what final/ will hold, warnings). Exits if a signal stopped the run."""
    stored = read_json(checkpoint / "trainer_state.json") if checkpoint else None
    if stored:
        before = {k: v for k, v in stored["log_history"][0].items() if k.startswith("eval_")}
    else:
        before = {f"eval_{k}": v for k, v in trainer.measure(trainer).items()} if plan.has_dev else {}
    callback = RunCallback(trainer, args, plan, before)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress(plan.shown))
    trainer.add_callback(callback)
    if args.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
    if stored and stored["global_step"] >= plan.total_steps:  # killed between its last checkpoint and final/
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        trainer._load_from_checkpoint(trainer.state.best_model_checkpoint or str(checkpoint))
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if callback.signal and trainer.state.global_step < plan.total_steps:
        say(f"stopped after step {trainer.state.global_step}. Go on with the same command and --resume_from_checkpoint")
        sys.exit(128 + callback.signal)
    evaluated = [entry for entry in trainer.state.log_history if f"eval_{plan.metric}" in entry]
    if plan.save_best:
        evaluated = [entry for entry in evaluated if entry["step"] == trainer.state.best_global_step]
    after = {key: value for key, value in evaluated[-1].items() if key.startswith("eval_")} if evaluated else {}
    name = f"eval_{plan.metric}"
    if after and (after[name] < before[name] if plan.greater_is_better else after[name] > before[name]):
        callback.warnings.append(f"{plan.metric} is worse than before training: lower --lr, or look at the data")
        say(f"warning   {callback.warnings[-1]}")
    return before, after, callback.warnings


def write_report(trainer, args, plan, config, counts, metrics, proof, warnings, seconds):
    """Write the logs, curves and report of a finished run; print three lines; return the report."""
    folder, log = Path(args.output_dir), trainer.state.log_history
    losses = [entry["loss"] for entry in log if "loss" in entry]
    before, after = ({key.removeprefix("eval_"): value for key, value in side.items()} for side in metrics)
    report = config | {
        "data": counts, "plan": plan, "metrics": {"before": before, "after": after}, "proof": proof, "warnings": warnings,
        "steps": trainer.state.global_step, "best_step": trainer.state.best_global_step if plan["save_best"] else None,
        "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
        "seconds": seconds, "tokens_per_second": trainer.real_tokens / seconds,
        "padded_per_real_token": trainer.padded_tokens / max(1, trainer.real_tokens), "peak_gib": peak_gib(),
    }  # fmt: skip
    if trainer.is_world_process_zero():
        write_logs(folder, log, SimpleNamespace(**plan))
        draw_curves(folder / "training_curves.png", log, plan["shown"], report["best_step"])
        write_json(folder / "training_summary_report.json", report)
    for name in plan["shown"]:
        if name in before and name in after:
            say(f"result    {name} {before[name]:.4f} before, {after[name]:.4f} after")
    say(f"          {report['steps']} steps in {seconds:.0f} s, {report['tokens_per_second']:,.0f} tokens/s, "
        f"{report['padded_per_real_token']:.2f} padded per real token, {report['peak_gib']:.1f} GiB")  # fmt: skip
    return report


# ---------------------------------------------------------------- the files of a run


def find_checkpoint(output_dir):
    """Return the newest complete checkpoint or None; Trainer writes trainer_state.json last, so it must parse."""
    complete = [path for path in Path(output_dir).glob("checkpoint-*") if read_json(path / "trainer_state.json")]
    return max(complete, key=lambda path: int(path.name.split("-")[1]), default=None)


def open_output_dir(args):
    """Return the checkpoint to resume from, or None; raises InputError rather than mix two runs in one folder."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint:
        named = Path(args.resume_from_checkpoint)
        checkpoint = find_checkpoint(folder) if args.resume_from_checkpoint == "last" else named
        if checkpoint is None:
            say(f"resume    {folder} holds no complete checkpoint: starting at step 0")
        elif read_json(checkpoint / "trainer_state.json") is None:
            raise InputError(f"--resume_from_checkpoint {checkpoint} is no complete checkpoint. Drop the path for the last.")
        return checkpoint
    left = [*folder.glob("checkpoint-*"), *(folder / n for n in ("final", "runs", "training_config.json"))]
    if args.overwrite and not args.dry_run:
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif folder.is_file() or folder.is_dir() and any(folder.iterdir()) and not args.overwrite:
        raise InputError(f"--output_dir {folder} is not empty. Pass --overwrite, --resume_from_checkpoint or another one.")
    return None


def check_same_run(args, config, checkpoint):
    """Refuse to resume with flags or data that differ from the run's; raises InputError naming them."""
    stored = read_json(Path(args.output_dir) / "training_config.json")
    if checkpoint is None or stored is None:
        return
    old, new = ({**c["flags"], "data": c["data_fingerprint"]} for c in (stored, json.loads(json.dumps(config, default=str))))
    changed = sorted(k for k in old.keys() | new.keys() if k not in FREE_ON_RESUME and old.get(k) != new.get(k))
    if changed:
        each = ", ".join(f"{k} was {old.get(k)} and is {new.get(k)}" for k in changed)
        raise InputError(f"cannot resume {checkpoint}: {each}. Give the flags of the run, or start another.")


def run_config(args, data_fingerprint):
    """Return what makes a run repeatable: flags, versions, and fingerprints of its data and base model."""
    names = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
    path = cached_file(args.model_name, "config.json", revision=args.model_revision)
    digest = hashlib.sha256()
    for file in sorted(Path(path).parent.glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(stream.read(2**20))  # the header and the first weights tell models apart
    return {
        "flags": vars(args),
        "versions": {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads",
        "data_fingerprint": data_fingerprint,
        "base_fingerprint": digest.hexdigest(),
    }


def write_logs(folder, log, plan):
    """Write every logged step, and the mean training loss of each epoch."""
    sums, counts, last = defaultdict(float), defaultdict(int), 0
    for entry in log:
        if "loss" in entry:
            epoch = (entry["step"] - 1) // plan.steps_per_epoch
            sums[epoch] += entry["loss"] * (entry["step"] - last)
            counts[epoch] += entry["step"] - last
            last = entry["step"]
    write_json(Path(folder) / "detailed_training_logs.json", [entry for entry in log if "train_runtime" not in entry])
    losses = [{"epoch": epoch + 1, "loss": sums[epoch] / counts[epoch]} for epoch in sums]
    write_json(Path(folder) / "training_losses.json", losses)


def draw_curves(path, log, names, best_step):
    """Draw the training loss and the metrics of `names` over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8, 7), layout="constrained")
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    if losses:
        top.plot(*zip(*losses, strict=True), color="tab:blue")
    top.set(ylabel="training loss", title=str(path.parent))
    for name in names:
        points = [(entry["step"], entry[f"eval_{name}"]) for entry in log if f"eval_{name}" in entry]
        if points:
            bottom.plot(*zip(*points, strict=True), marker="o", label=f"{name}: {points[0][1]:.3f} to {points[-1][1]:.3f}")
            bottom.legend()
    if best_step:
        bottom.axvline(best_step, color="grey", linestyle=":", label="best")
    bottom.set(xlabel="optimizer step", ylabel="dev sets")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""The flags that both trainers have: declared, checked against one another, filled in; no torch."""

import argparse
import os
from datetime import datetime
from pathlib import Path

from parts.flag_types import above_zero, count, integer, natural, one_of, real, share
from utils import InputError, checked_json

PREFERENCE_LOSSES = ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
# (flag, its key in adapter_config.json): a continued adapter keeps its own
OF_ADAPTER = (
    ("lora_r", "r"),
    ("lora_alpha", "lora_alpha"),
    ("use_rslora", "use_rslora"),
    ("target_modules", "target_modules"),
)


def add_switch(add, name, flag, value, meaning):
    """Declare a switch of other trainers that sets `flag` to `value`."""
    same = f"the same as {meaning}"
    add(name, dest=flag, action="store_const", const=value, default=argparse.SUPPRESS, help=same)


def make_parser(name, doc):
    """Return the parser of a script, whose docstring is the top of --help."""
    return argparse.ArgumentParser(
        name,
        usage="%(prog)s --train_file FILE [flags, see --help]",
        description=doc.partition("\nShapes: ")[0],  # what follows is for readers of the code
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# fmt: off


def add_first_flags(parser, model, batch, epochs):
    """Declare what most runs need; the arguments are the defaults in which the trainers differ."""
    add = parser.add_argument_group("what most runs need").add_argument
    add("--train_file", "--train_dataset", nargs="+", metavar="FILE",
        help="your rows: .jsonl .json .csv .tsv .parquet, or globs")
    add("--dev_file", action="append", metavar="[NAME=]PATH",
        help="rows to measure on, repeatable [held out of the training rows]")
    add("--model_name", "--model_name_or_path", metavar="ID",
        help=f"hub id or local folder [{model}]")
    add("--output_dir", metavar="DIR", help="where everything goes [runs/<script>-<date-time>]")
    add("--dry_run", action="store_true", help="check everything, train nothing")
    add("--epochs", "--num_train_epochs", type=above_zero, default=epochs, metavar="X",
        help=f"passes over the training rows; fractions are fine [{epochs}]")
    add("--lr", "--learning_rate", type=real(0, 1, {0, 1}), metavar="X",
        help="peak learning rate [2e-4; full fine-tuning 2e-5]")
    add("--batch_size", "--per_device_train_batch_size", type=count, default=batch, metavar="N",
        help=f"examples that must fit into memory, per process [{batch}]")
    add("--load_in_4bit", action="store_true",
        help="quantise the base to 4 bits, for a small GPU (bitsandbytes NF4)")
    add("--resume_from_checkpoint", nargs="?", const="last", metavar="DIR",
        help="go on where --output_dir stopped")


def add_model_flags(parser):
    """Declare how the base model is loaded, and what of it is trained."""
    add = parser.add_argument_group("model").add_argument
    add("--model_revision", metavar="REV", help="branch, tag or commit of a hub model [main]")
    add("--trust_remote_code", action="store_true", help="run the Python code of the base model")
    kernels = one_of("auto", "eager", "sdpa", "flash_attention_2")
    add("--attn_implementation", default="auto", **kernels,
        help="how attention is computed [auto: as the model prefers]")
    add_switch(add, "--flash_attention_v2", "attn_implementation", "flash_attention_2",
               "--attn_implementation flash_attention_2")
    add("--finetune_type", "--training_type", default="lora", **one_of("lora", "qlora", "full"),
        help="train adapters, adapters on a quantised base (qlora), or all weights (full) [lora]")
    add("--load_in_8bit", action="store_true", help="quantise the base to 8 bits (bitsandbytes)")
    add("--quantization_bits", "--quantization_bit", type=int, choices=[4, 8],
        help="--load_in_4bit or --load_in_8bit as a number [qlora alone means 4]")
    add("--init_adapter", metavar="DIR",
        help="go on training an adapter, with a fresh optimizer and its own rank")
    add("--zero_stage", type=int, choices=[0, 1, 2, 3], default=0,
        help="share out among processes: 3 the frozen base, 1 a full run's optimizer [0]")


def add_data_flags(parser, dev_size):
    """Declare what rows are read; `dev_size`, in words, is how many are held out by default."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", metavar="ID", help="data set on the hub, or a local folder of one")
    add("--dataset_subset", metavar="NAME", help="configuration of that data set")
    add("--dataset_split", default="train", metavar="NAME", help="split to train on [train]")
    add("--dataset_dev_split", metavar="NAME",
        help="split to evaluate on; if it is missing, rows are held out")
    add("--hf_revision", metavar="REV", help="branch, tag or commit of a hub data set")
    add("--train_sample_limit", type=count, metavar="N",
        help="train on N rows, drawn with --seed [all]")
    add("--dev_sample_limit", type=count, metavar="N",
        help="evaluate on (or hold out) N rows [all, --dev_size]")
    add("--dev_size", type=share, metavar="X",
        help=f"share of the rows to hold out where no dev set is named [{dev_size}]")
    add("--num_workers", type=natural, default=0, metavar="N",
        help="extra processes that tokenise and load [0]")


def add_lora_flags(parser):
    """Declare what the adapters are."""
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_r", "--lora_rank", type=count, metavar="N", help="rank [16]")
    add("--lora_alpha", type=count, metavar="N", help="scale is alpha/r: larger is stronger [32]")
    add("--lora_dropout", type=share, metavar="P", help="dropout on the adapters' inputs [0]")
    add("--target_modules", metavar="NAMES",
        help="comma-separated names of linear layers [all-linear]")
    add("--use_rslora", action="store_true", help="scale is alpha/sqrt(r) instead")
    add("--model_dropout", action="store_true",
        help="keep the base's own dropout on; steps are then not exact")
    add("--merge_adapter", action="store_true",
        help="run merge.py at the end, into OUTPUT_DIR/merged")


def add_training_flags(parser, step, checkpointing):
    """Declare how steps are made; the arguments are the defaults in which the trainers differ."""
    add = parser.add_argument_group("training").add_argument
    add("--gradient_accumulation", "--gradient_accumulation_steps", type=count, metavar="N",
        help=f"pieces that make one exact step of batch_size x N examples [a step of {step}]")
    add("--max_steps", type=count, metavar="N", help="optimizer steps, in place of --epochs")
    add("--lr_scheduler", "--lr_scheduler_type", default="cosine",
        **one_of("linear", "cosine", "constant"), help="learning rate after the warm-up [cosine]")
    add("--warmup_steps", "--lr_warmup_steps", type=natural, metavar="N",
        help="steps of linear warm-up; beats --warmup_ratio")
    add("--warmup_ratio", "--warmup_proportion", "--lr_warmup_ratio", type=share, default=0.05,
        metavar="X", help="share of the steps that warm up [0.05]")
    optimizers = one_of("adamw", "adamw_8bit", "sgd")
    add("--optimizer", "--optim", default="adamw", **optimizers, help="optimizer [adamw]")
    add("--weight_decay", type=real(0), default=0.01, metavar="X", help="decoupled [0.01]")
    add("--max_grad_norm", type=real(0), default=1.0, metavar="X",
        help="clip the gradient's norm; 0 = off [1.0]")
    add("--fp16", action="store_true", help="float16 with loss scaling")
    add("--bf16", action="store_true", help="bfloat16, on GPUs of compute capability 8.0 and newer")
    add("--mixed_precision", **one_of("bf16", "fp16", "none"),
        help="the same as a name [what the GPU is made for]")
    modes = one_of("on", "off", "auto")
    add("--gradient_checkpointing", nargs="?", const="on", default=checkpointing, **modes,
        help=f"recompute activations; auto: as a GPU's memory asks, else on [{checkpointing}]")
    for off in ("--no-gradient_checkpointing", "--disable_gradient_checkpointing"):
        add_switch(add, off, "gradient_checkpointing", "off", "--gradient_checkpointing off")
    add("--no-grow_pieces", dest="grow_pieces", action="store_false",
        help="keep to --batch_size on a GPU that has memory for more")
    add("--seed", type=integer(0, 2**32 - 1), default=42, metavar="N",
        help="of rows, adapters and dropout [42]")
    add("--full_determinism", action="store_true", help="bit for bit the same on a GPU (slower)")


def add_output_flags(parser, metric):
    """Declare when a run measures, saves and logs; `metric` is what best means by default."""
    add = parser.add_argument_group("evaluation and output").add_argument
    add("--overwrite", action="store_true", help="delete what an earlier run left in --output_dir")
    add("--save_best", type=int, choices=[0, 1],
        help="final/ is the best state, not the last [1 with a dev set]")
    add("--eval_every", "--eval_steps", type=natural, metavar="N",
        help="measure every N steps; 0 = each epoch [a tenth of the run, 5 or more]")
    add("--eval_strategy", **one_of("no", "epoch", "steps"),
        help="steps without --eval_every: every --logging_steps")
    add("--early_stopping_patience", type=count, metavar="N",
        help="evaluations without a new best, 3-5 [off]")
    add("--metric_for_best", "--metric_for_best_model", metavar="NAME",
        help=f"what best means [{metric}]")
    add("--checkpoint_strategy", default="steps", **one_of("no", "epoch", "steps"),
        help="when checkpoints are written; with a dev set they follow the evaluations [steps]")
    add("--save_on_epoch_end", type=natural, default=0, metavar="N",
        help="checkpoint every N epochs and keep them all; 0 = off [0]")
    add("--checkpoint_steps", "--save_steps", type=count, metavar="N",
        help="write one every N steps [a tenth of the run, 5 or more]")
    add("--save_total_limit", type=count, metavar="N",
        help="checkpoints that are kept [2; all with --save_on_epoch_end]")
    add("--logging_steps", type=integer(-1), default=10, metavar="N",
        help="print the loss every N steps; -1 = every step, 0 = off [10]")
    add("--report_to", "--log_with", **one_of("none", "tensorboard", "mlflow", "wandb"),
        help="logs go to [tensorboard, if installed]")


# fmt: on


def refuse(parser, table):
    """Exit 2 with the sentence of the first row (wrong, sentence) that is wrong."""
    for wrong, sentence in table:
        if wrong:
            parser.error(sentence)


def finish(parser, args, model, step):
    """Check the flags that depend on one another and fill in the defaults that do.

    model: the default base; step: examples of a default step. Exits 2 through `parser.error`.
    """
    bits = asked_bits(args)
    refuse_contradictions(parser, args, bits)
    refuse_shares(parser, args, bits)
    stored = adapter_of(parser, args)
    take_from_adapter(parser, args, stored)
    args.bits = next(iter(bits), None)
    args.model_name = args.model_name or stored.get("base_model_name_or_path") or model
    started = f"{datetime.now():%Y%m%d-%H%M%S}"
    args.output_dir = args.output_dir or f"runs/{Path(parser.prog).stem}-{started}"
    fill_in(args, step)
    return args


def asked_bits(args):
    """Return the set of bits that the quantisation flags ask for; more than one is a mistake."""
    bits = {args.quantization_bits}
    if args.load_in_8bit:
        bits.add(8)
    if args.load_in_4bit:
        bits.add(4)
    return bits - {None}


def refuse_contradictions(parser, args, bits):
    """Exit 2 where flags exclude one another, or one lacks what it needs."""
    trains = not getattr(args, "eval_only", False)
    has_data = args.train_file or args.dataset_name
    held_out = args.dev_size != 0 or args.dev_sample_limit
    measures = held_out or args.dev_file or args.dataset_dev_split
    no_eval = args.eval_strategy == "no" or not measures
    no_save = args.checkpoint_strategy == "no"
    full = args.finetune_type == "full"
    patience = args.early_stopping_patience
    needs_best = args.save_best or patience
    dev_corpus = getattr(args, "dev_corpus", None)
    resume = args.resume_from_checkpoint
    precisions = args.fp16 + args.bf16 + bool(args.mixed_precision)
    # fmt: off
    refuse(parser, (
        (trains and not has_data, "no training data: pass --train_file or --dataset_name"),
        (args.train_file and args.dataset_name,
         "--train_file and --dataset_name both name training data: pass one"),
        (precisions > 1, "--fp16, --bf16, --mixed_precision: pass one"),
        (len(bits) > 1,
         "8 and 4 bits are both asked for: pass one of the three quantisation flags"),
        (full and (bits or args.init_adapter),
         "--finetune_type full: no quantisation and no --init_adapter"),
        (full and args.merge_adapter,
         "--finetune_type full trains no adapter: drop --merge_adapter"),
        (needs_best and no_eval,
         "--save_best and --early_stopping_patience need an evaluation"),
        (dev_corpus and no_eval,
         "--dev_corpus is searched in evaluations, and there are none: drop it"),
        (no_save and (needs_best or args.save_on_epoch_end),
         "--save_best, --early_stopping_patience, --save_on_epoch_end need checkpoints: "
         "drop --checkpoint_strategy no"),
        (patience and args.save_best == 0,
         "--early_stopping_patience keeps the best state: drop --save_best 0"),
        (resume and not args.output_dir, "--resume_from_checkpoint needs the run's --output_dir"),
        (resume and args.overwrite, "--overwrite deletes what --resume_from_checkpoint needs"),
    ))
    # fmt: on


def refuse_shares(parser, args, bits):
    """Exit 2 where several processes cannot hold the base in parts, as --zero_stage asks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # torchrun's
        return  # one process holds all in any case
    if args.finetune_type == "full" and args.zero_stage > 1:
        parser.error("--finetune_type full: of --zero_stage it takes 1, which shares out AdamW's")
    if args.finetune_type == "full" and args.zero_stage and args.optimizer == "adamw_8bit":
        parser.error("--zero_stage 1 cannot share out --optimizer adamw_8bit: drop one of the two")
    if args.zero_stage == 3 and (bits or args.finetune_type == "qlora"):
        parser.error("--zero_stage 3 would lose the statistics of a quantised base: pass one")


def adapter_of(parser, args):
    """Return the adapter_config.json of --init_adapter, {} without one; exits 2 if unreadable."""
    if not args.init_adapter:
        return {}
    try:
        stored = checked_json(Path(args.init_adapter) / "adapter_config.json", dict)
    except InputError as error:
        parser.error(f"--init_adapter {args.init_adapter}: {error}")
    if stored is None:
        advice = "has no adapter_config.json: name a folder a trainer wrote"
        parser.error(f"--init_adapter {args.init_adapter} {advice}")
    return stored


def take_from_adapter(parser, args, stored):
    """Set what a continued adapter fixes, from its config; exits 2 where a flag says otherwise."""
    named = args.target_modules
    if named and named != "all-linear":
        args.target_modules = sorted(filter(None, map(str.strip, named.split(","))))
    for flag, key in OF_ADAPTER:
        if key not in stored:
            continue
        old = stored[key]
        if isinstance(old, list):
            old = sorted(old)
        asked = getattr(args, flag)
        if asked not in (None, False, old):
            differs = f"was trained with {flag} {old}, not {asked}: drop the flag"
            parser.error(f"--init_adapter {differs}")
        setattr(args, flag, old)


def fill_in(args, step):
    """Fill in the defaults that depend on other flags; `step`: examples of a default step."""
    full = args.finetune_type == "full"
    if args.finetune_type == "qlora":
        args.bits = args.bits or 4
    if os.path.isdir(args.model_name):  # the adapter stores it, and is loaded from elsewhere
        args.model_name = os.path.abspath(args.model_name)
    args.lora_r = args.lora_r or 16
    args.lora_alpha = args.lora_alpha or 32
    args.target_modules = args.target_modules or "all-linear"
    args.lr = args.lr or (2e-5 if full else 2e-4)
    args.gradient_accumulation = args.gradient_accumulation or max(1, step // args.batch_size)


def asked_base(args):
    """Return how the base is to be loaded, as keywords of parts.base.load."""
    return {
        "full": args.finetune_type == "full",
        "bits": args.bits,
        "attention": args.attn_implementation,
        "keep_dropout": args.model_dropout,
        "zero_stage": args.zero_stage,
    }


def asked_lora(args):
    """Return what the adapters are to be, as keywords of parts.adapters.Lora."""
    return {
        "r": args.lora_r,
        "alpha": args.lora_alpha,
        "dropout": args.lora_dropout,
        "target_modules": args.target_modules,
        "use_rslora": args.use_rslora,
    }


def asked_cut(args):
    """Return how steps are to be cut, as keywords of parts.step.StepTrainer."""
    return {
        "batch_size": args.batch_size,
        "grow_pieces": args.grow_pieces,
        "gradient_checkpointing": args.gradient_checkpointing,
        "zero_stage": args.zero_stage,
    }


def asked_run(args):
    """Return how the run is to begin and to end, as keywords of parts.run.Prepared."""
    return {
        "seed": args.seed,
        "dry_run": args.dry_run,
        "overwrite": args.overwrite,
        "merges": args.merge_adapter,
    }


def asked_precision(args):
    """Return "bf16", "fp16" or "none" as the flags name it, None where the machine decides."""
    if args.fp16:
        return "fp16"
    if args.bf16:
        return "bf16"
    return args.mixed_precision

"""Numbers in, a plan out: what a run will do, worked out of its flags before it trains."""

import dataclasses
import math

from utils import InputError


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run will do; the report holds it."""

    metric: str  # what best means
    greater_is_better: bool
    has_dev: bool  # there are dev sets, and they are measured
    batch_size: int  # examples in memory, per process
    step_rows: int  # examples of a step, per process
    examples_per_step: int  # of all processes
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    eval_steps: int  # from one evaluation to the next
    save_steps: int  # from one checkpoint to the next
    epoch_save_steps: int  # between the checkpoints of --save_on_epoch_end; 0 = off
    saves: bool  # checkpoints are written
    save_best: bool  # final/ is the best state, not the last
    save_total_limit: int | None  # checkpoints that are kept, None: all
    patience: int | None  # evaluations without a new best after which a run stops, None: never
    lora_scale: float  # what B @ A is multiplied by
    lr: float  # peak
    lr_scheduler: str
    optimizer: str
    weight_decay: float
    max_grad_norm: float  # 0: gradients are not clipped
    logging_steps: int  # as the flag has it: -1 = every step, 0 = off
    drop_last: bool  # rows that do not fill an epoch's last step are left out
    watched: list  # [metric, greater is better]: warned about if they worsen while the loss falls
    shown: dict  # {metric of the log lines, the curves and the report: its dev set}
    negatives_per_query: float | None = (
        None  # embeddings: other documents that a query is held against
    )
    evaluation_share: float | None = (
        None  # embeddings: tokens that evaluations embed, per trained one
    )


def make_plan(
    args, rows, processes, *, has_dev, metric, greater_is_better, watched, shown, drop_last, each=()
):
    """Work out a run of `rows` training rows over `processes` from its flags.

    has_dev: there are dev sets; each: how many rows each file has, where a step is of one file.
    Raises InputError for fewer rows than processes, and for flags that need an evaluation where
    there is none.
    """
    has_dev = has_dev and args.eval_strategy != "no"
    check_needs(args, rows, processes, has_dev)
    sizes = steps_of_files(args, each, processes) if each else None
    step_rows, examples, steps_per_epoch = sizes or steps_of_rows(args, rows, processes, drop_last)
    total_steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
    saves = args.checkpoint_strategy != "no"
    save_best = has_dev and saves and args.save_best != 0
    eval_steps = evaluation_interval(args, steps_per_epoch, total_steps)
    save_steps = checkpoint_interval(args, steps_per_epoch, total_steps)
    return Plan(
        **as_asked(args),
        metric=metric,
        greater_is_better=greater_is_better,
        has_dev=has_dev,
        step_rows=step_rows,
        examples_per_step=examples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=warmup(args, total_steps),
        eval_steps=eval_steps,
        save_steps=eval_steps if save_best else save_steps,
        epoch_save_steps=steps_per_epoch * args.save_on_epoch_end,
        saves=saves,
        save_best=save_best,
        save_total_limit=args.save_total_limit or (None if args.save_on_epoch_end else 2),
        drop_last=drop_last,
        watched=watched,
        shown=shown,
    )


def as_asked(args):
    """Return the fields of a Plan that follow from the flags alone."""
    rank = math.sqrt(args.lora_r) if args.use_rslora else args.lora_r
    return {
        "batch_size": args.batch_size,
        "patience": args.early_stopping_patience,
        "lora_scale": args.lora_alpha / rank,
        "lr": args.lr,
        "lr_scheduler": args.lr_scheduler,
        "optimizer": args.optimizer,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "logging_steps": args.logging_steps,
    }


def check_needs(args, rows, processes, has_dev):
    """Raise InputError if a process would have no row, or there is nothing to tell the best by."""
    if rows < processes:
        raise InputError(
            f"{rows} rows cannot be shared out over {processes} processes. Add rows, or use one "
            "GPU."
        )
    if not has_dev and (args.save_best or args.early_stopping_patience):
        raise InputError(
            "--save_best and --early_stopping_patience need an evaluation, and no rows could be "
            "held out for one. Pass --dev_file."
        )


def steps_of_rows(args, rows, processes, drop_last):
    """Return the examples of a step, per process and of all, and the steps of an epoch."""
    step_rows = rows_of_step(args, rows, processes, drop_last)
    examples = step_rows * processes
    steps = rows // examples if drop_last else math.ceil(rows / examples)
    return step_rows, examples, steps


def steps_of_files(args, each, processes):
    """Return what steps_of_rows does for steps of one file; each: how many rows each file has.

    A file with fewer rows than a step makes one of them.
    """
    asked = args.batch_size * args.gradient_accumulation * processes
    examples = min(asked, max(each))
    steps = sum(max(1, rows // examples) for rows in each)
    return math.ceil(examples / processes), examples, steps


def rows_of_step(args, rows, processes, drop_last):
    """Return the examples of a step, per process: a step that no epoch fills is shrunk to one."""
    asked = args.batch_size * args.gradient_accumulation
    if drop_last and rows < asked * processes:
        return rows // processes
    return asked


def warmup(args, total_steps):
    """Return how many steps the learning rate rises."""
    if args.warmup_steps is None:
        return int(args.warmup_ratio * total_steps)
    return args.warmup_steps


def a_tenth(steps):
    """Return the default interval of evaluations and checkpoints, in a run of so many steps."""
    # fewer steps change little, and evaluations share what tokens they may embed
    return min(steps, max(5, round(steps / 10)))


def evaluation_interval(args, steps_per_epoch, total_steps):
    """Return after how many steps dev sets are measured."""
    if args.eval_strategy == "epoch" or args.eval_every == 0:
        return steps_per_epoch
    if args.eval_every:
        return args.eval_every
    if args.save_on_epoch_end:  # each checkpoint has its figures, so that the best can be kept
        return steps_per_epoch * args.save_on_epoch_end
    if args.eval_strategy == "steps":
        return max(1, args.logging_steps)
    return a_tenth(total_steps)


def checkpoint_interval(args, steps_per_epoch, total_steps):
    """Return after how many steps checkpoints are written where they follow no evaluations."""
    if args.checkpoint_steps:
        return args.checkpoint_steps
    if args.save_on_epoch_end:
        return steps_per_epoch * args.save_on_epoch_end
    if args.checkpoint_strategy == "epoch":
        return steps_per_epoch
    return a_tenth(total_steps)


def advice(args, plan, rows, each=()):
    """Yield what about a plan for `rows` rows a user would want to know before hour three.

    each: see make_plan.
    """
    yield from on_files(args, plan, each) if each else on_rows(args, plan, rows)
    if plan.save_best and (args.checkpoint_steps or args.checkpoint_strategy == "epoch"):
        yield (
            "checkpoints follow the evaluations, so that the best can be kept (--save_best 0: as "
            "asked)"
        )
    if plan.has_dev and args.eval_every and args.eval_every * 2 > plan.total_steps:
        yield on_interval(plan, args.eval_every)
    yield from on_rate(args.finetune_type != "full", plan)


def on_rows(args, plan, rows):
    """Yield what to say of rows that make no whole steps."""
    asked = args.batch_size * args.gradient_accumulation
    if plan.step_rows < asked:
        whole = asked * (plan.examples_per_step // plan.step_rows)
        yield f"{rows} rows are less than one step of {whole}: the step is shrunk to them"
    left = rows - plan.steps_per_epoch * plan.examples_per_step
    if plan.drop_last and left:
        yield f"each epoch leaves out {left} rows, drawn anew, that do not fill a step"


def on_files(args, plan, each):
    """Yield what to say of files, of so many rows each, that make no whole steps."""
    size = plan.examples_per_step
    if plan.step_rows < args.batch_size * args.gradient_accumulation:
        yield f"no file has the rows of a whole step: it is shrunk to the {size} of the largest"
    small = sum(rows < size for rows in each)
    if small:
        yield f"{small} of {len(each)} files have fewer rows than a step: each makes one of them"


def on_interval(plan, interval):
    """Return what to say of evaluations after every `interval` steps, which are too few."""
    times = "once" if interval <= plan.total_steps else "never"
    better = max(1, round(plan.steps_per_epoch / 2.5))
    better = round(better, -int(math.log10(better)))  # to its first digit
    return (
        f"--eval_every {interval} evaluates {times} in {plan.total_steps} steps, besides before "
        f"and after; --eval_every {better} gives two or three an epoch"
    )


def on_rate(is_lora, plan):
    """Yield what is unusual about the learning rate."""
    lr = f"--lr {plan.lr:g}"
    if is_lora and plan.lr < 5e-5:
        yield f"{lr} is low for LoRA, which wants ten times full fine-tuning's: 1e-4 to 3e-4"
    if plan.lr > 5e-3 and plan.optimizer != "sgd":  # whose rates are larger
        yield f"{lr} is very high: 1e-4 to 3e-4 is usual for LoRA"
    if is_lora and plan.lora_scale > 4 and plan.lr >= 2e-4:
        yield f"a LoRA scale of {plan.lora_scale:.1f} at {lr} is strong"


def named(dev_name, metric):
    """Return a metric's name in logs: that of its dev set stands in front, if it has one."""
    return f"{dev_name}_{metric}" if dev_name else metric


def chosen_metric(metric, known, hint=""):
    """Return which `known` metric is meant by a name, Trainer's eval_loss say.

    Raises InputError for a metric that is none of them; `hint` says how there would be more.
    """
    for name in (metric, metric.removeprefix("eval_")):  # a dev set may be called eval
        if name in known:
            return name
    raise InputError(
        f"--metric_for_best {metric} is not measured. Choose one of {', '.join(known)}.{hint}"
    )

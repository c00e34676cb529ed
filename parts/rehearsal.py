"""The rehearsal: the plan in words, how large pieces may be, and the heaviest rows once."""

import math
import random
import time
from functools import partial

from parts.cutting import cut, padded_tokens
from parts.memory import BUDGET, bytes_to_come, gpu_memory, held, is_out_of_memory, tokens_that_fit
from parts.processes import OutOfMemoryElsewhere, agree, largest
from parts.report import peak_gib
from parts.shards import bytes_of
from parts.step import get_rng_state, replayed
from utils import InputError, note, say

import torch
from peft import PeftModel

MOST_DRAWS = 1000  # of rows, in search of the heaviest
EVERYTHING = 10**12  # piece_tokens of a pass that holds all of a step at once


def rehearse(trainer, plan, row_tokens, seed, stored=None):
    """Print the plan, settle how steps are cut, run the heaviest rows: before hour three.

    row_tokens: of each training row; stored: what this returned in the run that is resumed, or
    None. Returns what was settled, {flag: value}. Raises InputError if a gradient is not finite, or
    an adapter gets none.
    """
    show_plan(trainer, plan)
    weights = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    processes = trainer.accelerator.num_processes
    to_come = bytes_to_come(trainer.args.optim.value, weights, processes)
    # training draws its dropout as without a rehearsal
    with held(to_come, trainer.args.device), replayed(get_rng_state()):
        settle_pieces(trainer, plan, row_tokens, seed, stored)
        run_heaviest(trainer, plan, row_tokens, seed)
    # from here on: a grown piece that was halved above is no reason to
    trainer.may_recompute = trainer.gradient_checkpointing == "auto" and not trainer.recomputes
    return trainer.settled()


def run_heaviest(trainer, plan, row_tokens, seed):
    """Run as many rows as are in memory at once forward and backward, and look at the gradients."""
    count = trainer.batch_size
    if trainer.piece_tokens:
        mean_tokens = sum(row_tokens) / len(row_tokens)
        count = max(count, math.ceil(trainer.piece_tokens / mean_tokens))  # or a step's rows
    rows = heaviest_rows(row_tokens, plan, seed, count, trainer.file_steps)
    step = step_of(trainer, rows)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    started = time.perf_counter()
    is_finite = finite_gradients(
        lambda: trainer.training_step(trainer.model, step),
        trained.values(),
        trainer.accelerator.scaler,
        partial(on_all_processes, trainer.accelerator),
    )
    seconds = time.perf_counter() - started
    check_gradients(trained, is_finite)
    scaler = trainer.accelerator.scaler
    leave_no_trace(trainer)
    scaled = f" at a loss scale of {scaler.get_scale():g}" if scaler else ""
    say(
        f"rehearsal of {len(rows)} heavy examples: {seconds:.1f} s, {peak_gib():.1f} GiB, "
        f"finite gradients{scaled}"
    )


def step_of(trainer, rows):
    """Return a step of these training rows."""
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def leave_no_trace(trainer):
    """Let go of gradients and memory, and of tokens that training would count as its own."""
    trainer.free_memory()
    trainer.real_tokens = trainer.padded_tokens = 0


# ---------------------------------------------------------------- how steps are cut


def settle_pieces(trainer, plan, row_tokens, seed, stored):
    """Settle gradient checkpointing and the size of pieces: as `stored`, as asked, by memory."""
    memory = gpu_memory(trainer)
    asked = trainer.gradient_checkpointing
    if stored:
        trainer.take_over(stored, may_grow=memory is not None)
    # with the base in parts a process that runs out of memory ends the run: none tries its luck
    careful = memory is None or trainer.in_parts
    if asked == "on" or (asked == "auto" and careful):
        trainer.recompute_activations(True)
    if memory is None or stored:
        return
    free = -largest(trainer.accelerator, -memory.free())  # of all processes the least
    budget = BUDGET * free
    heavy = heaviest_rows(row_tokens, plan, seed, trainer.batch_size, trainer.file_steps)
    longest = heavy[:1]
    measured_pass(trainer, longest, memory)  # unread: a first one loads kernels, too
    large = measured_pass(trainer, heavy, memory)
    if asked == "auto" and not fits(large, budget):
        trainer.recompute_activations(True)
        large = measured_pass(trainer, heavy, memory)
    if trainer.grow_pieces and fits(large, budget):
        small = measured_pass(trainer, longest, memory)
        most = most_at_once(trainer, plan, row_tokens, seed)
        tokens = min(most, tokens_that_fit(budget, small, large))
        if tokens > large[0]:
            trainer.piece_tokens = tokens
    show_memory(trainer, free, large)


def measured_pass(trainer, rows, memory):
    """Run rows forward and backward, all in memory at once, and leave no trace of it.

    Returns (padded tokens, bytes it took at most in one process), None where memory ran out: the
    same on all processes, which run the same rows.
    """
    step = trainer._prepare_inputs(step_of(trainer, rows))
    trainer.model.train()
    trainer.piece_tokens = EVERYTHING

    measured = None
    try:
        taken = memory.peak_of(lambda: trainer.attempt_step(trainer.model, step))
        agree(trainer.accelerator)
        measured = trainer.padded_tokens, taken  # counted by cut_step
        ran_out = False
    except OutOfMemoryElsewhere:
        ran_out = False
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if trainer.in_parts:
            raise trainer.out_of_memory_alone() from error
        ran_out = True
    trainer.piece_tokens = None
    leave_no_trace(trainer)  # outside the except block, where the error no longer holds the graph
    if ran_out:
        agree(trainer.accelerator, fits=False)
    if measured:
        tokens, taken = measured
        return tokens, largest(trainer.accelerator, taken)
    return None


def fits(measured, budget):
    """Tell whether a pass, (tokens, bytes) or None where it ran out, stays within a budget."""
    return measured is not None and measured[1] <= budget


def most_at_once(trainer, plan, row_tokens, seed):
    """Return the most padded tokens that could be of use in memory at once."""
    if not trainer.keeps_graphs:  # one piece after the other
        return trainer.device_tokens
    rows = heaviest_rows(row_tokens, plan, seed, plan.step_rows, trainer.file_steps)
    lengths = trainer.lengths_of(step_of(trainer, rows))
    return padded_tokens(cut(lengths, trainer.device_tokens), lengths)


def show_memory(trainer, free, large):
    """Print how much memory is free (bytes), and how steps use it.

    large: (tokens, bytes) of --batch_size rows, None where they ran out.
    """
    size = "the pieces of --batch_size"
    if trainer.piece_tokens:
        size = f"{trainer.piece_tokens:,} tokens at once ({large[0]:,} at --batch_size)"
    recomputed = "with" if trainer.recomputes else "without"
    say(f"memory    {free / 2**30:.1f} GiB free: {size}, {recomputed} gradient checkpointing")


def show_plan(trainer, plan):
    """Print what is trained, in which steps, and when it is evaluated and saved."""
    model = trainer.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trainable / sum(p.numel() for p in model.parameters())
    adapter = ""
    if isinstance(model, PeftModel):
        adapter = f", LoRA r {model.peft_config['default'].r}, scale {plan.lora_scale:g}"
    say(f"trains    {trainable:,} weights ({share:.1%}){adapter}")
    if trainer.accelerator.num_processes > 1:
        held, whole = bytes_of(model)
        of_it = f"{held / 1e9:.2f} of its " if held < whole else ""
        say(f"base      each process holds {of_it}{whole / 1e9:.2f} GB")
    in_memory = f"{plan.batch_size} in memory x {math.ceil(plan.step_rows / plan.batch_size)}"
    if trainer.accelerator.num_processes > 1:
        in_memory += f" x {trainer.accelerator.num_processes} processes"
    examples = plan.examples_per_step
    if trainer.file_steps and min(map(len, trainer.file_steps.groups)) < examples:
        examples = f"at most {examples}"
    say(
        f"plan      {plan.total_steps} steps, {plan.steps_per_epoch} an epoch, of "
        f"{examples} examples ({in_memory}); lr {plan.lr:g} {plan.lr_scheduler}, "
        f"{plan.warmup_steps} steps of warm-up"
    )
    evaluation = f"evaluation every {plan.eval_steps} steps" if plan.has_dev else "no evaluation"
    saving = f"checkpoint every {plan.save_steps} steps" if plan.saves else "no checkpoints"
    best = f"; final/ is the best by {plan.metric}" if plan.save_best else ""
    say(f"          {evaluation}; {saving}{best}")


def note_inexact(*, dropout, half):
    """Note what makes a step's gradient depend on how it is cut into pieces."""
    causes = {"dropout": dropout, "half precision, by about 1 %": half}
    for cause, is_there in causes.items():
        if is_there:
            note(f"a step's gradient depends on how it is cut into pieces: {cause}")


def heaviest_rows(tokens, plan, seed, count, file_steps=None):
    """Return `count` rows, or those of a step: the longest, and the heaviest that are drawn.

    tokens: of each row. As many draws are made as the run will make, with file_steps (FileSteps)
    each from one file. At least two rows: one has nothing to contrast.
    """
    # a step of the longest rows alone never comes; one of rows as drawn would be too light
    rng = random.Random(seed)
    count = min(len(tokens), max(2, min(count, plan.step_rows)))
    draws = min(MOST_DRAWS, plan.total_steps * math.ceil(plan.step_rows / count))
    heaviest = []
    most = -1
    for group, share in draws_of_groups(len(tokens), plan, file_steps):
        for _ in range(math.ceil(share * draws)):
            rows = rng.sample(group, min(count, len(group)))
            weight = sum(tokens[i] for i in rows)
            if weight > most:  # the sum: sorted into pieces, rows are padded to their like
                heaviest = rows
                most = weight
    longest = max(range(len(tokens)), key=tokens.__getitem__)
    return list(dict.fromkeys([longest, *heaviest]))[:count]


def draws_of_groups(rows, plan, file_steps):
    """Return [(rows that steps are drawn from, their share of all steps)]."""
    if not file_steps:
        return [(range(rows), 1)]
    groups = file_steps.groups
    return [(group, file_steps.steps_of(group) / plan.steps_per_epoch) for group in groups]


def finite_gradients(attempt, weights, scaler, agreed=bool):
    """Call attempt(), a forward and backward pass; tell whether the gradients of all are finite.

    With a loss scaler (fp16, else None) again at half the scale until they are, or are not at a
    scale of 1. agreed(is_finite): whether they are on all processes, which go on alike.
    """
    weights = list(weights)  # gone through more than once
    while True:
        for weight in weights:
            weight.grad = None
        attempt()
        is_finite = all(weight.grad is None or weight.grad.isfinite().all() for weight in weights)
        # an attempt waits for the other processes: none may go on alone, nor at another scale
        if agreed(is_finite):
            return True
        if scaler is None or scaler.get_scale() <= 1:  # then it is not the scale
            return False
        # by hand: the scaler's own halving comes with a step of the optimizer, which is none here
        scaler.update(scaler.get_scale() / 2)


def check_gradients(trained, is_finite):
    """Raise InputError where training could not learn; trained: {name: weight with a gradient}."""
    moved = set()  # names of the weights that a step would change
    for name, weight in trained.items():
        if weight.grad is not None and weight.grad.any():
            moved.add(name)
    idle = []
    for name, weight in trained.items():
        # DDP cannot do with a weight without a gradient, and one of zeros is never trained; but
        # that of a lora_A is zero at first, since its lora_B is
        if weight.grad is None or ("lora_B" in name and name not in moved):
            idle.append(name)
    if not moved:
        raise InputError(
            "the loss of the heaviest rows has no gradient: they have nothing to tell apart."
        )
    if idle:
        raise InputError(
            f"{len(idle)} trainable weights get no gradient ({idle[0]}, ...): narrow "
            "--target_modules."
        )
    if not is_finite:
        raise InputError(
            "the first gradient is not finite: pass --mixed_precision none, or check the base "
            "model."
        )


def on_all_processes(accelerator, is_so):
    """Tell whether something is so on all processes."""
    if accelerator.num_processes == 1:
        return is_so
    signs = accelerator.gather(torch.tensor([is_so], device=accelerator.device))
    return signs.all().item()

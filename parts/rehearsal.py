"""The rehearsal: the plan in words, and the heaviest rows once forward and backward."""

import math
import random
import time

from parts.report import peak_gib
from utils import InputError, note, say

import torch
from peft import PeftModel

MOST_DRAWS = 1000  # of rows, in search of the heaviest


def rehearse(trainer, plan, row_tokens, seed):
    """Print the plan and run the heaviest rows: memory and gradients are checked before hour three.

    row_tokens: of each training row. Raises InputError if a gradient is not finite, or an adapter
    gets none.
    """
    show_plan(trainer, plan)
    rows = heaviest_rows(row_tokens, plan, seed)
    step = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    rng = torch.get_rng_state()  # training draws its dropout as without a rehearsal
    started = time.perf_counter()
    is_finite = finite_gradients(
        lambda: trainer.training_step(trainer.model, step),
        trained.values(),
        trainer.accelerator.scaler,
    )
    seconds = time.perf_counter() - started
    torch.set_rng_state(rng)
    check_gradients(trained, is_finite)
    scale = shared_loss_scale(trainer)
    # leaves no trace: neither a gradient, nor tokens that training would count as its own
    trainer.model.zero_grad()
    trainer.real_tokens = trainer.padded_tokens = 0
    scaled = "" if scale is None else f" at a loss scale of {scale:g}"
    say(
        f"rehearsal of {len(rows)} heavy examples: {seconds:.1f} s, {peak_gib():.1f} GiB, "
        f"finite gradients{scaled}"
    )


def show_plan(trainer, plan):
    """Print what is trained, in which steps, and when it is evaluated and saved."""
    model = trainer.model
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = trainable / sum(p.numel() for p in model.parameters())
    adapter = ""
    if isinstance(model, PeftModel):
        adapter = f", LoRA r {model.peft_config['default'].r}, scale {plan.lora_scale:g}"
    say(f"trains    {trainable:,} weights ({share:.1%}){adapter}")
    in_memory = f"{plan.batch_size} in memory x {math.ceil(plan.step_rows / plan.batch_size)}"
    if trainer.accelerator.num_processes > 1:
        in_memory += f" x {trainer.accelerator.num_processes} processes"
    say(
        f"plan      {plan.total_steps} steps, {plan.steps_per_epoch} an epoch, of "
        f"{plan.examples_per_step} examples ({in_memory}); lr {plan.lr:g} {plan.lr_scheduler}, "
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


def heaviest_rows(tokens, plan, seed):
    """Return as many rows as are in memory at once: the longest, and the heaviest that are drawn.

    tokens: of each row. As many draws are made as the run will make. At least two rows: one has
    nothing to contrast.
    """
    # a step of the longest rows alone never comes; one of rows as drawn would be too light
    rng = random.Random(seed)
    count = min(len(tokens), max(2, min(plan.batch_size, plan.step_rows)))
    draws = min(MOST_DRAWS, plan.total_steps * math.ceil(plan.step_rows / count))
    heaviest = []
    most = -1
    for _ in range(draws):
        rows = rng.sample(range(len(tokens)), count)
        weight = sum(tokens[i] for i in rows)
        if weight > most:  # the sum: sorted into pieces, rows are padded to their like
            heaviest = rows
            most = weight
    longest = max(range(len(tokens)), key=tokens.__getitem__)
    return list(dict.fromkeys([longest, *heaviest]))[:count]


def finite_gradients(attempt, weights, scaler):
    """Call attempt(), a forward and backward pass; tell whether the gradients of all are finite.

    With a loss scaler (fp16, else None) again at half the scale until they are, or are not at a
    scale of 1.
    """
    weights = list(weights)  # gone through more than once
    while True:
        for weight in weights:
            weight.grad = None
        attempt()
        if all(weight.grad is None or weight.grad.isfinite().all() for weight in weights):
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


def shared_loss_scale(trainer):
    """Let all processes begin at the smallest loss scale among them; return it, or None."""
    scaler = trainer.accelerator.scaler
    if scaler is None:
        return None
    # each has found its own with its own rows; a step that one skips, all must skip
    scale = torch.tensor([scaler.get_scale()], device=trainer.args.device)
    scaler.update(trainer.accelerator.gather(scale).min().item())
    return scaler.get_scale()

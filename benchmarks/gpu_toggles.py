"""What benchmarks/gpu.py switches off, by patching one name each, and the GPU that it plays.

Every name stands in TOGGLES: a context manager within which the idea is off.
"""

import contextlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
import train_sft_lora
from parts import attention, base, rehearsal, run, step
from parts.causal import token_scores
from parts.preference import PreferenceTrainer
from parts.step import StepTrainer

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CUDA = torch.cuda.is_available()
T4_GIB = 14.56  # what torch may take of a T4's 15 GiB beside its own context there
T4_CAPABILITY = (7, 5)


def patched(owner, name, value):
    """Return a context manager within which owner.name is `value`."""
    return mock.patch.object(owner, name, value)


# ---------------------------------------------------------------- attention


@contextmanager
def attention_as(function):
    """Context in which models use `function` as transformers' "sdpa", whatever was registered."""
    before = AttentionInterface._global_mapping["sdpa"]
    AttentionInterface.register("sdpa", function)
    try:
        # loading a base registers ours where the GPU needs it
        with patched(attention, "lacks_grouped_kernels", lambda: False):
            yield
    finally:
        AttentionInterface.register("sdpa", before)


def stock_attention():
    """Context in which transformers' own attention runs on every GPU."""
    return attention_as(sdpa_attention_forward)


def repeated_keys():
    """Context in which keys are repeated, as they are below compute capability 8.0."""
    return attention_as(attention.sdpa_with_repeated_keys)


@contextmanager
def kernels_of_t4():
    """Context without the attention kernels that a T4 lacks."""
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)


# ---------------------------------------------------------------- memory


@contextmanager
def memory_capped(size):
    """Context in which torch may allocate `size` bytes of the GPU."""
    if not CUDA:
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory

    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@contextmanager
def pieces_that_fit(trainer, tokens):
    """Context in which a step out of whose cut more than `tokens` are in memory at once fails.

    As torch fails on a GPU: what stands for a memory cap on a machine without one.
    """
    run_step = trainer.run_step

    def limited(model, step, pieces, tokens_at_once):
        if tokens_at_once > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory, as benchmarks/gpu.py plays it")
        return run_step(model, step, pieces, tokens_at_once)

    with patched(trainer, "run_step", limited):
        yield


@contextmanager
def played_t4():
    """Context that is a T4 as far as torch can play one: capability, kernels, memory.

    Its speed is not played: seconds are the present card's.
    """
    with contextlib.ExitStack() as stack:
        if CUDA:
            capability = patched(
                torch.cuda, "get_device_capability", lambda device=None: T4_CAPABILITY
            )
            stack.enter_context(capability)
        stack.enter_context(kernels_of_t4())
        stack.enter_context(repeated_keys())
        stack.enter_context(memory_capped(T4_GIB * 2**30))
        yield


# ---------------------------------------------------------------- ideas


def library_8bit():
    """Context in which 8-bit layers are bitsandbytes' own: LLM.int8 on a GPU."""
    return patched(base, "use_weights_only", lambda model: None)


def float32_norms():
    """Context in which the norms and biases of a quantised base become float32 in bf16, too."""
    frozen = base.frozen

    def with_float32(model, absent):
        model = frozen(model, absent)
        for parameter in model.parameters():
            if parameter.ndim == 1 and parameter.is_floating_point():
                parameter.data = parameter.data.float()
        return model

    return patched(base, "frozen", with_float32)


def pieces_of_batch_size():
    """Context in which memory never holds more than --batch_size asks for, with checkpointing."""
    return patched(rehearsal, "fits", lambda measured, budget: False)


def no_room_held():
    """Context in which the rehearsal does not know what the optimizer will take."""
    return patched(rehearsal, "bytes_to_come", lambda optimizer, weights, processes: 0)


def plain_adamw():
    """Context in which AdamW is not the fused one, in any precision."""
    optimizer_of = run.optimizer_of
    return patched(run, "optimizer_of", lambda name, precision: optimizer_of(name, "fp16"))


def copies_one_by_one():
    """Context in which each tensor of a step is copied by itself, and waited for."""

    def copied(tensors, device):
        return [tensor.to(device) for tensor in tensors]

    return patched(step, "moved", copied)


def losses_at_once():
    """Context in which each step's loss is looked at before the next one is queued."""
    training_step = StepTrainer.training_step

    def looked_at(trainer, *arguments):
        loss = training_step(trainer, *arguments)
        trainer.look_at(trainer.figures)
        return loss

    return patched(StepTrainer, "training_step", looked_at)


def likeliest_tokens():
    """Context in which SFT looks for the likeliest token of each position in training, too."""

    def losses_alone(logits, labels):
        return token_scores(logits, labels)[0]

    return patched(train_sft_lora, "token_losses", losses_alone)


def prompts_apart():
    """Context in which the prompt of a preference pair is computed with each answer."""
    return patched(PreferenceTrainer, "can_share", lambda trainer, pair: False)


TOGGLES = {  # idea: context manager in which it is off
    "8-bit weights alone": library_8bit,
    "norms in bf16": float32_norms,
    "repeated keys": stock_attention,
    "pieces that grow": pieces_of_batch_size,
    "room for the optimizer": no_room_held,
    "fused AdamW": plain_adamw,
    "one copy a step": copies_one_by_one,
    "losses looked at late": losses_at_once,
    "no argmax": likeliest_tokens,
    "shared prompts": prompts_apart,
}

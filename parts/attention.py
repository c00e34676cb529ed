"""Attention on GPUs below compute capability 8.0 (a T4): fused, also with grouped queries."""

from types import SimpleNamespace

import utils  # noqa: F401  quiets two libraries before the next are imported

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward


def sdpa_with_repeated_keys(module, query, key, value, attention_mask, **kwargs):
    """Do as transformers' SDPA attention, with a group's keys repeated for each of its queries.

    Transformers leaves that to torch's enable_gqa without asking for the GPU's capability (its
    issues 45776 and 48633). Below 8.0 no fused kernel takes it: the math kernel runs, in float32
    and with all scores of a layer in memory. query (B, heads, T, D), key, value (B, groups, T, D).
    """
    groups = getattr(module, "num_key_value_groups", 1)
    is_paged = kwargs.get("cache") is not None  # which is filled before keys are repeated
    if groups == 1 or is_paged:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # what is asked of a module there, but for the number of groups
    ungrouped = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    key = repeat_kv(key, groups)
    value = repeat_kv(value, groups)
    return sdpa_attention_forward(ungrouped, query, key, value, attention_mask, **kwargs)


def lacks_grouped_kernels():
    """Tell whether a visible GPU has no fused kernel for grouped queries."""
    if not torch.cuda.is_available():
        return False
    gpus = range(torch.cuda.device_count())
    return any(torch.cuda.get_device_capability(gpu) < (8, 0) for gpu in gpus)


def fit_attention_to_gpu():
    """Let models use sdpa_with_repeated_keys wherever this machine's GPU needs it.

    Under transformers' own name for it: under another one, models whose masks are made by that name
    (Gemma 3, BERT, ModernBERT, Falcon) would lose them without a word.
    """
    if lacks_grouped_kernels():
        AttentionInterface.register("sdpa", sdpa_with_repeated_keys)

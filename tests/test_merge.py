"""A merged folder is base + adapter: for every kind of model, adapter and file, and never half of it."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import merge
from conftest import ROOT, chat_tokenizer

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64, "head_dim": 8}
LINEARS = ["q_proj", "v_proj", "down_proj"]
BASES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, tie_word_embeddings=True), LINEARS),
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED, tie_word_embeddings=False), LINEARS),
    "gemma": (Gemma2ForCausalLM, Gemma2Config(**GROUPED, query_pre_attn_scalar=8), LINEARS),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
             ["c_attn", "c_proj"]),
}  # fmt: skip
ADAPTERS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "0.attn.c_attn": 2},
                 "alpha_pattern": {"v_proj": 9, "c_proj": 9, "value": 9}},
    "bias": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["norm", "ln_f", "LayerNorm"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "saved_embedding": {"modules_to_save": ["embed_tokens", "wte", "word_embeddings"]},
    "embedding": {"more": ["embed_tokens", "wte", "word_embeddings"]},
    "dora_embedding": {"more": ["embed_tokens", "wte", "word_embeddings"], "use_dora": True},
    "head": {"more": ["lm_head"]},
    "both": {"more": ["lm_head", "embed_tokens", "wte"]},
    "tied": {"more": ["embed_tokens", "wte"], "ensure_weight_tying": True},
    "tied_saved": {"modules_to_save": ["embed_tokens", "wte"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [7, 3, 90]},
}  # fmt: skip


def make_base(kind, folder, dtype=torch.float32, shard="50GB"):
    """Save a base with random weights, norms and biases included; all of them on the grid of `dtype`."""
    torch.manual_seed(0)
    auto, config, _ = BASES[kind]
    model = auto(config)
    for parameter in model.parameters():
        parameter.data = (parameter + 0.02 * torch.randn_like(parameter)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return str(folder)


def make_adapter(base, folder, auto=AutoModelForCausalLM, targets=LINEARS, size=0.05, more=(), **options):
    """Save an adapter with every trained tensor moved; return base + adapter as peft runs them, in float32."""
    model = auto.from_pretrained(base, dtype=torch.float32)
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    if "modules_to_save" in options:
        options["modules_to_save"] = [name for name in options["modules_to_save"] if name in names]
    if "trainable_token_indices" in options:
        embedding = next(name for name in ("embed_tokens", "wte", "word_embeddings") if name in names)
        options["trainable_token_indices"] = {embedding: options["trainable_token_indices"]}
    task = TaskType.CAUSAL_LM if auto is AutoModelForCausalLM else TaskType.FEATURE_EXTRACTION
    targets = [*targets, *(name for name in more if name in names)]
    model = get_peft_model(model, LoraConfig(task_type=task, target_modules=targets, **{"r": 4} | options))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


IDS = torch.tensor([[5, 3, 7, 7, 90, 12, 40, 41, 2, 11]])


def output(model, ids=IDS):
    with torch.no_grad():
        found = model(input_ids=ids)
    return found.logits if "logits" in found else found.last_hidden_state


def merge_and_load(base, adapter, folder, *flags, auto=AutoModelForCausalLM):
    report = merge.main(["--lora_adapter_path", str(adapter), "--output_path", str(folder), *flags])
    return report, auto.from_pretrained(folder, dtype=torch.float32).eval()


def error_of(found, right):
    return ((found - right).norm() / right.norm()).item()


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", BASES)
def test_merged_logits_are_those_of_base_and_adapter(kind, adapter, shard, tmp_path):
    if adapter == "lora_bias" and kind != "gpt2":
        pytest.skip("its linear layers have no bias to add to")
    base = make_base(kind, tmp_path / "base", shard=shard)
    right = output(make_adapter(base, tmp_path / "adapter", targets=BASES[kind][2], **ADAPTERS[adapter]))
    assert error_of(output(AutoModelForCausalLM.from_pretrained(base)), right) > 1e-3
    report, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged")
    assert error_of(output(merged), right) < 1e-5
    assert report["verified"] and report["dtype"] == "float32"
    assert report["verification"]["outputs"]["relative_error"] < 1e-5
    assert (tmp_path / "merged/model.safetensors.index.json").exists() == (shard == "20KB")


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if "head" not in name and "tied" not in name])
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_merged_minilm_gives_the_adapters_embeddings(adapter, dtype, minilm, tmp_path):
    targets = ["query", "value", "output.dense"]
    model = make_adapter(minilm, tmp_path / "adapter", AutoModel, targets, size=0.02, **ADAPTERS[adapter])
    ids = torch.tensor([AutoTokenizer.from_pretrained(minilm)("a lamp behind the door")["input_ids"]])
    right, plain = output(model, ids).mean(1), output(AutoModel.from_pretrained(minilm), ids).mean(1)
    flags = ("--training_precision", dtype)
    report, merged = merge_and_load(minilm, tmp_path / "adapter", tmp_path / "merged", *flags, auto=AutoModel)
    assert torch.cosine_similarity(output(merged, ids).mean(1), right).item() >= 1 - 1e-6
    assert torch.cosine_similarity(plain, right).item() < 0.9999
    assert report["verified"] and report["verification"]["outputs"]["kind"] == "embeddings"

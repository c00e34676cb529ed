"""A merged folder is base + adapter: for every kind of model, adapter and file, and never half of it."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import merge
import utils
from conftest import ROOT
from parts.base import Origin
from parts.run import check_base_of_adapter

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SMALL | {
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
LINEARS = ["q_proj", "v_proj", "down_proj"]
BASES = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, tie_word_embeddings=True), LINEARS),
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED, tie_word_embeddings=False), LINEARS),
    "gemma": (Gemma2ForCausalLM, Gemma2Config(**GROUPED, query_pre_attn_scalar=8), LINEARS),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
             ["c_attn", "c_proj"]),
}  # fmt: skip
MIXED = {name: value for name, value in GROUPED.items() if name != "intermediate_size"} | {
    "num_experts_per_tok": 2
}
EXPERTS = {
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**MIXED, moe_intermediate_size=24, num_experts=3), None),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**MIXED, intermediate_size=40, num_local_experts=3), None),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig(**MIXED, intermediate_size=32, num_local_experts=3), None),
}  # fmt: skip
BASES |= EXPERTS
DENSE = [kind for kind in BASES if kind not in EXPERTS]
ADAPTERS = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "0.attn.c_attn": 2, "0.attention.self.query": 2},
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


def make_adapter(
    base, folder, auto=AutoModelForCausalLM, targets=LINEARS, size=0.05, more=(), **options
):
    """Save an adapter with every trained tensor moved; return base + adapter as peft runs them, in float32."""
    model = auto.from_pretrained(base, dtype=torch.float32)
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    if "modules_to_save" in options:
        options["modules_to_save"] = [name for name in options["modules_to_save"] if name in names]
    if "trainable_token_indices" in options:
        embedding = next(
            name for name in ("embed_tokens", "wte", "word_embeddings") if name in names
        )
        options["trainable_token_indices"] = {embedding: options["trainable_token_indices"]}
    task = TaskType.CAUSAL_LM if auto is AutoModelForCausalLM else TaskType.FEATURE_EXTRACTION
    targets = (
        [*targets, *(name for name in more if name in names)]
        if targets != "all-linear"
        else targets
    )
    model = get_peft_model(
        model, LoraConfig(task_type=task, target_modules=targets, **{"r": 4} | options)
    )
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


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", DENSE)
def test_merged_logits_are_those_of_base_and_adapter(kind, adapter, tmp_path):
    if adapter == "lora_bias" and kind != "gpt2":
        pytest.skip("its linear layers have no bias to add to")
    base = make_base(kind, tmp_path / "base")
    right = output(
        make_adapter(base, tmp_path / "adapter", targets=BASES[kind][2], **ADAPTERS[adapter])
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    assert error_of(output(model), right) > 1e-3
    report, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged")
    assert error_of(output(merged), right) < 1e-5
    assert report["verified"] and report["dtype"] == "float32"
    assert report["verification"]["outputs"]["relative_error"] < 1e-5

    model.save_pretrained(base, max_shard_size="20KB")
    (tmp_path / "base/model.safetensors").unlink()
    report, merged = merge_and_load(
        base, tmp_path / "adapter", tmp_path / "shards", "--verify", "weights"
    )
    assert error_of(output(merged), right) < 1e-5 and report["verified"]
    assert (tmp_path / "shards/model.safetensors.index.json").exists()


ALL_EXPERTS = ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("kind, shard, options", [
    ("qwen3_moe", "50GB", {"targets": "all-linear", "use_rslora": True}),
    ("mixtral", "9KB", {"targets": "all-linear"}),
    ("mixtral", "50GB", {"targets": ["w1", "w3", "w2", "q_proj"], "r": 3}),
    ("qwen3_moe", "9KB", {"target_parameters": ["mlp.experts.down_proj"], "alpha_pattern": {"down_proj": 5}}),
    ("gpt_oss", "50GB", {"target_parameters": [*ALL_EXPERTS, "router.weight"]}),
])  # fmt: skip
def test_experts_are_merged_as_peft_does(kind, shard, options, tmp_path):
    base = make_base(kind, tmp_path / "base", shard=shard)
    model = make_adapter(base, tmp_path / "adapter", **{"targets": ["q_proj"]} | options)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_parameters"]
    right = output(model)
    report, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged")
    assert report["verified"] and report["verification"]["outputs"]["relative_error"] < 1e-6
    assert error_of(output(merged), right) < 1e-6
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    moved = {
        name for name, weight in merged.state_dict().items() if error_of(weight, plain[name]) > 1e-3
    }
    peft = model.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert error_of(weight, peft[name]) < 1e-6
    assert any("experts.down_proj" in name for name in moved)


def test_an_adapter_that_was_trained_expert_by_expert_is_merged(tmp_path):
    base = make_base("mixtral", tmp_path / "base")  # as transformers 4 saw it
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(f"{base}/model.safetensors").items():
        if ".experts." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for side, shape in (("A", (3, weight.shape[1])), ("B", (weight.shape[0], 3))):
                tensors[f"{module}.lora_{side}.weight"] = 0.1 * torch.randn(
                    shape, generator=generator
                )
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 5,
        "base_model_name_or_path": base,
    }
    config["target_modules"] = ["w1", "w2", "w3"]
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(base)
    assert "experts.gate_up_proj" in " ".join(plain.state_dict())
    before = output(plain)
    right = output(PeftModel.from_pretrained(plain, tmp_path / "adapter").eval())
    report, merged = merge_and_load(
        base, tmp_path / "adapter", tmp_path / "merged", "--verify", "full"
    )
    assert report["verified"] and error_of(output(merged), right) < 1e-5 < 1e-3 < error_of(
        before, right
    )


@pytest.mark.parametrize("verify", ["full", "weights"])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(
    "adapter", ["plain", "tokens", "embedding", "head", "saved_head", "saved_embedding"]
)
def test_a_tied_base_may_hold_a_head(adapter, same, verify, tmp_path):
    base = make_base("qwen3", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(
        tensors | {"lm_head.weight": head if same else head.flip(0).contiguous()},
        path,
        {"format": "pt"},
    )
    right = output(make_adapter(base, tmp_path / "adapter", **ADAPTERS[adapter]))
    _, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged", "--verify", verify)
    assert error_of(output(merged), right) < 1e-5


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_new_tokens_of_the_adapters_own_embedding_are_kept(kind, tmp_path):
    base = make_base(kind, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.get_input_embeddings().weight.data[90:] = torch.randn(6, 32)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) if "lora_" in name else 0
    model.save_pretrained(tmp_path / "adapter")
    right = output(
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
        ).eval()
    )
    assert error_of(right, output(model)) < 1e-5
    _, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged")
    assert error_of(output(merged), right) < 1e-5


BOTH = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("kind, adapter, rows", [
    ("qwen3", {}, 112), ("qwen3", {}, 93), ("llama", {}, 112), ("llama", {}, 93), ("qwen3", {"more": BOTH[:1]}, 112),
    ("qwen3", {"modules_to_save": BOTH}, 112), ("llama", {"modules_to_save": BOTH}, 112),
])  # fmt: skip
def test_a_resized_vocabulary_comes_with_the_adapter(kind, adapter, rows, tmp_path):
    base = make_base(kind, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "resized")
    model = make_adapter(tmp_path / "resized", tmp_path / "adapter", **adapter)
    model.save_pretrained(
        tmp_path / "adapter", save_embedding_layers=not adapter.get("modules_to_save")
    )
    right = output(model)
    for verify in ("full", "weights"):
        flags = ["--base_model_path", base, "--verify", verify]
        report, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / verify, *flags)
        assert error_of(output(merged), right) < 1e-5 and output(merged).shape[-1] == rows
        assert report["verified"] and merged.config.vocab_size == rows


def test_an_index_with_one_shard_is_kept(tmp_path):
    base = make_base("llama", tmp_path / "base")
    right = output(make_adapter(base, tmp_path / "adapter"))
    (tmp_path / "base/model.safetensors").rename(tmp_path / "base/model-00001-of-00001.safetensors")
    names = load_file(tmp_path / "base/model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps(index))
    _, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged")
    assert error_of(output(merged), right) < 1e-5


@pytest.mark.parametrize(
    "adapter", [name for name in ADAPTERS if "head" not in name and "tied" not in name]
)
def test_merged_minilm_gives_the_adapters_embeddings(adapter, minilm, tmp_path):
    targets = ["query", "value", "output.dense"]
    model = make_adapter(
        minilm, tmp_path / "adapter", AutoModel, targets, size=0.02, **ADAPTERS[adapter]
    )
    ids = torch.tensor(
        [AutoTokenizer.from_pretrained(minilm)("a lamp behind the door")["input_ids"]]
    )
    right, plain = (
        output(model, ids).mean(1),
        output(AutoModel.from_pretrained(minilm), ids).mean(1),
    )
    report, merged = merge_and_load(
        minilm, tmp_path / "adapter", tmp_path / "merged", auto=AutoModel
    )
    assert torch.cosine_similarity(output(merged, ids).mean(1), right).item() >= 1 - 1e-6
    assert torch.cosine_similarity(plain, right).item() < 0.9999
    assert report["verified"] and report["verification"]["outputs"]["kind"] == "embeddings"


@pytest.mark.parametrize("saved_as", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("trained_as", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_adapters_fit_bases_with_and_without_head(kind, trained_as, saved_as, tmp_path):
    base = make_base(kind, tmp_path / "whole")
    saved_as.from_pretrained(base).save_pretrained(tmp_path / "base")
    right = output(
        make_adapter(tmp_path / "base", tmp_path / "adapter", trained_as, BASES[kind][2])
    )
    _, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged", auto=trained_as)
    assert error_of(output(merged), right) < 1e-5


@pytest.mark.parametrize("trained_as", [AutoModel, AutoModelForCausalLM])
@pytest.mark.parametrize("named", ["FEATURE_EXTRACTION", None])
def test_embedrags_command_line_and_names(trained_as, named, tmp_path):
    base, final = make_base("qwen3", tmp_path / "base"), tmp_path / "OUT/final"
    right = output(make_adapter(base, final, trained_as, r=5, lora_alpha=7))
    tensors = load_file(final / "adapter_model.safetensors")
    save_file(
        {f"model.{name}": tensor for name, tensor in tensors.items()},
        final / "adapter_model.safetensors",
    )
    config = json.loads((final / "adapter_config.json").read_text())
    config["task_type"] = config["task_type"] if trained_as is AutoModelForCausalLM else named
    (final / "adapter_config.json").write_text(json.dumps(config))
    flags = "--base_model_path BASE --lora_adapter_path OUT/final/adapter_model.safetensors --output_path MERGED"
    paths = {
        "BASE": base,
        "OUT/final/adapter_model.safetensors": str(final / "adapter_model.safetensors"),
    }
    paths["MERGED"] = str(tmp_path / "merged")
    report = merge.main(
        [paths.get(part, part) for part in [*flags.split(), "--training_precision", "float32"]]
    )
    assert report["verified"]
    assert error_of(output(trained_as.from_pretrained(tmp_path / "merged").eval()), right) < 1e-5


def test_embedrags_snippet_gives_the_trainers_embeddings(run_embed, tiny_qwen, tmp_path):
    run_embed(
        "--append_eos", "--max_steps", "3", "--lr", "5e-3", model=tiny_qwen, out=tmp_path / "run"
    )
    merge.main(
        [
            "--lora_adapter_path",
            str(tmp_path / "run/final"),
            "--output_path",
            str(tmp_path / "merged"),
        ]
    )
    from sentence_transformers import SentenceTransformer

    text = "where is the lamp"
    right = torch.tensor(
        SentenceTransformer(str(tmp_path / "run/final"), device="cpu").encode([text])
    )
    model, tokenizer = (
        auto.from_pretrained(tmp_path / "merged") for auto in (AutoModel, AutoTokenizer)
    )
    inputs = tokenizer(text, return_tensors="pt", max_length=512, truncation=True)
    assert inputs["input_ids"][0, -1] == tokenizer.eos_token_id
    with torch.no_grad():
        embeddings = model(**inputs).last_hidden_state[:, -1, :]
    embeddings = torch.nn.functional.normalize(embeddings, p=2, dim=-1)
    assert torch.cosine_similarity(embeddings, right).item() >= 1 - 1e-6
    merged = torch.tensor(
        SentenceTransformer(str(tmp_path / "merged"), device="cpu").encode([text])
    )
    assert torch.cosine_similarity(merged, right).item() >= 1 - 1e-6
    base = torch.tensor(SentenceTransformer(tiny_qwen, device="cpu").encode([text]))
    assert torch.cosine_similarity(base, right).item() < 0.999


# ---------------------------------------------------------------- dtype and rounding


def small_fine_tune(folder, size):
    """A bf16 base, and an adapter that moves every linear weight by |dW|/|W| = size."""
    base = make_base("llama", folder / "base", torch.bfloat16)
    stored = load_file(f"{base}/model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in stored.items()},
        f"{base}/model.safetensors",
        {"format": "pt"},
    )
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for layer in model.modules():
        if "default" in getattr(layer, "lora_B", {}):
            weight = layer.lora_B["default"].weight
            weight.data.normal_(generator=torch.Generator().manual_seed(3))
            weight.data *= (
                size * layer.base_layer.weight.norm() / layer.get_delta_weight("default").norm()
            )
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


def test_auto_leaves_bfloat16_where_the_fine_tune_would_be_lost(tmp_path, capsys):
    base, adapter = small_fine_tune(tmp_path, 1e-3)
    report, merged = merge_and_load(base, adapter, tmp_path / "merged")
    assert (report["dtype"], report["base_dtype"], report["verified"]) == (
        "float32",
        "bfloat16",
        True,
    )
    assert 0.98 < report["verification"]["outputs"]["retained"] < 1.02
    assert report["verification"]["outputs"]["residual"] < 0.05
    assert (
        "bfloat16 would lose part of the fine-tune: once more in float32, 0.00 GB instead of 0.00. It helps only "
        "if it is served in float32 or float16" in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"


def one_tensor_that_rounds_away(folder):
    """A bf16 base and an adapter that moves all weights by 0.3 of their length, and one of them by 1e-4."""
    base, adapter = small_fine_tune(folder, 0.3)
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors | {name: tensors[name] * 3e-4})
    return base, adapter, "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize("verify", ["full", "weights", "off"])
def test_auto_is_decided_by_outputs_or_by_all_tensors_together(verify, tmp_path):
    base, adapter, name = one_tensor_that_rounds_away(tmp_path)
    report, _ = merge_and_load(base, adapter, tmp_path / "merged", "--verify", verify)
    assert not 0.98 <= report["tensors"][name]["retained"] <= 1.02
    assert report["dtype"] == "bfloat16" and report["verified"] == (verify != "off")
    weights = report["verification"]["weights"]
    if verify != "off":
        lowest, highest = weights["tensors"]["retained"]
        assert 0.98 < weights["retained"] < 1.02 and not (0.98 <= lowest and highest <= 1.02)
        assert weights["tensors"]["residual"] > merge.WEIGHTS_RESIDUAL > weights["residual"]


def test_figures_over_all_tensors_weigh_each_by_what_it_changes():
    big = merge.Figures(delta=3.0, retained=1.0, residual=0.1)
    small = merge.Figures(delta=1.0, retained=0.5, residual=0.4)
    found = merge.over_all({"big": big, "small": small})
    assert math.isclose(found.retained, (9 * 1.0 + 1 * 0.5) / 10)
    assert math.isclose(found.residual, math.sqrt((9 * 0.01 + 1 * 0.16) / 10))
    none = merge.Figures(delta=0.0, retained=1.0, residual=0.0)
    assert merge.over_all({"none": none}).retained == 1


def test_a_float32_file_that_is_served_in_bfloat16_is_the_bfloat16_merge(tmp_path):
    base, adapter = small_fine_tune(tmp_path, 0.03)
    stored = {}
    for dtype in ("float32", "bfloat16"):
        flags = [
            "--lora_adapter_path",
            str(adapter),
            "--output_path",
            str(tmp_path / dtype),
            "--training_precision",
        ]
        merge.main([*flags, dtype, "--verify", "off"])
        stored[dtype] = load_file(tmp_path / dtype / "model.safetensors")
    for name, tensor in stored["bfloat16"].items():
        assert torch.equal(stored["float32"][name].bfloat16(), tensor)


@pytest.mark.parametrize("verify", ["full", "weights", "off"])
def test_auto_keeps_bfloat16_where_the_fine_tune_survives(verify, tmp_path):
    base, adapter = small_fine_tune(tmp_path, 0.3)
    report, _ = merge_and_load(base, adapter, tmp_path / "merged", "--verify", verify)
    assert report["dtype"] == "bfloat16" and report["verified"] == (verify != "off")
    stored = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@pytest.mark.parametrize("verify", ["full", "weights"])
def test_an_explicit_bfloat16_merge_that_loses_is_written_and_fails(verify, tmp_path):
    base, adapter = small_fine_tune(tmp_path, 1e-3)
    flags = ["--training_precision", "bfloat16", "--verify", verify]
    with pytest.raises(
        merge.InputError,
        match="lost part of the fine-tune to bfloat16.*--training_precision float32",
    ):
        merge_and_load(base, adapter, tmp_path / "merged", *flags)
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    assert report["verified"] is False and report["dtype"] == "bfloat16"
    assert "failed its verification" in (tmp_path / "merged/README.md").read_text()


def test_the_reports_figures_are_those_of_a_naive_merge(tmp_path):
    base, adapter = small_fine_tune(tmp_path, 1e-3)
    with pytest.raises(merge.InputError):
        merge_and_load(
            base,
            adapter,
            tmp_path / "merged",
            "--training_precision",
            "bfloat16",
            "--verify",
            "weights",
        )
    report = json.loads((tmp_path / "merged/merge_report.json").read_text())
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (
        tensors[f"base_model.model.{name.replace('weight', f'lora_{x}.weight')}"].double()
        for x in "AB"
    )
    w = load_file(f"{base}/model.safetensors")[name].double()
    delta = 8 / 4 * b @ a
    written = (w + delta).float().bfloat16().double()
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")[name].double(), written)
    e, q = written - w, torch.linalg.qr(a.T).Q
    found = report["tensors"][name]
    assert math.isclose(found["relative_delta"], (delta.norm() / w.norm()).item(), rel_tol=1e-4)
    assert math.isclose(
        found["retained"], ((e * delta).sum() / delta.square().sum()).item(), abs_tol=1e-4
    )
    assert math.isclose(
        found["residual"], (((e - delta) @ q).norm() / delta.norm()).item(), abs_tol=1e-4
    )


def test_a_merge_in_float16_says_what_does_not_fit(tmp_path):
    base = make_base("llama", tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", size=300)
    with pytest.raises(
        merge.InputError, match="too large for float16. Pass --training_precision float32"
    ):
        merge_and_load(
            base, tmp_path / "adapter", tmp_path / "merged", "--training_precision", "float16"
        )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("flags", [[], ["--training_precision", "float32"]])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float64)]
)
def test_bases_of_mixed_and_double_precision(dtypes, flags, tmp_path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    path = tmp_path / "base/model.safetensors"
    tensors = {name: x.to(dtypes["q_proj" in name]) for name, x in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    right = output(make_adapter(base, tmp_path / "adapter", size=0.5))
    report, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged", *flags)
    assert error_of(output(merged), right) < (1e-5 if flags or dtypes[0] == torch.float64 else 1e-2)
    if flags:
        stored = load_file(tmp_path / "merged/model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_auto_goes_to_float32_where_float16_overflows(tmp_path):
    base = make_base("llama", tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    save_file(
        {name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"}
    )
    make_adapter(base, tmp_path / "adapter", size=300)
    report = merge.main(
        [
            "--lora_adapter_path",
            str(tmp_path / "adapter"),
            "--output_path",
            str(tmp_path / "merged"),
        ]
    )
    assert report["dtype"] == "float32" and report["verified"]


def test_trained_tokens_that_rounding_loses_fail_whatever_the_outputs_say(tmp_path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    path = tmp_path / "base/model.safetensors"
    save_file(
        {name: tensor.bfloat16() for name, tensor in load_file(path).items()},
        path,
        {"format": "pt"},
    )
    make_adapter(base, tmp_path / "adapter", size=0.5, trainable_token_indices=[94, 95])
    rows = load_file(path)["model.embed_tokens.weight"][94:].float() * 1.0007
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change_tensors(tmp_path / "adapter", lambda tensors: tensors | {name: rows})
    with pytest.raises(merge.InputError, match="lost part of the fine-tune"):
        merge_and_load(
            base, tmp_path / "adapter", tmp_path / "merged", "--training_precision", "bfloat16"
        )


@pytest.mark.parametrize("bits", [4, 8])
def test_qlora_can_be_merged_into_what_training_saw(bits, tmp_path):
    from transformers import BitsAndBytesConfig

    base = make_base("llama", tmp_path / "base")
    make_adapter(base, tmp_path / "adapter", targets=["q_proj", "down_proj"])
    (tmp_path / "adapter/training_config.json").write_text(json.dumps({"flags": {"bits": bits}}))
    how = {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }
    how = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **how)
    seen = AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32)
    seen = (
        seen.dequantize(torch.float32) if bits == 8 else seen
    )  # 8 bits also round the inputs, outside training
    right = output(PeftModel.from_pretrained(seen, tmp_path / "adapter").train())
    errors = {}
    for qlora_base in ("original", "dequant"):
        flags = ["--qlora_base", qlora_base]
        report, merged = merge_and_load(base, tmp_path / "adapter", tmp_path / qlora_base, *flags)
        errors[qlora_base] = error_of(output(merged), right)
        assert report["verified"]
    assert errors["dequant"] < 1e-5 < 1e-3 < errors["original"]
    stored, old = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "dequant", Path(base))
    )
    changed = {name for name in old if not torch.equal(old[name], stored[name])}
    assert (
        all("_proj" in name for name in changed) and len(changed) == 14
    )  # no norm, embedding or head


def test_an_adapter_is_merged_by_what_its_run_settled(parts):
    _, adapter, merged = parts
    records = {
        "older": {"flags": {"bits": 4}},
        "settled": {"flags": {"bits": 8}, "settled": {"bits": 4}},
        "asked": {"flags": {"bits": 8}, "settled": {}},
    }
    stored = {}
    for name, record in records.items():
        (adapter / "training_config.json").write_text(json.dumps(record))
        flags = ["--lora_adapter_path", str(adapter), "--output_path", str(merged / name)]
        merge.main([*flags, "--qlora_base", "dequant", "--verify", "off"])
        files = sorted((merged / name).glob("*.safetensors"))
        stored[name] = b"".join(file.read_bytes() for file in files)
    assert stored["older"] == stored["settled"] != stored["asked"]


@pytest.mark.parametrize(
    ("record", "trained"),
    [
        ({}, {}),
        ({"flags": {"bits": 4, "lr": 1}}, {"bits": 4, "lr": 1}),
        ({"flags": {"bits": None, "lr": 1}}, {"lr": 1}),
        ({"flags": {"bits": 4, "lr": 1}, "settled": {"lr": 2}}, {"bits": 4, "lr": 2}),
        ({"flags": {"bits": 4, "lr": 1}, "settled": {"bits": None}}, {"lr": 1}),
    ],
)
def test_what_a_run_settled_counts_before_what_was_asked(record, trained):
    assert merge.flags_of(record) == trained


@pytest.mark.parametrize("part", ["flags", "settled"])
def test_a_record_of_a_run_that_is_none_is_named(part):
    with pytest.raises(merge.InputError, match=rf"adapter holds \[5\] as {part}. Copy it again"):
        merge.flags_of({"flags": {"bits": 4}, part: [5]})


# ---------------------------------------------------------------- the folder


def test_the_folder_is_complete(run_sft, tiny_chat, tmp_path):
    run_sft("--max_steps", "2", "--lr", "5e-3", out=tmp_path / "run")
    final, merged = tmp_path / "run/final", tmp_path / "merged"
    report = merge.main(["--lora_adapter_path", str(final), "--output_path", str(merged)])
    assert {path.name for path in merged.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "training_config.json", "merge_report.json", "README.md"}  # fmt: skip
    assert (merged / "tokenizer.json").read_bytes() == (final / "tokenizer.json").read_bytes()
    template = (merged / "chat_template.jinja").read_text()
    assert json.loads((merged / "tokenizer_config.json").read_text())["chat_template"] == template
    stops = json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert stops == json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.eos_token_id in stops
    assert (
        json.loads((merged / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id
    )
    assert {path.stat().st_mode & 0o777 for path in merged.iterdir()} == {
        0o666 & ~os.umask(os.umask(0o22))
    }
    card = (merged / "README.md").read_text()
    assert tiny_chat not in card and str(tmp_path) not in card and "100.00%" in card
    recorded = json.loads((merged / "training_config.json").read_text())["base_fingerprint"]
    assert report["base_fingerprint"] == recorded


@pytest.mark.parametrize("script", ["run_sft", "run_embed"])
def test_both_trainers_merge_at_the_end_or_say_how(script, request, tmp_path, capsys):
    run, out = request.getfixturevalue(script), tmp_path / "run"
    run("--max_steps", "2", "--lr", "5e-3", out=out)
    assert (
        f"next      python merge.py --lora_adapter_path {out}/final --output_path {out}/merged"
        in capsys.readouterr().out
    )
    assert not (out / "merged").exists()
    for _ in range(2):  # the second run deletes what the first has merged
        run("--max_steps", "2", "--lr", "5e-3", "--merge_adapter", "--overwrite", out=out)
        assert json.loads((out / "merged/merge_report.json").read_text())["verified"]
        assert "outputs " in capsys.readouterr().out
    run("--max_steps", "2", "--overwrite", out=out)
    assert not (out / "merged").exists()
    # asked for when all else is done
    again = ["--max_steps", "2", "--resume_from_checkpoint"]
    for flags in (["--dry_run", "--merge_adapter"], []):
        run(*again, *flags, out=out)
        assert not (out / "merged").exists()
    for _ in range(2):  # the second one finds it there
        run(*again, "--merge_adapter", out=out)
        assert json.loads((out / "merged/merge_report.json").read_text())["verified"]
    with pytest.raises(SystemExit):
        run("--finetune_type", "full", "--merge_adapter", out=out)
    assert "drop --merge_adapter" in capsys.readouterr().err


def test_old_servers_read_the_dtype_too(tmp_path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", size=0.5)
    change_json(
        tmp_path / "base/config.json", torch_dtype="float32", text_config={"torch_dtype": "float32"}
    )
    flags = [
        "--lora_adapter_path",
        str(tmp_path / "adapter"),
        "--output_path",
        str(tmp_path / "merged"),
    ]
    merge.main([*flags, "--verify", "weights", "--training_precision", "bfloat16"])
    config = json.loads((tmp_path / "merged/config.json").read_text())
    for part in (config, config["text_config"]):
        assert part["torch_dtype"] == part["dtype"] == "bfloat16"


@pytest.mark.parametrize("owner", ["base", "adapter"])
def test_tekken_is_a_tokenizer(owner, parts):
    base, adapter, merged = parts
    (base if owner == "base" else adapter).joinpath("tekken.json").write_text('{"config": {}}')
    (base / "tokenizer.model").write_bytes(b"the base's")
    flags = [
        "--lora_adapter_path",
        str(adapter),
        "--output_path",
        str(merged),
        "--verify",
        "weights",
    ]
    merge.main(flags)
    assert (merged / "tekken.json").read_text() == '{"config": {}}'
    assert (merged / "tokenizer.model").exists() == (owner == "base")


def test_a_containers_memory_limit_counts(tmp_path):
    own, groups = tmp_path / "own", tmp_path / "groups"
    machine = merge.free_memory(groups, own)
    versions = (
        ("", "max", "current", "inactive_file"),
        ("memory", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
    )
    for kinds, limit, used, stat in versions:
        own.write_text(f"3:cpu:/\n1:{kinds}:/box/inner\n")
        inner = groups / kinds / "box/inner"
        inner.mkdir(parents=True)
        for folder, size in ((inner, "max" if not kinds else str(2**63)), (inner.parent, "5000")):
            (folder / f"memory.{limit}").write_text(f"{size}\n")
            (folder / f"memory.{used}").write_text("4000\n")
            (folder / "memory.stat").write_text(f"anon 1\n{stat} 300\n")
        assert merge.free_memory(groups, own) == 1300 < machine


def test_experts_are_trained_and_merged(run_sft, tiny_chat, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    config = Qwen3MoeConfig(**MIXED | {"vocab_size": 640, "max_position_embeddings": 256}, moe_intermediate_size=24,
                            num_experts=3, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    run_sft(
        "--max_steps",
        "1",
        "--lr",
        "5e-3",
        "--merge_adapter",
        model=str(tmp_path / "base"),
        out=tmp_path / "run",
    )
    report = json.loads((tmp_path / "run/merged/merge_report.json").read_text())
    assert report["verified"] and report["verification"]["outputs"]["relative_error"] < 1e-5
    assert sum(".experts.2." in name for name in report["tensors"]) == 2 * 3


@pytest.mark.parametrize("script", ["run_sft", "run_embed"])
def test_what_could_not_be_merged_is_said_before_training(
    script, request, tiny_chat, tiny_bert, tmp_path, capsys
):
    run, base = request.getfixturevalue(script), tmp_path / "base"
    shutil.copytree(tiny_chat if script == "run_sft" else tiny_bert, base)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(utils.InputError, match="--merge_adapter: .* lacks model.safetensors"):
        run("--dry_run", "--merge_adapter", model=str(base))
    run("--dry_run", model=str(base))
    assert "merge.py could not merge this adapter" in capsys.readouterr().out


def test_an_adapter_without_tokenizer_takes_the_bases(tiny_chat, tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(tiny_chat, base)
    make_adapter(base, tmp_path / "adapter")
    (base / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    merge.main(["--lora_adapter_path", str(tmp_path / "adapter"), "--output_path", str(merged)])
    assert (merged / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    eos = AutoTokenizer.from_pretrained(base).eos_token_id
    generation = json.loads((merged / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [eos, 7] and generation["temperature"] == 0.6


def test_what_the_adapter_does_not_touch_is_copied_byte_for_byte(tmp_path):
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", targets=["q_proj"])
    report, _ = merge_and_load(base, tmp_path / "adapter", tmp_path / "merged")
    count = len(report["tensors"])
    assert repr(report).splitlines()[0] == (
        f"Report of a merge as bfloat16, verified, {count} tensors"
    )
    assert len(repr(report)) < 400
    assert dict(report) == json.loads((tmp_path / "merged/merge_report.json").read_text())
    old, new = (
        load_file(folder / "model.safetensors") for folder in (Path(base), tmp_path / "merged")
    )
    assert list(old) == list(new)
    assert [name for name in old if not torch.equal(old[name], new[name])] == list(
        report["tensors"]
    )
    assert len(report["tensors"]) == 2


# ---------------------------------------------------------------- failures


@pytest.fixture
def parts(tmp_path):
    """A base of several shards and an adapter that fits it, as merge flags and folders."""
    base = make_base("llama", tmp_path / "base", shard="20KB")
    make_adapter(base, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rename_layer(tensors):
    return {
        name.replace("layers.0.mlp", "layers.9.mlp"): tensor for name, tensor in tensors.items()
    }


def double(tensors):
    return tensors | {f"model.{name}": tensor + 1 for name, tensor in tensors.items()}


def put_nan(tensors):
    next(iter(tensors.values()))[0, 0] = float("nan")
    return tensors


def cut_off(base, _):
    path = sorted(base.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-50])


def another_base(base, _):
    shutil.rmtree(base)
    make_base("gpt2", base)


def smaller_vocabulary(base, adapter):
    make_adapter(base, adapter, more=["embed_tokens"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(80)
    shutil.rmtree(base)
    model.save_pretrained(base)


def other_weights(base, adapter):
    (adapter / "training_config.json").write_text(
        json.dumps({"base_fingerprint": "0" * 64, "flags": {}})
    )


def other_experts(base, adapter):
    """The base is a mixture of three experts, the adapter for one of two."""
    shutil.rmtree(base)
    make_base("qwen3_moe", base)
    make_adapter(base, adapter, targets=["q_proj"], target_parameters=["down_proj"])
    keep = {"lora_A": lambda tensor: tensor[:8], "lora_B": lambda tensor: tensor[:, :8]}
    name = "base_model.model.model.layers.1.mlp.experts."
    change_tensors(
        adapter,
        lambda tensors: (
            tensors
            | {
                f"{name}{side}.weight": cut(tensors[f"{name}{side}.weight"]).contiguous()
                for side, cut in keep.items()
            }
        ),
    )


def bias_for_none(base, adapter):
    make_adapter(base, adapter, targets=["q_proj"], lora_bias=True)


def header(text):
    return lambda _, adapter: (adapter / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text.encode())  # fmt: skip


def index_outside(base, _):
    change_json(base / "model.safetensors.index.json", weight_map={"x": "../elsewhere.safetensors"})


def no_rank(tensors):
    return {
        name: x[:0] if "lora_A" in name else x[:, :0].contiguous() for name, x in tensors.items()
    }


def flat(tensors):
    return {name: tensor.flatten() for name, tensor in tensors.items()}


def bad_template(base, _):
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_bytes(b"\xff")


WRONG = {
    "no alpha": (lambda _, adapter: change_json(adapter / "adapter_config.json", lora_alpha=None), "for lora_alpha"),
    "alpha of what": (lambda _, adapter: change_json(adapter / "adapter_config.json", alpha_pattern={"(": 3}),
                      "is no regular expression"),
    "header": (header('{"x": {}}'), "cut off or no safetensors file"),
    "header of a list": (header("[]"), "cut off or no safetensors file"),
    "no rank": (lambda _, adapter: change_tensors(adapter, no_rank), "do not belong together"),
    "flat": (lambda _, adapter: change_tensors(adapter, flat), "do not belong together"),
    "a file elsewhere": (index_outside, "which is not in this folder"),
    "a template": (bad_template, "is no UTF-8"),
    "a bias for none": (bias_for_none, "q_proj has no bias in the base"),
    "another base": (another_base, "fit nothing in the base: .*q_proj.* as --base_model_path"),
    "other weights": (other_weights, "is not the base that .* was trained on"),
    "smaller vocabulary": (smaller_vocabulary, r"the adapter is for .*96.*, the base has .*80"),
    "missing shard": (lambda base, _: sorted(base.glob("*.safetensors"))[1].unlink(), "lacks model-00002-of"),
    "cut shard": (cut_off, "is cut off"),
    "no config": (lambda base, _: (base / "config.json").unlink(), "has no config.json"),
    "nan": (lambda _, adapter: change_tensors(adapter, put_nan), "1 tensors are not finite .*lora_A"),
    "unmatched key": (lambda _, adapter: change_tensors(adapter, rename_layer), "1 of .* fit nothing .*layers.9.*"),
    "unknown": (lambda _, adapter: change_tensors(adapter, lambda t: t | {"x.lora_C": torch.ones(2)}), "x.lora_C"),
    "one side": (lambda _, adapter: change_tensors(adapter, lambda t: dict([*t.items()][1:])), "A and B do not belong"),
    "quantised base": (lambda base, _: change_json(base / "config.json", quantization_config={}), "is quantised"),
    "not an adapter": (lambda _, adapter: (adapter / "adapter_config.json").unlink(), "is no LoRA adapter"),
    "no weights": (lambda _, adapter: (adapter / "adapter_model.safetensors").unlink(), "does not exist"),
    "pissa": (lambda _, adapter: change_json(adapter / "adapter_config.json", init_lora_weights="pissa"), "pissa"),
    "another's experts": (other_experts, "1 of .* fit nothing .*experts"),
    "replicated layers": (lambda _, adapter: change_json(adapter / "adapter_config.json", layer_replication=[[0, 2]]),
                          "layer_replication"),
    "two names": (lambda _, adapter: change_tensors(adapter, double), "Copy the adapter again"),
    "empty": (lambda _, adapter: change_tensors(adapter, lambda t: {}), "holds 0 tensors"),
    "untrained": (lambda _, adapter: change_tensors(adapter, lambda t: {n: x * 0 for n, x in t.items()}), "no output"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_merged_is_refused_in_one_sentence(what, parts):
    base, adapter, merged = parts
    spoil, sentence = WRONG[what]
    spoil(base, adapter)
    with pytest.raises(merge.InputError, match=sentence):
        merge.main(["--lora_adapter_path", str(adapter), "--output_path", str(merged)])
    assert not merged.exists() and not list(merged.parent.glob(".*partial"))


def test_a_base_is_known_by_the_weights_that_it_loads(parts):
    base, adapter, merged = parts
    known = merge.fingerprint(base)
    every_file = merge.digest_of(sorted(base.glob("*.safetensors")))
    assert known == every_file  # as earlier trainers recorded it
    record = adapter / "training_config.json"
    record.write_text(json.dumps({"base_fingerprint": known}))
    save_file({"x": torch.ones(3)}, base / "another.safetensors")
    assert merge.fingerprint(base) == known
    with_another = merge.digest_of(sorted(base.glob("*.safetensors")))
    for recorded, flags in ((known, []), (with_another, ["--overwrite"]), (None, ["--overwrite"])):
        record.write_text(json.dumps({"base_fingerprint": recorded}))
        merge.main(
            [
                "--lora_adapter_path",
                str(adapter),
                "--output_path",
                str(merged),
                "--verify",
                "off",
                *flags,
            ]
        )
        check_base_of_adapter(Origin(str(base), adapter=str(adapter)))  # of --init_adapter
    record.write_text(
        json.dumps({"base_fingerprint": merge.digest_of([base / "another.safetensors"])})
    )
    with pytest.raises(merge.InputError, match="is not the base that"):
        merge.main(
            ["--lora_adapter_path", str(adapter), "--output_path", str(merged), "--overwrite"]
        )


def test_a_base_without_safetensors_is_not_compared(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    assert merge.fingerprint(tmp_path) is None and merge.is_base(tmp_path, "0" * 64)


def test_one_file_is_taken_before_an_index_as_transformers_does(tmp_path):
    base = make_base("llama", tmp_path / "base", shard="20KB")
    make_base("llama", tmp_path / "other")
    plain = load_file(tmp_path / "other/model.safetensors")
    plain = {name: tensor + 1 for name, tensor in plain.items()}
    save_file(plain, tmp_path / "base/model.safetensors", {"format": "pt"})
    right = output(make_adapter(base, tmp_path / "adapter"))
    _, merged = merge_and_load(
        base, tmp_path / "adapter", tmp_path / "merged", "--verify", "weights"
    )
    assert error_of(output(merged), right) < 1e-5


def test_what_the_right_base_lacks_is_named(parts):
    base, adapter, merged = parts
    (adapter / "training_config.json").write_text(
        json.dumps({"base_fingerprint": merge.fingerprint(base)})
    )
    change_tensors(adapter, rename_layer)
    flags = ["--lora_adapter_path", str(adapter), "--output_path", str(merged)]
    named = "layers.9.mlp.down_proj .*was trained on .*whose files hold no such"
    with pytest.raises(merge.InputError, match=named) as found:
        merge.main(flags)
    assert "--base_model_path" not in str(found.value)
    change_json(adapter / "adapter_config.json", task_type="SEQ_CLS")
    with pytest.raises(merge.InputError, match="brings a head that a base's files do not hold"):
        merge.main(flags)


def tied_elsewhere(kind, folder):
    if kind == "bert":
        config = BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64)
        model, targets = BertForMaskedLM(config), {"target_modules": ["query", "word_embeddings"]}
    else:
        config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        model, targets = (
            T5ForConditionalGeneration(config),
            {"target_modules": ["q"], "modules_to_save": ["shared"]},
        )
        if kind == "t5 encoder":
            model, targets = T5EncoderModel(config), {"target_modules": ["q", "shared"]}
    model.save_pretrained(folder / "base")
    return get_peft_model(type(model).from_pretrained(folder / "base"), LoraConfig(r=4, **targets))


@pytest.mark.parametrize("kind", ["bert", "t5", "t5 encoder"])
def test_an_embedding_that_is_tied_to_more_than_a_head_is_refused(kind, tmp_path, capsys):
    model = tied_elsewhere(kind, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    flags = [
        "--lora_adapter_path",
        str(tmp_path / "adapter"),
        "--output_path",
        str(tmp_path / "merged"),
    ]
    with pytest.raises(
        merge.InputError,
        match="ties the (head of BertForMaskedLM|embeddings of encoder and decoder)",
    ):
        merge.main(flags)
    if kind == "bert":  # of an embedding model the head is no part
        change_json(tmp_path / "adapter/adapter_config.json", task_type="FEATURE_EXTRACTION")
        merge.main([*flags, "--verify", "weights"])
        assert "the head of BertForMaskedLM is tied to" in capsys.readouterr().out


def test_a_second_merge_into_the_same_folder_is_refused(parts):
    base, adapter, merged = parts
    flags = ["--lora_adapter_path", str(adapter), "--output_path"]
    merge.main([*flags, str(merged)])
    with pytest.raises(merge.InputError, match="holds a merge already"):
        merge.main([*flags, str(merged)])
    (merged / "left over").write_text("")
    merge.main([*flags, str(merged), "--overwrite", "--verify", "off"])
    assert not (merged / "left over").exists()
    for taken in (base, adapter, merged.parent):
        with pytest.raises(merge.InputError, match="is not empty and no earlier merge"):
            merge.main([*flags, str(taken), "--overwrite"])


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_an_output_path_that_cannot_be_is_refused_first(name, parts):
    _, adapter, merged = parts
    with pytest.raises(merge.InputError, match="--output_path cannot be used"):
        merge.main(
            ["--lora_adapter_path", str(adapter), "--output_path", str(merged.parent / name)]
        )


def test_modules_are_copied_from_their_own_folder_alone(parts):
    base, adapter, merged = parts
    (merged.parent / "outside/secret").mkdir(parents=True)
    (base / "modules.json").write_text('[{"path": "../outside"}, {}]')
    flags = [
        "--lora_adapter_path",
        str(adapter),
        "--output_path",
        str(merged.parent / "deeper/merged"),
    ]
    merge.main([*flags, "--verify", "off"])
    assert not (merged.parent / "deeper/outside").exists()


def test_a_disk_that_is_too_small_is_noticed_first(parts, monkeypatch):
    _, adapter, merged = parts
    usage = shutil.disk_usage(adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(merge.InputError, match="needs 0.0 GB and .* has .* free"):
        merge.main(["--lora_adapter_path", str(adapter), "--output_path", str(merged)])
    assert not merged.exists()


@pytest.mark.parametrize("factor", [0.1, 1.1, -1])
@pytest.mark.parametrize("size", [0.05, 1e-4])
def test_a_wrong_scale_does_not_pass(parts, monkeypatch, factor, size):
    base, adapter, merged = parts
    make_adapter(base, adapter, size=size)
    scale = merge.scale_of
    monkeypatch.setattr(merge, "scale_of", lambda *args: factor * scale(*args))
    with pytest.raises(merge.InputError, match="is not base \\+ adapter"):
        merge.main(["--lora_adapter_path", str(adapter), "--output_path", str(merged)])
    assert json.loads((merged / "merge_report.json").read_text())["verified"] is False


@pytest.mark.parametrize("name, sentence", [
    ("model.layers.0.mlp.down_proj.weight", "is not base"), ("model.norm.weight", "is not what was written")
])  # fmt: skip
@pytest.mark.parametrize("verify", ["full", "weights"])
def test_a_byte_that_the_disk_loses_does_not_pass(tmp_path, monkeypatch, verify, name, sentence):
    make_adapter(make_base("llama", tmp_path / "base"), tmp_path / "adapter")
    complete = merge.complete_folder

    def lose(folder, job):
        complete(folder, job)
        tensor = merge.read_header(folder / "model.safetensors")[name]
        with open(tensor.file, "r+b") as file:
            file.seek(tensor.start + 3)
            file.write(b"\xff")

    monkeypatch.setattr(merge, "complete_folder", lose)
    with pytest.raises(merge.InputError, match=sentence):
        flags = [
            "--lora_adapter_path",
            str(tmp_path / "adapter"),
            "--output_path",
            str(tmp_path / "merged"),
        ]
        merge.main([*flags, "--verify", verify])


def test_a_failed_merge_leaves_the_earlier_one(tmp_path):
    base, adapter = small_fine_tune(tmp_path, 1e-3)
    merge_and_load(base, adapter, tmp_path / "merged")
    with pytest.raises(merge.InputError, match="lost part"):
        merge_and_load(
            base, adapter, tmp_path / "merged", "--overwrite", "--training_precision", "bfloat16"
        )
    assert json.loads((tmp_path / "merged/merge_report.json").read_text())["verified"]
    (tmp_path / "merged").rename(tmp_path / ".merged.old")  # killed between two renames
    with pytest.raises(merge.InputError, match="holds a merge already"):
        merge_and_load(base, adapter, tmp_path / "merged")


def start(adapter, merged, **options):
    command = [
        sys.executable,
        ROOT / "merge.py",
        "--lora_adapter_path",
        adapter,
        "--output_path",
        merged,
    ]
    return subprocess.Popen(
        [*map(str, command)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )


def test_a_full_disk_leaves_nothing(parts):
    def limit():  # of a file: what a full disk looks like
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))

    _, adapter, merged = parts
    run = start(adapter, merged, preexec_fn=limit)
    _, errors = run.communicate()
    assert run.returncode == 1 and "could not be written" in errors and "Traceback" not in errors
    assert not merged.exists() and not list(merged.parent.glob(".*partial"))


def test_kill_leaves_nothing_that_looks_finished(parts):
    _, adapter, merged = parts
    partial = merged.with_name(".merged.partial")
    run = start(adapter, merged)
    while not (
        partial / "config.json"
    ).exists():  # the weights are written, the outputs not yet compared
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert partial.exists() and not merged.exists()
    merge.main(["--lora_adapter_path", str(adapter), "--output_path", str(merged)])
    assert (merged / "merge_report.json").exists() and not partial.exists()


def test_two_merges_into_one_folder_at_once(parts):
    _, adapter, merged = parts
    partial = merged.with_name(".merged.partial")
    flags = ["--lora_adapter_path", str(adapter), "--output_path", str(merged)]
    with merge.held(partial):
        (partial / "model.safetensors").write_text("of the other merge")
        with pytest.raises(merge.InputError, match="another merge is writing to"):
            merge.main(flags)
        assert (partial / "model.safetensors").read_text() == "of the other merge"
    assert merge.main(flags)["verified"] and not partial.exists()


def test_a_merge_that_ended_in_the_meantime_is_kept(parts, monkeypatch):
    _, adapter, merged = parts
    flags = ["--lora_adapter_path", str(adapter), "--output_path", str(merged)]
    make_job = merge.make_job

    def slow(args):
        monkeypatch.setattr(merge, "make_job", make_job)
        merge.main(flags)
        return make_job(args)

    monkeypatch.setattr(merge, "make_job", slow)
    with pytest.raises(merge.InputError, match="holds a merge already"):
        merge.main(flags)
    assert (merged / "merge_report.json").exists()


def test_folders_of_a_read_only_adapter_can_be_deleted_again(parts):
    _, adapter, merged = parts
    pooling = adapter / "1_Pooling"
    (pooling / "deeper").mkdir(parents=True)
    (pooling / "deeper" / "config.json").write_text("{}")
    (adapter / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    for folder in (pooling / "deeper", pooling):
        folder.chmod(0o555)
    merge.main(["--lora_adapter_path", str(adapter), "--output_path", str(merged)])
    for folder in ("1_Pooling", "1_Pooling/deeper"):
        assert (merged / folder).stat().st_mode & 0o200
    assert (merged / "1_Pooling/deeper/config.json").read_text() == "{}"


def test_an_earlier_merge_that_cannot_be_deleted_is_named(parts, monkeypatch, capsys):
    _, adapter, merged = parts
    flags = ["--lora_adapter_path", str(adapter), "--output_path", str(merged)]
    merge.main(flags)
    rmtree = shutil.rmtree

    def refuse(path, ignore_errors=False):
        if path.name == ".merged.old" and path.exists() and not ignore_errors:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        rmtree(path, ignore_errors)

    monkeypatch.setattr(merge.shutil, "rmtree", refuse)
    assert merge.main([*flags, "--overwrite"])["verified"]
    assert "the earlier merge could not be deleted and is left as " in capsys.readouterr().out


def test_dora_in_the_config_alone_is_refused(parts):
    _, adapter, merged = parts
    change_json(adapter / "adapter_config.json", use_dora=True)
    flags = [
        "--lora_adapter_path",
        str(adapter),
        "--output_path",
        str(merged),
        "--verify",
        "weights",
    ]
    with pytest.raises(
        merge.InputError, match="has no DoRA magnitude, but adapter_config.json says use_dora True"
    ):
        merge.main(flags)


def test_a_dora_adapter_whose_config_forgot_it_is_refused(tmp_path):
    make_base("llama", tmp_path / "base")
    make_adapter(tmp_path / "base", tmp_path / "adapter", use_dora=True)
    change_json(tmp_path / "adapter/adapter_config.json", use_dora=False)
    flags = [
        "--lora_adapter_path",
        str(tmp_path / "adapter"),
        "--output_path",
        str(tmp_path / "merged"),
    ]
    with pytest.raises(
        merge.InputError, match="has a DoRA magnitude, but adapter_config.json says use_dora False"
    ):
        merge.main([*flags, "--verify", "weights"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_alpha": float("nan")}, "no number for lora_alpha"),
        ({"lora_alpha": 0}, "has 0 for lora_alpha, at which it changes nothing"),
        ({"target_parameters": 5}, "target_parameters in adapter_config.json is no list of names"),
        (
            {"target_parameters": [5]},
            "target_parameters in adapter_config.json is no list of names",
        ),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(parts, change, words):
    _, adapter, merged = parts
    change_json(adapter / "adapter_config.json", **change)
    with pytest.raises(merge.InputError, match=words):
        merge.main(["--lora_adapter_path", str(adapter), "--output_path", str(merged)])


def test_a_bias_of_lora_without_its_weights_is_refused():
    parts = {"added": torch.ones(4)}
    with pytest.raises(merge.InputError, match="layer: a lora_B.bias without its lora_B. Copy"):
        merge.make_bias_change("layer", parts, (4,), None)


@pytest.mark.parametrize("message, said", [("first\nsecond", "first"), ("", "ValueError")])
def test_an_error_of_a_library_becomes_a_sentence_with_and_without_words(message, said):
    with pytest.raises(merge.InputError, match=rf"^the base cannot be loaded \({said}\)\.$"):
        with merge.in_one_sentence("the base cannot be loaded"):
            raise ValueError(message)


def test_a_base_that_cannot_be_downloaded_is_told_with_what_to_check():
    with pytest.raises(merge.InputError, match="'no/such' is no folder here and cannot be .*proxy"):
        merge.find_base("no/such", None)

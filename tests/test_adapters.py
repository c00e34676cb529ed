"""All of an adapter is gone on with, and every layer that was named gets one."""

from pathlib import Path
from types import SimpleNamespace

import merge
import utils
from parts import adapters
from utils import InputError

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_base import copied
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# ---------------------------------------------------------------- adapters to go on from


@pytest.fixture
def adapter(tiny_bert, tmp_path):
    """An adapter with one module saved whole, as a folder and make() that goes on with it."""
    config = LoraConfig(
        r=2, target_modules=["query", "key"], modules_to_save=["position_embeddings"]
    )
    get_peft_model(AutoModel.from_pretrained(tiny_bert), config).save_pretrained(
        tmp_path / "adapter"
    )
    folder = str(tmp_path / "adapter")
    return SimpleNamespace(
        folder=folder,
        make=lambda: adapters.with_adapter(
            AutoModel.from_pretrained(tiny_bert), folder, "moved/base"
        ),
    )


def change_adapter(folder, drop=(), rename=str, add=()):
    file = Path(folder) / "adapter_model.safetensors"
    weights = {
        rename(name): t
        for name, t in load_file(file).items()
        if not any(part in name for part in drop)
    }
    save_file(weights | dict(add), file)


def test_all_of_an_adapter_is_loaded_to_go_on_with(adapter):
    stored = load_file(adapter.folder + "/adapter_model.safetensors")
    model = adapter.make()
    name = "base_model.model.encoder.layer.1.attention.self.key.lora_A"
    assert torch.equal(model.get_parameter(f"{name}.default.weight"), stored[f"{name}.weight"])
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == len(stored) == 9
    assert model.peft_config["default"].base_model_name_or_path == "moved/base"


INCOMPLETE_ADAPTERS = {
    "half of it": (
        {"drop": ["layer.1"]},
        "it lacks 4 of its weights (base_model.model.encoder.layer.1.",
    ),
    "other names": (
        {"rename": lambda name: name.replace("layer.1", "layer.7")},
        "it lacks 4 of its weights",
    ),
    "more": (
        {"add": {"base_model.model.head.lora_A.weight": torch.ones(2, 64)}},
        "the model has no place for 1 of its weights",
    ),
    "a saved module": (
        {"drop": ["position"]},
        "it lacks 'base_model.model.embeddings.position_embeddings.weight'.",
    ),
    "another size": (
        {
            "add": {
                "base_model.model.encoder.layer.0.attention.self.key.lora_A.weight": torch.ones(
                    2, 8
                )
            }
        },
        "does not fit",
    ),
}


@pytest.mark.parametrize("case", INCOMPLETE_ADAPTERS)
def test_half_an_adapter_is_not_gone_on_with(case, adapter):
    changes, sentence = INCOMPLETE_ADAPTERS[case]
    change_adapter(adapter.folder, **changes)
    with pytest.raises(InputError) as error:
        adapter.make()
    assert sentence in str(error.value) and "--init_adapter" in str(error.value)


def test_an_adapter_of_another_base_is_not_gone_on_with(adapter, run_embed, tiny_bert, tmp_path):
    run = {
        "base_fingerprint": merge.fingerprint(Path(tiny_bert)),
        "flags": {"model_name": tiny_bert},
    }
    utils.write_json(Path(adapter.folder) / "training_config.json", run)
    weights = load_file(tiny_bert + "/model.safetensors")
    other, moved = copied(tiny_bert, tmp_path / "other"), copied(tiny_bert, tmp_path / "moved")
    save_file(
        {name: weight + 1e-3 for name, weight in weights.items()}, other + "/model.safetensors"
    )
    with pytest.raises(
        InputError, match="other is not the base that --init_adapter .*adapter was trained on"
    ):
        run_embed("--dry_run", "--init_adapter", adapter.folder, model=other)
    save_file(weights, moved + "/model.safetensors", metadata={"format": "pt"})
    assert run_embed("--dry_run", "--init_adapter", adapter.folder, model=moved)["base_fingerprint"]


# ---------------------------------------------------------------- what adapters are put on


def small_bert():
    return BertModel(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )


def small_experts():
    """The first of two layers is dense, the second has four experts, fused into two parameters."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            head_dim=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            num_experts=4,
            num_experts_per_tok=2,
            mlp_only_layers=[0],
        )
    )


def small_gpt2():
    return GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=8))


UNTRAINED = {
    "misspelt": (
        small_bert,
        "query,valeu",
        "no layer is called valeu. Linear layers here: dense, key, query, value.",
    ),
    "only misspelt": (small_bert, "valeu", "no layer is called valeu. Linear"),
    "all-linear in a list": (
        small_bert,
        "query,all-linear",
        "no layer is called all-linear. Linear",
    ),
    "not needed": (
        small_bert,
        "query,pooler.dense",
        "the outputs do not depend on pooler.dense, which is all that",
    ),
    "only not needed": (
        small_bert,
        "pooler.dense",
        "the outputs do not depend on pooler.dense, which is all that",
    ),
    "a norm": (small_bert, "query,LayerNorm", "a LayerNorm is no layer that peft adapts. Linear"),
    "a block": (small_bert, "attention", "a BertAttention is no layer that peft adapts. Linear"),
    "fused experts": (
        small_experts,
        "q_proj,gate_up_proj",
        "gate_up_proj is no layer but a parameter "
        "(model.layers.1.mlp.experts.gate_up_proj), as fused experts are",
    ),
    "half of what is fused": (
        small_experts,
        "q_proj,gate_proj",
        "without also targeting up_proj because they are fu",
    ),
    "GPT-2": (
        small_gpt2,
        "c_attn,q_proj",
        "no layer is called q_proj. Linear layers here: c_attn, c_fc, c_proj.",
    ),
}


@pytest.mark.parametrize("case", UNTRAINED)
def test_target_modules_that_get_no_adapter_are_refused(case):
    make, targets, sentence = UNTRAINED[case]
    with pytest.raises(InputError) as error:
        adapters.with_new_adapter(
            make(), LoraConfig(r=2, target_modules=targets.split(",")), ["pooler.dense"]
        )
    assert "--target_modules" in str(error.value) and sentence in str(error.value)


ADAPTED = {
    "names": (small_bert, ["query", "dense"], 8, []),
    "a path": (small_bert, ["encoder.layer.0.output.dense"], 2, []),
    "all of an encoder": (small_bert, "all-linear", 12, []),
    "an embedding": (small_gpt2, ["wte", "c_attn"], 4, []),
    # router, gate_up_proj and down_proj, and attention in both layers
    "fused experts": (small_experts, "all-linear", 22, ["gate_proj", "up_proj", "down_proj"]),
    "experts by their old names": (
        small_experts,
        ["q_proj", "gate_proj", "up_proj"],
        6,
        ["gate_proj", "up_proj"],
    ),
}


@pytest.mark.parametrize("case", ADAPTED)
def test_target_modules_that_get_an_adapter(case):
    make, targets, count, left = ADAPTED[case]
    unused = ["pooler.dense"]
    model = adapters.with_new_adapter(make(), LoraConfig(r=2, target_modules=targets), unused)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == count and not any("pooler" in name for name in trained)
    assert adapters.left_out(model, targets, unused) == [
        f"model.layers.0.mlp.{name}" for name in left
    ]

"""What is loaded is what was meant: base weights, adapters to go on from, the layers that adapters are put on."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import utils

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def copied(model, folder, rename=None, drop=(), **config):
    """Copy a model, its weights renamed by rename(name), those that contain one of `drop` left out, config changed."""
    shutil.copytree(model, folder)
    weights = load_file(Path(model) / "model.safetensors")
    kept = {
        (rename or str)(name): t
        for name, t in weights.items()
        if not any(part in name for part in drop)
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    utils.write_json(folder / "config.json", utils.read_json(folder / "config.json") | config)
    return str(folder)


def renamed(name):
    return name.replace("self.query", "self.Wq")


CODE = {"auto_map": {"AutoModel": "modelling.Model"}}
RANDOM_BASES = {
    "renamed keys": (
        {"rename": renamed},
        "4 of 39 weights are not in its files and would be random "
        "(encoder.layer.0.attention.self.query.bias; encoder.layer.0.attention.self.query.weight",
    ),
    "code of its own": (
        {"rename": renamed} | CODE,
        "It brings Python code of its own: read that, pass --trust_remote_code",
    ),
    "two layers of four": (
        {"num_hidden_layers": 4},
        "(encoder.layer.2.attention.output.LayerNorm.bias;",
    ),
    "another vocabulary": (
        {"vocab_size": 700},
        "(embeddings.word_embeddings.weight, there (600, 64) in place of (700, 64))",
    ),
    "no embedding": ({"drop": ["word_embeddings"]}, "(embeddings.word_embeddings.weight)"),
}


@pytest.mark.parametrize("case", RANDOM_BASES)
def test_an_encoder_with_random_weights_is_refused(case, run_embed, tiny_bert, tmp_path):
    changes, sentence = RANDOM_BASES[case]
    base = copied(tiny_bert, tmp_path / "base", **changes)
    with pytest.raises(utils.InputError) as error:
        run_embed("--dry_run", model=base)
    assert sentence in str(error.value)
    assert ("trust_remote_code" in str(error.value)) == (case == "code of its own")


RANDOM_CAUSAL_MODELS = {
    "model.layers.2.input_layernorm.weight": {
        "num_hidden_layers": 3,
        "layer_types": ["full_attention"] * 3,
    },
    "lm_head.weight": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("first", RANDOM_CAUSAL_MODELS)
def test_a_causal_model_with_random_weights_is_refused(first, run_sft, tiny_chat, tmp_path):
    base = copied(tiny_chat, tmp_path / "base", **RANDOM_CAUSAL_MODELS[first])
    with pytest.raises(
        utils.InputError, match=f"weights are not in its files and would be random .{first}"
    ):
        run_sft("--dry_run", model=base)


def test_an_encoder_is_no_causal_model(run_sft, tiny_chat, tmp_path):
    base = copied(tiny_chat, tmp_path / "base", model_type="distilbert")
    with pytest.raises(
        utils.InputError, match="is a distilbert model, which AutoModelForCausalLM does not know"
    ):
        run_sft("--dry_run", model=base)


def test_a_quantised_base_with_random_weights_is_refused(run_embed, tiny_bert, tmp_path):
    base = copied(tiny_bert, tmp_path / "base", num_hidden_layers=3)
    with pytest.raises(utils.InputError, match="16 of 55 weights are not in its files"):
        run_embed("--dry_run", "--load_in_4bit", model=base)


@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"]])
def test_weights_that_the_outputs_do_not_need_may_be_missing(flags, run_embed, tiny_bert, tmp_path):
    base = copied(tiny_bert, tmp_path / "base", drop=["pooler"])
    report = run_embed("--dry_run", *flags, model=base)
    note = "not in the base's files, and not needed by the outputs: pooler.dense.bias, pooler.dense.weight"
    assert note in report["plan"]["notes"]


class Experts(nn.Module):
    """Two experts, of which a text reaches one; the head is not reached at all."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2)
        self.config = SimpleNamespace()


def test_the_weights_of_an_expert_that_the_trial_text_does_not_reach_are_needed():
    model, args = Experts(), SimpleNamespace(model_name="moe", trust_remote_code=False)

    def outputs():
        return model.experts[0](torch.ones(2))

    notes = []
    utils.check_loaded(model, {"head.weight": "head.weight"}, outputs, args, notes)
    assert notes == ["not in the base's files, and not needed by the outputs: head.weight"]
    with pytest.raises(utils.InputError, match="1 of 6 weights .* .experts.1.weight"):
        utils.check_loaded(model, {"experts.1.weight": "experts.1.weight"}, outputs, args, notes)


# ---------------------------------------------------------------- adapters to go on from


@pytest.fixture
def adapter(tiny_bert, tmp_path):
    """An adapter of the tiny encoder with one module saved whole, as a folder and make(base) that goes on with it."""
    config = LoraConfig(
        r=2, target_modules=["query", "key"], modules_to_save=["position_embeddings"]
    )
    get_peft_model(AutoModel.from_pretrained(tiny_bert), config).save_pretrained(
        tmp_path / "adapter"
    )
    folder = str(tmp_path / "adapter")
    return SimpleNamespace(
        folder=folder,
        make=lambda: utils.with_adapter(AutoModel.from_pretrained(tiny_bert), folder, "moved/base"),
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
    with pytest.raises(utils.InputError) as error:
        adapter.make()
    assert sentence in str(error.value) and "--init_adapter" in str(error.value)


def test_an_adapter_of_another_base_is_not_gone_on_with(adapter, run_embed, tiny_bert, tmp_path):
    print_of = utils.base_fingerprint(SimpleNamespace(model_name=tiny_bert, model_revision=None))
    run = {"base_fingerprint": print_of, "flags": {"model_name": tiny_bert}}
    utils.write_json(Path(adapter.folder) / "training_config.json", run)
    weights = load_file(tiny_bert + "/model.safetensors")
    other, moved = copied(tiny_bert, tmp_path / "other"), copied(tiny_bert, tmp_path / "moved")
    save_file(
        {name: weight + 1e-3 for name, weight in weights.items()}, other + "/model.safetensors"
    )
    with pytest.raises(
        utils.InputError, match="other is not the base that --init_adapter .*adapter was trained on"
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
    with pytest.raises(utils.InputError) as error:
        utils.with_new_adapter(
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
    model = utils.with_new_adapter(make(), LoraConfig(r=2, target_modules=targets), unused)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == count and not any("pooler" in name for name in trained)
    assert utils.left_out(model, targets, unused) == [f"model.layers.0.mlp.{name}" for name in left]

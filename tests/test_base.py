"""What is loaded is what was meant: no weight that training needs is random."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import utils
from parts import base
from parts.rows import HubSet, read_hub_rows
from parts.tokenizer import load_tokenizer
from utils import InputError

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig


def copied(model, folder, rename=None, drop=(), **config):
    """Copy a model, its weights renamed by rename(name), its config changed.

    Weights whose names contain one of `drop` are left out.
    """
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
    folder = copied(tiny_bert, tmp_path / "base", **changes)
    with pytest.raises(InputError) as error:
        run_embed("--dry_run", model=folder)
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
    folder = copied(tiny_chat, tmp_path / "base", **RANDOM_CAUSAL_MODELS[first])
    with pytest.raises(
        InputError, match=f"weights are not in its files and would be random .{first}"
    ):
        run_sft("--dry_run", model=folder)


def test_an_encoder_is_no_causal_model(run_sft, tiny_chat, tmp_path):
    folder = copied(tiny_chat, tmp_path / "base", model_type="distilbert")
    with pytest.raises(
        InputError, match="is a distilbert model, which AutoModelForCausalLM does not know"
    ):
        run_sft("--dry_run", model=folder)


def test_a_quantised_base_with_random_weights_is_refused(run_embed, tiny_bert, tmp_path):
    folder = copied(tiny_bert, tmp_path / "base", num_hidden_layers=3)
    with pytest.raises(InputError, match="16 of 55 weights are not in its files"):
        run_embed("--dry_run", "--load_in_4bit", model=folder)


@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"]])
def test_weights_that_the_outputs_do_not_need_may_be_missing(flags, run_embed, tiny_bert, tmp_path):
    folder = copied(tiny_bert, tmp_path / "base", drop=["pooler"])
    report = run_embed("--dry_run", *flags, model=folder)
    names = "pooler.dense.bias, pooler.dense.weight"
    note = f"not in the base's files, and not needed by the outputs: {names}"
    assert note in report["plan"]["notes"]


class Experts(nn.Module):
    """Two experts, of which a text reaches one; the head is not reached at all."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.Linear(2, 2)
        self.config = SimpleNamespace()


def test_the_weights_of_an_expert_that_the_trial_text_does_not_reach_are_needed(monkeypatch):
    model, origin = Experts(), base.Origin("moe")

    def outputs():
        return model.experts[0](torch.ones(2))

    monkeypatch.setattr(utils, "NOTES", [])
    base.check_loaded(model, {"head.weight": "head.weight"}, outputs, origin)
    assert utils.NOTES == ["not in the base's files, and not needed by the outputs: head.weight"]
    with pytest.raises(InputError, match="1 of 6 weights .* .experts.1.weight"):
        base.check_loaded(model, {"experts.1.weight": "experts.1.weight"}, outputs, origin)


def test_dropout_is_off_in_what_is_loaded_alone():
    asked = BertConfig(hidden_dropout_prob=0.1)
    found = base.training_config(asked, keep_dropout=False)
    assert (found.hidden_dropout_prob, found.attention_probs_dropout_prob) == (0, 0)
    assert not found.use_cache and asked.hidden_dropout_prob == 0.1
    assert base.training_config(asked, keep_dropout=True).hidden_dropout_prob == 0.1


@pytest.mark.parametrize(
    "asked, capability, expected",
    [
        (None, None, ("none", "float32, no GPU")),
        ("bf16", None, ("none", "float32, no GPU for --bf16")),
        ("none", None, ("none", "float32, no GPU")),
        (None, (7, 5), ("fp16", "fp16, chosen for a GPU of compute capability 7.5")),
        ("bf16", (7, 5), ("fp16", "fp16, chosen for a GPU of compute capability 7.5")),
        (None, (9, 0), ("bf16", "bf16, chosen for a GPU of compute capability 9.0")),
        ("none", (8, 0), ("none", "float32, as asked for a GPU of compute capability 8.0")),
    ],
)
def test_a_gpu_gets_the_precision_it_has_hardware_for(asked, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert base.choose_precision(asked) == expected


def quantised_decoder(folder, bits, precision):
    """Load a causal model as it is trained in half precision."""
    origin = base.Origin(folder)
    how = {"full": False, "bits": bits, "attention": "auto", "keep_dropout": False}
    config = base.load_config(origin)
    return base.load(origin, AutoModelForCausalLM, config, precision, **how).model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float32)])
def test_norms_of_a_quantised_base(bits, precision, dtype, tiny_chat):
    model = quantised_decoder(tiny_chat, bits, precision)
    norms = {p.dtype for name, p in model.named_parameters() if "norm" in name}
    assert norms == {dtype}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("half_norms", [False, True])
def test_float32_norms_let_the_residual_stream_leave_the_range_of_fp16(bits, half_norms, tiny_chat):
    model = quantised_decoder(tiny_chat, bits, "fp16")
    if half_norms:
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data = parameter.data.half()
    embeddings, layer = model.get_input_embeddings(), model.model.layers[0].mlp
    embeddings.register_forward_hook(lambda _, __, output: torch.full_like(output, 60000))
    layer.register_forward_hook(lambda _, __, output: torch.full_like(output, 30000))
    with torch.autocast("cpu", dtype=torch.float16):
        hidden = model.model(torch.tensor([[5, 6, 7]])).last_hidden_state
    assert bool(hidden.isfinite().all()) == (not half_norms)


# ---------------------------------------------------------------- a hub out of reach


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that refuses every connection; returns the list of the waits before each new try."""
    waits = []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def test_a_hub_out_of_reach_is_said_first_and_asked_for_one_file_alone(no_hub):
    with pytest.raises(InputError) as error:
        base.load_config(base.Origin("no/such-model"))
    assert str(error.value).startswith("no connection to the hub ([Errno ")
    assert "--model_name no/such-model is neither a folder here nor downloaded" in str(error.value)
    assert "proxy (HTTPS_PROXY), or give a local folder" in str(error.value)
    assert len(no_hub) == 5  # huggingface_hub's tries of one file


def test_a_data_set_of_a_hub_out_of_reach_is_told_the_same(no_hub):
    with pytest.raises(InputError, match="^no connection to the hub .*--dataset_name no/such is"):
        read_hub_rows(HubSet("no/such"), "train", seed=1)


def test_a_tokenizer_of_a_hub_out_of_reach_is_told_the_same(no_hub):
    with pytest.raises(InputError, match="^no connection to the hub .*no/such is neither"):
        load_tokenizer(base.Origin("no/such"))

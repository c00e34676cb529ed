"""What a base does with two trial texts is what it is trained as."""

from types import SimpleNamespace

from parts import base, behaviour
from utils import InputError

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_an_encoder_sees_both_ways_and_its_pooler_is_not_needed(bits, tiny_bert):
    origin = base.Origin(tiny_bert)
    config = base.load_config(origin)
    loaded = base.load(
        origin,
        AutoModel,
        config,
        "none",
        full=False,
        bits=bits,
        attention="auto",
        keep_dropout=False,
    )
    assert loaded.bits == bits
    found = behaviour.what_an_embedder_does(loaded.model, "none")
    assert found == behaviour.Behaviour(False, ["pooler.dense"], 64)
    assert not any(m._forward_hooks for m in loaded.model.modules() if isinstance(m, nn.Linear))


def test_a_decoder_is_causal_with_and_without_its_head(tiny_chat):
    embedder = AutoModel.from_pretrained(tiny_chat)
    found = behaviour.what_an_embedder_does(embedder, "none")
    assert found == behaviour.Behaviour(True, [], 64)
    predictor = AutoModelForCausalLM.from_pretrained(tiny_chat)
    found = behaviour.what_a_language_model_does(predictor, "none", None, "m")
    assert found == behaviour.Behaviour(True, [], 640, plain_head=True)


def test_a_head_with_softcapping_behind_it_is_no_plain_one():
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    assert not behaviour.what_a_language_model_does(model, "none", None, "m").plain_head


class WithTower(Qwen3ForCausalLM):
    """A causal model with a vision tower, which texts do not reach."""

    def __init__(self):
        super().__init__(Qwen3Config(**SIZES))
        self.model.vision = nn.Sequential(nn.Linear(2, 2))


def test_a_tower_that_does_not_run_is_unused():
    found = behaviour.what_a_language_model_does(WithTower(), "none", None, "m")
    assert found.unused == ["model.vision.0"] and found.is_causal


class SeesAll(Qwen3ForCausalLM):
    """A model whose logits depend on the whole text."""

    def forward(self, input_ids, logits_to_keep):
        logits = super().forward(input_ids, logits_to_keep=logits_to_keep).logits
        return SimpleNamespace(logits=logits + input_ids.sum())


def test_a_model_that_sees_what_it_predicts_is_not_causal():
    model = SeesAll(Qwen3Config(**SIZES))
    assert not behaviour.what_a_language_model_does(model, "none", None, "m").is_causal


class Old(Qwen3ForCausalLM):
    """A model from before logits_to_keep."""

    def forward(self, input_ids):
        return super().forward(input_ids)


def test_models_that_cannot_be_asked_are_refused(tiny_bert):
    with pytest.raises(InputError, match="an/encoder has no output head. Choose a causal language"):
        model = AutoModel.from_pretrained(tiny_bert)
        behaviour.what_a_language_model_does(model, "none", None, "an/encoder")
    with pytest.raises(InputError, match="old takes no logits_to_keep .* its code is too old for"):
        model = Old(Qwen3Config(**SIZES))
        behaviour.what_a_language_model_does(model, "none", None, "old")
    assert torch.is_grad_enabled()

"""On GPUs without fused kernels for grouped queries, keys are repeated: the same numbers."""

from conftest import relative
from parts import attention

import pytest
import torch
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
GEMMA = {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZE, **FALCON)),
    "bert": lambda: BertModel(BertConfig(**SIZE)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SIZE, pad_token_id=0)),
}


@pytest.fixture
def capability(monkeypatch):
    """Set the compute capabilities of the visible GPUs; transformers' own attention is put back."""

    def put(*found):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(found))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu=0: found[gpu])

    yield put
    AttentionInterface.register("sdpa", sdpa_attention_forward)


@pytest.mark.parametrize(
    "found, repeats",
    [((), False), (((8, 0),), False), (((9, 0), (7, 5)), True), (((7, 5),), True)],
)
def test_the_capability_alone_decides(capability, found, repeats):
    capability(*found)
    for _ in range(2):  # again, as by a second run in a notebook
        attention.fit_attention_to_gpu()
        used = AttentionInterface()["sdpa"]
        assert (used is attention.sdpa_with_repeated_keys) == repeats
        assert repeats or used is sdpa_attention_forward


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.set_attn_implementation("sdpa")
    return model.eval()


def ran(model, mask):
    """Return outputs and gradient of two texts of 9 tokens."""
    ids = torch.arange(18).reshape(2, 9) + 3
    model.zero_grad()
    output = model(input_ids=ids, attention_mask=mask)[0]
    kept = output if mask is None else output[mask.bool()]
    kept.square().mean().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return kept.detach(), torch.cat(grads)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_same(name, masked, capability):
    model = made(name)
    mask = None
    if masked:
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[0, 6:] = 0
    expected = ran(model, mask)
    capability((7, 5))
    attention.fit_attention_to_gpu()
    for found, wanted in zip(ran(model, mask), expected, strict=True):
        assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3", "falcon"])
def test_one_query_token_behind_a_cache_gives_the_same(name, capability):
    model = made(name)
    first, last = torch.tensor([[3, 4, 5, 6, 7, 8]]), torch.tensor([[9]])

    def answered():
        with torch.no_grad():
            cache = model(input_ids=first, use_cache=True).past_key_values
            return model(input_ids=last, past_key_values=cache).logits

    expected = answered()
    capability((7, 5))
    attention.fit_attention_to_gpu()
    assert relative(answered(), expected) < 1e-6


def test_no_fused_kernel_is_asked_for_grouped_queries(capability, monkeypatch):
    asked = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        asked.append(kwargs.get("enable_gqa", False))
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model = made("qwen3")
    ran(model, None)
    assert asked == [True, True]  # which a T4 would compute with the math kernel
    asked.clear()
    capability((7, 5))
    attention.fit_attention_to_gpu()
    ran(model, None)
    assert asked == [False, False]

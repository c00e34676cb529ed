"""8-bit layers quantise weights alone, keep nothing of their input, and are the same everywhere."""

import copy
import gc
import weakref

from conftest import gradient, gradients_of_two_processes, relative
from parts import base
from parts.eight_bit import Linear8bit

import bitsandbytes
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp, MatMul8bitLt
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel


@pytest.fixture
def encoder(tiny_bert):
    """A tiny encoder in 8 bits, as it is loaded to be trained."""
    origin = base.Origin(tiny_bert)
    how = {"full": False, "bits": 8, "attention": "auto", "keep_dropout": False}
    return base.load(origin, AutoModel, base.load_config(origin), "none", **how).model


@pytest.fixture
def layer(encoder):
    return encoder.encoder.layer[0].intermediate.dense


def inputs_of(layer, rows=5):
    torch.manual_seed(0)
    return torch.randn(rows, layer.in_features, requires_grad=True)


def test_outputs_and_gradients_are_those_of_the_librarys_weights_only_function(layer):
    """It runs that on a CPU in training alone: on a GPU, and in evaluation, LLM.int8."""
    x, same = inputs_of(layer), inputs_of(layer)
    found = layer(x)
    wanted = MatMul8bitFp.apply(same, layer.weight, None, layer.bias, layer.state)
    assert relative(found, wanted) < 1e-6
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert relative(x.grad, same.grad) < 1e-6
    other = MatMul8bitLt.apply(inputs_of(layer), layer.weight, None, layer.bias, layer.state)
    assert relative(other, wanted) > 1e-3  # what a GPU would have computed


def test_training_and_evaluation_are_the_same_and_the_rows_of_a_piece_do_not_matter(layer):
    x = inputs_of(layer, 8)
    whole = layer.train()(x)
    assert torch.equal(layer.eval()(x), whole)
    parts = torch.cat([layer(x[:3]), layer(x[3:])])
    assert relative(parts, whole) < 1e-6


def test_the_librarys_function_is_never_reached(encoder, monkeypatch):
    def fail(*_, **__):
        pytest.fail("bitsandbytes quantised the inputs")

    monkeypatch.setattr(bitsandbytes, "matmul", fail)
    monkeypatch.setattr(MatMul8bitLt, "apply", fail)
    ids = torch.tensor([[5, 6, 7]])
    for model in (encoder.train(), encoder.eval(), copy.deepcopy(encoder)):
        assert model(ids).last_hidden_state.isfinite().all()


def kept_inputs(apply, layer):
    """Return whether the input of a function lives on, as long as its output does."""
    x = inputs_of(layer) * 1  # no leaf, as between two layers
    alive = weakref.ref(x)
    output = apply(x)
    del x
    gc.collect()
    assert output.requires_grad
    return alive() is not None


def test_nothing_of_the_input_is_kept(layer):
    """Its own gradient does not need it: the weights are frozen."""
    state = layer.state
    bias = layer.bias
    assert kept_inputs(lambda x: MatMul8bitFp.apply(x, layer.weight, None, bias, state), layer)
    assert kept_inputs(lambda x: MatMul8bitLt.apply(x, layer.weight, None, bias, state), layer)
    assert not kept_inputs(layer, layer)


def test_under_checkpointing_nothing_of_the_input_of_a_layer_within_is_kept(layer):
    seen = []

    def block(x):
        inner = x * 2
        seen.append(weakref.ref(inner))
        return layer(inner).tanh()  # which is computed again, from the block's own input

    output = checkpoint(block, inputs_of(layer), use_reentrant=False)
    gc.collect()
    assert seen[0]() is None
    output.sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_products_are_in_autocasts_dtype_and_fp16_keeps_a_float32_residual_stream(layer, precision):
    x = inputs_of(layer)
    plain = layer(x)
    with torch.autocast("cpu", dtype=precision):
        found = layer(x)
        of_half = layer(x.to(precision))
    assert found.dtype == (torch.float32 if precision == torch.float16 else precision)
    assert of_half.dtype == precision
    assert torch.equal(found.to(precision), of_half)
    assert relative(found.float(), plain) < 0.02
    found.float().square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.dtype == torch.float32


def test_all_else_is_the_librarys(encoder, layer):
    assert type(layer) is Linear8bit and isinstance(layer, Linear8bitLt)
    plain = Linear8bitLt(4, 4, has_fp16_weights=False)
    assert set(layer.state_dict()) >= {"weight", "bias", "SCB", "weight_format"}
    assert set(plain.state_dict()) <= set(layer.state_dict())
    config = LoraConfig(r=2, target_modules=["query"])
    model = get_peft_model(encoder, config)
    adapted = model.base_model.model.encoder.layer[0].attention.self.query
    assert type(adapted).__module__.endswith("lora.bnb")
    adapted.merge()
    assert adapted.merged


@pytest.mark.parametrize("batch_size", [8, 2])
def test_an_8_bit_step_does_not_depend_on_the_cut(embed_trainer, batch_size):
    trainer = embed_trainer("--load_in_8bit", "--max_negs", 2)
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(32)])
    trainer.batch_size = 32
    _, whole = gradient(trainer, step)
    trainer.batch_size = batch_size
    _, cut = gradient(trainer, step)
    assert relative(cut, whole) < 1e-5


def test_two_processes_give_the_8_bit_gradient_of_one(embed_trainer, tmp_path, tiny_bert, pairs):
    trainer = embed_trainer("--load_in_8bit", "--max_negs", 2)
    rows = [trainer.train_dataset[i] for i in range(32)]
    _, expected = gradient(trainer, trainer.data_collator(rows))
    flags = (
        f"--model_name {tiny_bert} --train_file {pairs} --max_negs 2 --report_to none "
        "--load_in_8bit --batch_size 4 --gradient_accumulation 4"
    )
    for found in gradients_of_two_processes(tmp_path, "train_embed_lora", flags, 0, 16, 0):
        assert relative(found, expected) < 1e-4


def test_an_adapter_is_continued_on_8_bit_layers(run_embed, tmp_path):
    """The proof after training reads the adapter back and finds the same outputs."""
    run_embed("--load_in_8bit", "--max_steps", 2, out=tmp_path / "one")
    flags = ["--load_in_8bit", "--max_steps", 2, "--init_adapter", tmp_path / "one/final"]
    report = run_embed(*flags)
    assert report["settled"]["bits"] == 8
    assert report["proof"]["relative_error"] < 1e-6

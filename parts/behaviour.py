"""What a freshly loaded base does with a text: whether it is causal, which layers it needs.

Shapes: T tokens, D embedding, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass

from parts.base import DTYPES
from utils import InputError, reason

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Behaviour:
    """What two trial texts, which differ in their last token, show of a base."""

    is_causal: bool  # no token sees a later one
    unused: list  # names of linear layers that the outputs do not depend on
    dimension: int  # of an output: D of hidden states, V of logits
    plain_head: bool | None = None  # logits are the head's very output; None without a head


def on_trial(model, precision, last, **inputs):
    """Return what the model gives for four tokens, of which the fourth is `last`."""
    device = model.device
    # ids that any vocabulary has; the first few are often special. Precision as in training: a
    # model may differ with it
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "none"):
        return model(torch.tensor([[5, 6, 7, last]], device=device), **inputs)


def hidden_states(model, precision, last):
    """Return the hidden states (1, T, D) of a trial text in float32."""
    return on_trial(model, precision, last).last_hidden_state.float()


def middle_logits(model, precision, last):
    """Return the logits (1, 2, V) of a trial text's second and third token."""
    # by a mask, which code that is too old does not know; the last token may change its own logits
    keep = torch.tensor([[False, True, True, False]], device=model.device)
    return on_trial(model, precision, last, logits_to_keep=keep).logits


def what_an_embedder_does(model, precision):
    """Return the Behaviour of a model that gives hidden states.

    Its unused layers are those that ran and that no hidden state got anything of: an encoder's
    pooler. Layers that the trial texts do not reach, as of an expert, are not among them.
    """
    outputs = {}

    def keep(name, output):
        outputs[name] = output.requires_grad_()  # those of frozen layers have no gradient else

    model.eval()  # without dropout, which would make any two passes differ
    with hooked(layers_of_kind(model, nn.Linear | Conv1D), keep):
        first = hidden_states(model, precision, 8)
        changed = hidden_states(model, precision, 9)
    # equal but for the order of sums: a bidirectional first token differs by far more
    is_causal = torch.allclose(first[0, 0], changed[0, 0], rtol=1e-3, atol=1e-4)
    # by gradients: a pooler runs, and what comes of it is not among the hidden states
    gradients = torch.autograd.grad(changed.sum(), list(outputs.values()), allow_unused=True)
    found = zip(outputs, gradients, strict=True)
    unused = [name for name, gradient in found if gradient is None]
    return Behaviour(is_causal, unused, first.shape[-1])


def what_a_language_model_does(model, precision, bits, name):
    """Return the Behaviour of a model that gives logits.

    Its unused layers are those of towers that did not run. No gradients are needed to see that,
    which not every quantised layer has. bits: it is quantised to, None for a plain one. Raises
    InputError for a model without a head, or one that cannot be asked for logits of some tokens.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise InputError(f"{name} has no output head. Choose a causal language model.")
    linear = layers_of_kind(model, nn.Linear)
    of_head = []
    ran = set()
    model.eval()
    try:
        with (
            torch.no_grad(),
            hooked({"head": head}, lambda _, output: of_head.append(output)),
            hooked(linear, lambda layer, _: ran.add(tower_of(layer))),
        ):
            first = middle_logits(model, precision, 8)
            changed = middle_logits(model, precision, 9)
    except TypeError as error:
        raise InputError(
            f"{name} takes no logits_to_keep ({reason(error)}): its code is too old for this "
            "script."
        ) from None
    unused = [layer for layer in linear if tower_of(layer) not in ran]
    noise = 1e-4 if precision == "none" and not bits else 0.05  # relative: half precision rounds
    change = (first.float() - changed.float()).norm()
    sees_the_future = change > noise * first.float().norm()  # NaN is no answer to that: False
    # no softcapping or scaling behind it, so that the loss may run the head on parts of a text
    plain_head = torch.equal(of_head[0], first)
    return Behaviour(not sees_the_future, unused, first.shape[-1], plain_head)


def layers_of_kind(model, kind):
    """Return {name: layer} of a model's layers of a class."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kind)}


def tower_of(name):
    """Return the part of a model that a layer is in: a vision tower beside the text's, say."""
    return ".".join(name.split(".")[:2])


@contextmanager
def hooked(layers, see):
    """Context in which see(name, output) is called whenever one of {name: layer} has run."""

    def hook_of(name):
        def hook(_, __, output):
            see(name, output)  # and return None: anything else would replace the output

        return hook

    hooks = [layer.register_forward_hook(hook_of(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

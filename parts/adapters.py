"""LoRA on a base: a new adapter, or one of an earlier run to go on with."""

import re
import warnings
from dataclasses import dataclass

from utils import InputError, note, reason

from peft import LoraConfig, NoMatchingPeftModuleError, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Lora:
    """A new adapter as it was asked for."""

    r: int
    alpha: float
    dropout: float | None  # None: 0, or what an adapter to go on with has
    target_modules: list | str  # names of layers, or "all-linear"
    use_rslora: bool
    task_type: str  # as peft has it: FEATURE_EXTRACTION, CAUSAL_LM


def add_adapter(model, origin, lora, unused, *, full):
    """Wrap the base with a new adapter, or with origin.adapter to train that on.

    The `unused` linear layers get none. full: all weights will be trained, so that there is no
    adapter, and the unused layers are frozen. Returns (model, the adapter's dropout).
    """
    if full:
        # DDP would wait for gradients that they never get
        for name in unused:
            model.get_submodule(name).requires_grad_(False)
        return model, lora.dropout
    if origin.adapter:
        model = with_adapter(model, origin.adapter, origin.name)
        if lora.dropout is not None:
            set_dropout(model, lora.dropout)
        return model, model.peft_config["default"].lora_dropout
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout or 0.0,
        target_modules=lora.target_modules,
        use_rslora=lora.use_rslora,
        task_type=lora.task_type,
    )
    model = with_new_adapter(model, config, unused)
    left = left_out(model, lora.target_modules, unused)
    if left:
        few = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        note(
            f"peft puts no adapter on {len(left)} of the layers that --target_modules names ({few})"
        )
    return model, lora.dropout


def make_trainable(model, unused):
    """Make the trainable weights float32; note the layers without an adapter, `unused`."""
    if unused:
        note(f"not trained, because the outputs do not depend on it: {', '.join(unused)}")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the loss scaler cannot unscale fp16 gradients


# ---------------------------------------------------------------- an adapter to go on with


def with_adapter(model, folder, model_name):
    """Return the base with the adapter of a folder, to train it on.

    Raises InputError unless all of it fits. model_name: of the base, for messages.
    """
    fits_not = f"--init_adapter {folder} does not fit {model_name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys, which are an error below
            model = PeftModel.from_pretrained(model, folder, is_trainable=True)
        # once more: from_pretrained does not return what was missing and what was left over
        mapping = getattr(model.get_base_model(), "_checkpoint_conversion_mapping", {})
        loaded = model.load_adapter(folder, "default", is_trainable=True, key_mapping=mapping)
    except KeyError as error:  # a module that adapter_config.json says is saved whole
        raise InputError(f"{fits_not}: it lacks {error}. Copy the adapter again.") from error
    except SafetensorError as error:
        raise InputError(
            f"--init_adapter {folder}: its weights cannot be loaded ({reason(error)}). Copy the "
            "adapter again."
        ) from None
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(
            f"{fits_not} ({reason(error)}). Pass the base that its adapter_config.json names."
        ) from error
    refuse_keys(fits_not, "it lacks", loaded.missing_keys)
    refuse_keys(fits_not, "the model has no place for", loaded.unexpected_keys)
    model.peft_config["default"].base_model_name_or_path = model_name  # it may have moved
    return model


def refuse_keys(fits_not, what, keys):
    """Raise InputError if there are names of weights that the adapter or the model lacks."""
    if not keys:
        return
    few = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
    raise InputError(
        f"{fits_not}: {what} {len(keys)} of its weights ({few}). Pass the base that it was trained "
        "on, or copy the adapter again."
    )


def set_dropout(model, dropout):
    """Give a loaded adapter another dropout; peft would keep the stored one."""
    model.peft_config["default"].lora_dropout = dropout
    for module in model.modules():
        if "default" in getattr(module, "lora_dropout", {}):
            module.lora_dropout["default"] = nn.Dropout(dropout)


# ---------------------------------------------------------------- a new adapter


def with_new_adapter(model, config, unused):
    """Return the base with LoRA on the layers that config.target_modules names.

    The `unused` layers get none. Raises InputError if one of the names gets none either: peft is
    content as long as one does.
    """
    # looked up before: peft renames what it wraps
    layers = [name for name, _ in model.named_modules()]
    weights = [name for name, _ in model.named_parameters()]
    linear = {name.split(".")[-1] for name, layer in model.named_modules() if is_linear(layer)}
    targets = config.target_modules
    names = set() if isinstance(targets, str) else set(targets)  # "all-linear" names none
    if unused:  # a list would also exclude whatever ends in one of the names
        config.exclude_modules = "|".join(map(re.escape, unused))
    why = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that match nothing, which are an error below
            model = get_peft_model(model, config)
        names &= set(config.target_modules)  # peft makes parameters of fused experts of the others
    except NoMatchingPeftModuleError:
        pass
    except ValueError as error:
        kind = re.match(r"Target module (\w+)", str(error))
        why = f"a {kind[1]} is no layer that peft adapts" if kind else reason(error).rstrip(".")
    for name in sorted(names):  # the first reason is the one that is told
        why = why or untrained(name, layers, weights, unused)
    if why or not isinstance(model, PeftModel):
        raise InputError(
            f"--target_modules: {why or 'there is nothing to put an adapter on'}. "
            f"Linear layers here: {', '.join(sorted(linear))}."
        )
    return model


def is_linear(layer):
    """Tell whether a module is a linear layer; GPT-2's are of a class of its own."""
    return isinstance(layer, nn.Linear | Conv1D)


def matches(name, target):
    """Tell whether a name of --target_modules stands for the layer `name`, as peft sees it."""
    return name == target or name.endswith(f".{target}")


def untrained(target, layers, weights, unused):
    """Return in words why a name of --target_modules gets no adapter, or "" if it does."""
    found = [name for name in layers if matches(name, target)]
    stored = [name for name in weights if matches(name, target)]
    if set(found) - set(unused):
        return ""
    if found:
        few = ", ".join(found[:3])
        return f"the outputs do not depend on {few}, which is all that {target} matches"
    if stored:
        return (
            f"{target} is no layer but a parameter ({stored[0]}), as fused experts are: peft "
            "leaves it alone here"
        )
    return f"no layer is called {target}"


def left_out(model, targets, unused):
    """Return what peft put no adapter on although `targets` stands for it.

    These are names of linear layers and of fused experts, which are parameters.
    """
    base = model.get_base_model()
    layers = dict(base.named_modules())
    head = base.get_output_embeddings()  # which peft leaves out of all-linear
    adapted = {name for name, layer in layers.items() if isinstance(layer, BaseTunerLayer)}
    names = [name for name, layer in layers.items() if is_linear(layer) and layer is not head]
    for name, weight in base.named_parameters():
        if weight.ndim == 3 and "experts." in name:  # fused: one parameter for all experts
            names.append(name)
    found = []
    for name in names:
        parts = name.split(".")
        outer = {".".join(parts[:i]) for i in range(1, len(parts) + 1)}  # and itself
        is_meant = targets == "all-linear" or any(matches(name, target) for target in targets)
        if is_meant and not outer & adapted and name not in unused:
            found.append(name)
    return found

"""The base model: its files, its config, its precision, its weights and how they are quantised."""

import copy
import importlib.util
import math
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

from parts.attention import fit_attention_to_gpu
from parts.eight_bit import use_weights_only
from parts.shards import is_in_parts, load_in_parts, settled_stage
from utils import InputError, checked_json, no_connection, note, reason, say

import torch
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import cached_file


@dataclass(frozen=True)
class Origin:
    """Where the base comes from, and the adapter that is trained on, if any."""

    name: str  # a folder here, or a model of the hub
    revision: str | None = None
    trust_remote_code: bool = False
    adapter: str | None = None  # the folder of --init_adapter


# ---------------------------------------------------------------- files and config


def stored_file(source, filename, revision=None):
    """Return the path of a file of a folder or hub model, None if it has none.

    Raises OSError where the hub cannot be asked.
    """
    # the private argument: a file that is not there is an answer here, and no error
    return cached_file(
        source, filename, revision=revision, _raise_exceptions_for_missing_entries=False
    )


def base_json(origin, filename, kind=dict):
    """Return a JSON file of --init_adapter or else of the base; None if neither has it.

    Raises InputError for one that does not hold a `kind`.
    """
    # the adapter first: its prompts and its stop tokens are those that it was trained with
    for source, revision in ((origin.adapter, None), (origin.name, origin.revision)):
        if not source:
            continue
        try:
            path = stored_file(source, filename, revision)
        except OSError:
            path = None
            # no fact about the run, so that the report does not list it
            say(
                f"note      the hub could not be asked whether {source} has a {filename}: "
                "going on as if not"
            )
        if path:
            return checked_json(path, kind)
    return None


def base_folder(origin):
    """Return the folder of the base's files; they are here once the base was loaded."""
    return Path(cached_file(origin.name, "config.json", revision=origin.revision)).parent


def is_adapter(name, revision):
    """Tell whether a folder or hub id, which is no model, holds an adapter."""
    try:
        return stored_file(name, "adapter_config.json", revision) is not None
    except OSError:
        return False


def load_config(origin):
    """Read the base's config; raises InputError where there is none or its code may not be run."""
    name, revision = origin.name, origin.revision
    try:
        stored, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        # where transformers has a class of its own for the type, that one is taken
        is_known = "auto_map" not in stored or stored.get("model_type") in CONFIG_MAPPING
        if not is_known and not origin.trust_remote_code:
            raise InputError(
                f"{name} brings Python code of its own: read it, pass --trust_remote_code."
            )
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=origin.trust_remote_code
        )
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        StrictDataclassError,
    ) as error:
        if no_hub := no_connection(f"--model_name {name}", error):
            raise no_hub from None
        # asked for only now: of a model that loads, the hub need not be asked once more
        if is_adapter(name, revision):
            raise InputError(
                f"--model_name {name} is an adapter, not a model. Pass --init_adapter {name} "
                "to train it on, or merge it into its base first."
            ) from None
        raise InputError(
            f"--model_name {name}: neither a folder here nor a hub model with a config of a known "
            f"model ({reason(error)})"
        ) from None
    if config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder. Choose an encoder or a decoder.")
    return config


def position_limit(config, tokenizer):
    """Return the longest sequence the base can take, in tokens (math.inf if nothing says so)."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    limit = limit or math.inf  # 0 and None are no limit
    if any(name in config.model_type for name in ("roberta", "camembert", "mpnet")):
        limit -= (config.pad_token_id or 0) + 1  # their positions start behind the padding index
    return min(limit, tokenizer.model_max_length)


# ---------------------------------------------------------------- precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "none": torch.float32}


def choose_precision(asked):
    """Return ("bf16" | "fp16" | "none", in words) for this machine.

    asked: one of the three, or None: bf16 from compute capability 8.0 on, fp16 below, none on
    a CPU.
    """
    if not torch.cuda.is_available():
        unused = f" for --{asked}" if asked in ("fp16", "bf16") else ""
        return "none", f"float32, no GPU{unused}"
    # not torch.cuda.is_bf16_supported(): it counts emulation, as on a T4
    major, minor = torch.cuda.get_device_capability()
    chosen = asked or ("bf16" if major >= 8 else "fp16")
    if chosen == "bf16" and major < 8:  # a T4 would compute it in software
        chosen = "fp16"
    dtype = "float32" if chosen == "none" else chosen
    why = "as asked" if chosen == asked else "chosen"
    return chosen, f"{dtype}, {why} for a GPU of compute capability {major}.{minor}"


# ---------------------------------------------------------------- weights

# of weights files that are cut off, of pickles that are none, of sizes that no layer can have
LOADING_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
    ZeroDivisionError,
)


@dataclass
class Loaded:
    """A base as it was loaded."""

    model: nn.Module
    bits: int | None  # it is quantised to, None where it is not
    absent: dict  # {name: in words} of the weights that its files do not hold


def load(
    origin, auto_class, config, precision, *, full, bits, attention, keep_dropout, zero_stage=0
):
    """Load the base in the compute dtype, quantised to `bits` if asked; returns a Loaded.

    full: all weights will be trained, so that they are float32. attention, zero_stage: as the flags
    have them. Where quantising fails, the base is loaded without. Raises InputError.
    """
    in_parts = settled_stage(zero_stage, PartialState().num_processes) == 3
    options = loading_options(origin, config, keep_dropout, attention)
    # what is trained is float32: in bf16 most of a small update would be rounded away
    options["dtype"] = torch.float32 if full else DTYPES[precision]
    fit_attention_to_gpu()
    device = PartialState().device  # of this process, where there are several
    if bits:
        try:
            how = quantisation(bits, DTYPES[precision])
            # weights are quantised on their way to the device, which never holds them whole
            placed = {"quantization_config": how, "device_map": {"": device}}
            model, info = auto_class.from_pretrained(origin.name, **options, **placed)
            absent = not_loaded(info)
            return Loaded(frozen(model, absent), bits, absent)
        except LOADING_ERRORS as error:
            note(f"{bits}-bit loading failed, so the base is not quantised: {reason(error)}")
    try:
        if in_parts:
            model, info = load_in_parts(auto_class, origin.name, options)
            return Loaded(model, None, not_loaded(info))
        model, info = auto_class.from_pretrained(origin.name, **options)
        return Loaded(model.to(device), None, not_loaded(info))
    except LOADING_ERRORS as error:
        raise cannot_load(origin, auto_class, config, error) from None


def loading_options(origin, config, keep_dropout, attention):
    """Return keywords of from_pretrained, but for the dtype."""
    options = {
        "config": training_config(config, keep_dropout),
        "revision": origin.revision,
        "trust_remote_code": origin.trust_remote_code,
        # else transformers draws weights that are not there at random, and prints a table
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    attention = usable_attention(attention)
    if attention != "auto":
        options["attn_implementation"] = attention
    return options


def cannot_load(origin, auto_class, config, error):
    """Return the InputError on a base that one of LOADING_ERRORS kept from being loaded."""
    why = reason(error) or type(error).__name__
    if "Unrecognized configuration class" in why:
        return InputError(
            f"{origin.name} is a {config.model_type} model, which {auto_class.__name__} does not "
            "know. Choose a base of another kind."
        )
    return InputError(f"{origin.name} cannot be loaded: {why}. Are its files whole?")


def training_config(config, keep_dropout):
    """Return a copy of a config as the model is to be trained with it."""
    config = copy.deepcopy(config)  # the caller goes on asking the one that was stored
    if not keep_dropout:
        without_dropout(config)
    config.use_cache = False  # a decoder would build a key-value cache in every training step
    return config


def without_dropout(config):
    """Set every dropout of a config to 0, inner ones too: steps become exact, and faster."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            without_dropout(value)
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)


def usable_attention(asked):
    """Return the attention to load with: the one that was asked for if it can run here."""
    if asked != "flash_attention_2":
        return asked
    modern = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if modern and importlib.util.find_spec("flash_attn") is not None:
        return asked
    note("flash attention 2 needs the flash-attn package and compute capability 8.0: SDPA instead")
    return "sdpa"


def quantisation(bits, dtype):
    """Return how bitsandbytes is to quantise to 8 or 4 bits, computing in `dtype`."""
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def frozen(model, absent):
    """Freeze a quantised model; in fp16 norms become float32, embeddings and head stay small.

    The `absent` weights, which are not in its files, were not quantised: their layers become plain
    ones, which run.
    """
    for name in absent:
        path, _, kind = name.rpartition(".")
        layer = model.get_submodule(path)
        # bitsandbytes' layers are children of nn.Linear
        if kind == "weight" and isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight, plain.bias = layer.weight, layer.bias
            model.set_submodule(path, plain)
    # not as peft's prepare_model_for_kbit_training has it: float32 embeddings and head take 2.5 GB
    # of an 8B
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        # float32 norms keep the residual stream in float32, which leaves fp16's range in some
        # models (Gemma 3); bf16 has that range, and float32 would cost it a quarter more memory
        if parameter.ndim == 1 and parameter.dtype == torch.float16:
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50: after one evaluation its bf16 kernel, which has no gradient, stays
            # on in training
            module.support_avx512bf16_for_cpu = False
    use_weights_only(model)
    return model


# ---------------------------------------------------------------- weights that no file holds


def not_loaded(info):
    """Return {name: in words} of the weights that transformers did not load.

    One that is tied to another it did load. info: as from_pretrained returns it.
    """
    found = {name: name for name in sorted(info["missing_keys"])}
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        found[name] = f"{name}, there {tuple(stored)} in place of {tuple(wanted)}"
    return found


def check_loaded(model, absent, outputs, origin):
    """Refuse a base that would be trained on random weights.

    absent: as in Loaded; outputs(): a tensor computed with gradients. Raises InputError if one of
    them, or its like in another layer or expert, takes part in that; notes the others.
    """
    if not absent:
        return
    if is_in_parts(model):  # its graphs end in copies that were gathered, which have no names
        raise InputError(
            f"{origin.name}: {len(absent)} weights are not in its files ({next(iter(absent))}, "
            "...), and with --zero_stage 3 whether they are needed cannot be told: drop the flag."
        )
    # by name, without numbers: a trial text reaches some experts of a router's, others need theirs
    needed = needed_weights(model, outputs)
    random_ones = [name for name in absent if without_numbers(name) in needed]
    if not random_ones:
        note(f"not in the base's files, and not needed by the outputs: {', '.join(absent)}")
        return
    few = "; ".join(absent[name] for name in random_ones[:3])
    more = "; ..." if len(random_ones) > 3 else ""
    remedy = "Fetch it again, or mend its config.json"
    if getattr(model.config, "auto_map", None) and not origin.trust_remote_code:
        remedy = "It brings Python code of its own: read that, pass --trust_remote_code"
    count = len(dict(model.named_parameters()))
    raise InputError(
        f"{origin.name}: {len(random_ones)} of {count} weights are not in its files and would be "
        f"random ({few}{more}). {remedy}."
    )


def needed_weights(model, outputs):
    """Return the names, without_numbers, of the weights that outputs() is computed from."""
    weights = dict(model.named_parameters())
    trainable = {name: weight.requires_grad for name, weight in weights.items()}
    # the graph of a forward pass knows what took part in it, which no list of names does
    for weight in weights.values():
        weight.requires_grad_(weight.is_floating_point())  # a quantised weight has no gradient
    reached = leaves_of(outputs())
    for name, weight in weights.items():
        weight.requires_grad_(trainable[name])
    return {without_numbers(name) for name, weight in weights.items() if id(weight) in reached}


def leaves_of(output):
    """Return the ids of the leaf tensors with a gradient that `output` was computed from."""
    found = set()
    seen = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


def without_numbers(name):
    """Return a weight's name with # for the numbers of layers and experts."""
    return re.sub(r"\d+", "#", name)

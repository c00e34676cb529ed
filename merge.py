"""Merge a LoRA adapter into its base model, in the memory of a few rows, and prove that nothing was lost.

    python merge.py --lora_adapter_path runs/mine/final --output_path merged
    python merge.py --lora_adapter_path runs/mine/final --output_path merged --base_model_path BASE --verify weights
    python merge.py --lora_adapter_path OUT/final/adapter_model.safetensors --output_path merged --output_dtype float32

output_path: weights, config, tokenizer, chat template, stop tokens, sentence-transformers files, a model card and
merge_report.json. Stands alone: torch, numpy, tqdm, safetensors; psutil, transformers and peft to compare outputs.
Shapes: W (out, in), A (r, in), B (out, r). D is what the adapter changes in W, E what the written file changes in it.
"""

import argparse
import ctypes
import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from errno import EFBIG, ENOSPC
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names an optional CPU kernel at every import
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
warnings.filterwarnings("ignore", message=".*_pattern keys did not match")  # peft's own, of experts' parameters
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PRECISIONS = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as the trainers record theirs
NAMES = {dtype: code for code, dtype in CODES.items()}
BLOCK_VALUES = 2**20  # of a tensor in memory at once, per worker: 4 MiB in float32
WORKERS = min(4, os.cpu_count() or 1)  # tensors that are merged at the same time
RETAINED, RESIDUAL = (0.98, 1.02), 0.05  # what a merge may keep of the fine-tune, and add as noise, at the outputs
WEIGHTS_RESIDUAL = 0.017  # noise over all tensors, where outputs are not compared (benchmarks/rounding.py)
# of a tensor's outputs
ROUNDING_ERROR = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
UNMERGEABLE = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
HEADED = re.compile(r"(LMHeadModel|ForCausalLM|ForConditionalGeneration)$")
# the head that is tied to the embedding is no lm_head.weight
OTHER_HEADS = ("bert", "bert-generation", "big_bird", "biogpt", "camembert", "electra", "ernie", "git",
               "gpt_neox_japanese", "megatron-bert", "modernbert-decoder", "roberta", "roberta-prelayernorm",
               "roc_bert", "roformer", "rwkv", "trocr", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet",
               "xmod")
OWN_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # of the task, which a base's file seldom holds
WRAPPERS = ("transformer", "bert", "roberta", "deberta", "distilbert", "electra", "gpt_neox", "backbone")
# how files store, for each expert, what memory holds as one parameter of all experts
EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "up_proj": (("up_proj",),),
                "down_proj": (("down_proj",), ("w2",))}
IN_OUT_EXPERTS = ("gpt_oss", "aria_text", "qwen3_vl_moe_text")  # store all experts in one tensor, as (E, in, out)
RENAMED = {"block_sparse_moe": "mlp"}  # files of Mixtral against its modules
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # store W as (in, out)
PROBE_TEXTS = ("What is the capital of Japan?", "人名をJSONで抜き出してください。山田太郎は大阪で働く。",
               "def f(x):\n    return x + 1")


class InputError(Exception):
    """A flag, file or folder of the user's is wrong: shown as one sentence, without a traceback, exit code 1."""


class DoesNotFit(InputError):
    """Adapter and base do not belong together: the sentence still lacks what to do."""


class TooLarge(InputError):
    """A merged value does not fit into the dtype that is written."""


@contextmanager
def in_one_sentence(what):
    """Turn what transformers, peft and bitsandbytes raise on models they cannot run into an InputError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise InputError(f"{what} ({str(error).strip().splitlines()[0]}).") from None


# ---------------------------------------------------------------- arguments


def parse_args(argv=None):
    """Parse the command line; exits 2 with one sentence on what is wrong."""
    parser = argparse.ArgumentParser("merge.py", usage="%(prog)s --lora_adapter_path DIR --output_path DIR [flags]",
                                     description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--lora_adapter_path", required=True, metavar="DIR", help="adapter folder, or the .safetensors file in it")
    add("--output_path", required=True, metavar="DIR", help="where the merged model goes")
    add("--base_model_path", metavar="ID", help="local folder or hub id [what adapter_config.json names]")
    add("--training_precision", "--output_dtype", default="auto", type=str.lower, choices=["auto", *DTYPES],
        help="of the merged weights [auto: the base's where the fine-tune survives it, else float32]")
    add("--qlora_base", default="original", type=str.lower, choices=["original", "dequant"],
        help="after QLoRA, merge into the 16-bit base, or into what 4 bits left of it [original]")
    add("--verify", type=str.lower, choices=["off", "weights", "full"],
        help="[full where memory allows, else weights]")
    add("--overwrite", action="store_true", help="replace an earlier merge at --output_path")
    add("--device", default="cpu", metavar="NAME", help="where outputs are computed [cpu]")
    add("--trust_remote_code", action="store_true", help="run the Python code that comes with the base model")
    args = parser.parse_args(argv)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    return args


# ---------------------------------------------------------------- safetensors files


def read_json(path, kind=dict):
    """Return the parsed file, or None where there is none; raises InputError if it does not hold a `kind`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Fetch it again.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {error}. Fetch it again.") from None
    if not isinstance(content, kind):
        raise InputError(f"{path} holds a {type(content).__name__}, not a {kind.__name__}. Fetch it again.")
    return content


def write_json(path, content):
    """Write JSON."""
    Path(path).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass
class Tensor:
    """Where a tensor lies: safetensors file, dtype code, shape, bytes [start, end). It is read as a matrix, by rows."""

    file: Path
    code: str
    shape: tuple
    start: int
    end: int
    dequantised: torch.Tensor = None  # what 4- or 8-bit training saw in its place
    stored_rows: int = None  # of the file, where the adapter brings more or fewer

    @property
    def dtype(self):
        """The torch dtype of a floating-point tensor, else None."""
        return CODES.get(self.code)

    @property
    def size(self):
        """(rows, columns); a vector has one column."""
        return (self.shape[0] if self.shape else 1), math.prod(self.shape[1:])

    def blocks(self):
        """Yield the row ranges [first, last) that are in memory at once."""
        rows, columns = self.size
        step = max(1, BLOCK_VALUES // max(1, columns))
        for first in range(0, rows, step):
            yield first, min(rows, first + step)

    def raw(self, first, last):
        """Return the bytes of rows [first, last), uint8."""
        width = (self.end - self.start) // max(1, self.stored_rows or self.size[0])
        data = torch.empty((last - first) * width, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start + first * width)
            file.readinto(data.numpy())
        return data

    def read(self, first, last):
        """Return rows [first, last) in float32; those that the file does not have are zero."""
        if self.dequantised is not None:
            return self.dequantised[first:last]
        known = last if self.stored_rows is None else max(first, min(last, self.stored_rows))
        rows = self.raw(first, known).view(self.dtype).reshape(known - first, self.size[1]).float()
        return rows if known == last else torch.cat([rows, torch.zeros(last - known, self.size[1])])


def read_header(path):
    """Return {name: Tensor}, in the order of the file: 8 bytes of length, a JSON header, raw bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size > 8 else size
        try:
            header = json.loads(file.read(min(length, size)))
            header = {name: entry for name, entry in header.items() if name != "__metadata__"}
            found = {name: Tensor(path, entry["dtype"], tuple(entry["shape"]),
                                  *(8 + length + x for x in entry["data_offsets"])) for name, entry in header.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path} is cut off or no safetensors file ({size} bytes). Fetch it again.") from None
    if max((tensor.end for tensor in found.values()), default=0) > size:
        raise InputError(f"{path} is cut off ({size} bytes). Fetch it again.")
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def find_base(name, revision, cached_only=False):
    """Return the folder of the base model; a hub id is downloaded, with `cached_only` only looked for."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "model*.safetensors", "*/model*.safetensors", "*.py", "*.jinja", "*.model", "*.tiktoken",
              "*.txt", "LICENSE*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=cached_only))
    except Exception as error:  # no such id, no network, no permission
        why = str(error).strip().split("\n")[0]
        raise InputError(f"base model {name!r} is no folder here and cannot be downloaded ({why}). Pass "
                         "--base_model_path.") from None


def weights_files(folder):
    """Return the names of the safetensors files that transformers would load, in order; there may be others beside."""
    index = read_json(folder / "model.safetensors.index.json") or {}
    if (folder / "model.safetensors").is_file() or not isinstance(index.get("weight_map"), dict):
        return ["model.safetensors"]
    files = sorted(set(index["weight_map"].values()))
    outside = [file for file in files if not stays_inside(file)]
    if outside:
        raise InputError(f"{folder}/model.safetensors.index.json names {outside[0]}, which is not in this folder. "
                         "Fetch it again.")
    return files


def stays_inside(path):
    """Tell whether a relative path of a downloaded file leads to something in its own folder."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def read_base(folder):
    """Return (config, {tensor name: Tensor} over all shards) of a model folder."""
    config = read_json(folder / "config.json")
    if config is None:
        raise InputError(f"{folder} has no config.json, so it is no model. Pass the base model as --base_model_path.")
    if "quantization_config" in config:
        raise InputError(f"{folder} is quantised: merging into rounded weights erases the fine-tune. Pass the 16- or "
                         "32-bit model that it was made from as --base_model_path, and quantise after the merge.")
    files = weights_files(folder)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(missing)}. Fetch it again; a pytorch_model.bin must be saved as "
                         "safetensors first.")
    return config, {name: tensor for file in files for name, tensor in read_header(folder / file).items()}


# ---------------------------------------------------------------- the adapter


@dataclass
class Change:
    """What an adapter does to one tensor of the base, in float32.

    LoRA adds scale * B @ A; `transposed` tensors are stored as (in, out), as Conv1D and embeddings are. DoRA then gives
    output i the length magnitude[i] (Liu et al. 2024, eq. 5). `rows` maps indices to new rows, `replacement` is a
    whole new tensor, `added` a vector to add (lora_bias), `experts` a Change for each matrix of a stack (E, ., .).
    """

    lora_a: torch.Tensor = None
    lora_b: torch.Tensor = None
    scale: float = 1.0
    transposed: bool = False
    magnitude: torch.Tensor = None
    rows: dict = field(default_factory=dict)
    replacement: torch.Tensor = None
    added: torch.Tensor = None
    experts: list = ()  # of a tensor that holds them all: a Change for each
    lengths: torch.Tensor = None  # of the outputs of a transposed DoRA tensor, which span all its blocks

    def prepare(self, tensor):
        """Compute, and keep, what rows need and a block of them does not show."""
        if self.magnitude is not None and self.transposed and self.lengths is None:
            blocks = (self.with_lora(tensor.read(*at), *at) for at in tensor.blocks())
            self.lengths = sum(block.square().sum(0) for block in blocks).sqrt()

    def with_lora(self, block, first, last):
        """Return rows [first, last) of W, replaced where the adapter has its own, + scale * B @ A."""
        if self.replacement is not None:
            block = self.replacement[first:last].reshape(block.shape).float()
        inside = [index for index in self.rows if first <= index < last]
        if inside:
            block = block.clone()
            block[[index - first for index in inside]] = torch.stack([self.rows[index] for index in inside]).float()
        if self.lora_a is None:
            return block
        if self.transposed:
            return torch.addmm(block, self.lora_a[:, first:last].T, self.lora_b.T, alpha=self.scale)
        return torch.addmm(block, self.lora_b[first:last], self.lora_a, alpha=self.scale)

    def apply(self, block, first, last):
        """Return the merged rows [first, last) of the tensor whose rows are `block` (rows, columns)."""
        merged = self.with_lora(block, first, last)
        if self.magnitude is not None and self.transposed:
            merged = merged * (self.magnitude / self.lengths)
        elif self.magnitude is not None:
            merged = merged * (self.magnitude[first:last] / merged.norm(dim=1))[:, None]
        if self.added is not None:
            merged = merged + self.added[first:last, None]
        return merged

    def basis(self):
        """Return an orthonormal basis (in, r) of what A reads, for plain LoRA on (out, in), else None."""
        if self.lora_a is None or self.transposed or self.magnitude is not None or self.rows:
            return None
        return torch.linalg.qr(self.lora_a.T).Q if self.replacement is None else None


def pieces(name, tensor, change):
    """Yield (name, Tensor, Change) of what is merged by itself: the tensor, or each expert that it stacks."""
    if not change.experts:
        yield name, tensor, change
        return
    size = (tensor.end - tensor.start) // len(change.experts)
    for index, each in enumerate(change.experts):
        start = tensor.start + index * size
        yield f"{name}[{index}]", Tensor(tensor.file, tensor.code, tensor.shape[1:], start, start + size), each


def unmergeable(config, tensors=None, base_folder=None):
    """Return in words what keeps an adapter with this adapter_config (a dict) from being merged, or None.

    Given its tensors {name: tensor} and the base's folder, whether they fit the base's files is found out as well.
    """
    kinds = [name for name in UNMERGEABLE if config.get(name)]
    if config.get("peft_type") != "LORA" or kinds:
        kind = kinds[0] if kinds else f"peft_type {config.get('peft_type')}"
        return (f"an adapter with {kind} does not map onto the base's stored tensors (peft's merge_and_unload may do "
                "it)")
    patterns = config.get("alpha_pattern") or {}
    alphas = {"lora_alpha": config.get("lora_alpha")} | (
        patterns if isinstance(patterns, dict) else {"alpha_pattern": None})
    wrong = [name for name, alpha in alphas.items() if not isinstance(alpha, int | float) or not math.isfinite(alpha)]
    if wrong:
        return f"adapter_config.json has no number for {wrong[0]} (fetch it again)"
    zero = [name for name, alpha in alphas.items() if alpha == 0]
    if zero:
        return f"adapter_config.json has 0 for {zero[0]}, at which it changes nothing (fetch it again)"
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list | tuple | set) or not all(isinstance(name, str) for name in targets):
        return "target_parameters in adapter_config.json is no list of names (fetch it again)"
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva", "true", "false"):
        return (f"it began with init_lora_weights {start}, which changes the base itself (save it with peft's "
                "path_initial_model_for_weight_conversion first)")
    if tensors is None:
        return None
    try:
        make_changes(config, {plain(name): tensor for name, tensor in tensors.items()}, *read_base(base_folder))
    except InputError as error:
        return str(error).removesuffix(".")
    return None


def read_adapter(path):
    """Return (folder, adapter_config, {name: tensor}); raises InputError for what cannot be merged by adding."""
    from safetensors.torch import load_file

    path = Path(path)
    folder, file = path, path / "adapter_model.safetensors"
    if path.suffix == ".safetensors" and not path.is_dir():
        folder, file = path.parent, path
    config = read_json(folder / "adapter_config.json")
    if config is None:
        raise InputError(f"{folder} has no adapter_config.json, so it is no LoRA adapter. Point --lora_adapter_path at "
                         "the folder a trainer wrote; a fully fine-tuned model needs no merge.")
    wrong = unmergeable(config)
    if wrong:
        raise InputError(f"{folder} cannot be merged: {wrong}.")
    if not file.is_file():
        raise InputError(f"{file} does not exist. Point --lora_adapter_path at the folder a trainer wrote.")
    read_header(file)
    tensors = load_file(file)
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise InputError(f"{file}: {len(broken)} tensors are not finite (first: {broken[0]}). The training diverged: "
                         "take an earlier checkpoint, or train again with a lower --lr.")
    plainly = {plain(name): tensor for name, tensor in tensors.items()}
    if len(plainly) != len(tensors) or not tensors:
        raise InputError(f"{file} holds {len(tensors)} tensors of {len(plainly)} names. Copy the adapter again.")
    return folder, config, plainly


def plain(name):
    """Return an adapter tensor's name without what wraps the model; "model.base_model" is how EmbedRAG saved."""
    name = re.sub(r"^(model\.)?base_model\.model\.", "", name)
    return name.replace(".modules_to_save.default", "").replace(".default", "")


KINDS = {"lora_A.weight": "a", "lora_B.weight": "b",
         "lora_embedding_A": "embedding_a", "lora_embedding_B": "embedding_b",
         "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude", "lora_B.bias": "added",
         "token_adapter.trainable_tokens_delta": "rows", "token_adapter.base_layer.weight": "base_layer",
         "base_layer.weight": "base_layer", "base_layer.bias": "bias", "weight": "weight", "bias": "bias"}


def split(name):
    """Return (module path, kind) of an adapter tensor's plain name; the kind is None for a parameter of its own."""
    ending = next((ending for ending in sorted(KINDS, key=len, reverse=True) if name.endswith(f".{ending}")), None)
    return (name.removesuffix(f".{ending}"), KINDS[ending]) if ending else (name, None)


def match_names(base):
    """Return find(path, ending) -> the base's tensor name or None.

    Models nest differently alone and under a head, and change it between versions: names match when one ends with the
    other, the parts "model" and "language_model" left out.
    """
    def core(name):
        parts = (RENAMED.get(part, part) for part in name.split("."))
        return tuple(part for part in parts if part not in ("model", "language_model"))

    cores, endings = {}, defaultdict(list)
    for name in base:
        parts = core(name)
        cores[parts] = name
        for i in range(len(parts)):
            endings[parts[i:]].append(name)

    def find(path, ending):
        name = f"{path}.{ending}" if ending else path
        if name in base:
            return name
        parts = core(name)
        found = [cores[parts]] if parts in cores else endings.get(parts, [])
        if len(found) > 1:
            raise InputError(f"{path} of the adapter may be {' or '.join(found[:3])} of the base.")
        if not found and parts[1:] in cores and parts[0] in WRAPPERS:  # the base was saved without its head
            found = [cores[parts[1:]]]
        return found[0] if found else None

    return find


def scale_of(path, rank, config):
    """Return the factor of B @ A: alpha/r, with rsLoRA alpha/sqrt(r); patterns are matched as peft does."""
    patterns = config.get("alpha_pattern") or {}
    try:
        key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)
    except re.error as error:
        raise InputError(f"adapter_config.json: an alpha_pattern is no regular expression ({error}).") from None
    alpha = patterns[key] if key else config["lora_alpha"]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def make_changes(config, tensors, base_config, base):
    """Return ({base tensor name: Change}, name of the embedding if the tied head must get a tensor of its own).

    Every adapter tensor is used exactly once; raises DoesNotFit with the list of those that fit nothing. What the
    adapter holds whole and with other rows (a resized vocabulary) gets those rows in `base`.
    """
    modules = defaultdict(dict)
    for name, tensor in tensors.items():
        path, kind = split(name)
        modules[path][kind] = tensor
    find, changes, unused, untied = match_names(base), {}, [], None
    embedding, declared, tied = find_embedding(base_config, base)
    for path, parts in modules.items():
        is_dora = "magnitude" in parts
        if {"a", "b"} <= parts.keys() and not without_nesting(path).endswith("experts") and (
                is_dora != bool(config.get("use_dora"))):
            raise InputError(f"{path} of the adapter has {'a' if is_dora else 'no'} DoRA magnitude, but "
                             f"adapter_config.json says use_dora {config.get('use_dora')}. Copy the adapter again.")
    if config.get("target_parameters"):
        changes |= take_experts(modules, config, base_config, base, find)
    for path, parts in modules.items():
        of_bias = {kind: parts.pop(kind) for kind in ("bias", "added") if kind in parts}
        name, bias = find(path, None if None in parts else "weight"), find(path, "bias")
        if path.split(".")[-1] == "lm_head" and tied:
            untied, name = embedding, "lm_head.weight"
        if "added" in of_bias and name and bias is None:
            raise InputError(f"{path} has no bias in the base, to which the adapter's could be added. Train without "
                             "lora_bias.")
        if parts and (name is None or name in changes) or of_bias and bias is None:
            unused.append(f"{path} ({', '.join(map(str, parts | of_bias))})")
            continue
        if parts:
            place = embedding if untied and name == "lm_head.weight" else name
            base[place] = with_rows_of(parts, base[place])
            changes[name] = make_change(path, parts, config, base[place], base_config)
        if of_bias:
            change = changes[bias] = Change(replacement=of_bias.get("bias"))
            if "added" in of_bias:
                change.added = of_bias["added"].float() * changes[name].scale
            fitting(path, of_bias.popitem()[1], base[bias].shape)
    if unused:
        raise DoesNotFit(f"{len(unused)} of {len(modules)} modules of the adapter fit nothing in the base: "
                         f"{'; '.join(unused[:8])}{'; ...' if len(unused) > 8 else ''}.")
    untied = settle_head(changes, embedding, untied, tied, declared, config.get("task_type"), base_config, base)
    if declared and (untied or embedding in changes):
        refuse_tied_copies(changes.get(embedding), embedding, config.get("task_type"), base_config)
    check_vocabulary(base, embedding, untied)
    return changes, untied


def find_embedding(base_config, base):
    """Return the embedding's name or None, whether the config ties the head to it, and whether the files agree."""
    embedding = next((name for name in base if EMBEDDING.search(name)), None)
    nested = base_config.get("text_config") or {}
    declared = base_config.get("tie_word_embeddings", nested.get("tie_word_embeddings", "lm_head.weight" not in base))
    tied = bool(declared and embedding)
    if tied and "lm_head.weight" in base:  # transformers ties them only where the file agrees
        tied = equal(base[embedding], base["lm_head.weight"])
    return embedding, declared, tied


def settle_head(changes, embedding, untied, tied, declared, task, base_config, base):
    """Give a head that was tied to a changed embedding what it holds in training; return `untied` of make_changes()."""
    has_head = task == "CAUSAL_LM" or task != "FEATURE_EXTRACTION" and is_headed(base_config)
    change, head = changes.get(embedding), changes.get("lm_head.weight")
    if declared and change and change.rows and (head or "lm_head.weight" in base):
        changes["lm_head.weight"] = head or Change()
        changes["lm_head.weight"].rows = change.rows  # peft ties trained rows
        return embedding if tied else None
    if tied and change and not change.rows and has_head:
        if change.lora_a is not None and change.replacement is not None and not head:
            changes["lm_head.weight"] = Change(replacement=change.replacement)
        return embedding  # the head keeps what it was tied to, which the adapter may hold
    return untied


def refuse_tied_copies(change, embedding, task, base_config):
    """Raise InputError where more than lm_head is tied to an embedding that is changed, or whose head is untied.

    Training left those copies as they were, and no file holds them: read from a merged one they would change as well.
    """
    if change and change.rows:
        return  # peft ties trained rows
    kind = (base_config.get("architectures") or [""])[0]
    other_head = kind.endswith(("ForMaskedLM", "ForPreTraining")) or (
        HEADED.search(kind) and base_config.get("model_type") in OTHER_HEADS)
    if base_config.get("is_encoder_decoder") or embedding.endswith("shared.weight"):
        copies = "embeddings of encoder and decoder"
    elif not other_head:
        return
    elif task == "FEATURE_EXTRACTION":  # trained, compared and served without the head
        print(f"note      the head of {kind} is tied to {embedding} and changes with it: use the merged folder for "
              "embeddings alone")
        return
    else:
        copies = f"head of {kind}"
    raise InputError(f"the adapter changes {embedding}, to which the base ties the {copies}: training left those as "
                     "they were, and no file of the base holds them. Train without embedding and head, or save the "
                     "base untied first.")


def take_experts(modules, config, base_config, base, find):
    """Take out of `modules` what adapts parameters (target_parameters); return {base tensor name: Change}.

    peft holds one pair for all E experts of a parameter: A (E r, in), expert after expert, and B (out, r E), the
    experts of a rank side by side. The pairs of two parameters of one module are nested (experts.base_layer.lora_A);
    their shapes tell which is whose.
    """
    changes = {}
    targets = sorted({name.rpartition(".")[2] for name in config["target_parameters"]})
    for path, parts in list(modules.items()):
        if set(parts) != {"a", "b"} or find(path, "weight"):
            continue
        module = without_nesting(path)
        a, b = parts["a"].float(), parts["b"].float()
        if a.dim() != 2 or b.dim() != 2 or not a.numel():
            continue  # make_change() says what is wrong
        fits = {}
        for target in targets:
            experts = find_experts(module, target, find)
            rank = max(1, len(a) // count_experts(experts, base)) if experts else 1
            scale = scale_of(f"{module}.{target}", rank, config)
            found = experts and split_experts(experts, a, b, scale, base_config, base)
            if found and changes.keys().isdisjoint(found):
                fits[target] = found
        if len(fits) > 1:
            raise InputError(f"{path} of the adapter may be for {' or '.join(fits)} of the base.")
        if fits:
            changes |= fits.popitem()[1]
            del modules[path]
    return changes


def without_nesting(path):
    """Return the path of the module whose parameter an adapter of target_parameters is for."""
    return re.sub(r"(\.base_layer)+$", "", path)


def find_experts(module, target, find):
    """Return for each expert the names of the tensors that store its share of a parameter; one list if all in one."""
    whole = find(module, target)
    if whole:
        return [[whole]]
    for parts in EXPERT_PARTS.get(target, ()):
        experts = []
        while all(names := [find(f"{module}.{len(experts)}.{part}", "weight") for part in parts]):
            experts.append(names)
        if experts:
            return experts
    return []


def count_experts(experts, base):
    """Return E: the length of the list, or of a tensor that stacks them."""
    shape = base[experts[0][0]].shape
    return shape[0] if len(shape) == 3 else len(experts)


def split_experts(experts, a, b, scale, base_config, base):
    """Return {base tensor name: Change} for the tensors of `experts`, or None if A and B do not have their shapes."""
    count = count_experts(experts, base)
    if len(a) % count or len(a) != b.shape[1]:
        return None
    a = a.reshape(count, -1, a.shape[1])  # (E, r, in)
    b = b.reshape(len(b), -1, count).permute(2, 0, 1)  # (E, out, r)
    straight = b.shape[1], a.shape[2]
    shapes = [[base[name].shape for name in names] for names in experts]
    if len(shapes[0][0]) == 3:
        stored, turned = tuple(shapes[0][0][1:]), straight[::-1]
        kind = (base_config.get("text_config") or base_config).get("model_type")
        in_out = stored == turned and (straight != turned or kind in IN_OUT_EXPERTS)
        if stored not in (straight, turned):
            return None
        each = [Change(lora_a=a[i], lora_b=b[i], scale=scale, transposed=in_out) for i in range(count)]
        return {experts[0][0]: Change(experts=each)}
    changes = {}
    for names, sizes, own_a, own_b in zip(experts, shapes, a, b, strict=True):
        rows = [size[0] for size in sizes]
        if (sum(rows), *{size[1] for size in sizes}) != straight:
            return None
        for name, share in zip(names, own_b.split(rows), strict=True):
            changes[name] = Change(lora_a=own_a, lora_b=share.contiguous(), scale=scale)
    return changes


def with_rows_of(parts, source):
    """Return the base's tensor with as many rows as the adapter's whole one has: a vocabulary that was resized."""
    whole = next((parts[kind] for kind in ("weight", "base_layer", None) if kind in parts), None)
    if whole is None or len(source.shape) != 2 or tuple(whole.shape[1:]) != source.shape[1:]:
        return source
    if len(whole) == source.shape[0]:
        return source
    return replace(source, shape=tuple(whole.shape), stored_rows=source.stored_rows or source.shape[0])


def check_vocabulary(base, embedding, untied):
    """Raise DoesNotFit where rows were added to, or cut from, only one of embedding, head and the head's bias."""
    head = () if untied else ("lm_head.weight", "lm_head.bias")
    sizes = {name: base[name].shape[0] for name in (embedding, *head) if name in base}
    for name, tensor in base.items():
        if tensor.stored_rows and set(sizes.values()) != {sizes.get(name)}:
            raise DoesNotFit(f"{name}: the adapter is for {tensor.shape}, the base has {tensor.stored_rows} rows. A "
                             f"vocabulary is resized as a whole, and here it is {sizes}.")


def equal(one, other):
    """Tell whether two stored tensors are the same, byte by byte."""
    alike = (one.code, one.shape) == (other.code, other.shape)
    return alike and all(torch.equal(one.raw(*at), other.raw(*at)) for at in one.blocks())


def is_headed(config):
    """Tell whether a base was saved with its language-modelling head."""
    return any(map(HEADED.search, config.get("architectures") or []))


def fitting(path, tensor, shape):
    """Return a tensor of the adapter if it has the base's shape; raises InputError otherwise."""
    if tuple(tensor.shape) != tuple(shape):
        vocabulary = " (a resized vocabulary?)" if tensor.shape[1:] == tuple(shape)[1:] else ""
        raise DoesNotFit(f"{path}: the adapter is for {tuple(tensor.shape)}, the base has {tuple(shape)}{vocabulary}.")
    return tensor


def make_change(path, parts, config, source, base_config):
    """Return the Change that a module's adapter tensors {kind: tensor} make to the base's tensor `source`."""
    change, shape = Change(), source.shape
    for sides in (("a", "b"), ("embedding_a", "embedding_b")):
        found = [parts[side] for side in sides if side in parts]
        whole = len(found) == 2 and all(side.dim() > 1 and side.numel() for side in found)
        found = [side.float().flatten(1) for side in found] if whole else found
        if found and not (whole and len(found[0]) == found[1].shape[1]):
            raise InputError(f"{path}: the adapter's A and B do not belong together. Copy the adapter again.")
        if found:
            a, b = change.lora_a, change.lora_b = found
            change.scale = parts.get("scale") or scale_of(path, len(a), config)
            straight, turned = (len(b), a.shape[1]), (a.shape[1], len(b))
            conv1d = base_config.get("model_type") in CONV1D_MODELS or bool(config.get("fan_in_fan_out"))
            in_out = turned == source.size and (straight != turned or conv1d)  # as Conv1D stores W
            change.transposed = sides[0] == "embedding_a" or in_out
            fitting(path, torch.empty(turned if change.transposed else straight, device="meta"), source.size)
    if "magnitude" in parts:
        change.magnitude = parts["magnitude"].float().flatten()
    if "base_layer" in parts:
        change.replacement = fitting(path, parts["base_layer"], shape)  # differs where tokens were added
    if "rows" in parts:
        indices = config.get("trainable_token_indices") or []
        if isinstance(indices, dict):
            indices = next((ids for name, ids in indices.items() if path.endswith(name)), [])
        if len(indices) != len(parts["rows"]) or max(indices) >= shape[0]:
            raise InputError(f"{path}: {len(parts['rows'])} trained token rows do not fit trainable_token_indices in "
                             f"adapter_config.json ({len(indices)} of them) and a base of {shape[0]} rows.")
        change.rows = dict(zip(indices, parts["rows"], strict=True))
    if "weight" in parts or None in parts:
        change.replacement = fitting(path, parts.get("weight", parts.get(None)), shape)
    return change


# ---------------------------------------------------------------- writing


def measure(base, exact, written, change, basis, first, last):
    """Return the sums (<E, D>, |D|^2, |E - D|^2, |W|^2) over a block; with a basis Q of <EQ, DQ> and so on.

    A value that is infinite or NaN makes the third sum so.
    """
    noise = torch.empty_like(exact).copy_(written).sub_(exact)
    if basis is None:
        wanted = exact - base
    else:  # D = D Q Q^T, so that nothing of D is lost
        wanted, noise = change.lora_b[first:last] @ (change.scale * change.lora_a @ basis), noise @ basis
    wanted, noise, base = wanted.flatten(), noise.flatten(), base.flatten()
    delta = wanted.dot(wanted)
    return torch.stack([delta + noise.dot(wanted), delta, noise.dot(noise), base.dot(base)]).double()


def figures_of(sums):
    """Return from measure()'s sums {"delta": |D|, "relative_delta": |D|/|W|, and what fidelity() returns}."""
    _, delta, _, weight = sums.tolist()
    size = math.sqrt(delta)
    return {"delta": size, "relative_delta": size / math.sqrt(max(weight, 1e-30)), **fidelity(*sums.tolist()[:3])}


def fidelity(along, delta, noise):
    """Return {"retained": <E, D>/|D|^2, "residual": |E - D|/|D|} from these products."""
    if not delta:
        return {"retained": 1.0, "residual": 0.0}
    return {"retained": along / delta, "residual": math.sqrt(noise / delta)}


def over_all(figures):
    """Return fidelity() over all tensors together: a tensor counts by its |D|^2."""
    weighted = [(each["delta"] ** 2, each) for each in figures.values()]
    along = sum(weight * each["retained"] for weight, each in weighted)
    noise = sum(weight * each["residual"] ** 2 for weight, each in weighted)
    return fidelity(along, sum(weight for weight, _ in weighted), noise)


def copy_range(source, target, count, start, at):
    """Copy `count` bytes from one file descriptor to another, inside the kernel where it can."""
    while count:
        try:
            copied = os.copy_file_range(source, target, count, start, at)
        except (AttributeError, OSError) as error:  # not Linux, or two file systems
            if getattr(error, "errno", None) in (EFBIG, ENOSPC):
                raise
            copied = 0
        if not copied:
            copied = os.pwrite(target, os.pread(source, min(count, 2**24), start), at)
        count, start, at = count - copied, start + copied, at + copied


def write_shard(path, tensors, job, bar):
    """Write {name: (source Tensor, Change or None)} as one safetensors file; return {name: figures} of the changed.

    What stays as it is is copied by the kernel; what changes or is cast goes through memory in blocks of rows.
    """
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (source, _) in tensors.items():
        dtype = job.dtype_of(source)
        size = math.prod(source.shape) * dtype.itemsize if dtype else source.end - source.start
        header[name] = {"dtype": NAMES.get(dtype, source.code), "shape": list(source.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as out, ThreadPoolExecutor(WORKERS) as pool:
        out.write(struct.pack("<Q", len(text)) + text)

        def write(item):
            name, (source, change) = item
            at, dtype, found = 8 + len(text) + header[name]["data_offsets"][0], job.dtype_of(source), {}
            if change is None and dtype == source.dtype:
                with open(source.file, "rb") as file:
                    copy_range(file.fileno(), out.fileno(), source.end - source.start, source.start, at)
            else:
                place = at
                for part, tensor, own in pieces(name, source, change or Change()):
                    found[part] = write_blocks(out, place, part, tensor, own, dtype)
                    place += math.prod(tensor.shape) * dtype.itemsize
            if hasattr(os, "posix_fadvise"):  # to the disk now, while the next tensor is merged
                os.posix_fadvise(out.fileno(), at, source.end - source.start, os.POSIX_FADV_DONTNEED)
            bar.update(source.end - source.start)
            return found if change else {}

        figures = {name: figure for found in pool.map(write, tensors.items()) for name, figure in found.items()}
        os.fsync(out.fileno())
    return figures


def write_blocks(out, at, name, source, change, dtype):
    """Write a changed or cast tensor at byte `at`, block by block; return its figures.

    Raises InputError where a merged value is infinite or NaN, TooLarge where it becomes so in `dtype`.
    """
    change.prepare(source)
    sums, basis = torch.zeros(4, dtype=torch.float64), change.basis()
    for first, last in source.blocks():
        base = source.read(first, last)
        exact = change.apply(base, first, last)
        written = exact.to(dtype)
        sums += measure(base, exact, written, change, basis, first, last)
        if not sums[2].isfinite():
            if not exact.isfinite().all():
                raise InputError(f"{name} holds NaN or infinite values once merged: the base or the adapter is broken.")
            raise TooLarge(f"{name} is too large for {str(dtype)[6:]}. Pass --training_precision float32.")
        start = at + first * source.size[1] * dtype.itemsize
        data = memoryview(written.contiguous().view(torch.uint8).numpy()).cast("B")
        while data:
            count = os.pwrite(out.fileno(), data, start)
            data, start = data[count:], start + count
    return figures_of(sums)


def keep_freed_memory():
    """Have glibc reuse freed blocks; mapping and zeroing each anew would be half the time of a merge."""
    with suppress(OSError, AttributeError):  # not Linux
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**27)  # M_TRIM_THRESHOLD


def write_weights(folder, job):
    """Write all shards and the index; return ({tensor name: figures}, seconds)."""
    keep_freed_memory()
    total = sum(source.end - source.start for tensors in job.shards.values() for source, _ in tensors.values())
    started, figures, threads = time.perf_counter(), {}, torch.get_num_threads()
    torch.set_num_threads(1)  # each worker has its own core
    with tqdm(total=total, unit="B", unit_scale=True, desc="merge", disable=None, leave=False) as bar:
        for file, tensors in job.shards.items():
            figures |= write_shard(folder / file, tensors, job, bar)
    torch.set_num_threads(threads)
    if list(job.shards) != ["model.safetensors"]:
        weight_map = {name: file for file, tensors in job.shards.items() for name in tensors}
        size = sum(tensor.end - tensor.start for file in job.shards for tensor in read_header(folder / file).values())
        write_json(folder / "model.safetensors.index.json",
                   {"metadata": {"total_size": size}, "weight_map": weight_map})
    seconds = time.perf_counter() - started
    count = sum(map(len, job.shards.values()))
    print(f"merge     {count} tensors, {len(figures)} of them changed, {total / 1e9:.2f} GB in {seconds:.1f} s "
          f"({total / 1e9 / seconds:.2f} GB/s), as {job.dtype_name}", flush=True)
    return figures, seconds


# ---------------------------------------------------------------- proof


def probe(folder, job):
    """Compare every changed tensor, read back from disk, with W + D on random inputs, in and outside what A reads.

    Returns {tensor name: {"delta", "retained", "residual", "error", "intact"}}; three on inputs of the adapter, the
    error, relative to the tensor's own outputs, on others; intact: no larger than rounding makes it. Raises InputError
    where the bytes of an unchanged tensor differ.
    """
    generator, found = torch.Generator().manual_seed(0), {}
    for file, tensors in job.shards.items():
        stored = read_header(folder / file)
        for name, (source, change) in tensors.items():
            copy = stored[name]
            if change is None:
                if copy.code == source.code and not equal(source, copy):
                    raise InputError(f"{folder / file}: {name} is not what was written. Look at the disk.")
                continue
            written = (tensor for _, tensor, _ in pieces(name, copy, change))
            for (part, tensor, own), other in zip(pieces(name, source, change), written, strict=True):
                found[part] = probe_tensor(tensor, own, other, generator)
    return found


def probe_tensor(source, change, copy, generator):
    """Return what probe() does of one tensor: `copy` is what was written for `source` with `change`."""
    every = inside = outside = torch.randn(source.size[1], 4, generator=generator)
    basis = change.basis()
    if basis is not None:
        inside, outside = basis @ (basis.T @ every), every - basis @ (basis.T @ every)
    sums, far = torch.zeros(4, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for at in source.blocks():
        base, written = source.read(*at), copy.read(*at)
        exact = change.apply(base, *at)
        delta, noise = (exact - base) @ inside, written - exact
        sums += measure(torch.zeros_like(delta), delta, delta + noise @ inside, change, None, *at)
        far += torch.stack([(noise @ outside).square().sum(), (exact @ every).square().sum()])
    error, limit = math.sqrt(far[0] / max(far[1], 1e-30)), ROUNDING_ERROR[copy.dtype]
    figures = {**figures_of(sums), "error": error, "intact": error <= limit}
    del figures["relative_delta"]  # W itself is not measured
    return figures


def load_model(folder, job, bits=None):
    """Load a model in float32, with its head if the adapter was trained with one."""
    from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as bars

    bars.disable_progress_bar()
    how = {"dtype": torch.float32, "trust_remote_code": job.args.trust_remote_code}
    if bits:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
        how |= {"device_map": {"": job.args.device},
                "quantization_config": BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **nf4)}
    model = (AutoModelForCausalLM if job.causal else AutoModel).from_pretrained(folder, **how)
    if not bits:
        return model.to(job.args.device).eval()
    kinds = ("Linear4bit", "Linear8bitLt")
    job.quantised = [path for path, layer in model.named_modules() if type(layer).__name__ in kinds]
    return model.dequantize(dtype=torch.float32).eval()


def outputs_of(model, tokenizer, device, rows):
    """Return float32 outputs on fixed inputs: logits (T, V), or unit embeddings (D) of mean and last token.

    rows: token ids that are asked for too.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [tokenizer(text)["input_ids"] for text in PROBE_TEXTS] if tokenizer else []
    inputs.append(torch.randint(model.config.get_text_config().vocab_size, (24,), generator=generator).tolist())
    inputs += [rows[:64]] * bool(rows)
    outputs = []
    for ids in inputs:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids], device=device))
        if "logits" in found:
            outputs.append(found.logits[0].float().cpu())
        else:
            hidden = found.last_hidden_state[0].float().cpu()
            outputs.append(torch.nn.functional.normalize(torch.stack([hidden.mean(0), hidden[-1]]), dim=1))
    return torch.cat(outputs)


def holds_tokenizer(folder):
    """Tell whether a folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_tokenizer(folder, job):
    """Return the tokenizer in a folder, or None where it has none."""
    from transformers import AutoTokenizer

    if not holds_tokenizer(folder):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=job.args.trust_remote_code)


def resize(model, rows):
    """Give a model's embedding, and its head, that many rows; new ones are zero, as merging takes them to be."""
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        layer.weight.data[known:] = 0


def reference_outputs(job, tokenizer):
    """Return the outputs of the base and of base + adapter, as peft computes them."""
    from peft import PeftModel
    from safetensors.torch import save_file

    model, tensors = load_model(job.base_folder, job, job.bits), {}
    if job.vocabulary:
        resize(model, job.vocabulary)
    find, rows = match_names(model.state_dict()), sorted({row for change in job.changes for row in change.rows})
    base = outputs_of(model, tokenizer, job.args.device, rows)
    targets = [name.rpartition(".")[2] for name in job.config.get("target_parameters") or []]
    for name, tensor in job.tensors.items():  # under the names that this model has for them
        path, kind = split(name)
        at = find(path, kind and "weight") or find(path, "bias")
        if at is None and kind in ("a", "b"):
            path = without_nesting(path)
            at = next(filter(None, (find(path, target) for target in targets)), None)
        if at is None and not re.search(r"\.experts\.\d+\.", path):
            raise ValueError(f"{path} of the adapter is not in {type(model).__name__}")
        if at is None:  # trained expert by expert, before transformers 5: peft fuses them as it loads
            own = name
        else:
            own = at if kind is None else at.rpartition(".")[0] + name.removeprefix(path)
        tensors[f"base_model.model.{own}"] = tensor.contiguous()
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        write_json(f"{folder}/adapter_config.json", job.config | {"task_type": None})
        model = PeftModel.from_pretrained(model, folder).eval()
    return base, outputs_of(model, tokenizer, job.args.device, rows)


def compare_outputs(folder, job, tokenizer):
    """Return what the merged model keeps of the fine-tune at its outputs: d = adapter - base, e = merged - base.

    {"kind", "retained": <e, d>/|d|^2, "residual": |e - d|/|d|, "relative_error": |merged - adapter|/|adapter|,
    "change": |d|/|adapter|}; None where the outputs do not depend on what was trained (a vision tower, say).
    """
    job.reference = job.reference or reference_outputs(job, tokenizer)
    gc.collect()
    base, adapter = job.reference
    if torch.equal(adapter, base):
        return None
    rows = sorted({row for change in job.changes for row in change.rows})
    merged = outputs_of(load_model(folder, job), tokenizer, job.args.device, rows)
    d, e = adapter - base, merged - base
    return {"kind": "logits" if job.causal else "embeddings", "retained": ((e * d).sum() / d.square().sum()).item(),
            "residual": ((e - d).norm() / d.norm()).item(),
            "relative_error": ((merged - adapter).norm() / adapter.norm()).item(),
            "change": (d.norm() / adapter.norm()).item()}


def keeps(found, noise=RESIDUAL):
    """Tell whether retained and residual say that the fine-tune is there."""
    return RETAINED[0] <= found["retained"] <= RETAINED[1] and found["residual"] <= noise


def weights_keep(figures):
    """Tell whether the fine-tune is there in all tensors together; decides where outputs are not compared."""
    return keeps(over_all(figures), WEIGHTS_RESIDUAL)


def tokens_keep(figures, job):
    """Tell whether trained tokens are there: the inputs of a comparison may lack them, so each tensor must show it."""
    rows = (name for tensors in job.shards.values() for name, (_, change) in tensors.items()
            if change and (change.rows or change.replacement is not None and EMBEDDING.search(name)))
    return all(keeps(figures[name]) for name in rows)


def verify(folder, job, mode, figures):
    """Verify what was written. Returns {"mode", "passed", "weights": over all tensors and the worst, "outputs"}."""
    found = {"mode": mode, "passed": None, "weights": None, "outputs": None}
    if mode == "off":
        return found
    probes = probe(folder, job)
    for name, each in probes.items():
        figures[name]["probe"] = each
    found["weights"] = summarise(probes)
    out = compare_if_possible(folder, job) if mode == "full" else None
    kept = weights_keep(probes)
    if out:
        found["outputs"] = out
        print(f"outputs   {out['kind']} in float32: {out['retained']:.2%} of the fine-tune kept, noise "
              f"{out['residual']:.2%} of it, relative error {out['relative_error']:.0e}", flush=True)
        # a change below the noise of float32 is proven on the weights
        invisible = kept and job.dtype == torch.float32 and out["relative_error"] <= 1e-5
        kept = keeps(out) or invisible
    intact = all(each["intact"] for each in probes.values())
    found["passed"] = kept and intact and tokens_keep(probes, job)
    return found


def summarise(probes):
    """Print, and return for the report, what the probes of all tensors say."""
    total = over_all(probes)
    retained = [each["retained"] for each in probes.values()]
    low, high = min(retained), max(retained)
    residual, error = (max(each[key] for each in probes.values()) for key in ("residual", "error"))
    print(f"weights   {len(probes)} tensors read back: {total['retained']:.1%} of the fine-tune kept, noise "
          f"{total['residual']:.1%} of it (single tensors {low:.1%} to {high:.1%}, noise at most {residual:.1%}); "
          f"on other inputs errors of {error:.0e}", flush=True)
    return total | {"tensors": {"retained": [low, high], "residual": residual}, "error": error}


def compare_if_possible(folder, job):
    """Return compare_outputs(), or None, and say why, where a model cannot be run or does not show what was trained."""
    found, why = None, "they do not depend on what was trained"
    try:
        cannot = "outputs cannot be compared; pass --verify weights"
        with in_one_sentence(cannot if job.args.verify == "full" else "base and adapter cannot be run here"):
            found = compare_outputs(folder, job, load_tokenizer(folder, job))
    except InputError as error:
        if job.args.verify == "full":
            raise
        why = error
    if not found and not any(tensor.any() for name, tensor in job.tensors.items() if "lora_A" not in name):
        raise InputError(f"{job.adapter_folder} changes no output of {job.base_folder}: it was not trained.")
    if not found:
        print(f"note      outputs are not compared: {why}", flush=True)
    return found


# ---------------------------------------------------------------- the folder

TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json")  # one is there
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                   "*.tiktoken", "tekken.json", "chat_template.jinja")
PROCESSOR_FILES = ("*preprocessor_config.json", "processor_config.json", "chat_template.json")
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")


def copy_files(folder, target, patterns):
    """Copy the files that match; contents only, so that they are as readable as new ones."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def copy_tree(folder, target):
    """Copy a folder; contents only: of one that may not be written to, a copy could never be deleted."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def complete_folder(folder, job):
    """Write all that a model folder needs beside its weights; the tokenizer is copied byte for byte, never re-saved."""
    copy_files(job.base_folder, folder, ("*.py", "LICENSE*", "NOTICE*", *PROCESSOR_FILES))
    copy_files(job.adapter_folder, folder, ("training_config.json",))
    tokenizer_from = job.adapter_folder if holds_tokenizer(job.adapter_folder) else job.base_folder
    sentences_from = job.adapter_folder if (job.adapter_folder / "modules.json").is_file() else job.base_folder
    copy_files(tokenizer_from, folder, TOKENIZER_FILES)
    copy_files(sentences_from, folder, SENTENCE_FILES)
    for module in read_json(sentences_from / "modules.json", list) or []:
        path = module.get("path") if isinstance(module, dict) else None
        if path and stays_inside(path) and (sentences_from / path).is_dir():
            copy_tree(sentences_from / path, folder / path)
    stored, template = read_json(tokenizer_from / "tokenizer_config.json") or {}, folder / "chat_template.jinja"
    if template.is_file():  # Ollama's importer reads the one place, transformers 5 writes the other
        try:
            text = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{tokenizer_from}/chat_template.jinja is no UTF-8 ({error}). Fetch it again.") from None
        write_json(folder / "tokenizer_config.json", stored | {"chat_template": text})
    elif isinstance(stored.get("chat_template"), str):
        template.write_text(stored["chat_template"], encoding="utf-8")
    write_configs(folder, job, stored)


def write_configs(folder, job, tokenizer_config):
    """Write config.json and, for a language model, generation_config.json with every stop token."""
    config = dict(job.base_config)
    for part in filter(None, (config, config.get("text_config"))):
        part["dtype"] = part["torch_dtype"] = job.dtype_name  # servers older than transformers 5 read the second
        if job.untied:
            part["tie_word_embeddings"] = False
        if job.vocabulary and "vocab_size" in part:
            part["vocab_size"] = job.vocabulary
    base, trained = (read_json(source / "generation_config.json") for source in (job.base_folder, job.adapter_folder))
    if job.causal or base or trained:
        eos = tokenizer_config.get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        tokens = (read_json(folder / "tokenizer.json") or {}).get("added_tokens", [])
        own = [token["id"] for token in tokens if token["content"] == eos]
        parts = (trained, base, config, config.get("text_config"))
        known = (part.get("eos_token_id") for part in parts if part)
        stops = next((eos for eos in known if eos is not None), None)
        stops = own + (stops if isinstance(stops, list) else [stops] * (stops is not None))
        if stops:
            config["eos_token_id"] = stops[0]
            stops = {"eos_token_id": list(dict.fromkeys(stops))}
        write_json(folder / "generation_config.json", (base or {}) | (trained or {}) | (stops or {}))
    write_json(folder / "config.json", config)


CARD = """---
base_model: {base}
library_name: {library}
---

# {name}

{base} with the LoRA adapter {adapter} merged into its weights, stored as {dtype}. {verdict}

| check | kept of the fine-tune | noise added to it |
|---|---|---|
{checks}

`merge_report.json` holds the figures of every tensor.
"""


def write_card(folder, report, name):
    """Write README.md: base, adapter, and the figures of the proof."""
    proof, checks = report["verification"], []
    if proof["weights"]:
        weights = proof["weights"]
        checks.append(f"| all tensors, read back | {weights['retained']:.2%} | {weights['residual']:.2%} |")
    if proof["outputs"]:
        out = proof["outputs"]
        checks.append(f"| {out['kind']}, float32 | {out['retained']:.2%} | {out['residual']:.2%} |")
    how = "" if proof.get("outputs") else " on its weights alone"
    verdict = {True: f"The merge was verified{how}.", False: "**The merge failed its verification.**",
               None: "Not verified."}
    library = "sentence-transformers" if (folder / "modules.json").is_file() else "transformers"
    (folder / "README.md").write_text(CARD.format(
        base=report["base"], adapter=report["adapter"], dtype=report["dtype"], name=name, library=library,
        verdict=verdict[proof["passed"]], checks="\n".join(checks) or "| none | | |"), encoding="utf-8")


def fingerprint(folder):
    """Return the hash by which a base is known again, or None where it has no safetensors.

    It is of the first MiB (header and weights) of each weights file.
    """
    files = [folder / name for name in weights_files(folder)]
    return digest_of(files) if all(file.is_file() for file in files) else None


def digest_of(files):
    """Return the SHA-256 of the first MiB of each file."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            digest.update(stream.read(2**20))
    return digest.hexdigest()


def is_base(folder, recorded):
    """Tell whether a trainer can have recorded this fingerprint of the base in `folder`.

    Earlier trainers hashed every safetensors file of the folder, and nothing where it had none.
    """
    found = fingerprint(folder)
    if found is None or recorded in (None, found, digest_of([])):
        return True
    return recorded == digest_of(sorted(folder.glob("*.safetensors")))


# ---------------------------------------------------------------- main


def flags_of(trained):
    """Return the flags that a training_config.json (a dict) holds; raises InputError for what is none."""
    flags = trained.get("flags") or {}
    if not isinstance(flags, dict):
        raise InputError(f"training_config.json of the adapter holds {str(flags)[:60]} as flags. Copy it again.")
    return flags


def make_job(args):
    """Read and check everything that is merged; returns what the merge needs, nothing written yet."""
    adapter_folder, config, tensors = read_adapter(args.lora_adapter_path)
    trained = read_json(adapter_folder / "training_config.json") or {}
    flags, name = flags_of(trained), args.base_model_path or config.get("base_model_name_or_path") or ""
    base_folder = find_base(name, flags.get("model_revision") or config.get("revision"))
    base_config, base = read_base(base_folder)
    recorded = trained.get("base_fingerprint")
    try:
        changes, untied = make_changes(config, tensors, base_config, base)
    except DoesNotFit as error:
        raise InputError(f"{error} {what_to_do(recorded, base_folder, name, config)}") from None
    print(f"adapter   {adapter_folder}: {len(tensors)} tensors for {len(changes)} of the {len(base)} of {name}")
    if not is_base(base_folder, recorded):
        raise InputError(f"{base_folder} is not the base that {adapter_folder} was trained on: its weights are not "
                         f"those of {flags.get('model_name')}. Pass that one as --base_model_path; if it is the same "
                         f"model in other files, delete base_fingerprint from its training_config.json.")
    task, top = config.get("task_type"), next(iter(tensors)).split(".")[0]
    causal = task == "CAUSAL_LM" or (
        task is None and is_headed(base_config) and any(each.split(".")[0] == top for each in base))
    shards, sizes = defaultdict(dict), defaultdict(int)
    for each, tensor in base.items():
        sizes[tensor.dtype] += (tensor.end - tensor.start) * (tensor.dtype is not None)
        if not (untied and each == "lm_head.weight"):
            shards[tensor.file.name][each] = tensor, changes.get(each)
    if untied:
        shards[list(shards)[-1]]["lm_head.weight"] = base[untied], changes.get("lm_head.weight")
    vocabulary = next((tensor.shape[0] for tensor in base.values() if tensor.stored_rows), None)
    job = SimpleNamespace(
        args=args, adapter_folder=adapter_folder, config=config, tensors=tensors, trained=trained, base_name=name,
        base_folder=base_folder, base_config=base_config, base=base, base_dtype=max(sizes, key=sizes.get),
        base_fingerprint=fingerprint(base_folder), shards=dict(shards), untied=bool(untied), causal=causal, bits=None,
        vocabulary=vocabulary, reference=None, changes=list(changes.values()))
    if args.qlora_base == "dequant":
        dequantise(job, flags.get("bits") or flags.get("quantization_bits") or 4)
    return job


def what_to_do(recorded, base_folder, name, config):
    """Return the advice where an adapter does not fit the base that is called `name`.

    recorded: the fingerprint of the base that a trainer put it on, or None.
    """
    by_peft = "merge it with peft's merge_and_unload."
    if config.get("task_type") in OWN_HEADS:
        return f"An adapter for {config['task_type']} brings a head that a base's files do not hold: {by_peft}"
    if recorded and is_base(base_folder, recorded):
        return (f"The adapter was trained on {name}, whose files hold no such tensor: its class makes it anew, or was "
                f"changed before the training; {by_peft}")
    if name == config.get("base_model_name_or_path"):
        return (f"{name} is the base that the adapter names: if it changed since, pass the old one as "
                f"--base_model_path; else {by_peft}")
    trained_on = config.get("base_model_name_or_path")
    return f"Pass the base that it was trained on ({trained_on}) as --base_model_path."


def dequantise(job, bits):
    """Make the base what quantised training saw: the layers that bitsandbytes quantises, and only those, rounded."""
    job.bits, find = bits, match_names(job.base)
    with in_one_sentence(f"--qlora_base dequant: {job.base_folder} cannot be loaded in {bits} bits"):
        model = load_model(job.base_folder, job, bits)
    for path in job.quantised:
        name, weight = find(path, "weight"), model.get_submodule(path).weight.detach().cpu()
        for tensors in (each for each in job.shards.values() if name in each):
            source, change = tensors[name]
            source.dequantised = weight.T if job.base_config.get("model_type") in CONV1D_MODELS else weight
            tensors[name] = source, change or Change()


def settle_dtype(job, name):
    """Set the dtype to write; with auto every tensor keeps its own, and the base's is that of most of its bytes."""
    job.dtype = job.base_dtype if name == "auto" else DTYPES[name]
    job.dtype_name = str(job.dtype)[6:]
    job.dtype_of = lambda source: source.dtype if name == "auto" or source.dtype is None else job.dtype


def free_memory(groups=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """Return the bytes of memory that this process may still take: the machine's, or less in a container."""
    import psutil

    found = [psutil.virtual_memory().available]
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        root = groups / kinds  # version 1 has a folder for each kind
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):  # a container sees its own group as the root
            folder = root.joinpath(*parts[:depth])
            with suppress(OSError, ValueError):  # no such file; "max"
                limit, used = (int((folder / name).read_text()) for name in names)
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                found.append(max(0, limit - used + cached))
    return min(found)


def choose_verification(job):
    """Return what --verify says, else full where float32 models fit into the memory that is free, else weights."""
    if job.args.verify:
        return job.args.verify
    needed = 4.4 * sum(math.prod(tensor.shape) for tensor in job.base.values()) + 5e8
    cuda = job.args.device.startswith("cuda")
    free = torch.cuda.mem_get_info()[0] if cuda else free_memory()
    if needed <= free:
        return "full"
    print(f"note      outputs are not compared: that needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} are "
          "free; --verify full does it all the same")
    return "weights"


def written_size(job):
    """Return the bytes of all tensors as they are written."""
    sources = [source for tensors in job.shards.values() for source, _ in tensors.values()]
    return sum(math.prod(source.shape) * (job.dtype_of(source) or torch.int64).itemsize for source in sources)


def merge_once(folder, job, mode):
    """Merge into an empty folder in job.dtype and verify it; returns (tensor figures, seconds, verification)."""
    empty(folder)
    size = written_size(job)
    free = shutil.disk_usage(folder).free
    if size + 2**26 > free:
        raise InputError(f"the merged model needs {size / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} free. "
                         "Make room, or pass an --output_path on another disk.")
    try:
        figures, seconds = write_weights(folder, job)
    except TooLarge:
        if job.args.training_precision != "auto" or job.dtype == torch.float32:
            raise
        return {}, 0.0, {"passed": False}
    complete_folder(folder, job)
    if job.args.training_precision == "auto" and job.dtype != torch.float32:
        if mode != "full" and not (weights_keep(figures) and tokens_keep(figures, job)):
            return figures, seconds, {"passed": False}
    return figures, seconds, verify(folder, job, mode, figures)


def open_output(args):
    """Return the output folder; raises InputError rather than lose a folder that is not an earlier merge."""
    try:
        output = Path(os.path.realpath(args.output_path))
        old = output.with_name(f".{output.name}.partial").exists()  # the longest name that is used
    except (OSError, ValueError) as error:
        raise InputError(f"--output_path cannot be used ({error}). Name another folder.") from None
    if output.is_symlink():  # what realpath leaves of a circle
        raise InputError(f"--output_path {output} is a symbolic link to itself. Name a folder.")
    old = output.with_name(f".{output.name}.old")
    if old.exists() and not output.exists():  # a crash between two renames
        old.rename(output)
    if output.is_file():
        raise InputError(f"--output_path {output} is a file. Name a folder.")
    if output.is_dir() and any(output.iterdir()):
        if not (output / "merge_report.json").is_file():
            raise InputError(f"--output_path {output} is not empty and no earlier merge. Name another folder.")
        if not args.overwrite:
            raise InputError(f"--output_path {output} holds a merge already. Name another folder, or pass --overwrite.")
    return output


@contextmanager
def held(folder):
    """Make a folder that no other merge can hold at the same time, and delete what is left of it in the end."""
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the lock ends with the process, even if that is killed
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"another merge is writing to {folder} at this moment. Wait for it, or pass another "
                                 "--output_path.") from None
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def empty(folder):
    """Delete everything in a folder."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def put_in_place(folder, output):
    """Make the finished folder appear under its name at once, after everything in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if output.exists():
        old = output.with_name(f".{output.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # which a crash has left
        output.rename(old)
        folder.rename(output)
        try:
            shutil.rmtree(old)
        except OSError as error:
            print(f"note      the earlier merge could not be deleted and is left as {old} ({error})", flush=True)
    else:
        folder.rename(output)


def main(argv=None):
    """Run the command line `argv`; return what merge_report.json holds. Raises InputError if the proof fails."""
    args = parse_args(argv)
    output, job = open_output(args), make_job(args)
    mode, temporary = choose_verification(job), output.with_name(f".{output.name}.partial")
    settle_dtype(job, args.training_precision)
    try:
        with held(temporary):
            open_output(args)  # again: another merge may have ended in the meantime
            figures, seconds, proof = merge_once(temporary, job, mode)
            if args.training_precision == "auto" and proof["passed"] is False and job.dtype != torch.float32:
                lossy, small = job.dtype_name, written_size(job)
                settle_dtype(job, "float32")
                print(price_of_float32(lossy, small, written_size(job)), flush=True)
                figures, seconds, proof = merge_once(temporary, job, mode)
            trained_in = PRECISIONS.get(job.trained.get("precision"))
            report = {
                "verified": proof["passed"] is True, "base": job.base_name, "base_fingerprint": job.base_fingerprint,
                "adapter": str(job.adapter_folder), "dtype": job.dtype_name, "base_dtype": str(job.base_dtype)[6:],
                "trained_in": trained_in, "qlora_base": args.qlora_base, "seconds": seconds,
                "verification": proof, "tensors": figures,
            }
            write_json(temporary / "merge_report.json", report)
            write_card(temporary, report, output.name)
            if proof["passed"] is not False or not output.exists():  # else the earlier merge stays
                put_in_place(temporary, output)
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise InputError(f"the merged model could not be written ({error}). Nothing is left of it.") from None
    if trained_in not in (None, job.dtype_name):
        print(f"note      trained in {trained_in}, stored as {job.dtype_name}")
    if proof["passed"] is False:
        raise InputError(failure(job, proof))
    print(f"result    {output}: {'verified' if report['verified'] else 'not verified'}, {job.dtype_name}", flush=True)
    return report


def price_of_float32(lossy, small, large):
    """Return the note on why a merge in the dtype `lossy`, of `small` bytes, is done again in float32, of `large`."""
    served = "float32 or float16" if lossy == "bfloat16" else "float32"
    return (f"note      {lossy} would lose part of the fine-tune: once more in float32, {large / 1e9:.2f} GB instead "
            f"of {small / 1e9:.2f}. It helps only if it is served in {served}: in {lossy} it is the same lossy merge")


def failure(job, proof):
    """Return in one sentence why the proof failed, and what to do."""
    found = proof["outputs"] or proof["weights"]
    figures = f"{found['retained']:.1%} of it is kept, with noise of {found['residual']:.1%}"
    if job.dtype == torch.float32:
        return (f"{job.args.output_path} is not base + adapter ({figures}): do not use it. Is the base the one that "
                "the adapter was trained on?")
    return (f"{job.args.output_path} has lost part of the fine-tune to {job.dtype_name}: {figures}. Merge with "
            f"--training_precision float32{'' if proof['outputs'] else ', or let the outputs decide: --verify full'}.")


if __name__ == "__main__":
    try:
        main()
    except InputError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(1)
    except OSError as wrong:
        if wrong.errno is None:  # not the system's
            raise
        print(f"error: a file cannot be read or written: {wrong}. Mend that, and start again.", file=sys.stderr)
        sys.exit(1)

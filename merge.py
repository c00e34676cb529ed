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
from dataclasses import dataclass, field
from errno import EFBIG, ENOSPC
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names an optional CPU kernel at every import
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CODES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
PRECISIONS = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as the trainers record theirs
NAMES = {dtype: code for code, dtype in CODES.items()}
BLOCK_VALUES = 2**20  # of a tensor in memory at once, per worker: 4 MiB in float32
WORKERS = min(4, os.cpu_count() or 1)  # tensors that are merged at the same time
RETAINED, RESIDUAL = (0.98, 1.02), 0.05  # what a merge may keep of the fine-tune, and add to it as noise
# of a tensor's outputs
ROUNDING_ERROR = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
UNMERGEABLE = ("target_parameters", "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$")
HEADED = re.compile(r"(LMHeadModel|ForCausalLM|ForConditionalGeneration)$")
WRAPPERS = ("transformer", "bert", "roberta", "deberta", "distilbert", "electra", "gpt_neox", "backbone")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # store W as (in, out)
PROBE_TEXTS = ("What is the capital of Japan?", "人名をJSONで抜き出してください。山田太郎は大阪で働く。",
               "def f(x):\n    return x + 1")


class InputError(Exception):
    """A flag, file or folder of the user's is wrong: shown as one sentence, without a traceback, exit code 1."""


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


def read_json(path):
    """Return the parsed file, or None where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON: {error}. Fetch it again.") from None


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
        width = (self.end - self.start) // max(1, self.size[0])
        data = torch.empty((last - first) * width, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start + first * width)
            file.readinto(data.numpy())
        return data

    def read(self, first, last):
        """Return rows [first, last) in float32."""
        if self.dequantised is not None:
            return self.dequantised[first:last]
        return self.raw(first, last).view(self.dtype).reshape(last - first, self.size[1]).float()


def read_header(path):
    """Return {name: Tensor}, in the order of the file: 8 bytes of length, a JSON header, raw bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size > 8 else size
        try:
            header = json.loads(file.read(min(length, size)))
        except ValueError:
            raise InputError(f"{path} is cut off or no safetensors file ({size} bytes). Fetch it again.") from None
    header.pop("__metadata__", None)
    found = {name: Tensor(path, entry["dtype"], tuple(entry["shape"]), *(8 + length + x for x in entry["data_offsets"]))
             for name, entry in header.items()}
    if max((tensor.end for tensor in found.values()), default=0) > size:
        raise InputError(f"{path} is cut off ({size} bytes). Fetch it again.")
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def find_base(name, revision):
    """Return the folder of the base model; a hub id is downloaded."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "model*.safetensors", "*/model*.safetensors", "*.py", "*.jinja", "*.model", "*.tiktoken",
              "*.txt", "LICENSE*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # no such id, no network, no permission
        why = str(error).strip().split("\n")[0]
        raise InputError(f"base model {name!r} is no folder here and cannot be downloaded ({why}). Pass "
                         "--base_model_path.") from None


def read_base(folder):
    """Return (config, {tensor name: Tensor} over all shards) of a model folder."""
    config = read_json(folder / "config.json")
    if config is None:
        raise InputError(f"{folder} has no config.json, so it is no model. Pass the base model as --base_model_path.")
    if "quantization_config" in config:
        raise InputError(f"{folder} is quantised: merging into rounded weights erases the fine-tune. Pass the 16- or "
                         "32-bit model that it was made from as --base_model_path, and quantise after the merge.")
    index = read_json(folder / "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
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
    whole new tensor, `added` a vector to add (lora_bias).
    """

    lora_a: torch.Tensor = None
    lora_b: torch.Tensor = None
    scale: float = 1.0
    transposed: bool = False
    magnitude: torch.Tensor = None
    rows: dict = field(default_factory=dict)
    replacement: torch.Tensor = None
    added: torch.Tensor = None
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
    start, kinds = config.get("init_lora_weights", True), [name for name in UNMERGEABLE if config.get(name)]
    if config.get("peft_type") != "LORA" or kinds:
        kind = kinds[0] if kinds else f"peft_type {config.get('peft_type')}"
        raise InputError(f"{folder} holds an adapter with {kind}, "
                         "which does not map onto the base's stored tensors. Merge it with peft's merge_and_unload.")
    if isinstance(start, str) and start.lower() not in ("gaussian", "orthogonal", "eva", "true", "false"):
        raise InputError(f"{folder} began with init_lora_weights {start}, which changes the base itself. Save it with "
                         "peft's path_initial_model_for_weight_conversion first.")
    if not file.is_file():
        raise InputError(f"{file} does not exist. Point --lora_adapter_path at the folder a trainer wrote.")
    read_header(file)
    tensors = load_file(file)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
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
        return tuple(part for part in name.split(".") if part not in ("model", "language_model"))

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
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", path)), None)
    alpha = patterns[key] if key else config["lora_alpha"]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def make_changes(config, tensors, base_config, base):
    """Return ({base tensor name: Change}, name of the embedding if the tied head must get a tensor of its own).

    Every adapter tensor is used exactly once; raises InputError with the list of those that fit nothing.
    """
    find, changes, unused, modules, task = match_names(base), {}, [], defaultdict(dict), config.get("task_type")
    for name, tensor in tensors.items():
        path, kind = split(name)
        modules[path][kind] = tensor
    embedding = next((name for name in base if EMBEDDING.search(name)), None)
    nested = base_config.get("text_config") or {}
    tied = base_config.get("tie_word_embeddings", nested.get("tie_word_embeddings", "lm_head.weight" not in base))
    declared = tied
    if tied and embedding and "lm_head.weight" in base:  # transformers ties them only where the file agrees
        tied = equal(base[embedding], base["lm_head.weight"])
    untied = None
    for path, parts in modules.items():
        of_bias = {kind: parts.pop(kind) for kind in ("bias", "added") if kind in parts}
        name, bias = find(path, None if None in parts else "weight"), find(path, "bias")
        if path.split(".")[-1] == "lm_head" and tied and embedding:
            untied, name = embedding, "lm_head.weight"
        if parts and (name is None or name in changes) or of_bias and bias is None:
            unused.append(f"{path} ({', '.join(map(str, parts | of_bias))})")
            continue
        if parts:
            source = base[embedding if untied and name == "lm_head.weight" else name]
            changes[name] = make_change(path, parts, config, source, base_config)
        if of_bias:
            change = changes[bias] = Change(replacement=of_bias.get("bias"))
            if "added" in of_bias:
                change.added = of_bias["added"].float() * changes[name].scale
            fitting(path, of_bias.popitem()[1], base[bias].shape)
    if unused:
        raise InputError(f"{len(unused)} of {len(modules)} modules of the adapter fit nothing in the base: "
                         f"{'; '.join(unused[:8])}{'; ...' if len(unused) > 8 else ''}. Pass the base that it was "
                         f"trained on ({config.get('base_model_name_or_path')}) as --base_model_path.")
    has_head = task == "CAUSAL_LM" or task != "FEATURE_EXTRACTION" and is_headed(base_config)
    change, head = changes.get(embedding), changes.get("lm_head.weight")
    if declared and change and change.rows and (head or "lm_head.weight" in base):
        untied, changes["lm_head.weight"] = embedding if tied else None, head or Change()
        changes["lm_head.weight"].rows = change.rows  # peft ties trained rows
    elif tied and change and not change.rows and has_head:
        untied = embedding  # the head keeps what it was tied to, which the adapter may hold
        if change.lora_a is not None and change.replacement is not None and not head:
            changes["lm_head.weight"] = Change(replacement=change.replacement)
    return changes, untied


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
        raise InputError(f"{path}: the adapter is for {tuple(tensor.shape)}, the base has {tuple(shape)}{vocabulary}. "
                         "Pass the base that it was trained on as --base_model_path.")
    return tensor


def make_change(path, parts, config, source, base_config):
    """Return the Change that a module's adapter tensors {kind: tensor} make to the base's tensor `source`."""
    change, shape = Change(), source.shape
    for sides in (("a", "b"), ("embedding_a", "embedding_b")):
        found = [parts[side].float().flatten(1) for side in sides if side in parts]
        if len(found) == 1 or found and len(found[0]) != found[1].shape[1]:
            raise InputError(f"{path}: the adapter's A and B do not belong together. Copy the adapter again.")
        if found:
            a, b = change.lora_a, change.lora_b = found
            change.scale = scale_of(path, len(a), config)
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
    """Return {"relative_delta": |D|/|W|, "retained": <E, D>/|D|^2, "residual": |E - D|/|D|} from measure()'s sums."""
    along, delta, noise, weight = sums.tolist()
    if not delta:
        return {"relative_delta": 0.0, "retained": 1.0, "residual": 0.0}
    return {"relative_delta": math.sqrt(delta / max(weight, 1e-30)), "retained": along / delta,
            "residual": math.sqrt(noise / delta)}


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
            at, dtype, found = 8 + len(text) + header[name]["data_offsets"][0], job.dtype_of(source), None
            if change is None and dtype == source.dtype:
                with open(source.file, "rb") as file:
                    copy_range(file.fileno(), out.fileno(), source.end - source.start, source.start, at)
            else:
                found = write_blocks(out, at, name, source, change or Change(), dtype)
            if hasattr(os, "posix_fadvise"):  # to the disk now, while the next tensor is merged
                os.posix_fadvise(out.fileno(), at, source.end - source.start, os.POSIX_FADV_DONTNEED)
            bar.update(source.end - source.start)
            return name, found if change else None

        figures = {name: found for name, found in pool.map(write, tensors.items()) if found}
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

    Returns {tensor name: {"retained", "residual", "error", "intact"}}; the first two on inputs of the adapter, the
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
            found[name] = {**figures_of(sums), "error": error, "intact": error <= limit}
            del found[name]["relative_delta"]
    return found


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


def load_tokenizer(folder, job):
    """Return the tokenizer in a folder, or None where it has none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=job.args.trust_remote_code)


def reference_outputs(job, tokenizer):
    """Return the outputs of the base and of base + adapter, as peft computes them."""
    from peft import PeftModel
    from safetensors.torch import save_file

    model, tensors = load_model(job.base_folder, job, job.bits), {}
    find, rows = match_names(model.state_dict()), sorted({row for change in job.changes for row in change.rows})
    base = outputs_of(model, tokenizer, job.args.device, rows)
    for name, tensor in job.tensors.items():  # under the names that this model has for them
        path, kind = split(name)
        at = find(path, kind and "weight") or find(path, "bias")
        if at is None:
            raise ValueError(f"{path} of the adapter is not in {type(model).__name__}")
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


def keeps(found):
    """Tell whether retained and residual say that the fine-tune is there."""
    return RETAINED[0] <= found["retained"] <= RETAINED[1] and found["residual"] <= RESIDUAL


def verify(folder, job, mode, figures):
    """Verify what was written. Returns {"mode", "passed", "weights": the worst of all tensors, "outputs"}."""
    found = {"mode": mode, "passed": None, "weights": None, "outputs": None}
    if mode == "off":
        return found
    probes = probe(folder, job)
    for name, each in probes.items():
        figures[name]["probe"] = each
    low, high = (pick(each["retained"] for each in probes.values()) for pick in (min, max))
    residual, error = (max(each[key] for each in probes.values()) for key in ("residual", "error"))
    found["weights"] = {"retained": [low, high], "residual": residual, "error": error}
    print(f"weights   {len(probes)} tensors read back: {low:.1%} to {high:.1%} of the fine-tune kept, noise at most "
          f"{residual:.1%} of it; on other inputs errors of {error:.0e}", flush=True)
    kept, out = all(map(keeps, probes.values())), compare_if_possible(folder, job) if mode == "full" else None
    if out:
        found["outputs"] = out
        print(f"outputs   {out['kind']} in float32: {out['retained']:.2%} of the fine-tune kept, noise "
              f"{out['residual']:.2%} of it, relative error {out['relative_error']:.0e}", flush=True)
        # tokens that the inputs may lack are proven on their own; changes below float32's noise on the weights
        own = [probes[name] for tensors in job.shards.values() for name, (_, change) in tensors.items()
               if change and (change.rows or change.replacement is not None)]
        unseen = kept and job.dtype == torch.float32 and out["relative_error"] <= 1e-5
        kept = all(map(keeps, own)) and keeps(out) or unseen
    found["passed"] = kept and all(each["intact"] for each in probes.values())
    return found


def compare_if_possible(folder, job):
    """Return compare_outputs(), or None, and say why, where a model cannot be run or does not show what was trained."""
    found, why = None, "they do not depend on what was trained"
    try:
        with in_one_sentence("outputs cannot be compared; pass --verify weights"):
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

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
                   "*.tiktoken", "chat_template.jinja")
PROCESSOR_FILES = ("*preprocessor_config.json", "processor_config.json", "chat_template.json")
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")


def copy_files(folder, target, patterns):
    """Copy the files that match; contents only, so that they are as readable as new ones."""
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        if path.is_file():
            shutil.copyfile(path, target / path.name)


def complete_folder(folder, job):
    """Write all that a model folder needs beside its weights; the tokenizer is copied byte for byte, never re-saved."""
    has = {name: (job.adapter_folder / name).is_file() for name in ("tokenizer_config.json", "modules.json")}
    copy_files(job.base_folder, folder, ("*.py", "LICENSE*", "NOTICE*", *PROCESSOR_FILES))
    copy_files(job.adapter_folder, folder, ("training_config.json",))
    tokenizer_from = job.adapter_folder if has["tokenizer_config.json"] else job.base_folder
    sentences_from = job.adapter_folder if has["modules.json"] else job.base_folder
    copy_files(tokenizer_from, folder, TOKENIZER_FILES)
    copy_files(sentences_from, folder, SENTENCE_FILES)
    for module in read_json(sentences_from / "modules.json") or []:
        if module["path"] and (sentences_from / module["path"]).is_dir():
            shutil.copytree(sentences_from / module["path"], folder / module["path"], copy_function=shutil.copyfile)
    stored, template = read_json(folder / "tokenizer_config.json") or {}, folder / "chat_template.jinja"
    if template.is_file():  # Ollama's importer reads the one place, transformers 5 writes the other
        write_json(folder / "tokenizer_config.json", stored | {"chat_template": template.read_text(encoding="utf-8")})
    elif isinstance(stored.get("chat_template"), str):
        template.write_text(stored["chat_template"], encoding="utf-8")
    write_configs(folder, job, stored)


def write_configs(folder, job, tokenizer_config):
    """Write config.json and, for a language model, generation_config.json with every stop token."""
    config = {key: value for key, value in job.base_config.items() if key != "torch_dtype"} | {"dtype": job.dtype_name}
    for part in filter(None, (config, config.get("text_config"))):
        part["dtype"] = job.dtype_name
        part.pop("torch_dtype", None)
        if job.untied:
            part["tie_word_embeddings"] = False
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
        low, high = proof["weights"]["retained"]
        checks.append(f"| tensors, read back | {low:.1%} to {high:.1%} | at most {proof['weights']['residual']:.1%} |")
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
    """Return the hash by which a base is known again: of the first MiB (header and weights) of each weights file."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as stream:
            digest.update(stream.read(2**20))
    return digest.hexdigest()


# ---------------------------------------------------------------- main


def make_job(args):
    """Read and check everything that is merged; returns what the merge needs, nothing written yet."""
    adapter_folder, config, tensors = read_adapter(args.lora_adapter_path)
    trained = read_json(adapter_folder / "training_config.json") or {}
    flags, name = trained.get("flags") or {}, args.base_model_path or config.get("base_model_name_or_path") or ""
    base_folder = find_base(name, flags.get("model_revision") or config.get("revision"))
    base_config, base = read_base(base_folder)
    changes, untied = make_changes(config, tensors, base_config, base)
    print(f"adapter   {adapter_folder}: {len(tensors)} tensors for {len(changes)} of the {len(base)} of {name}")
    base_fingerprint = fingerprint(base_folder)
    if trained.get("base_fingerprint") not in (None, base_fingerprint):
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
    job = SimpleNamespace(
        args=args, adapter_folder=adapter_folder, config=config, tensors=tensors, trained=trained, base_name=name,
        base_folder=base_folder, base_config=base_config, base=base, base_dtype=max(sizes, key=sizes.get),
        base_fingerprint=base_fingerprint, shards=dict(shards), untied=bool(untied), causal=causal, bits=None,
        reference=None, changes=list(changes.values()))
    if args.qlora_base == "dequant":
        dequantise(job, flags.get("bits") or flags.get("quantization_bits") or 4)
    return job


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


def choose_verification(job):
    """Return what --verify says, else full where float32 models fit into the memory that is free, else weights."""
    if job.args.verify:
        return job.args.verify
    needed = 4.4 * sum(math.prod(tensor.shape) for tensor in job.base.values()) + 5e8
    cuda = job.args.device.startswith("cuda")
    if not cuda:
        import psutil
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    if needed <= free:
        return "full"
    print(f"note      outputs are not compared: that needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} are "
          "free; --verify full does it all the same")
    return "weights"


def merge_once(folder, job, mode):
    """Merge into an empty folder in job.dtype and verify it; returns (tensor figures, seconds, verification)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    size = sum(math.prod(source.shape) * (job.dtype_of(source) or torch.int64).itemsize
               for tensors in job.shards.values() for source, _ in tensors.values())
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
        lost = not all(RETAINED[0] <= each["retained"] <= RETAINED[1] for each in figures.values())
        if lost or mode != "full" and not all(map(keeps, figures.values())):  # the outputs need not be asked
            return figures, seconds, {"passed": False}
    return figures, seconds, verify(folder, job, mode, figures)


def open_output(args):
    """Return the output folder; raises InputError rather than lose a folder that is not an earlier merge."""
    output = Path(os.path.realpath(args.output_path))
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
        shutil.rmtree(old)
    else:
        folder.rename(output)


def main(argv=None):
    """Run the command line `argv`; return what merge_report.json holds. Raises InputError if the proof fails."""
    args = parse_args(argv)
    output, job = open_output(args), make_job(args)
    mode, temporary = choose_verification(job), output.with_name(f".{output.name}.partial")
    settle_dtype(job, args.training_precision)
    try:
        figures, seconds, proof = merge_once(temporary, job, mode)
        if args.training_precision == "auto" and proof["passed"] is False and job.dtype != torch.float32:
            print(f"note      {job.dtype_name} would lose part of the fine-tune: once more in float32")
            settle_dtype(job, "float32")
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if trained_in not in (None, job.dtype_name):
        print(f"note      trained in {trained_in}, stored as {job.dtype_name}")
    if proof["passed"] is False:
        raise InputError(failure(job, proof))
    print(f"result    {output}: {'verified' if report['verified'] else 'not verified'}, {job.dtype_name}", flush=True)
    return report


def failure(job, proof):
    """Return in one sentence why the proof failed, and what to do."""
    found = proof["outputs"] or proof["weights"] | {"retained": proof["weights"]["retained"][0]}
    figures = f"{found['retained']:.1%} of it is kept, with noise of {found['residual']:.1%}"
    if job.dtype == torch.float32:
        return (f"{job.args.output_path} is not base + adapter ({figures}): do not use it. Is the base the one that "
                "the adapter was trained on?")
    return (f"{job.args.output_path} has lost part of the fine-tune to {job.dtype_name}: {figures}. Merge with "
            "--training_precision float32.")


if __name__ == "__main__":
    try:
        main()
    except InputError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(1)

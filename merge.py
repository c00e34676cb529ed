"""Merge a LoRA adapter into its base, in the memory of a few rows; prove that nothing was lost.

    python merge.py --lora_adapter_path runs/mine/final --output_path merged
    python merge.py --lora_adapter_path runs/mine/final --output_path merged --base_model_path BASE
    python merge.py --lora_adapter_path runs/mine/final --output_path merged --verify weights
    python merge.py --lora_adapter_path runs/mine/final --output_path merged --output_dtype float32

output_path: weights, config, tokenizer, chat template, stop tokens, sentence-transformers files, a
model card and merge_report.json. Stands alone: torch, numpy, tqdm, safetensors; psutil,
transformers and peft to compare outputs.
Shapes: W (out, in), A (r, in), B (out, r). D is what the adapter changes in W, E what the written
file changes in it.
"""

# ruff: noqa: E402  a wrong flag is answered before torch is imported, which takes seconds
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
from dataclasses import asdict, dataclass, field, replace
from errno import EFBIG, ENOSPC
from functools import partial
from pathlib import Path

# ---------------------------------------------------------------- arguments

CHOICES = ("auto", "float32", "bfloat16", "float16")  # of --training_precision


def parse_args(argv=None):
    """Parse the command line; exits 2 with one sentence on what is wrong."""
    parser = argparse.ArgumentParser(
        "merge.py",
        usage="%(prog)s --lora_adapter_path DIR --output_path DIR [flags]",
        description=__doc__.partition("\nShapes: ")[0],  # what follows is for readers of the code
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--lora_adapter_path", required=True, metavar="DIR",
      help="adapter folder, or the .safetensors file in it")
    add("--output_path", required=True, metavar="DIR", help="where the merged model goes")
    add("--base_model_path", metavar="ID",
      help="local folder or hub id [what adapter_config.json names]")
    add("--training_precision", "--output_dtype", default="auto", type=str.lower, choices=CHOICES,
      help="of the merged weights [auto: the base's where the fine-tune survives it, else float32]")
    add("--qlora_base", default="original", type=str.lower, choices=["original", "dequant"],
      help="after QLoRA, merge into the 16-bit base, or into what 4 bits left of it [original]")
    add("--verify", type=str.lower, choices=["off", "weights", "full"],
      help="[full where memory allows, else weights]")
    add("--overwrite", action="store_true", help="replace an earlier merge at --output_path")
    add("--device", default="cpu", metavar="NAME", help="where outputs are computed [cpu]")
    add("--trust_remote_code", action="store_true",
      help="run the Python code that comes with the base model")
    # fmt: on
    args = parser.parse_args(argv)
    if args.device != "cpu":
        check_device(parser, args.device)
    return args


def check_device(parser, device):
    """Exit 2 where torch has no such device."""
    import torch  # here: it takes seconds, and a CPU is always there

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device}: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    parse_args()

import torch
from tqdm import tqdm

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # names an optional CPU kernel
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
warnings.filterwarnings("ignore", message=".*_pattern keys did not match")  # peft's own, of experts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# as safetensors names them
CODES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: code for code, dtype in CODES.items()}
PRECISIONS = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as the trainers record it
BLOCK_VALUES = 2**20  # of a tensor in memory at once, per worker: 4 MiB in float32
WORKERS = min(4, os.cpu_count() or 1)  # tensors that are merged at the same time
# what a merge may keep of the fine-tune, and add to it as noise, at the outputs
RETAINED = (0.98, 1.02)
RESIDUAL = 0.05
WEIGHTS_RESIDUAL = 0.017  # noise over all tensors, without outputs (benchmarks/rounding.py)
ROUNDING_ERROR = {  # of a tensor's outputs, which its dtype explains
    torch.float64: 1e-6,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
# kinds of LoRA that do more than add to stored tensors
UNMERGEABLE = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")
OWN_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # of the task, which base files seldom hold
HEAD = "lm_head.weight"
EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$"
)
HEADED = re.compile(r"(LMHeadModel|ForCausalLM|ForConditionalGeneration)$")
# model types whose head that is tied to the embedding is no lm_head.weight
OTHER_HEADS = frozenset(
    "bert bert-generation big_bird biogpt camembert electra ernie git gpt_neox_japanese"
    " megatron-bert modernbert-decoder roberta roberta-prelayernorm roc_bert roformer rwkv trocr"
    " whisper xlm xlm-roberta xlm-roberta-xl xlnet xmod".split()
)
# modules around the whole model, which a base that was saved without its head does not name
WRAPPERS = frozenset(
    "transformer bert roberta deberta distilbert electra gpt_neox backbone".split()
)
RENAMED = {"block_sparse_moe": "mlp"}  # files of Mixtral against its modules
# how files store, for each expert, what memory holds as one parameter of all experts
EXPERT_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
IN_OUT_EXPERTS = ("gpt_oss", "aria_text", "qwen3_vl_moe_text")  # one tensor of all, (E, in, out)
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # store W as (in, out)
PROBE_TEXTS = (
    "What is the capital of Japan?",
    "人名をJSONで抜き出してください。山田太郎は大阪で働く。",
    "def f(x):\n    return x + 1",
)


class InputError(Exception):
    """A flag, file or folder of the user's is wrong: shown as one sentence, exit code 1."""


class DoesNotFit(InputError):
    """Adapter and base do not belong together: the sentence still lacks what to do."""


class TooLarge(InputError):
    """A merged value does not fit into the dtype that is written."""


@contextmanager
def in_one_sentence(what):
    """Turn what transformers, peft and bitsandbytes raise on models into an InputError."""
    kinds = (OSError, ValueError, LookupError, TypeError, ImportError, AttributeError, RuntimeError)
    try:
        yield
    except kinds as error:
        why = str(error).strip() or type(error).__name__  # some come without a word
        raise InputError(f"{what} ({why.splitlines()[0]}).") from None


# ---------------------------------------------------------------- files


def read_json(path, kind=dict):
    """Return the parsed file, or None where there is none; raises InputError if it is no `kind`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Fetch it again.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {error}. Fetch it again.") from None
    if not isinstance(content, kind):
        found = type(content).__name__
        raise InputError(f"{path} holds a {found}, not a {kind.__name__}. Fetch it again.")
    return content


def write_json(path, content):
    """Write JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


@dataclass
class Tensor:
    """Where a tensor lies. It is read as a matrix, by rows."""

    file: Path
    code: str  # dtype, as safetensors names it
    shape: tuple
    start: int  # first byte in the file
    end: int  # one behind the last
    dequantised: torch.Tensor = None  # what 4- or 8-bit training saw in its place
    stored_rows: int = None  # of the file, where the adapter brings more or fewer

    @property
    def dtype(self):
        """The torch dtype of a floating-point tensor, else None."""
        return CODES.get(self.code)

    @property
    def size(self):
        """(rows, columns); a vector has one column."""
        rows = self.shape[0] if self.shape else 1
        return rows, math.prod(self.shape[1:])

    @property
    def stored_bytes(self):
        """The bytes that it takes in its file."""
        return self.end - self.start

    def blocks(self):
        """Yield the row ranges [first, last) that are in memory at once."""
        rows, columns = self.size
        step = max(1, BLOCK_VALUES // max(1, columns))
        for first in range(0, rows, step):
            yield first, min(rows, first + step)

    def raw(self, first, last):
        """Return the bytes of rows [first, last), uint8."""
        width = self.stored_bytes // max(1, self.stored_rows or self.size[0])
        data = torch.empty((last - first) * width, dtype=torch.uint8)
        with open(self.file, "rb", buffering=0) as file:  # straight into the tensor's memory
            file.seek(self.start + first * width)
            file.readinto(data.numpy())
        return data

    def read(self, first, last):
        """Return rows [first, last) in float32; those that the file does not have are zero."""
        if self.dequantised is not None:
            return self.dequantised[first:last]
        known = last
        if self.stored_rows is not None:
            known = max(first, min(last, self.stored_rows))
        columns = self.size[1]
        rows = self.raw(first, known).view(self.dtype).reshape(known - first, columns).float()
        if known == last:
            return rows
        return torch.cat([rows, torch.zeros(last - known, columns)])


def equal(one, other):
    """Tell whether two stored tensors are the same, byte by byte."""
    if (one.code, one.shape) != (other.code, other.shape):
        return False
    return all(torch.equal(one.raw(*at), other.raw(*at)) for at in one.blocks())


def read_header(path):
    """Return {name: Tensor} of a safetensors file, in its order.

    The file is 8 bytes of length, a JSON header, raw bytes.
    """
    size = path.stat().st_size
    found = {}
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size > 8 else size
        try:
            header = json.loads(file.read(min(length, size)))
            for name, entry in header.items():
                if name != "__metadata__":
                    found[name] = tensor_at(path, entry, 8 + length)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"{path} is cut off or no safetensors file ({size} bytes). Fetch it again."
            ) from None
    if max((tensor.end for tensor in found.values()), default=0) > size:
        raise InputError(f"{path} is cut off ({size} bytes). Fetch it again.")
    return dict(sorted(found.items(), key=lambda item: item[1].start))


def tensor_at(path, entry, begin):
    """Return the Tensor of a header's entry; `begin` is the byte at which the data starts."""
    start, end = entry["data_offsets"]
    return Tensor(path, entry["dtype"], tuple(entry["shape"]), begin + start, begin + end)


# ---------------------------------------------------------------- the base


def core_of(name):
    """Return the parts of a tensor's name without those that only nest a model."""
    parts = [RENAMED.get(part, part) for part in name.split(".")]
    return tuple(part for part in parts if part not in ("model", "language_model"))


class Names:
    """The names of a base's tensors, looked up by those that an adapter has for them.

    Models nest differently alone and under a head, and change it between versions: names match when
    one ends with the other, the parts "model" and "language_model" left out.
    """

    def __init__(self, names):
        self.names = set(names)
        self.cores = {}  # core: name
        self.endings = defaultdict(list)  # end of a core: names
        for name in names:
            parts = core_of(name)
            self.cores[parts] = name
            for i in range(len(parts)):
                self.endings[parts[i:]].append(name)

    def find(self, path, ending):
        """Return the name of a module's tensor, or None; raises InputError where it may be two.

        ending: "weight" or "bias"; None where the path itself names a parameter.
        """
        name = f"{path}.{ending}" if ending else path
        if name in self.names:
            return name
        parts = core_of(name)
        if parts in self.cores:
            return self.cores[parts]
        found = self.endings.get(parts, [])
        if len(found) > 1:
            raise InputError(f"{path} of the adapter may be {' or '.join(found[:3])} of the base.")
        if found:
            return found[0]
        if parts and parts[0] in WRAPPERS:  # the base was saved without its head
            return self.cores.get(parts[1:])
        return None


@dataclass
class Base:
    """A model folder: its config.json, and where its tensors lie over all shards."""

    folder: Path
    config: dict
    tensors: dict  # {name: Tensor}

    def __post_init__(self):
        self.find = Names(self.tensors).find  # base.find(module path, "weight")

    @property
    def model_type(self):
        """The kind of model, as transformers names it."""
        return self.config.get("model_type")

    @property
    def is_headed(self):
        """Tell whether it was saved with its language-modelling head."""
        return any(HEADED.search(name) for name in self.config.get("architectures") or [])


def find_base(name, revision, cached_only=False):
    """Return the folder of the base; a hub id is downloaded, with `cached_only` only looked for."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "model*.safetensors", "*/model*.safetensors", "*.py", "*.jinja", "*.model"]
    wanted += ["*.tiktoken", "*.txt", "LICENSE*", "README.md"]  # the last names the license
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=wanted, local_files_only=cached_only
        )
    except Exception as error:  # no such id, no network, no permission
        why = str(error).strip().split("\n")[0]
        raise InputError(
            f"base model {name!r} is no folder here and cannot be downloaded ({why}). Check "
            "the name, and the network or proxy (HTTPS_PROXY), or pass its folder as "
            "--base_model_path."
        ) from None
    return Path(folder)


def weights_files(folder):
    """Return the names of the safetensors files that transformers would load, in order.

    There may be others beside them.
    """
    index = read_json(folder / "model.safetensors.index.json") or {}
    weight_map = index.get("weight_map")
    # transformers takes the one file before an index, which may be of an older save
    if (folder / "model.safetensors").is_file() or not isinstance(weight_map, dict):
        return ["model.safetensors"]
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if not stays_inside(file)]
    if outside:
        raise InputError(
            f"{folder}/model.safetensors.index.json names {outside[0]}, which is not in this "
            "folder. Fetch it again."
        )
    return files


def stays_inside(path):
    """Tell whether a relative path of a downloaded file leads to something in its own folder."""
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def read_base(folder):
    """Return the Base in a folder; raises InputError for what is no whole 16- or 32-bit model."""
    config = read_json(folder / "config.json")
    if config is None:
        raise InputError(
            f"{folder} has no config.json, so it is no model. Pass the base model as "
            "--base_model_path."
        )
    if "quantization_config" in config:
        raise InputError(
            f"{folder} is quantised: merging into rounded weights erases the fine-tune. Pass the "
            "16- or 32-bit model that it was made from as --base_model_path, and quantise after "
            "the merge."
        )
    files = weights_files(folder)
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise InputError(
            f"{folder} lacks {', '.join(missing)}. Fetch it again; a pytorch_model.bin must be "
            "saved as safetensors first."
        )
    tensors = {}
    for file in files:
        tensors |= read_header(folder / file)
    return Base(folder, config, tensors)


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


# ---------------------------------------------------------------- the adapter


@dataclass
class Adapter:
    """An adapter folder: its configs and its tensors, under the names of the modules alone."""

    folder: Path
    config: dict  # adapter_config.json
    tensors: dict  # {plain name: tensor}
    trained: dict  # training_config.json, {} where another trainer wrote it

    @property
    def task(self):
        """What it was trained for ("CAUSAL_LM", "FEATURE_EXTRACTION"), or None."""
        return self.config.get("task_type")


def read_adapter(path):
    """Return the Adapter at a path; raises InputError for what cannot be merged by adding."""
    from safetensors.torch import load_file

    path = Path(path)
    folder = path
    file = path / "adapter_model.safetensors"
    if path.suffix == ".safetensors" and not path.is_dir():
        folder = path.parent
        file = path
    config = read_json(folder / "adapter_config.json")
    if config is None:
        raise InputError(
            f"{folder} has no adapter_config.json, so it is no LoRA adapter. Point "
            "--lora_adapter_path at the folder a trainer wrote; a fully fine-tuned model needs no "
            "merge."
        )
    wrong = unmergeable(config)
    if wrong:
        raise InputError(f"{folder} cannot be merged: {wrong}.")
    if not file.is_file():
        raise InputError(
            f"{file} does not exist. Point --lora_adapter_path at the folder a trainer wrote."
        )
    read_header(file)  # says what is wrong with a broken file, which load_file() does not
    tensors = with_plain_names(file, load_file(file))
    return Adapter(folder, config, tensors, read_json(folder / "training_config.json") or {})


def with_plain_names(file, tensors):
    """Return an adapter's tensors under their plain names; raises InputError for broken ones."""
    broken = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise InputError(
            f"{file}: {len(broken)} tensors are not finite (first: {broken[0]}). The training "
            "diverged: take an earlier checkpoint, or train again with a lower --lr."
        )
    plainly = {plain(name): tensor for name, tensor in tensors.items()}
    if len(plainly) != len(tensors) or not tensors:
        raise InputError(
            f"{file} holds {len(tensors)} tensors of {len(plainly)} names. Copy the adapter again."
        )
    return plainly


def plain(name):
    """Return an adapter tensor's name without what wraps the model."""
    name = re.sub(r"^(model\.)?base_model\.model\.", "", name)  # "model." is how EmbedRAG saved
    return name.replace(".modules_to_save.default", "").replace(".default", "")


KINDS = {  # what a tensor of an adapter is, by the end of its name
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_B.bias": "added",
    "token_adapter.trainable_tokens_delta": "rows",
    "token_adapter.base_layer.weight": "base_layer",
    "base_layer.weight": "base_layer",
    "base_layer.bias": "bias",
    "weight": "weight",
    "bias": "bias",
}
OF_BIAS = ("bias", "added")  # those kinds that are not for the module's weight


def split(name):
    """Return (module path, kind) of a plain name; the kind is None for a parameter of its own."""
    for ending in sorted(KINDS, key=len, reverse=True):  # many end in "weight"
        if name.endswith(f".{ending}"):
            return name.removesuffix(f".{ending}"), KINDS[ending]
    return name, None


def by_module(tensors):
    """Return {module path: {kind: tensor}} of an adapter's {plain name: tensor}."""
    modules = defaultdict(dict)
    for name, tensor in tensors.items():
        path, kind = split(name)
        modules[path][kind] = tensor
    return dict(modules)


def unmergeable(config, tensors=None, base_folder=None):
    """Return in words what keeps an adapter with this config from being merged, or None.

    config: its adapter_config, a dict. Given its tensors {name: tensor} and the base's folder,
    whether they fit the base's files is found out as well.
    """
    for check in (another_kind, odd_alpha, odd_targets, changed_base):
        wrong = check(config)
        if wrong:
            return wrong
    if tensors is None:
        return None
    plainly = {plain(name): tensor for name, tensor in tensors.items()}
    try:
        make_changes(config, plainly, read_base(base_folder))
    except InputError as error:
        return str(error).removesuffix(".")
    return None


def another_kind(config):
    """Return in words that an adapter is no plain LoRA, or None."""
    kinds = [name for name in UNMERGEABLE if config.get(name)]
    if config.get("peft_type") == "LORA" and not kinds:
        return None
    kind = kinds[0] if kinds else f"peft_type {config.get('peft_type')}"
    return (
        f"an adapter with {kind} does not map onto the base's stored tensors (peft's "
        "merge_and_unload may do it)"
    )


def odd_alpha(config):
    """Return in words which alpha scales nothing, or None."""
    alphas = {"lora_alpha": config.get("lora_alpha")}
    patterns = config.get("alpha_pattern") or {}
    alphas |= patterns if isinstance(patterns, dict) else {"alpha_pattern": None}
    for name, alpha in alphas.items():
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            return f"adapter_config.json has no number for {name} (fetch it again)"
    for name, alpha in alphas.items():
        if alpha == 0:
            return (
                f"adapter_config.json has 0 for {name}, at which it changes nothing (fetch it "
                "again)"
            )
    return None


def odd_targets(config):
    """Return in words that target_parameters names nothing, or None."""
    targets = config.get("target_parameters") or []
    # a set where the config was not saved yet
    if isinstance(targets, list | tuple | set) and all(isinstance(each, str) for each in targets):
        return None
    return "target_parameters in adapter_config.json is no list of names (fetch it again)"


def changed_base(config):
    """Return in words that the adapter's beginning was taken out of the base (PiSSA), or None."""
    start = config.get("init_lora_weights", True)
    known = ("gaussian", "orthogonal", "eva", "true", "false")
    if not isinstance(start, str) or start.lower() in known:
        return None
    return (
        f"it began with init_lora_weights {start}, which changes the base itself (save it with "
        "peft's path_initial_model_for_weight_conversion first)"
    )


def scale_of(path, rank, config):
    """Return the factor of B @ A: alpha/r, with rsLoRA alpha/sqrt(r)."""
    alpha = config["lora_alpha"]
    try:
        for pattern, own in (config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):  # as peft does: the first that matches
                alpha = own
                break
    except re.error as error:
        raise InputError(
            f"adapter_config.json: an alpha_pattern is no regular expression ({error})."
        ) from None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


# ---------------------------------------------------------------- what it changes


@dataclass
class Change:
    """What an adapter does to one tensor of the base, in float32.

    LoRA adds scale * B @ A; `transposed` tensors are stored as (in, out), as Conv1D and embeddings
    are. DoRA then gives output i the length magnitude[i] (Liu et al. 2024, eq. 5).
    """

    lora_a: torch.Tensor = None  # (r, in)
    lora_b: torch.Tensor = None  # (out, r)
    scale: float = 1.0
    transposed: bool = False
    magnitude: torch.Tensor = None  # (out)
    rows: dict = field(default_factory=dict)  # {index: new row}
    replacement: torch.Tensor = None  # a whole new tensor
    added: torch.Tensor = None  # a vector to add (lora_bias)
    experts: list = ()  # of a stack (E, ., .) that holds all experts: a Change for each
    lengths: torch.Tensor = None  # of a transposed DoRA tensor's outputs, which span all its blocks

    def prepare(self, tensor):
        """Compute, and keep, what rows need and a block of them does not show."""
        if self.magnitude is None or not self.transposed or self.lengths is not None:
            return
        squares = 0
        for at in tensor.blocks():
            squares = squares + self.with_lora(tensor.read(*at), *at).square().sum(0)
        self.lengths = squares.sqrt()

    def with_lora(self, block, first, last):
        """Return rows [first, last) of W, or of what the adapter has for it, + scale * B @ A."""
        if self.replacement is not None:
            block = self.replacement[first:last].reshape(block.shape).float()
        inside = [index for index in self.rows if first <= index < last]
        if inside:
            block = block.clone()
            new_rows = torch.stack([self.rows[index] for index in inside])
            block[[index - first for index in inside]] = new_rows.float()
        if self.lora_a is None:
            return block
        if self.transposed:  # (B @ A).T = A.T @ B.T
            return torch.addmm(block, self.lora_a[:, first:last].T, self.lora_b.T, alpha=self.scale)
        return torch.addmm(block, self.lora_b[first:last], self.lora_a, alpha=self.scale)

    def apply(self, block, first, last):
        """Return the merged rows [first, last) of the tensor whose rows are `block`."""
        merged = self.with_lora(block, first, last)
        if self.magnitude is not None and self.transposed:
            merged = merged * (self.magnitude / self.lengths)
        elif self.magnitude is not None:
            merged = merged * (self.magnitude[first:last] / merged.norm(dim=1))[:, None]
        if self.added is not None:
            merged = merged + self.added[first:last, None]
        return merged

    def basis(self):
        """Return an orthonormal basis (in, r) of what A reads, or None.

        Only where nothing but LoRA on (out, in) changes the tensor, D lies in it: D = D Q Q^T.
        """
        more = self.transposed or self.magnitude is not None or self.replacement is not None
        if self.lora_a is None or more or self.rows:
            return None
        return torch.linalg.qr(self.lora_a.T).Q


def pieces(name, tensor, change):
    """Yield (name, Tensor, Change) of what is merged by itself: the tensor, or its experts."""
    if not change.experts:
        yield name, tensor, change
        return
    size = tensor.stored_bytes // len(change.experts)
    for index, each in enumerate(change.experts):
        start = tensor.start + index * size
        expert = Tensor(tensor.file, tensor.code, tensor.shape[1:], start, start + size)
        yield f"{name}[{index}]", expert, each


# ---------------------------------------------------------------- fitting it to the base


@dataclass
class Module:
    """An adapter's tensors {kind: tensor} for one module, and the base's tensors that they fit."""

    path: str
    of_weight: dict
    of_bias: dict
    weight: str | None  # the tensor that of_weight changes
    source: str | None  # and the one that holds what it is now: for a tied head the embedding
    bias: str | None

    def fits(self, changes):
        """Tell whether the base has all that it is for, and nothing in `changes` took it before."""
        weight_fits = self.weight is not None and self.weight not in changes
        if self.of_weight and not weight_fits:
            return False
        return not self.of_bias or self.bias is not None

    def __str__(self):
        kinds = [str(kind) for kind in [*self.of_weight, *self.of_bias]]
        return f"{self.path} ({', '.join(kinds)})"


@dataclass
class Fit:
    """How an adapter fits its base."""

    changes: dict  # {base tensor name: Change}
    base: Base  # with the rows that the adapter brings (a resized vocabulary)
    untied: str | None  # the embedding, where the head that is tied to it gets a tensor of its own


def make_changes(config, tensors, base):
    """Return the Fit of an adapter's config and {plain name: tensor} on a Base.

    Every adapter tensor is used exactly once; raises DoesNotFit with the list of those that fit
    nothing.
    """
    modules = by_module(tensors)
    check_dora(modules, config)
    sources = dict(base.tensors)
    changes = {}
    unused = []
    tie = find_tie(base)
    # experts first: their modules have no weight of their own, and would fit nothing
    for path, of_experts in find_expert_changes(modules, config, base).items():
        changes |= of_experts
        del modules[path]
    for path, parts in modules.items():
        module = find_module(path, parts, base, tie)
        if not module.fits(changes):
            unused.append(str(module))
            continue
        if module.of_weight:
            source = with_rows_of(module.of_weight, sources[module.source])
            sources[module.source] = source
            changes[module.weight] = make_change(path, module.of_weight, config, source, base)
        if module.of_bias:
            shape = sources[module.bias].shape
            of_weight = changes.get(module.weight)
            changes[module.bias] = make_bias_change(path, module.of_bias, shape, of_weight)
    if unused:
        more = "; ..." if len(unused) > 8 else ""
        raise DoesNotFit(
            f"{len(unused)} of {len(modules)} modules of the adapter fit nothing in the base: "
            f"{'; '.join(unused[:8])}{more}."
        )
    head_is_trained = any(is_head(path) for path in modules)
    return fit_head(changes, replace(base, tensors=sources), tie, config, head_is_trained)


def check_dora(modules, config):
    """Raise InputError where config and tensors do not agree on DoRA."""
    for path, parts in modules.items():
        is_lora = {"a", "b"} <= parts.keys()
        is_dora = "magnitude" in parts
        of_experts = without_nesting(path).endswith("experts")  # peft has no DoRA for those
        if is_lora and not of_experts and is_dora != bool(config.get("use_dora")):
            found = "a" if is_dora else "no"
            raise InputError(
                f"{path} of the adapter has {found} DoRA magnitude, but adapter_config.json says "
                f"use_dora {config.get('use_dora')}. Copy the adapter again."
            )


def find_module(path, parts, base, tie):
    """Return the Module of an adapter's {kind: tensor}."""
    of_weight = {kind: tensor for kind, tensor in parts.items() if kind not in OF_BIAS}
    of_bias = {kind: parts[kind] for kind in OF_BIAS if kind in parts}
    weight = source = base.find(path, None if None in parts else "weight")
    bias = base.find(path, "bias")
    if tie.holds and is_head(path):  # training parted the two, and changed the head alone
        weight = HEAD
        source = tie.embedding
    if "added" in of_bias and weight and bias is None:
        raise InputError(
            f"{path} has no bias in the base, to which the adapter's could be added. Train without "
            "lora_bias."
        )
    return Module(path, of_weight, of_bias, weight, source, bias)


def is_head(path):
    """Tell whether a module of the adapter is the language-modelling head."""
    return path.split(".")[-1] == "lm_head"


def with_rows_of(parts, source):
    """Return the base's tensor with as many rows as the adapter's whole one has.

    They differ where a vocabulary was resized.
    """
    whole = None
    # trained whole (modules_to_save), kept beside its LoRA, or a parameter of its own
    for kind in ("weight", "base_layer", None):
        if kind in parts:
            whole = parts[kind]
            break
    if whole is None or len(source.shape) != 2 or tuple(whole.shape[1:]) != source.shape[1:]:
        return source
    if len(whole) == source.shape[0]:
        return source
    stored_rows = source.stored_rows or source.shape[0]
    return replace(source, shape=tuple(whole.shape), stored_rows=stored_rows)


def make_change(path, parts, config, source, base):
    """Return the Change that an adapter's {kind: tensor} make to `source`, a module's weight."""
    change = Change()
    for side_a, side_b in (("a", "b"), ("embedding_a", "embedding_b")):
        found = [parts[side] for side in (side_a, side_b) if side in parts]
        if found:
            is_embedding = side_a == "embedding_a"
            change = make_lora_change(path, found, is_embedding, config, source, base)
    if "magnitude" in parts:
        change.magnitude = parts["magnitude"].float().flatten()
    if "base_layer" in parts:  # it differs from the base's where tokens were added
        change.replacement = fitting(path, parts["base_layer"], source.shape)
    if "rows" in parts:
        change.rows = numbered_rows(path, parts["rows"], config, source)
    if "weight" in parts or None in parts:
        whole = parts.get("weight", parts.get(None))
        change.replacement = fitting(path, whole, source.shape)
    return change


def make_lora_change(path, found, is_embedding, config, source, base):
    """Return the Change of LoRA's `found`, which should be A and B; raises if they fit nothing."""
    whole = len(found) == 2 and all(side.dim() > 1 and side.numel() for side in found)
    sides = [side.float().flatten(1) for side in found] if whole else []
    if not whole or len(sides[0]) != sides[1].shape[1]:
        raise InputError(
            f"{path}: the adapter's A and B do not belong together. Copy the adapter again."
        )
    a, b = sides
    scale = scale_of(path, len(a), config)
    straight = (len(b), a.shape[1])
    turned = (a.shape[1], len(b))
    # a square W does not show how it is stored
    stores_in_out = base.model_type in CONV1D_MODELS or bool(config.get("fan_in_fan_out"))
    in_out = source.size == turned and (straight != turned or stores_in_out)
    transposed = is_embedding or in_out
    check_shape(path, turned if transposed else straight, source.size)
    return Change(lora_a=a, lora_b=b, scale=scale, transposed=transposed)


def numbered_rows(path, rows, config, source):
    """Return {token id: its new row} of trained tokens; raises InputError where they do not fit."""
    indices = config.get("trainable_token_indices") or []
    if isinstance(indices, dict):  # {embedding: indices}
        of_module = [ids for name, ids in indices.items() if path.endswith(name)]
        indices = of_module[0] if of_module else []
    known = source.shape[0]
    if len(indices) != len(rows) or max(indices) >= known:
        raise InputError(
            f"{path}: {len(rows)} trained token rows do not fit trainable_token_indices in "
            f"adapter_config.json ({len(indices)} of them) and a base of {known} rows."
        )
    return dict(zip(indices, rows, strict=True))


def make_bias_change(path, parts, shape, of_weight):
    """Return the Change of a bias of this shape: replaced, or added to as the weight's B @ A is."""
    for tensor in parts.values():
        fitting(path, tensor, shape)
    change = Change(replacement=parts.get("bias"))
    if "added" in parts:
        if of_weight is None:
            raise InputError(f"{path}: a lora_B.bias without its lora_B. Copy the adapter again.")
        change.added = parts["added"].float() * of_weight.scale
    return change


def check_shape(path, found, wanted):
    """Raise DoesNotFit unless what an adapter has for a tensor has the base's shape."""
    if tuple(found) == tuple(wanted):
        return
    vocabulary = " (a resized vocabulary?)" if tuple(found[1:]) == tuple(wanted[1:]) else ""
    raise DoesNotFit(
        f"{path}: the adapter is for {tuple(found)}, the base has {tuple(wanted)}{vocabulary}."
    )


def fitting(path, tensor, shape):
    """Return a tensor of the adapter if it has the base's shape; raises DoesNotFit otherwise."""
    check_shape(path, tensor.shape, shape)
    return tensor


# ---------------------------------------------------------------- a head that is tied


@dataclass(frozen=True)
class Tie:
    """Whether embedding and head are one tensor."""

    embedding: str | None  # its name
    declared: bool  # in the config
    holds: bool  # in the files, too: transformers ties the two only where they agree


def find_tie(base):
    """Return the Tie of a base."""
    embedding = next((name for name in base.tensors if EMBEDDING.search(name)), None)
    nested = base.config.get("text_config") or {}
    by_default = nested.get("tie_word_embeddings", HEAD not in base.tensors)
    declared = base.config.get("tie_word_embeddings", by_default)
    holds = bool(declared and embedding)
    if holds and HEAD in base.tensors:
        holds = equal(base.tensors[embedding], base.tensors[HEAD])
    return Tie(embedding, declared, holds)


def fit_head(changes, base, tie, config, head_is_trained):
    """Return the Fit of these changes, those of a tied head included.

    Where embedding and head are one tensor, a change to one side may part them, or be the other's
    as well. Raises InputError where it would be that of further copies, or of other rows.
    """
    task = config.get("task_type")
    head, parted = part_head(changes, base, tie, task, head_is_trained)
    if head:
        changes = changes | {HEAD: head}
    untied = tie.embedding if parted else None
    if tie.declared and (untied or tie.embedding in changes):
        refuse_tied_copies(changes.get(tie.embedding), tie.embedding, task, base)
    check_vocabulary(base.tensors, tie.embedding, untied)
    return Fit(changes, base, untied)


def part_head(changes, base, tie, task, head_is_trained):
    """Return (Change of the head or None, whether it needs a tensor of its own).

    | what was trained            | the head that was tied to it becomes                |
    |-----------------------------|-----------------------------------------------------|
    | the head                    | the base's embedding with its change                |
    | token rows of the embedding | those rows too, as peft ties them; else stays tied  |
    | the embedding               | what it was tied to, which the adapter may hold     |
    """
    of_embedding = changes.get(tie.embedding)
    of_head = changes.get(HEAD)
    has_head = task == "CAUSAL_LM" or (task != "FEATURE_EXTRACTION" and base.is_headed)
    if of_embedding and of_embedding.rows:
        if tie.declared and (of_head or HEAD in base.tensors):
            return replace(of_head or Change(), rows=of_embedding.rows), tie.holds
    elif of_embedding and tie.holds and has_head:
        # LoRA on an embedding that the adapter brings whole: the head is the whole without LoRA
        brings_whole = of_embedding.lora_a is not None and of_embedding.replacement is not None
        if brings_whole and not of_head:
            of_head = Change(replacement=of_embedding.replacement)
        return of_head, True
    return of_head, head_is_trained and tie.holds


def refuse_tied_copies(change, embedding, task, base):
    """Raise InputError where more than lm_head is tied to an embedding that is changed or parted.

    Training left those copies as they were, and no file holds them: read from a merged one they
    would change as well.
    """
    if change and change.rows:
        return  # peft ties trained rows
    kind = (base.config.get("architectures") or [""])[0]
    other_head = kind.endswith(("ForMaskedLM", "ForPreTraining")) or (
        HEADED.search(kind) and base.model_type in OTHER_HEADS
    )
    if base.config.get("is_encoder_decoder") or embedding.endswith("shared.weight"):
        copies = "embeddings of encoder and decoder"
    elif not other_head:
        return
    elif task == "FEATURE_EXTRACTION":  # trained, compared and served without the head
        print(
            f"note      the head of {kind} is tied to {embedding} and changes with it: use the "
            "merged folder for embeddings alone"
        )
        return
    else:
        copies = f"head of {kind}"
    raise InputError(
        f"the adapter changes {embedding}, to which the base ties the {copies}: training left "
        "those as they were, and no file of the base holds them. Train without embedding and head, "
        "or save the base untied first."
    )


def check_vocabulary(tensors, embedding, untied):
    """Raise DoesNotFit where only one of embedding, head and the head's bias was resized."""
    ends = [embedding] if untied else [embedding, HEAD, "lm_head.bias"]
    sizes = {name: tensors[name].shape[0] for name in ends if name in tensors}
    for name, tensor in tensors.items():
        if tensor.stored_rows and set(sizes.values()) != {sizes.get(name)}:
            raise DoesNotFit(
                f"{name}: the adapter is for {tensor.shape}, the base has {tensor.stored_rows} "
                f"rows. A vocabulary is resized as a whole, and here it is {sizes}."
            )


# ---------------------------------------------------------------- experts


def find_expert_changes(modules, config, base):
    """Return {path: {base tensor name: Change}} of the modules that are for target_parameters.

    peft holds one pair for all E experts of a parameter: A (E r, in), expert after expert, and
    B (out, r E), the experts of a rank side by side. The pairs of two parameters of one module are
    nested (experts.base_layer.lora_A); their shapes tell which is whose.
    """
    targets = sorted({name.rpartition(".")[2] for name in config.get("target_parameters") or []})
    found = {}
    taken = set()  # tensors of the base
    for path, parts in modules.items():
        if not targets or set(parts) != {"a", "b"} or base.find(path, "weight"):
            continue
        a = parts["a"].float()
        b = parts["b"].float()
        if a.dim() != 2 or b.dim() != 2 or not a.numel():
            continue  # make_change() says what is wrong
        fits = {}
        for target in targets:
            changes = expert_changes(f"{without_nesting(path)}.{target}", a, b, config, base)
            if changes and taken.isdisjoint(changes):
                fits[target] = changes
        if len(fits) > 1:
            raise InputError(f"{path} of the adapter may be for {' or '.join(fits)} of the base.")
        for changes in fits.values():
            found[path] = changes
            taken |= changes.keys()
    return found


def without_nesting(path):
    """Return the path of the module whose parameter an adapter of target_parameters is for."""
    return re.sub(r"(\.base_layer)+$", "", path)


def expert_changes(parameter, a, b, config, base):
    """Return {base tensor name: Change} of A and B for a parameter of all experts.

    None if there is no such parameter, or one of other shapes.
    """
    experts = find_experts(parameter, base)
    if not experts:
        return None
    first = base.tensors[experts[0][0]]
    stacked = len(first.shape) == 3
    count = first.shape[0] if stacked else len(experts)  # E
    scale = scale_of(parameter, max(1, len(a) // count), config)
    if len(a) % count or len(a) != b.shape[1]:
        return None
    a = a.reshape(count, -1, a.shape[1])  # (E, r, in)
    b = b.reshape(len(b), -1, count).permute(2, 0, 1)  # (E, out, r)
    if not stacked:
        return single_changes(experts, a, b, scale, base)
    change = stack_change(first, a, b, scale, base)
    return {experts[0][0]: change} if change else None


def find_experts(parameter, base):
    """Return for each expert the names of the tensors that store its share of a parameter.

    Where one tensor holds all experts, [[its name]]; [] where there are none.
    """
    whole = base.find(parameter, None)
    if whole:
        return [[whole]]
    module, _, target = parameter.rpartition(".")
    for parts in EXPERT_PARTS.get(target, ()):
        experts = []
        while True:
            expert = f"{module}.{len(experts)}"
            names = [base.find(f"{expert}.{part}", "weight") for part in parts]
            if not all(names):
                break
            experts.append(names)
        if experts:
            return experts
    return []


def stack_change(stack, a, b, scale, base):
    """Return the Change of a tensor (E, ., .) by A (E, r, in) and B (E, out, r), None if unlike."""
    stored = tuple(stack.shape[1:])
    straight = (b.shape[1], a.shape[2])
    turned = straight[::-1]
    if stored not in (straight, turned):
        return None
    # square ones do not show how they are stored
    model_type = (base.config.get("text_config") or base.config).get("model_type")
    in_out = stored == turned and (straight != turned or model_type in IN_OUT_EXPERTS)
    each = []
    for own_a, own_b in zip(a, b, strict=True):
        each.append(Change(lora_a=own_a, lora_b=own_b, scale=scale, transposed=in_out))
    return Change(experts=each)


def single_changes(experts, a, b, scale, base):
    """Return {base tensor name: Change} by A (E, r, in) and B (E, out, r), None if shapes differ.

    experts: for each the names of the tensors that store it, one above the other.
    """
    changes = {}
    for names, own_a, own_b in zip(experts, a, b, strict=True):
        rows = [base.tensors[name].shape[0] for name in names]
        columns = {base.tensors[name].shape[1] for name in names}
        if sum(rows) != len(own_b) or columns != {own_a.shape[1]}:
            return None
        for name, share in zip(names, own_b.split(rows), strict=True):
            changes[name] = Change(lora_a=own_a, lora_b=share.contiguous(), scale=scale)
    return changes


# ---------------------------------------------------------------- the job


@dataclass
class Job:
    """One merge: what is merged into what, and how."""

    adapter: Adapter
    base: Base
    base_name: str  # as the adapter or --base_model_path names it
    base_fingerprint: str | None
    base_dtype: torch.dtype  # of most of its bytes
    shards: dict  # {file: {tensor name: (source Tensor, Change or None)}}
    untied: bool  # the head gets a tensor of its own
    causal: bool  # the adapter was trained below a language-modelling head
    trained_rows: list  # token ids whose embeddings were trained
    output_path: str
    precision: str  # --training_precision, one of CHOICES
    qlora_base: str
    verify: str | None  # --verify as it was asked for
    device: str
    trust_remote_code: bool
    bits: int | None = None  # of the base that outputs are compared with (--qlora_base dequant)
    reference: tuple | None = None  # outputs of base and base + adapter, once they were computed

    @property
    def dtype(self):
        """The dtype that is written; with auto every tensor keeps its own."""
        return self.base_dtype if self.precision == "auto" else DTYPES[self.precision]

    @property
    def dtype_name(self):
        """The name of the dtype that is written."""
        return str(self.dtype)[6:]

    def dtype_of(self, source):
        """Return the dtype in which a Tensor is written; None for integers, which stay so."""
        if self.precision == "auto" or source.dtype is None:
            return source.dtype
        return self.dtype

    def size_of(self, source):
        """Return the bytes of a Tensor as it is written."""
        dtype = self.dtype_of(source)
        return math.prod(source.shape) * dtype.itemsize if dtype else source.stored_bytes

    @property
    def may_widen(self):
        """Tell whether float32 is still to be tried where the fine-tune does not survive."""
        return self.precision == "auto" and self.dtype != torch.float32

    @property
    def vocabulary(self):
        """The rows of embedding and head where the adapter resized them, else None."""
        resized = (each for each in self.base.tensors.values() if each.stored_rows)
        return next((tensor.shape[0] for tensor in resized), None)


def make_job(args):
    """Read and check everything that is merged; returns a Job, nothing written yet."""
    adapter = read_adapter(args.lora_adapter_path)
    trained = flags_of(adapter.trained)
    name = args.base_model_path or adapter.config.get("base_model_name_or_path") or ""
    revision = trained.get("model_revision") or adapter.config.get("revision")
    base = read_base(find_base(name, revision))
    fit = fit_adapter(adapter, base, name)
    check_base(adapter, base.folder, trained.get("model_name"))
    trained_rows = {row for change in fit.changes.values() for row in change.rows}
    job = Job(
        adapter=adapter,
        base=fit.base,
        base_name=name,
        base_fingerprint=fingerprint(base.folder),
        base_dtype=most_common_dtype(fit.base),
        shards=lay_out_shards(fit),
        untied=fit.untied is not None,
        causal=is_causal(adapter, base),
        trained_rows=sorted(trained_rows),
        output_path=args.output_path,
        precision=args.training_precision,
        qlora_base=args.qlora_base,
        verify=args.verify,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    if job.qlora_base == "dequant":
        bits = trained.get("bits") or trained.get("quantization_bits") or 4
        job = dequantised(job, bits)
    return job


def flags_of(trained):
    """Return {flag: value} of a training_config.json (a dict), as parsed and then settled.

    Raises InputError for what is none. Earlier trainers recorded nothing as settled.
    """
    recorded = {}
    for part in ("flags", "settled"):
        values = trained.get(part) or {}
        if not isinstance(values, dict):
            raise InputError(
                f"training_config.json of the adapter holds {str(values)[:60]} as {part}. Copy it "
                "again."
            )
        recorded |= values
    if recorded.get("bits") is None:  # as where it is missing: nothing was quantised
        recorded.pop("bits", None)
    return recorded


def fit_adapter(adapter, base, name):
    """Return the Fit of adapter and base, which is called `name`; raises InputError if none is."""
    try:
        fit = make_changes(adapter.config, adapter.tensors, base)
    except DoesNotFit as error:
        advice = what_to_do(adapter, base.folder, name)
        raise InputError(f"{error} {advice}") from None
    print(
        f"adapter   {adapter.folder}: {len(adapter.tensors)} tensors for {len(fit.changes)} of the "
        f"{len(base.tensors)} of {name}"
    )
    return fit


def what_to_do(adapter, base_folder, name):
    """Return the advice where an adapter does not fit the base that is called `name`."""
    by_peft = "merge it with peft's merge_and_unload."
    trained_on = adapter.config.get("base_model_name_or_path")
    recorded = adapter.trained.get("base_fingerprint")
    if adapter.task in OWN_HEADS:
        return (
            f"An adapter for {adapter.task} brings a head that a base's files do not hold: "
            f"{by_peft}"
        )
    if recorded and is_base(base_folder, recorded):
        return (
            f"The adapter was trained on {name}, whose files hold no such tensor: its class makes "
            f"it anew, or was changed before the training; {by_peft}"
        )
    if name == trained_on:
        return (
            f"{name} is the base that the adapter names: if it changed since, pass the old one as "
            f"--base_model_path; else {by_peft}"
        )
    return f"Pass the base that it was trained on ({trained_on}) as --base_model_path."


def check_base(adapter, base_folder, trained_on):
    """Raise InputError where the adapter was trained on other weights than those of the base."""
    if not is_base(base_folder, adapter.trained.get("base_fingerprint")):
        raise InputError(
            f"{base_folder} is not the base that {adapter.folder} was trained on: its weights are "
            f"not those of {trained_on}. Pass that one as --base_model_path; if it is the same "
            "model in other files, delete base_fingerprint from its training_config.json."
        )


def is_causal(adapter, base):
    """Tell whether an adapter was trained with a language-modelling head."""
    if adapter.task is not None:
        return adapter.task == "CAUSAL_LM"
    # no task is recorded: below a head its modules are nested as in the base's file
    top = next(iter(adapter.tensors)).split(".")[0]
    return base.is_headed and any(name.split(".")[0] == top for name in base.tensors)


def most_common_dtype(base):
    """Return the floating-point dtype of most of a base's bytes."""
    sizes = defaultdict(int)
    for tensor in base.tensors.values():
        sizes[tensor.dtype] += tensor.stored_bytes if tensor.dtype else 0
    return max(sizes, key=sizes.get)


def lay_out_shards(fit):
    """Return {file: {tensor name: (source Tensor, Change or None)}} of what is written."""
    shards = defaultdict(dict)
    for name, tensor in fit.base.tensors.items():
        if not (fit.untied and name == HEAD):
            shards[tensor.file.name][name] = tensor, fit.changes.get(name)
    if fit.untied:  # the base's files may have no place for it
        last = list(shards)[-1]
        shards[last][HEAD] = fit.base.tensors[fit.untied], fit.changes.get(HEAD)
    return dict(shards)


def dequantised(job, bits):
    """Return the Job on what quantised training saw of the base.

    The layers that bitsandbytes quantises, and only those, are rounded.
    """
    cannot = f"--qlora_base dequant: {job.base.folder} cannot be loaded in {bits} bits"
    with in_one_sentence(cannot):
        model, paths = load_rounded(job, bits)
    weights = {}
    turned = job.base.model_type in CONV1D_MODELS
    for path in paths:
        weight = model.get_submodule(path).weight.detach().cpu()
        weights[job.base.find(path, "weight")] = weight.T if turned else weight
    shards = {}
    for file, tensors in job.shards.items():
        shards[file] = dict(tensors)
        for name in weights.keys() & tensors.keys():
            source, change = tensors[name]
            source = replace(source, dequantised=weights[name])
            shards[file][name] = source, change or Change()
    return replace(job, bits=bits, shards=shards)


# ---------------------------------------------------------------- models


def load_model(folder, job, **more):
    """Load a model in float32, with its head if the adapter was trained with one."""
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging as bars

    bars.disable_progress_bar()
    auto = AutoModelForCausalLM if job.causal else AutoModel
    model = auto.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=job.trust_remote_code, **more
    )
    if not more:  # a quantised one is on its device already, and must not be moved
        model = model.to(job.device)
    return model.eval()


def load_rounded(job, bits):
    """Return (the base as 4- or 8-bit training saw it, in float32, paths of its rounded layers)."""
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = load_model(job.base.folder, job, quantization_config=how, device_map={"": job.device})
    paths = []
    for path, layer in model.named_modules():
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            paths.append(path)
    return model.dequantize(dtype=torch.float32).eval(), paths


def holds_tokenizer(folder):
    """Tell whether a folder has a tokenizer."""
    return any((folder / name).is_file() for name in TOKENIZERS)


def load_tokenizer(folder, job):
    """Return the tokenizer in a folder, or None where it has none."""
    from transformers import AutoTokenizer

    if not holds_tokenizer(folder):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=job.trust_remote_code)


def resize(model, rows):
    """Give embedding and head that many rows; new ones are zero, as merging takes them to be."""
    known = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            layer.weight.data[known:] = 0


def outputs_of(model, tokenizer, device, rows):
    """Return float32 outputs on fixed inputs: logits (T, V), or unit embeddings (D).

    Embeddings are of mean and last token. rows: token ids that are asked for too.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [tokenizer(text)["input_ids"] for text in PROBE_TEXTS] if tokenizer else []
    vocabulary = model.config.get_text_config().vocab_size
    inputs.append(torch.randint(vocabulary, (24,), generator=generator).tolist())
    if rows:
        inputs.append(rows[:64])
    outputs = []
    for ids in inputs:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids], device=device))
        if "logits" in found:
            outputs.append(found.logits[0].float().cpu())
        else:
            hidden = found.last_hidden_state[0].float().cpu()
            pooled = torch.stack([hidden.mean(0), hidden[-1]])
            outputs.append(torch.nn.functional.normalize(pooled, dim=1))
    return torch.cat(outputs)


def reference_outputs(job, tokenizer):
    """Return the outputs of the base and of base + adapter, as peft computes them."""
    from peft import PeftModel
    from safetensors.torch import save_file

    model = load_rounded(job, job.bits)[0] if job.bits else load_model(job.base.folder, job)
    if job.vocabulary:
        resize(model, job.vocabulary)
    base = outputs_of(model, tokenizer, job.device, job.trained_rows)
    tensors = named_for(model, job.adapter)
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/adapter_model.safetensors")
        # without a task peft takes the model as it is, with or without a head
        write_json(f"{folder}/adapter_config.json", job.adapter.config | {"task_type": None})
        model = PeftModel.from_pretrained(model, folder).eval()
    return base, outputs_of(model, tokenizer, job.device, job.trained_rows)


def named_for(model, adapter):
    """Return an adapter's tensors under the names that peft looks for in this model."""
    find = Names(model.state_dict()).find
    parameters = [name.rpartition(".")[2] for name in adapter.config.get("target_parameters") or []]
    tensors = {}
    for name, tensor in adapter.tensors.items():
        path, kind = split(name)
        at = find(path, kind and "weight") or find(path, "bias")
        if at is None and kind in ("a", "b"):
            path = without_nesting(path)
            found = (find(path, parameter) for parameter in parameters)
            at = next((each for each in found if each), None)
        own = name
        if at is not None:
            own = at if kind is None else at.rpartition(".")[0] + name.removeprefix(path)
        # trained expert by expert, before transformers 5: peft fuses them as it loads
        elif not re.search(r"\.experts\.\d+\.", path):
            raise ValueError(f"{path} of the adapter is not in {type(model).__name__}")
        tensors[f"base_model.model.{own}"] = tensor.contiguous()
    return tensors


# ---------------------------------------------------------------- figures


@dataclass(kw_only=True)
class Figures:
    """What a merge keeps of the fine-tune in a tensor, or in all of them together."""

    delta: float = None  # |D|
    relative_delta: float = None  # |D| / |W|
    retained: float  # <E, D> / |D|^2
    residual: float  # |E - D| / |D|
    error: float = None  # at outputs that A does not read, relative to all outputs
    intact: bool = None  # the error is no larger than rounding makes it

    def to_json(self):
        """Return {name: value} of what is known."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class Outputs:
    """What a merged model keeps of the fine-tune at its outputs.

    d = adapter - base, e = merged - base.
    """

    kind: str  # logits or embeddings
    retained: float  # <e, d> / |d|^2
    residual: float  # |e - d| / |d|
    relative_error: float  # |merged - adapter| / |adapter|
    change: float  # |d| / |adapter|


def sums_of(wanted, noise):
    """Return (<E, D>, |D|^2, |E - D|^2) of D `wanted` and E - D `noise`, in float64."""
    wanted = wanted.flatten()
    noise = noise.flatten()
    delta = wanted.dot(wanted)
    return torch.stack([delta + noise.dot(wanted), delta, noise.dot(noise)]).double()


def figures_of(along, delta, noise, **more):
    """Return the Figures of <E, D>, |D|^2 and |E - D|^2."""
    if not delta:
        return Figures(delta=0.0, retained=1.0, residual=0.0, **more)
    residual = math.sqrt(noise / delta)
    return Figures(delta=math.sqrt(delta), retained=along / delta, residual=residual, **more)


def over_all(figures):
    """Return the Figures of all tensors, {name: Figures}, together: each counts by its |D|^2."""
    weighted = [(each.delta**2, each) for each in figures.values()]
    along = sum(weight * each.retained for weight, each in weighted)
    noise = sum(weight * each.residual**2 for weight, each in weighted)
    return figures_of(along, sum(weight for weight, _ in weighted), noise)


def keeps(found, noise=RESIDUAL):
    """Tell whether retained and residual say that the fine-tune is there."""
    return RETAINED[0] <= found.retained <= RETAINED[1] and found.residual <= noise


def weights_keep(figures):
    """Tell whether the fine-tune is there in all tensors together.

    Decides where outputs are not compared.
    """
    return keeps(over_all(figures), WEIGHTS_RESIDUAL)


def tokens_keep(figures, job):
    """Tell whether trained tokens are there, each tensor of them by itself.

    The inputs of a comparison may lack them.
    """
    for tensors in job.shards.values():
        for name, (_, change) in tensors.items():
            replaced = change and change.replacement is not None and EMBEDDING.search(name)
            trained = replaced or (change and change.rows)
            if trained and not keeps(figures[name]):
                return False
    return True


# ---------------------------------------------------------------- writing


@dataclass
class Place:
    """Where a tensor is written, and from what."""

    name: str
    source: Tensor
    change: Change | None
    dtype: torch.dtype | None  # in the file; None for integers
    start: int  # first byte in the file


def lay_out(tensors, job):
    """Return (a safetensors file's bytes before its data, [Place]) of {name: (source, change)}."""
    header = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (source, _) in tensors.items():
        end = offset + job.size_of(source)
        code = NAMES.get(job.dtype_of(source), source.code)
        shape = list(source.shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    head = struct.pack("<Q", len(text)) + text
    places = []
    for name, (source, change) in tensors.items():
        start = len(head) + header[name]["data_offsets"][0]
        places.append(Place(name, source, change, job.dtype_of(source), start))
    return head, places


def write_shard(path, tensors, job, bar):
    """Write {name: (source, change)} as one safetensors file; return {name: Figures} of changes."""
    head, places = lay_out(tensors, job)
    figures = {}
    with open(path, "wb", buffering=0) as out, ThreadPoolExecutor(WORKERS) as pool:
        out.write(head)
        for found in pool.map(partial(write_tensor, out, bar), places):
            figures |= found
        os.fsync(out.fileno())  # a disk that is full says so here at the latest
    return figures


def write_tensor(out, bar, place):
    """Write one tensor to its Place; return {name: Figures} of what is merged in it.

    What stays as it is is copied by the kernel; what changes or is cast goes through memory in
    blocks of rows.
    """
    source = place.source
    found = {}
    if place.change is None and place.dtype == source.dtype:
        with open(source.file, "rb") as file:
            copy_range(file.fileno(), out.fileno(), source.stored_bytes, source.start, place.start)
    else:
        at = place.start
        for name, part, change in pieces(place.name, source, place.change or Change()):
            found[name] = write_blocks(out, at, name, part, change, place.dtype)
            at += math.prod(part.shape) * place.dtype.itemsize
    if hasattr(os, "posix_fadvise"):  # to the disk now, while the next tensor is merged
        os.posix_fadvise(out.fileno(), place.start, source.stored_bytes, os.POSIX_FADV_DONTNEED)
    bar.update(source.stored_bytes)
    return found if place.change else {}


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
        count -= copied
        start += copied
        at += copied


def write_blocks(out, at, name, source, change, dtype):
    """Write a changed or cast tensor at byte `at`, block by block; return its Figures.

    Raises InputError where a merged value is infinite or NaN, TooLarge where it becomes so in
    `dtype`.
    """
    change.prepare(source)
    basis = change.basis()
    sums = torch.zeros(3, dtype=torch.float64)
    weight = torch.zeros((), dtype=torch.float64)  # |W|^2
    for first, last in source.blocks():
        base = source.read(first, last)
        exact = change.apply(base, first, last)
        written = exact.to(dtype)
        noise = torch.empty_like(exact).copy_(written).sub_(exact)  # without a second temporary
        if basis is None:
            wanted = exact - base
        else:  # <EQ, DQ> and so on: r columns instead of `in`, and nothing of D is lost
            wanted = change.lora_b[first:last] @ (change.scale * change.lora_a @ basis)
            noise = noise @ basis
        found = sums_of(wanted, noise)
        if not found[2].isfinite():  # one value that is not makes the sum so
            raise not_finite(name, exact, dtype)
        sums += found
        weight += base.flatten().dot(base.flatten()).double()
        write_at(out, written, at + first * source.size[1] * dtype.itemsize)
    figures = figures_of(*sums.tolist())
    figures.relative_delta = figures.delta / math.sqrt(max(weight.item(), 1e-30))
    return figures


def not_finite(name, exact, dtype):
    """Return the error where merged values `exact` are not finite once they are in `dtype`."""
    if exact.isfinite().all():
        kind = str(dtype)[6:]
        return TooLarge(f"{name} is too large for {kind}. Pass --training_precision float32.")
    return InputError(
        f"{name} holds NaN or infinite values once merged: the base or the adapter is broken."
    )


def write_at(out, block, start):
    """Write a tensor's values at a byte of a file."""
    data = memoryview(block.contiguous().view(torch.uint8).numpy()).cast("B")
    while data:  # pwrite may take only part
        count = os.pwrite(out.fileno(), data, start)
        data = data[count:]
        start += count


def keep_freed_memory():
    """Have glibc reuse freed blocks; mapping and zeroing each anew would be half of a merge."""
    with suppress(OSError, AttributeError):  # not Linux
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**27)  # M_TRIM_THRESHOLD


def write_weights(folder, job):
    """Write all shards and the index; return ({tensor name: Figures}, seconds)."""
    keep_freed_memory()
    total = 0
    for tensors in job.shards.values():
        total += sum(source.stored_bytes for source, _ in tensors.values())
    started = time.perf_counter()
    figures = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each worker has its own core
    with tqdm(
        total=total, unit="B", unit_scale=True, desc="merge", disable=None, leave=False
    ) as bar:
        for file, tensors in job.shards.items():
            figures |= write_shard(folder / file, tensors, job, bar)
    torch.set_num_threads(threads)
    if list(job.shards) != ["model.safetensors"]:
        write_index(folder, job.shards)
    seconds = time.perf_counter() - started
    count = sum(map(len, job.shards.values()))
    print(
        f"merge     {count} tensors, {len(figures)} of them changed, {total / 1e9:.2f} GB in "
        f"{seconds:.1f} s ({total / 1e9 / seconds:.2f} GB/s), as {job.dtype_name}",
        flush=True,
    )
    return figures, seconds


def write_index(folder, shards):
    """Write which shard holds which tensor."""
    weight_map = {}
    size = 0
    for file, tensors in shards.items():
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.stored_bytes for tensor in read_header(folder / file).values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


# ---------------------------------------------------------------- proof


@dataclass
class AllTensors:
    """What the probes of all tensors say."""

    retained: float  # as in Figures, of all together
    residual: float
    tensors: dict  # the worst single ones
    error: float


@dataclass
class Proof:
    """Whether what was written is base + adapter, and the figures that say so."""

    mode: str  # off, weights or full
    passed: bool | None = None  # None: not verified
    weights: AllTensors | None = None
    outputs: Outputs | None = None
    probes: dict = field(default_factory=dict)  # {tensor name: Figures}, read back

    def to_json(self):
        """Return what merge_report.json holds of it; the probes stand with their tensors."""
        content = asdict(replace(self, probes={}))
        del content["probes"]
        return content


def probe(folder, job):
    """Compare every changed tensor, read back from disk, with W + D on random inputs.

    Returns {tensor name: Figures}: `delta`, `retained` and `residual` on inputs that A reads, the
    error on others. Raises InputError where the bytes of an unchanged tensor differ.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for file, tensors in job.shards.items():
        stored = read_header(folder / file)
        for name, (source, change) in tensors.items():
            copy = stored[name]
            if change is None:
                if copy.code == source.code and not equal(source, copy):
                    raise InputError(
                        f"{folder / file}: {name} is not what was written. Look at the disk."
                    )
                continue
            copies = {part: written for part, written, _ in pieces(name, copy, change)}
            for part, tensor, own in pieces(name, source, change):
                found[part] = probe_tensor(tensor, own, copies[part], generator)
    return found


def probe_tensor(source, change, copy, generator):
    """Return the Figures of one tensor: `copy` is what was written for `source` with `change`."""
    every = torch.randn(source.size[1], 4, generator=generator)  # (in, 4)
    inside = outside = every
    basis = change.basis()
    if basis is not None:
        inside = basis @ (basis.T @ every)  # what A reads, where D is
        outside = every - inside  # where only rounding is
    sums = torch.zeros(3, dtype=torch.float64)
    noise_outside = size_of_all = 0.0  # squared
    for at in source.blocks():
        base = source.read(*at)
        exact = change.apply(base, *at)
        noise = copy.read(*at) - exact
        wanted = (exact - base) @ inside
        found = wanted + noise @ inside
        sums += sums_of(wanted, found - wanted)
        noise_outside += (noise @ outside).square().sum().item()
        size_of_all += (exact @ every).square().sum().item()
    error = math.sqrt(noise_outside / max(size_of_all, 1e-30))
    intact = error <= ROUNDING_ERROR[copy.dtype]
    return figures_of(*sums.tolist(), error=error, intact=intact)


def summarise(probes):
    """Print, and return for the report, what the probes of all tensors say."""
    total = over_all(probes)
    retained = [each.retained for each in probes.values()]
    low = min(retained)
    high = max(retained)
    residual = max(each.residual for each in probes.values())
    error = max(each.error for each in probes.values())
    print(
        f"weights   {len(probes)} tensors read back: {total.retained:.1%} of the fine-tune kept, "
        f"noise {total.residual:.1%} of it (single tensors {low:.1%} to {high:.1%}, noise at most "
        f"{residual:.1%}); on other inputs errors of {error:.0e}",
        flush=True,
    )
    worst = {"retained": [low, high], "residual": residual}
    return AllTensors(total.retained, total.residual, worst, error)


def compare_outputs(folder, job, tokenizer):
    """Return the Outputs of the merged model against those of base and base + adapter.

    None where the outputs do not depend on what was trained (a vision tower, say).
    """
    if job.reference is None:  # kept: a second merge in another dtype has the same
        job.reference = reference_outputs(job, tokenizer)
    gc.collect()
    base, adapter = job.reference
    if torch.equal(adapter, base):
        return None
    merged = outputs_of(load_model(folder, job), tokenizer, job.device, job.trained_rows)
    d = adapter - base
    e = merged - base
    return Outputs(
        kind="logits" if job.causal else "embeddings",
        retained=((e * d).sum() / d.square().sum()).item(),
        residual=((e - d).norm() / d.norm()).item(),
        relative_error=((merged - adapter).norm() / adapter.norm()).item(),
        change=(d.norm() / adapter.norm()).item(),
    )


def compare_if_possible(folder, job):
    """Return the Outputs, or None, and say so, where no model can be run or shows the training."""
    asked_for = job.verify == "full"
    cannot = "base and adapter cannot be run here"
    if asked_for:
        cannot = "outputs cannot be compared; pass --verify weights"
    found = None
    why = "they do not depend on what was trained"
    try:
        with in_one_sentence(cannot):
            found = compare_outputs(folder, job, load_tokenizer(folder, job))
    except InputError as error:
        if asked_for:
            raise
        why = error
    if found:
        return found
    # A is random from the beginning; all else is zero until it is trained
    trained = [tensor for name, tensor in job.adapter.tensors.items() if "lora_A" not in name]
    if not any(tensor.any() for tensor in trained):
        raise InputError(
            f"{job.adapter.folder} changes no output of {job.base.folder}: it was not trained."
        )
    print(f"note      outputs are not compared: {why}", flush=True)
    return None


def verify(folder, job, mode):
    """Return the Proof of what was written."""
    if mode == "off":
        return Proof(mode)
    probes = probe(folder, job)
    weights = summarise(probes)
    outputs = compare_if_possible(folder, job) if mode == "full" else None
    weights_kept = weights_keep(probes)
    if outputs:
        print(
            f"outputs   {outputs.kind} in float32: {outputs.retained:.2%} of the fine-tune kept, "
            f"noise {outputs.residual:.2%} of it, relative error {outputs.relative_error:.0e}",
            flush=True,
        )
        # a change below the noise of float32 is proven on the weights
        exact = job.dtype == torch.float32 and outputs.relative_error <= 1e-5
        fine_tune_kept = keeps(outputs) or (weights_kept and exact)
    else:
        fine_tune_kept = weights_kept
    intact = all(each.intact for each in probes.values())
    tokens_kept = tokens_keep(probes, job)
    return Proof(mode, fine_tune_kept and intact and tokens_kept, weights, outputs, probes)


# ---------------------------------------------------------------- the folder

# a folder with a tokenizer has one of these
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json")
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*")
TOKENIZER_FILES += ("merges.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.jinja")
PROCESSOR_FILES = ("*preprocessor_config.json", "processor_config.json", "chat_template.json")
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json")


def copy_files(folder, target, patterns):
    """Copy the files that match; contents only, so that they are as readable as new ones."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def copy_tree(folder, target):
    """Copy a folder; contents only: a copy of one that is read-only could never be deleted."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            copy_tree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def complete_folder(folder, job):
    """Write all that a model folder needs beside its weights.

    The tokenizer is copied byte for byte, never saved anew.
    """
    base = job.base.folder
    adapter = job.adapter.folder
    copy_files(base, folder, ("*.py", "LICENSE*", "NOTICE*", *PROCESSOR_FILES))
    copy_files(adapter, folder, ("training_config.json",))
    tokenizer_from = adapter if holds_tokenizer(adapter) else base
    copy_files(tokenizer_from, folder, TOKENIZER_FILES)
    copy_sentence_files(adapter if (adapter / "modules.json").is_file() else base, folder)
    tokenizer_config = read_json(tokenizer_from / "tokenizer_config.json") or {}
    write_template(folder, tokenizer_from, tokenizer_config)
    write_configs(folder, job, tokenizer_config)


def copy_sentence_files(source, folder):
    """Copy what makes a folder a SentenceTransformer, the folders of its modules included."""
    copy_files(source, folder, SENTENCE_FILES)
    for module in read_json(source / "modules.json", list) or []:
        path = module.get("path") if isinstance(module, dict) else None
        if path and stays_inside(path) and (source / path).is_dir():
            copy_tree(source / path, folder / path)


def write_template(folder, source, tokenizer_config):
    """Write the chat template to both places where it is looked for.

    Ollama's importer reads tokenizer_config.json, transformers 5 writes chat_template.jinja.
    """
    template = folder / "chat_template.jinja"
    if template.is_file():
        try:
            text = template.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source}/chat_template.jinja is no UTF-8 ({error}). Fetch it again."
            ) from None
        write_json(folder / "tokenizer_config.json", tokenizer_config | {"chat_template": text})
    elif isinstance(tokenizer_config.get("chat_template"), str):
        template.write_text(tokenizer_config["chat_template"], encoding="utf-8")


def write_configs(folder, job, tokenizer_config):
    """Write config.json and, for a language model, generation_config.json with every stop token."""
    config = dict(job.base.config)
    for part in (config, config.get("text_config")):
        if part:
            # servers older than transformers 5 read the second
            part["dtype"] = part["torch_dtype"] = job.dtype_name
            if job.untied:
                part["tie_word_embeddings"] = False
            if job.vocabulary and "vocab_size" in part:
                part["vocab_size"] = job.vocabulary
    base = read_json(job.base.folder / "generation_config.json")
    trained = read_json(job.adapter.folder / "generation_config.json")
    if job.causal or base or trained:
        stops = own_stops(folder, tokenizer_config)
        stops += recorded_stops(trained, base, config, config.get("text_config"))
        generation = (base or {}) | (trained or {})
        if stops:
            config["eos_token_id"] = stops[0]
            generation["eos_token_id"] = list(dict.fromkeys(stops))
        write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", config)


def own_stops(folder, tokenizer_config):
    """Return the ids of the tokenizer's EOS, as a list of one or none."""
    eos = tokenizer_config.get("eos_token")
    if isinstance(eos, dict):
        eos = eos["content"]
    added = (read_json(folder / "tokenizer.json") or {}).get("added_tokens", [])
    return [token["id"] for token in added if token["content"] == eos]


def recorded_stops(*configs):
    """Return the eos_token_id of the first config that has one, as a list."""
    for config in configs:
        stops = config.get("eos_token_id") if config else None
        if stops is not None:
            return stops if isinstance(stops, list) else [stops]
    return []


CARD = """---
{front}
---

# {name}

{base} with a LoRA adapter merged into its weights, stored as {dtype}. {verdict}

| check | kept of the fine-tune | noise added to it |
|---|---|---|
{checks}

`merge_report.json` holds the figures of every tensor.
{results}
## Use

`MODEL` is this folder, or its id on the hub.

{uses}
"""
# of the adapter's card, above the rows of its metrics
TABLE_HEAD = "| metric | before training | after |"
RESULTS = """
## Results

As the adapter's card has them, measured before the merge.

{table}
"""
SENTENCE_USES = """\
With sentence-transformers, pooling and prompts included:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("MODEL"{remote_code})
print(model.encode(["how do I reset it?"]).shape)
```

With transformers, one vector a token:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL"{remote_code})
model = AutoModel.from_pretrained("MODEL"{remote_code})
```

With TEI:

    text-embeddings-router --model-id MODEL

With llama.cpp, as GGUF:

    python llama.cpp/convert_hf_to_gguf.py MODEL --outfile model.gguf"""
LANGUAGE_USES = """\
With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL"{remote_code})
model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto"{remote_code})
messages = [{{"role": "user", "content": "2+2?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{thinking}
)
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With vLLM:

    vllm serve MODEL

With llama.cpp and Ollama, as GGUF:

    python llama.cpp/convert_hf_to_gguf.py MODEL --outfile model.gguf"""
OTHER_USES = """\
With transformers:

```python
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("MODEL"{remote_code})
model = AutoModel.from_pretrained("MODEL"{remote_code})
```"""


def write_card(folder, job, report):
    """Write README.md: base, figures of the proof, what the adapter's card says, how to load it.

    It names no folders of this machine.
    """
    # of another trainer's card it is not known what it says
    adapters_card = read_card(job.adapter.folder) if job.adapter.trained else ""
    hub_id = base_on_hub(job, adapters_card)
    table = metrics_table(adapters_card)
    thinking = flags_of(job.adapter.trained).get("enable_thinking")
    asked = f", enable_thinking={thinking.title()}" if thinking in ("true", "false") else ""
    uses = LANGUAGE_USES if job.causal else OTHER_USES
    if (folder / "modules.json").is_file():
        uses = SENTENCE_USES
    card = CARD.format(
        front="\n".join(front_matter(folder, job, hub_id, adapters_card)),
        name=Path(job.output_path).resolve().name,
        base=f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else "A base model",
        dtype=report["dtype"],
        verdict=verdict_of(report["verification"]),
        checks="\n".join(check_rows(report["verification"])) or "| none | | |",
        results=RESULTS.format(table=table) if table else "",
        uses=uses.format(
            remote_code=", trust_remote_code=True" if job.trust_remote_code else "",
            thinking=asked,
        ),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def check_rows(proof):
    """Return the rows of the card's table of what the proof compared."""
    rows = []
    weights = proof["weights"]
    outputs = proof["outputs"]
    if weights:
        figures = f"{weights['retained']:.2%} | {weights['residual']:.2%}"
        rows.append(f"| all tensors, read back | {figures} |")
    if outputs:
        figures = f"{outputs['retained']:.2%} | {outputs['residual']:.2%}"
        rows.append(f"| {outputs['kind']}, float32 | {figures} |")
    return rows


def verdict_of(proof):
    """Return in one sentence how the verification ended."""
    if proof["passed"] and proof["outputs"]:
        return "The merge was verified."
    if proof["passed"]:
        return "The merge was verified on its weights alone."
    if proof["passed"] is False:
        return "**The merge failed its verification.**"
    return "Not verified."


def front_matter(folder, job, hub_id, adapters_card):
    """Return the lines of the card that the hub reads: https://huggingface.co/docs/hub/model-cards.

    hub_id: of the base, or None.
    """
    lines = []
    if hub_id:
        # a merge, to the hub, is one of several models
        lines += [f'base_model: "{hub_id}"', "base_model_relation: finetune"]
    is_sentence_transformer = (folder / "modules.json").is_file()
    library = "sentence-transformers" if is_sentence_transformer else "transformers"
    lines.append(f"library_name: {library}")
    if is_sentence_transformer:
        lines.append("pipeline_tag: sentence-similarity")
    elif job.causal:
        lines.append("pipeline_tag: text-generation")
    # the base's own, else what the adapter's card has taken from it
    lines += license_lines(read_card(job.base.folder)) or license_lines(adapters_card)
    datasets = re.search(r"^datasets:\n((?:- [\w./\'\"-]+\n)+)", front_of(adapters_card), re.M)
    if datasets:
        lines += ["datasets:", *datasets[1].splitlines()]
    return lines


def read_card(folder):
    """Return the text of a folder's README.md, "" where there is none that can be read."""
    try:
        return (folder / "README.md").read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return ""


def front_of(card):
    """Return the lines of a card that the hub reads, without a YAML parser: "" if it has none."""
    found = re.match(r"---[ \t]*\n(.*?\n)---[ \t]*(\n|$)", card, re.S)
    return found[1] if found else ""


def value_of(card, key):
    """Return a text that stands behind a key in front of a card, None if it is no plain one."""
    found = re.search(
        rf"^{key}:[ \t]+([\"']?)([^\s\"'\[{{|>#]+)\1[ \t]*(#.*)?$", front_of(card), re.M
    )
    return found[2] if found else None


def license_lines(card):
    """Return the lines of a card that name its license; [] where it names none."""
    if not value_of(card, "license"):
        return []
    lines = []
    for key in ("license", "license_name", "license_link"):
        value = value_of(card, key)
        # a link to a file beside that card leads nowhere from here
        if value and (key != "license_link" or value.startswith(("https://", "http://"))):
            lines.append(f"{key}: {json.dumps(value)}")
    return lines


def base_on_hub(job, adapters_card):
    """Return the hub id of the base, None if it is not known to be there."""
    name = job.base_name
    if os.path.exists(name):  # a copy: the adapter's card may say of what
        # peft's cards have folders there; without a fingerprint any other base may be in this one
        is_ours = value_of(adapters_card, "base_model_relation") is not None
        if not is_ours or not job.adapter.trained.get("base_fingerprint"):
            return None
        name = value_of(adapters_card, "base_model") or ""
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII)
    return name if is_id and not os.path.exists(name) else None


def metrics_table(card):
    """Return the table of metrics in an adapter's card; "" if it has none."""
    _, head, rest = card.partition(TABLE_HEAD)
    rows = []
    for line in rest.splitlines()[2:]:
        if not re.fullmatch(r"\|[^|]*\|( [-\w.]+ \|){2}", line):
            break
        rows.append(line)
    return "\n".join([head, "|---|---|---|", *rows]) if rows else ""


def open_output(path, overwrite):
    """Return the output folder; raises InputError rather than lose one that is no earlier merge."""
    try:
        output = Path(os.path.realpath(path))
        output.with_name(f".{output.name}.partial").exists()  # the longest name that is used
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
            raise InputError(
                f"--output_path {output} is not empty and no earlier merge. Name another folder."
            )
        if not overwrite:
            raise InputError(
                f"--output_path {output} holds a merge already. Name another folder, or pass "
                "--overwrite."
            )
    return output


@contextmanager
def held(folder):
    """Make a folder that no other merge can hold at the same time; delete what is left of it."""
    import fcntl  # not on Windows

    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)  # the lock ends with the process, even if it is killed
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another merge is writing to {folder} at this moment. Wait for it, or pass "
                    "another --output_path."
                ) from None
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
    """Make the finished folder appear under its name at once, with all of it on the disk."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if not output.exists():
        folder.rename(output)
        return
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # which a crash has left
    output.rename(old)
    folder.rename(output)
    try:
        shutil.rmtree(old)
    except OSError as error:
        print(
            f"note      the earlier merge could not be deleted and is left as {old} ({error})",
            flush=True,
        )


@contextmanager
def nothing_left():
    """Turn the system's errors while the merged folder is written into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise InputError(
            f"the merged model could not be written ({error}). Nothing is left of it."
        ) from None


# ---------------------------------------------------------------- main


def free_memory(groups=Path("/sys/fs/cgroup"), own=Path("/proc/self/cgroup")):
    """Return the bytes that this process may still take: the machine's, or less in a container."""
    import psutil

    found = [psutil.virtual_memory().available]
    lines = own.read_text().splitlines() if own.is_file() else []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        folder = groups / kinds  # version 1 has a folder for each kind
        levels = [folder]  # a container sees its own group as the root
        for part in path.split("/"):
            if part:
                folder = folder / part
                levels.append(folder)
        for level in levels:
            with suppress(OSError, ValueError):  # no such file; "max"
                found.append(free_in_group(level, version=1 if kinds else 2))
    return min(found)


def free_in_group(folder, version):
    """Return the bytes that a control group may still take; raises where it has no limit."""
    limit_file, used_file = ("memory.max", "memory.current")
    if version == 1:
        limit_file, used_file = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limit = int((folder / limit_file).read_text())
    used = int((folder / used_file).read_text())
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
    return max(0, limit - used + cached)


def choose_verification(job):
    """Return what --verify says, else full where float32 models fit into the memory, or weights."""
    if job.verify:
        return job.verify
    values = sum(math.prod(tensor.shape) for tensor in job.base.tensors.values())
    needed = 4.4 * values + 5e8
    cuda = job.device.startswith("cuda")
    free = torch.cuda.mem_get_info()[0] if cuda else free_memory()
    if needed <= free:
        return "full"
    print(
        f"note      outputs are not compared: that needs {needed / 1e9:.1f} GB of memory and "
        f"{free / 1e9:.1f} are free; --verify full does it all the same"
    )
    return "weights"


def written_size(job):
    """Return the bytes of all tensors as they are written."""
    size = 0
    for tensors in job.shards.values():
        size += sum(job.size_of(source) for source, _ in tensors.values())
    return size


@dataclass
class Merged:
    """What came of writing a merge."""

    figures: dict  # {tensor name: Figures}, as it was written
    seconds: float
    proof: Proof


def merge_once(folder, job, mode):
    """Merge into an empty folder in job.dtype, verify it, and return what came of it."""
    empty(folder)
    size = written_size(job)
    free = shutil.disk_usage(folder).free
    if size + 2**26 > free:  # 64 MiB for all the other files
        raise InputError(
            f"the merged model needs {size / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} "
            "free. Make room, or pass an --output_path on another disk."
        )
    try:
        figures, seconds = write_weights(folder, job)
    except TooLarge:
        if job.may_widen:
            return Merged({}, 0.0, Proof(mode, passed=False))
        raise
    complete_folder(folder, job)
    # where no outputs decide on the dtype, the figures do, before anything is read back
    if job.may_widen and mode != "full":
        if not (weights_keep(figures) and tokens_keep(figures, job)):
            return Merged(figures, seconds, Proof(mode, passed=False))
    return Merged(figures, seconds, verify(folder, job, mode))


def merge_without_loss(folder, job, mode):
    """Merge; with --training_precision auto once more in float32 where the first lost something.

    Returns (the Job as it was carried out, Merged).
    """
    merged = merge_once(folder, job, mode)
    if merged.proof.passed is not False or not job.may_widen:
        return job, merged
    wide = replace(job, precision="float32")
    print(price_of_float32(job.dtype_name, written_size(job), written_size(wide)), flush=True)
    return wide, merge_once(folder, wide, mode)


def price_of_float32(lossy, small, large):
    """Return the note on why a merge in the dtype `lossy` is done again in float32.

    small, large: the bytes of both.
    """
    served = "float32 or float16" if lossy == "bfloat16" else "float32"
    return (
        f"note      {lossy} would lose part of the fine-tune: once more in float32, "
        f"{large / 1e9:.2f} GB instead of {small / 1e9:.2f}. It helps only if it is served in "
        f"{served}: in {lossy} it is the same lossy merge"
    )


class Report(dict):
    """What main returns; at the end of a notebook's cell it shows no figures of single tensors."""

    def __repr__(self):
        verified = "verified" if self["verified"] else "not verified"
        title = f"Report of a merge as {self['dtype']}, {verified}, {len(self['tensors'])} tensors"
        return f"{title}\nits keys: {', '.join(self)}; all of it: dict(report)"


def make_report(job, merged):
    """Return what merge_report.json holds."""
    tensors = {name: figures.to_json() for name, figures in merged.figures.items()}
    for name, figures in merged.proof.probes.items():
        tensors[name]["probe"] = figures.to_json()
    return Report(
        verified=merged.proof.passed is True,
        base=job.base_name,
        base_fingerprint=job.base_fingerprint,
        adapter=str(job.adapter.folder),
        dtype=job.dtype_name,
        base_dtype=str(job.base_dtype)[6:],
        trained_in=PRECISIONS.get(job.adapter.trained.get("precision")),
        qlora_base=job.qlora_base,
        seconds=merged.seconds,
        verification=merged.proof.to_json(),
        tensors=tensors,
    )


def failure(job, proof):
    """Return in one sentence why the proof failed, and what to do."""
    found = proof.outputs or proof.weights
    figures = f"{found.retained:.1%} of it is kept, with noise of {found.residual:.1%}"
    if job.dtype == torch.float32:
        return (
            f"{job.output_path} is not base + adapter ({figures}): do not use it. Is the base the "
            "one that the adapter was trained on?"
        )
    or_full = "" if proof.outputs else ", or let the outputs decide: --verify full"
    return (
        f"{job.output_path} has lost part of the fine-tune to {job.dtype_name}: {figures}. Merge "
        f"with --training_precision float32{or_full}."
    )


def main(argv=None):
    """Run the command line `argv`; return what merge_report.json holds.

    Raises InputError if the proof fails.
    """
    args = parse_args(argv)
    output = open_output(args.output_path, args.overwrite)
    job = make_job(args)
    mode = choose_verification(job)
    temporary = output.with_name(f".{output.name}.partial")
    with nothing_left(), held(temporary):
        open_output(args.output_path, args.overwrite)  # another merge may have ended meanwhile
        job, merged = merge_without_loss(temporary, job, mode)
        report = make_report(job, merged)
        write_json(temporary / "merge_report.json", report)
        write_card(temporary, job, report)
        failed = merged.proof.passed is False
        if not failed or not output.exists():  # else the earlier merge stays, which may be good
            put_in_place(temporary, output)
    if report["trained_in"] not in (None, job.dtype_name):
        print(f"note      trained in {report['trained_in']}, stored as {job.dtype_name}")
    if failed:
        raise InputError(failure(job, merged.proof))
    verified = "verified" if report["verified"] else "not verified"
    print(f"result    {output}: {verified}, {job.dtype_name}", flush=True)
    return report


if __name__ == "__main__":
    try:
        main()
    except InputError as wrong:
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(1)
    except OSError as wrong:
        if wrong.errno is None:  # not the system's
            raise
        print(
            f"error: a file cannot be read or written: {wrong}. Mend that, and start again.",
            file=sys.stderr,
        )
        sys.exit(1)

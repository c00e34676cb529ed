"""Tokens kept on disk from run to run, under a hash of all that they depend on."""

import json
import linecache
import os
import tempfile
from contextlib import suppress
from pathlib import Path

import utils  # noqa: F401  quiets libraries before they are imported

import datasets
import tokenizers
import transformers
from datasets.fingerprint import Hasher

TOKEN_CACHE_BYTES = 10 * 2**30


def token_cache():
    """Return the folder where tokens are kept from run to run."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "lora_tokens"


def trim_token_cache(limit=TOKEN_CACHE_BYTES):
    """Delete the files whose last use is longest ago, until the others have at most `limit` bytes.

    A run that has one of them open keeps it until it ends.
    """
    files = []
    for path in token_cache().glob("*"):
        with suppress(OSError):  # another process may trim, too
            files.append((path.stat().st_mtime, path.stat().st_size, path))
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > limit:
            with suppress(OSError):
                path.unlink()


def cached_map(columns, encode, key, workers, features=None):
    """Return a Dataset of `columns` with encode(batch) applied, cached under a hash of `key`."""
    folder = token_cache()
    folder.mkdir(parents=True, exist_ok=True)
    name = Hasher.hash(key)
    for path in folder.glob(f"{name}*"):  # several workers write a file each
        with suppress(OSError):
            path.touch()  # the time of the last use: not every disk keeps one
    return datasets.Dataset.from_dict(columns).map(
        encode,
        batched=True,
        remove_columns=list(columns),
        new_fingerprint=name,
        num_proc=workers or None,
        features=features,
        desc="tokenising",
        cache_file_name=str(folder / f"{name}.arrow"),
    )


def tokens_key(tokenizer, *functions):
    """Return what tokens depend on beside texts and flags: the tokenizer, versions, our own code.

    `functions`: one of each file whose code makes the tokens. Where no source is to be seen,
    nothing returned here is ever the same again.
    """
    versions = [tokenizers.__version__, transformers.__version__]
    sources = [source_of(function) for function in functions]
    return [type(tokenizer).__name__, rules_of(tokenizer), *versions, *sources]


def rules_of(tokenizer):
    """Return all that a tokenizer does, as its files say it."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules["truncation"] = rules["padding"] = None  # what the last call asked for
        return rules
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()]
        return [(path.name, path.read_bytes()) for path in files]


def source_of(function):
    """Return the lines of the file that holds a function, or what was never returned before."""
    file = function.__code__.co_filename
    linecache.checkcache(file)
    return linecache.getlines(file) or os.urandom(16)  # linecache knows a notebook's cells, too


def ragged(dataset, column):
    """Return a column of lists as (values, offsets), numpy arrays.

    Row i is values[offsets[i] : offsets[i + 1]].
    """
    lists = dataset.data.column(column).combine_chunks()
    return lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()

"""What makes a folder a SentenceTransformer: pooling, prompts, and the files that say so."""

import json
from dataclasses import dataclass, field

from parts.base import base_json
from utils import InputError, note, write_json

PROMPTS_FILE = "config_sentence_transformers.json"
LENGTH_FILE = "sentence_bert_config.json"

# sentence-transformers' name -> --pooling
POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
# all that 1_Pooling/config.json names, since old versions, vLLM and TEI read one key a mode
POOLING_MODES = (
    "cls_token",
    "mean_tokens",
    "max_tokens",
    "mean_sqrt_len_tokens",
    "weightedmean_tokens",
    "lasttoken",
)
OWN_LAYERS = {"Transformer", "Pooling", "Normalize"}  # which final/ has, too


@dataclass(frozen=True)
class Stored:
    """What the base's sentence-transformers files say."""

    pooling: str | None = None  # as --pooling says it
    prompts: dict = field(default_factory=dict)  # {name: text}
    lowers_case: bool = False  # texts are made lower case before they are encoded
    default_prompt: str | None = None  # the name of the prompt where none is asked for


@dataclass(frozen=True)
class Prompts:
    """What stands before a query and a document, and what final/ stores."""

    query: str
    document: str
    saved: dict  # {name: text}


# ---------------------------------------------------------------- reading


def read_sentence_files(origin, pooling):
    """Return the Stored of a base; `pooling` is the flag, "auto" if the base's own will be taken.

    Raises InputError where the base has a layer that would be missing from what is trained here.
    """
    own_pooling = None
    pooling_file = find_pooling(origin)
    if pooling_file:
        config = base_json(origin, pooling_file) or {}
        own_pooling = name_pooling(config)
        if pooling == "auto" and own_pooling not in POOLINGS.values():
            raise InputError(
                f"{origin.name} pools by {own_pooling}, which is not known here. Pass --pooling."
            )
        if config.get("include_prompt") is False:
            note(
                "the base leaves the tokens of a prompt out of its pooling; here they take part, "
                "as in final/"
            )
    config = base_json(origin, PROMPTS_FILE) or {}
    prompts = config.get("prompts") or {}
    if not is_prompts(prompts):
        raise InputError(
            f"{origin.name}: the prompts in {PROMPTS_FILE} are no texts with names. Fetch it "
            "again, or mend them."
        )
    default = config.get("default_prompt_name")
    lengths = base_json(origin, LENGTH_FILE) or {}
    return Stored(
        pooling=own_pooling,
        prompts=prompts,
        lowers_case=bool(lengths.get("do_lower_case")),
        default_prompt=default if isinstance(default, str) else None,
    )


def find_pooling(origin):
    """Return the file that says how a base pools, None without one.

    Raises InputError where the base has a layer of another kind.
    """
    modules = base_json(origin, "modules.json", list) or []
    for module in modules:
        if not isinstance(module, dict) or not isinstance(module.get("type"), str):
            raise InputError(
                f"{origin.name}: modules.json has a module without a type. Fetch it again."
            )
    kinds = [module["type"].split(".")[-1] for module in modules]
    others = set(kinds) - OWN_LAYERS
    if others:
        raise InputError(
            f"{origin.name} has a {others.pop()} layer behind its pooling, which would get lost. "
            "Choose a base without one."
        )
    if "Pooling" not in kinds:
        return None
    folder = modules[kinds.index("Pooling")].get("path")
    return f"{folder}/config.json"


def name_pooling(config):
    """Return how a Pooling module pools, as --pooling says it; several ways, joined, with a +."""
    named = config.get("pooling_mode")  # newer versions: a name, or a list of them
    if isinstance(named, list):
        names = named
    elif named:
        names = [named]
    else:
        names = []
        for key, is_on in config.items():
            if key.startswith("pooling_mode_") and is_on:
                names.append(key.removeprefix("pooling_mode_"))
    return " + ".join(str(POOLINGS.get(str(name), name)) for name in names) or None


def is_prompts(prompts):
    """Tell whether a value of a config is {name: text}; a text may be missing."""
    if not isinstance(prompts, dict):
        return False
    return all(isinstance(text, str | None) for text in prompts.values())


def note_lower_case(stored, tokenizer):
    """Note where sentence-transformers gives the base other texts than it will get here."""
    if stored.lowers_case and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        note(
            "sentence-transformers makes this base's texts lower case (do_lower_case), here they "
            "stay as they are, as with final/: write yours in lower case"
        )


# ---------------------------------------------------------------- prompts


def choose_prompts(stored_prompts, query_prefix, doc_prefix, examples):
    """Return the Prompts: the flags', else the rows' own, if it is one, else the base's.

    A prefix is None where no flag gives it. final/ keeps all prompts of the base beside those that
    are trained.
    """
    if query_prefix is None:
        query_prefix = stored_prompts.get("query") or ""
    if doc_prefix is None:
        doc_prefix = stored_prompts.get("document") or stored_prompts.get("passage") or ""
    note_other_prompts(stored_prompts)
    own = {example.prompt for example in examples}  # None: a row without one
    if own != {None}:
        note_prompts_of_rows(examples)
    if len(own) == 1 and own != {None}:
        query_prefix = next(iter(own))  # the rows' own prompt is the one to save
    elif len(own) > 1:
        note(
            f"the rows carry {len(own)} query prefixes and final/ stores one, '{query_prefix}': "
            "put a query's own prompt before it when you encode it"
        )
    note_typed_breaks({query_prefix, doc_prefix, *filter(None, own)})
    trained = {"query": query_prefix, "document": doc_prefix}
    if "passage" in stored_prompts:  # the same under the name that e5 uses
        trained["passage"] = doc_prefix
    return Prompts(query_prefix, doc_prefix, stored_prompts | trained)


def note_other_prompts(prompts):
    """Note the base's prompts that are taken by nobody, since their names do not say for what."""
    others = [name for name in prompts if name not in ("query", "document", "passage")]
    if not others:
        return
    example = next((name for name in others if "query" in name.lower()), others[0])
    text = json.dumps(prompts[example], ensure_ascii=False)
    note(
        f"the base has prompts under other names, {', '.join(others)} ({example}: {text}): to "
        "train with one of them pass it as --query_prefix or --doc_prefix; final/ keeps all"
    )


def note_prompts_of_rows(examples):
    """Note how a row's own prompt is joined with its query, as which base it was written for."""
    first = next(example for example in examples if example.prompt)
    joined = json.dumps(first.prompt + first.query[:40], ensure_ascii=False)
    note(
        f"a row's prompt stands before its query as it is: {joined}; for a base that was trained "
        r"with 'Instruct: ...\nQuery: ' write all of that into the column, line break included"
    )


def note_typed_breaks(prefixes):
    """Note prefixes with a backslash and an n, as a shell and a table make of a line break."""
    for prefix in sorted(prefixes):
        if r"\n" in prefix:
            note(
                rf"the prefix '{prefix}' holds a backslash and an n, which is no line break: in "
                r"bash write $'Instruct: ...\nQuery: ', in a table a real line break"
            )


# ---------------------------------------------------------------- writing


def write_sentence_files(folder, pooling, dimension, max_length, prompts, default_prompt):
    """Write what makes `folder` a SentenceTransformer, as old versions, vLLM and TEI read it."""
    modules = []
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    for i, (path, kind) in enumerate(kinds):
        (folder / path).mkdir(exist_ok=True)
        kind = f"sentence_transformers.models.{kind}"
        modules.append({"idx": i, "name": str(i), "path": path, "type": kind})
    modes = {}
    for mode in POOLING_MODES:
        modes[f"pooling_mode_{mode}"] = POOLINGS.get(mode) == pooling
    pools = {"word_embedding_dimension": dimension, **modes, "include_prompt": True}
    encodes = {
        "prompts": prompts,
        "default_prompt_name": default_prompt if default_prompt in prompts else None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling/config.json", pools)
    write_json(folder / LENGTH_FILE, {"max_seq_length": max_length, "do_lower_case": False})
    write_json(folder / PROMPTS_FILE, encodes)

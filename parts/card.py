"""The model card in final/: what the hub reads of a model, and what a person needs to load it.

It names models and data sets of the hub alone, no folders of this machine, and quotes no texts.
"""

import os
from pathlib import Path

from utils import read_json, recorded_flags

import yaml
from huggingface_hub import ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# merge.py reads the rows below it out of the adapter's card, into that of the merged model
TABLE_HEAD = "| metric | before training | after |"
LICENSE_KEYS = ("license", "license_name", "license_link")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
# as sentence-transformers tags what it saves
SENTENCE_TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction"]
LOCAL_BASE = (
    "Before you publish this folder, write the base's hub id into the lines above, as "
    "`base_model`{and_adapter_config}."
)
SENTENCE_TRANSFORMERS = """\
With sentence-transformers, pooling, prompts and length included:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("MODEL"{remote_code})
queries = model.encode(["how do I reset it?"], prompt_name="query")
documents = model.encode(["Hold the button."], prompt_name="document")
print(model.similarity(queries, documents))
```
"""
BARE_EMBEDDER = """\
With {libraries}, where you put the prompts of `config_sentence_transformers.json` before the texts:

```python
import torch
{imports}

tokenizer = AutoTokenizer.from_pretrained("MODEL", padding_side="right"{remote_code})
{load}
texts = ["how do I reset it?", "Hold the button."]
batch = tokenizer(texts, padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    hidden = model(**batch).last_hidden_state  # (texts, tokens, dimension)
{pool}
vectors = torch.nn.functional.normalize(vectors, dim=-1)
print(vectors @ vectors.T)
```
"""
POOLS = {
    "mean": 'mask = batch["attention_mask"].unsqueeze(-1)\n'
    "vectors = (hidden * mask).sum(1) / mask.sum(1)",
    "cls": "vectors = hidden[:, 0]",
    "last": 'ends = batch["attention_mask"].sum(1) - 1\n'
    "vectors = hidden[torch.arange(len(ends)), ends]",
}
LANGUAGE_MODEL = """\
With {libraries}:

```python
{imports}

tokenizer = AutoTokenizer.from_pretrained("MODEL"{remote_code})
{load}
messages = [{{"role": "user", "content": "2+2?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{thinking}
)
stops = GenerationConfig.from_pretrained("MODEL")  # every stop token, which bases may lack
answer = model.generate(**inputs, generation_config=stops, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
TRANSFORMERS_ADAPTER = """\
With transformers, which finds the base by itself where peft is installed:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto"{remote_code})
```
"""


def write_card(folder, origin, record, metrics):
    """Write README.md into final/, which holds all else already; peft's own card is replaced.

    record: as training_config.json has it. metrics: {name: (before, after)} of the dev sets.
    """
    run = recorded_flags(record)
    base = hub_id(origin.name)
    is_embedder = (folder / "modules.json").is_file()
    # None: all weights were trained
    adapter = read_json(folder / "adapter_config.json")
    data = front_matter(base, origin, hub_id(run.get("dataset_name")), is_embedder, adapter)
    models = "`MODEL` is this folder, or its id on the hub"
    if adapter is not None and not base:
        models += "; `BASE` is the base's"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        introduction(base, is_embedder, adapter, record),
        results(metrics, bool(run.get("sanity_overfit"))),
        f"## Use\n\n{models}.",
        *(embedder_uses if is_embedder else language_model_uses)(origin, base, run, adapter),
    ]
    text = "\n\n".join(part.strip() for part in parts)
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")


# ---------------------------------------------------------------- front matter


def hub_id(name):
    """Return the name of a model or data set that was loaded if it is the hub's, else None."""
    if not name or os.path.exists(name):  # a folder here comes first, as it does in loading
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def front_matter(base, origin, dataset, is_embedder, adapter):
    """Return the ModelCardData: https://huggingface.co/docs/hub/model-cards.

    base, dataset: ids of the hub, or None. adapter: what adapter_config.json holds, or None.
    """
    library = "transformers" if adapter is None else "peft"
    tags = [] if adapter is None else ["lora"]
    if is_embedder:
        library = "sentence-transformers"
        tags = SENTENCE_TAGS + tags
    more = base_license(origin, base)
    if base:
        # a merge, to the hub, is one of several models
        more["base_model_relation"] = "finetune" if adapter is None else "adapter"
    return ModelCardData(
        base_model=base,
        datasets=[dataset] if dataset else None,
        library_name=library,
        pipeline_tag="sentence-similarity" if is_embedder else "text-generation",
        tags=tags or None,
        **more,
    )


def base_license(origin, base):
    """Return {"license": ...} and what goes with it, as the base's card says; {} without a card.

    The hub is not asked: where only the model's files were fetched there is no card.
    """
    path = Path(origin.name) / "README.md"
    try:  # somebody else's file: no reason to end a run
        if not os.path.isdir(origin.name):
            path = try_to_load_from_cache(origin.name, "README.md", revision=origin.revision)
        # else it was not fetched, or is known not to exist
        stored = metadata_load(path) if isinstance(path, str | Path) else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    stored = stored or {}
    found = {}
    for key in LICENSE_KEYS:
        if isinstance(stored.get(key), str):
            found[key] = stored[key]
    link = found.pop("license_link", "")
    if link.startswith(("https://", "http://")):
        found["license_link"] = link
    elif link and base:  # a file beside the base's card
        found["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return found if "license" in found else {}


# ---------------------------------------------------------------- text


def introduction(base, is_embedder, adapter, record):
    """Return the title, and what was trained on how much."""
    kind = "Text-embedding model" if is_embedder else "Language model"
    named = "a base that was loaded from a folder"
    if base:
        named = f"[{base}](https://huggingface.co/{base})"
    made = f"All weights of {named}"
    and_adapter_config = ""
    if adapter is not None:
        made = f"A LoRA adapter of rank {adapter['r']} for {named}"
        and_adapter_config = ", and into `adapter_config.json`, as `base_model_name_or_path`"
    said = f"# {kind}\n\n{made}, trained with {record['data']['train_rows']} rows. "
    said += "`training_config.json` holds all settings and versions, and the names of the files."
    if not base:
        said += "\n\n" + LOCAL_BASE.format(and_adapter_config=and_adapter_config)
    return said


def results(metrics, is_sanity):
    """Return the table of the metrics, {name: (before, after)}, or that there are none."""
    if not metrics:
        return "## Results\n\nNo dev set was measured."
    lines = [TABLE_HEAD, "|---|---|---|"]
    for name, (before, after) in metrics.items():
        lines.append(f"| {name.replace('|', '/')} | {before:.4f} | {after:.4f} |")
    measured = "Measured on the dev sets of the run."
    if is_sanity:
        measured = "Measured on the rows that it was trained on: a test of the training alone."
    table = "\n".join(lines)
    return f"## Results\n\n{measured}\n\n{table}"


def embedder_uses(origin, base, run, adapter):
    """Return how an embedding model is loaded, a text for each library."""
    remote_code = remote_code_of(origin)
    load = f'model = AutoModel.from_pretrained("MODEL"{remote_code}).eval()'
    imports = "from transformers import AutoModel, AutoTokenizer"
    libraries = "transformers"
    served = "TEI and vLLM can serve this folder as it is."
    if adapter is not None:
        load = (
            f"base = AutoModel.from_pretrained({base_arguments(origin, base)})\n"
            'model = PeftModel.from_pretrained(base, "MODEL").eval()'
        )
        imports = f"from peft import PeftModel\n{imports}"
        libraries = "transformers and peft"
        served = "For TEI, vLLM and llama.cpp merge it into its base first."
    bare = BARE_EMBEDDER.format(
        libraries=libraries,
        imports=imports,
        load=load,
        length=max(run["query_max_len"], run["passage_max_len"]),
        pool=POOLS[run["pooling"]],
        remote_code=remote_code,
    )
    return [SENTENCE_TRANSFORMERS.format(remote_code=remote_code), bare, served]


def language_model_uses(origin, base, run, adapter):
    """Return how a language model is loaded, a text for each library."""
    remote_code = remote_code_of(origin)
    load = f'model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto"{remote_code})'
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig"
    libraries = "transformers"
    if adapter is not None:
        load = (
            f"base = AutoModelForCausalLM.from_pretrained({base_arguments(origin, base)}, "
            'dtype="auto")\nmodel = PeftModel.from_pretrained(base, "MODEL")'
        )
        imports = f"from peft import PeftModel\n{imports}"
        libraries = "peft"
    thinking = run.get("enable_thinking")
    asked = f", enable_thinking={thinking.title()}" if thinking in ("true", "false") else ""
    uses = [
        LANGUAGE_MODEL.format(
            libraries=libraries,
            imports=imports,
            load=load,
            thinking=asked,
            remote_code=remote_code,
        )
    ]
    if adapter is not None:
        uses.append(TRANSFORMERS_ADAPTER.format(remote_code=remote_code))
    uses.append(f"With vLLM:\n\n    {vllm_command(origin, base, adapter)}")
    if adapter is not None:
        uses.append("For llama.cpp and Ollama merge it into its base first.")
    if run.get("system_prompt"):
        uses.append("Rows without a system turn were trained with a system prompt: ask with it.")
    return uses


def vllm_command(origin, base, adapter):
    """Return the command that serves a language model."""
    remote_code = " --trust-remote-code" if origin.trust_remote_code else ""
    if adapter is None:
        return f"vllm serve MODEL{remote_code}"
    rank = max([adapter["r"], *(adapter.get("rank_pattern") or {}).values()])
    allowed = next((each for each in VLLM_RANKS if each >= rank), rank)
    revision = f" --revision {origin.revision}" if pinned(origin, base) else ""
    return (
        f"vllm serve {base or 'BASE'}{revision}{remote_code} --enable-lora "
        f"--max-lora-rank {allowed} --lora-modules mine=MODEL --tokenizer MODEL "
        "--generation-config MODEL"
    )


def base_arguments(origin, base):
    """Return what from_pretrained is given to load the base that an adapter belongs to."""
    revision = f', revision="{origin.revision}"' if pinned(origin, base) else ""
    return f'"{base or "BASE"}"{revision}{remote_code_of(origin)}'


def pinned(origin, base):
    """Tell whether a base of the hub was loaded at another revision than its latest."""
    return base is not None and origin.revision not in (None, "main")


def remote_code_of(origin):
    """Return what from_pretrained is given beside for a model that brings code of its own."""
    return ", trust_remote_code=True" if origin.trust_remote_code else ""

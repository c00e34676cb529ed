"""Time samples() on conversations of many turns against rendering and tokenising each once.

    python benchmarks/turns.py                              # a made tokenizer
    python benchmarks/turns.py --model_name Qwen/Qwen3-0.6B # its tokenizer and template

Writes runs/benchmark_turns.json. `once` renders and tokenises a whole conversation, `turns` is
parts.masks.samples, `anew` the same without a memory: every turn's prompt and answer tokenised from
the start. CPU seconds of one thread, the best of the rounds, each with an empty memory. The samples
of `turns` and `anew` must be equal.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent.parent))

from parts.masks import Rules, samples
from parts.template import Chat

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REWRITES = (  # as Qwen3 does, only the last answer has a thinking block
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)
README = Path(__file__).parent.parent / "README.md"
EVERYTHING = Rules(max_length=10**9)


def make_tokenizer(words):
    """Return a byte-level BPE of 20,000 tokens that has read `words`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=20_000,
        special_tokens=["<|im_end|>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def make_conversation(draw, words, turns):
    """Return `turns` turns of 10 to 90 words."""
    messages = []
    for i in range(turns):
        text = " ".join(draw.choices(words, k=draw.randint(10, 90)))
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    return messages


def best_seconds(work, chat, rounds):
    """Return the least CPU seconds that work() takes with an empty memory."""
    seconds = []
    for _ in range(rounds):
        chat.pieces.forget()
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return min(seconds)


def measure(tokenizer, rows, rounds):
    """Return {"once", "turns", "anew": rows a second} of conversations."""
    chat = Chat(tokenizer, False, [])
    slow = Chat(tokenizer, False, [])
    slow.pieces.cuts = None  # nothing is remembered
    ways = {
        "once": lambda: [chat.tokenised(chat.render(row, False)) for row in rows],
        "turns": lambda: [samples(chat, row, None, EVERYTHING) for row in rows],
        "anew": lambda: [samples(slow, row, None, EVERYTHING) for row in rows],
    }
    assert ways["turns"]() == ways["anew"]()
    return {way: len(rows) / best_seconds(work, chat, rounds) for way, work in ways.items()}


def main():
    """Measure every template at every length; print and write the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model_name", help="tokenizer and template of this base [made ones]")
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 10, 40, 100])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="runs/benchmark_turns.json")
    args = parser.parse_args()
    words = [word for word in README.read_text(encoding="utf-8").split() if "<" not in word]
    if args.model_name:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name)
        templates = {"its own": tokenizer.chat_template}
    else:
        tokenizer = make_tokenizer(words)
        templates = {"chatml": CHATML, "rewrites history": REWRITES}
    results = vars(args)
    for name, template in templates.items():
        tokenizer.chat_template = template
        for turns in args.turns:
            draw = random.Random(turns)
            rows = [make_conversation(draw, words, turns) for _ in range(max(3, 400 // turns))]
            rates = results[f"{name}, {turns} turns"] = measure(tokenizer, rows, args.rounds)
            times = {way: rates["once"] / rates[way] for way in ("turns", "anew")}
            print(
                f"{name}, {turns} turns: once {rates['once']:.0f} rows/s; "
                f"turns {rates['turns']:.0f} ({times['turns']:.1f}x), "
                f"anew {rates['anew']:.1f} ({times['anew']:.1f}x)",
                flush=True,
            )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

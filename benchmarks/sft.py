"""Compare a step of train_sft_lora.py with TRL's SFTTrainer: same model, rows, LoRA, micro-batch.

    pip install -r tests/requirements.txt "trl>=1.16,<2"
    python benchmarks/sft.py        # all cases, alternating; writes runs/benchmark_sft.json
    python benchmarks/sft.py --cases checkpointing

The model has Qwen3's shape and vocabulary (151,936 tokens) with random weights, the rows are made:
a prompt of about 250 tokens, an answer of about 60. Loss on the answers alone on both sides, which
accumulate alike. Each side runs in a process of its own, ours and theirs in turn; tokens/s are
those of the steps after the first, padding not counted; memory is the process' peak, on a GPU the
GPU's.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
BATCH, ACCUMULATION, RANK, ALPHA, LENGTH = 2, 8, 16, 32, 2048
SHAPES = {  # hidden, layers, heads, key-value heads, head_dim, intermediate
    "cpu": (512, 8, 8, 4, 64, 1536),  # 103M weights
    "cuda": (1024, 28, 16, 8, 128, 3072),  # Qwen3-0.6B
}
CASES = {"checkpointing": True, "no checkpointing": False}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows(count, prompt_words=200, answer_words=50):
    """Return rows of lengths as in extraction tasks: long prompts of all lengths, short answers.

    Their words are those of the median row.
    """
    rng = random.Random(0)
    words = [f"word{i}" for i in range(3000)]

    def text(mean, spread, least):
        size = max(least, int(rng.lognormvariate(0, spread) * mean))
        return " ".join(rng.choice(words) for _ in range(size))

    rows = []
    for _ in range(count):
        question = {"role": "user", "content": text(prompt_words, 0.6, prompt_words // 10)}
        answer = {"role": "assistant", "content": text(answer_words, 0.6, 4)}
        rows.append({"messages": [question, answer]})
    return rows


def make_tokenizer(texts):
    """Return a tokenizer that knows the words of `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )


def make_model(folder, texts, device, shape=None, vocabulary=151936):
    """Save a random Qwen3 with a tokenizer that knows the words of `texts`.

    shape: as in SHAPES, whose entry of the device it is if left out.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    make_tokenizer(texts).save_pretrained(folder)
    hidden, layers, heads, kv_heads, head_dim, intermediate = shape or SHAPES[device]
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):  # on a GPU drawing 1.7 billion numbers takes no time
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)


def timer():
    """Return a Trainer callback that keeps the time at which each step ended."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        ends: list = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.perf_counter())

    return Timer()


def timed_training():
    """Have all that is trained from now on timed; return the timer."""
    from transformers import Trainer

    clock = timer()
    train = Trainer.train

    def timed(trainer, *rest, **more):
        trainer.add_callback(clock)
        return train(trainer, *rest, **more)

    Trainer.train = timed
    return clock


def run_ours(model, rows_file, folder, checkpointing):
    """Train with our script; return the end of each step and padded per real tokens."""
    import train_sft_lora

    clock = timed_training()
    flags = (
        f"--model_name {model} --train_file {rows_file} --output_dir {folder} "
        f"--max_length {LENGTH} --batch_size {BATCH} --gradient_accumulation {ACCUMULATION} "
        f"--epochs 1 --lora_r {RANK} --lora_alpha {ALPHA} --dev_size 0 --checkpoint_strategy no "
        f"--report_to none --{'' if checkpointing else 'no-'}gradient_checkpointing"
    )
    report = train_sft_lora.main(flags.split())
    return clock.ends, report["padded_per_real_token"]


def their_settings(folder, checkpointing):
    """Return the settings of a TRL trainer that are those of our side."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "max_length": LENGTH,
        "gradient_checkpointing": checkpointing,
        "bf16": gpu,
        "use_cpu": not gpu,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def their_training(trainer_class, model, settings, data, clock=None, dtype=None):
    """Train with a TRL trainer; return the end of each step.

    clock: another callback that watches the steps; dtype: that the base is loaded in.
    """
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clock = clock or timer()
    if dtype is None:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        args=settings,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    return clock.ends


def their_data(rows_file):
    """Return rows of messages as TRL takes them: prompt and completion."""
    from datasets import Dataset

    rows = [json.loads(line)["messages"] for line in open(rows_file, encoding="utf-8")]
    return Dataset.from_dict(
        {"prompt": [row[:1] for row in rows], "completion": [row[1:] for row in rows]}
    )


def run_theirs(model, rows_file, folder, checkpointing):
    """Train with TRL's SFTTrainer on prompt/completion rows; return the end of each step."""
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        **their_settings(folder, checkpointing),
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=2e-4,
        completion_only_loss=True,
        logging_strategy="no",
    )
    return their_training(SFTTrainer, model, settings, their_data(rows_file)), None


def peak_gib():
    """Return the most memory that this process had, on a GPU that it had there."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_side(job):
    """Run one side in this process and print its figures as the last line."""
    run = run_ours if job.pop("side") == "ours" else run_theirs
    ends, padding = run(**job)
    figures = {
        "seconds_per_step": (ends[-1] - ends[0]) / (len(ends) - 1),
        "padded_per_real_token": padding,
        "peak_gib": peak_gib(),
    }
    print(json.dumps(figures))


def figures_of(script, job):
    """Run one side in a process of its own; return the figures that it prints."""
    done = subprocess.run(
        [sys.executable, script, "--side", json.dumps(job)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(folder, rows):
    """Write rows as JSON lines into a folder; return the path."""
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def count_tokens(model, rows):
    """Return the tokens of a step, padding not counted, averaged over all rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    return sum(map(len, tokenizer(texts)["input_ids"])) / len(rows) * BATCH * ACCUMULATION


def run_case(case, rounds, model, rows_file, folder):
    """Run a case, ours and theirs alternating; return the figures of both."""
    sides = {"ours": [], "theirs": []}
    for i in range(rounds):
        for side, figures in sides.items():
            job = {
                "side": side,
                "model": model,
                "rows_file": rows_file,
                "checkpointing": CASES[case],
                "folder": f"{folder}/{case}{side}{i}".replace(" ", ""),
            }
            figures.append(figures_of(__file__, job))
    return sides


def compare(case, sides, tokens):
    """Print the medians of a case, `tokens` a step; return what is written of it."""
    speeds, memories = [], []
    for ours, theirs in zip(sides["ours"], sides["theirs"], strict=True):
        speeds.append(theirs["seconds_per_step"] / ours["seconds_per_step"])
        memories.append(ours["peak_gib"] / theirs["peak_gib"])
    rate, peak = {}, {}
    for side, runs in sides.items():
        rate[side] = tokens / statistics.median(each["seconds_per_step"] for each in runs)
        peak[side] = statistics.median(each["peak_gib"] for each in runs)
    found = {
        "tokens_per_step": tokens,
        "speed_ratio": statistics.median(speeds),
        "memory_ratio": statistics.median(memories),
        "padding": sides["ours"][0]["padded_per_real_token"],
        "runs": sides,
    }
    print(
        f"{case}: {rate['ours']:,.0f} against {rate['theirs']:,.0f} tokens/s "
        f"({found['speed_ratio']:.2f}x), {peak['ours']:.1f} against {peak['theirs']:.1f} GiB "
        f"({found['memory_ratio']:.2f}x), padded/real {found['padding']:.2f}",
        flush=True,
    )
    return found


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=3, help="measured steps, after one that warms up")
    add("--out", default="runs/benchmark_sft.json")
    add("--side", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Run the cases, ours and theirs alternating; print medians, and write all figures to --out."""
    args = parse_args()
    if args.side:
        return run_side(args.side)
    import torch

    results = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(BATCH * ACCUMULATION * (args.steps + 1))
        model = f"{folder}/model"
        make_model(model, [turn["content"] for row in rows for turn in row["messages"]], device)
        rows_file = write_rows(folder, rows)
        tokens = count_tokens(model, rows)
        for case in args.cases:
            sides = run_case(case, args.rounds, model, rows_file, folder)
            results[case] = {"device": device} | compare(case, sides, tokens)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Compare a step of train_sft_lora.py with TRL's SFTTrainer: same model, rows, LoRA, micro-batch, accumulation.

    pip install -r tests/requirements.txt "trl>=1.16,<2"
    python benchmarks/sft.py                      # all cases, alternating; writes runs/benchmark_sft.json
    python benchmarks/sft.py --cases checkpointing

The model has Qwen3's shape and vocabulary (151,936 tokens) with random weights, the rows are made: a prompt of about
250 tokens, an answer of about 60. Loss on the answers alone on both sides. Each side runs in a process of its own, ours
and theirs in turn; tokens/s are those of the steps after the first, padding not counted; memory is the process' peak,
on a GPU the GPU's.
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
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_rows(count):
    """Return rows whose texts have lengths as in extraction tasks: long prompts of differing length, short answers."""
    rng, words = random.Random(0), [f"word{i}" for i in range(3000)]

    def text(mean, spread, least):
        size = max(least, int(rng.lognormvariate(0, spread) * mean))
        return " ".join(rng.choice(words) for _ in range(size))

    roles = ("user", 200, 0.6, 20), ("assistant", 50, 0.6, 4)
    return [
        {
            "messages": [
                {"role": role, "content": text(mean, spread, least)}
                for role, mean, spread, least in roles
            ]
        }
        for _ in range(count)
    ]


def make_model(folder, rows, device):
    """Save a random Qwen3 with a tokenizer that knows the rows' words."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        pre_tokenizers.ByteLevel.alphabet(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(
        [turn["content"] for row in rows for turn in row["messages"]], trainer
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    hidden, layers, heads, kv_heads, head_dim, intermediate = SHAPES[device]
    config = Qwen3Config(
        vocab_size=151936,
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
    Qwen3ForCausalLM(config).to(
        torch.bfloat16 if device == "cuda" else torch.float32
    ).save_pretrained(folder)


def timer():
    """Return a Trainer callback that keeps the time at which each step ended."""
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        ends: list = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ends.append(time.perf_counter())

    return Timer()


def run_ours(model, rows_file, folder, checkpointing):
    """Train with our script; return the end of each step and padded per real tokens."""
    import train_sft_lora
    import utils

    clock, train = timer(), utils.train

    def timed(trainer, *rest):
        trainer.add_callback(clock)
        return train(trainer, *rest)

    utils.train = timed
    flags = (
        f"--model_name {model} --train_file {rows_file} --output_dir {folder} --max_length {LENGTH} "
        f"--batch_size {BATCH} --gradient_accumulation {ACCUMULATION} --epochs 1 --lora_r {RANK} "
        f"--lora_alpha {ALPHA} --dev_size 0 --checkpoint_strategy no --report_to none "
        f"--{'' if checkpointing else 'no-'}gradient_checkpointing"
    )
    report = train_sft_lora.main(flags.split())
    return clock.ends, report["padded_per_real_token"]


def run_theirs(model, rows_file, folder, checkpointing):
    """Train with TRL's SFTTrainer on prompt/completion rows; return the end of each step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [json.loads(line)["messages"] for line in open(rows_file, encoding="utf-8")]
    data = Dataset.from_dict(
        {"prompt": [row[:1] for row in rows], "completion": [row[1:] for row in rows]}
    )
    clock, gpu = timer(), torch.cuda.is_available()
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=1,
        learning_rate=2e-4,
        max_length=LENGTH,
        completion_only_loss=True,
        gradient_checkpointing=checkpointing,
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16 if gpu else torch.float32
        ),
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    return clock.ends, None


def run_side(job):
    """Run one side in this process and print its figures as the last line."""
    import torch

    ends, padding = {"ours": run_ours, "theirs": run_theirs}[job.pop("side")](**job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    seconds = (ends[-1] - ends[0]) / (len(ends) - 1)
    print(
        json.dumps(
            {"seconds_per_step": seconds, "padded_per_real_token": padding, "peak_gib": peak}
        )
    )


def count_tokens(model, rows):
    """Return the tokens of a step, padding not counted, averaged over all rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    return sum(map(len, tokenizer(texts)["input_ids"])) / len(rows) * BATCH * ACCUMULATION


def main():
    """Run the cases, ours and theirs alternating; print medians, and write every figure to --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=3, help="measured steps, after one that warms up"
    )
    parser.add_argument("--out", default="runs/benchmark_sft.json")
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return run_side(args.side)
    import torch

    results, device = {}, "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        rows, model = make_rows(BATCH * ACCUMULATION * (args.steps + 1)), f"{folder}/model"
        make_model(model, rows, device)
        rows_file = Path(folder) / "rows.jsonl"
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokens = count_tokens(model, rows)
        for case in args.cases:
            sides = {"ours": [], "theirs": []}
            for i in range(args.rounds):
                for side, figures in sides.items():
                    job = {
                        "side": side,
                        "model": model,
                        "rows_file": str(rows_file),
                        "checkpointing": CASES[case],
                    }
                    job["folder"] = f"{folder}/{case}{side}{i}".replace(" ", "")
                    done = subprocess.run(
                        [sys.executable, __file__, "--side", json.dumps(job)],
                        capture_output=True,
                        text=True,
                        env=os.environ | {"HF_HUB_OFFLINE": "1"},
                    )
                    if done.returncode:
                        sys.exit(done.stderr)
                    figures.append(json.loads(done.stdout.splitlines()[-1]))
            pairs = list(zip(sides["ours"], sides["theirs"], strict=True))
            speed = statistics.median(
                b["seconds_per_step"] / a["seconds_per_step"] for a, b in pairs
            )
            memory = statistics.median(a["peak_gib"] / b["peak_gib"] for a, b in pairs)
            rate = {
                s: tokens / statistics.median(f["seconds_per_step"] for f in runs)
                for s, runs in sides.items()
            }
            peak = {s: statistics.median(f["peak_gib"] for f in runs) for s, runs in sides.items()}
            padding = sides["ours"][0]["padded_per_real_token"]
            results[case] = {
                "device": device,
                "tokens_per_step": tokens,
                "speed_ratio": speed,
                "memory_ratio": memory,
                "padding": padding,
                "runs": sides,
            }
            print(
                f"{case}: {rate['ours']:,.0f} against {rate['theirs']:,.0f} tokens/s ({speed:.2f}x), "
                f"{peak['ours']:.1f} against {peak['theirs']:.1f} GiB ({memory:.2f}x), padded/real {padding:.2f}",
                flush=True,
            )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

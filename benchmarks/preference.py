"""Compare preference steps of train_sft_lora.py with TRL's DPOTrainer: same model, pairs, LoRA.

    pip install -r tests/requirements.txt "trl>=1.16,<2"
    python benchmarks/preference.py     # alternating; writes benchmarks/results/preference.json
    python benchmarks/preference.py --learn DATA

With --learn nothing is compared: what a tiny Qwen3 learns from DATA/{train,dev}.jsonl. Loss
(sigmoid) and micro-batch are the same on both sides, model and tokenizer those of benchmarks/sft.py
(Qwen3's shape, 151,936 tokens of vocabulary); a prompt has about 480 tokens, an answer about 120.
Each side runs in a process of its own. pairs/s are those of one epoch: the steps after the first,
and, on our side, the reference log-probabilities that are computed before them; memory is the
process' peak.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sft import (
    ALPHA,
    BATCH,
    LENGTH,
    RANK,
    figures_of,
    make_model,
    peak_gib,
    their_settings,
    their_training,
    timed_training,
    write_rows,
)

ACCUMULATION, BETA = 4, 0.1
RESULTS = Path(__file__).parent / "results/preference.json"


def make_pairs(count, prompt=400, answer=100):
    """Return pairs of texts of differing lengths; prompt, answer: their words, in the median."""
    rng = random.Random(0)
    words = [f"word{i}" for i in range(3000)]

    def text(mean):
        size = max(8, int(rng.lognormvariate(0, 0.3) * mean))
        return " ".join(rng.choice(words) for _ in range(size))

    rows = []
    for _ in range(count):
        rows.append({"prompt": text(prompt), "chosen": text(answer), "rejected": text(answer)})
    return rows


def timed_reference():
    """Have what is computed before training timed; return the list for the seconds a pair took."""
    from parts.preference import PreferenceTrainer

    took = []
    before_training = PreferenceTrainer.before_training

    def timed(trainer):
        started = time.perf_counter()
        before_training(trainer)
        took.append((time.perf_counter() - started) / len(trainer.train_dataset))

    PreferenceTrainer.before_training = timed
    return took


def run_ours(model, rows_file, folder, checkpointing):
    """Train with our script; return the end of each step, and each pair's seconds of reference."""
    import train_sft_lora

    clock = timed_training()
    took = timed_reference()
    flags = (
        f"--model_name {model} --train_file {rows_file} --output_dir {folder} "
        f"--max_length {LENGTH} --pref_loss sigmoid --pref_beta {BETA} --batch_size {BATCH} "
        f"--gradient_accumulation {ACCUMULATION} --epochs 1 --lora_r {RANK} --lora_alpha {ALPHA} "
        "--dev_size 0 --checkpoint_strategy no --report_to none --lr 1e-4 "
        f"--{'' if checkpointing else 'no-'}gradient_checkpointing"
    )
    report = train_sft_lora.main(flags.split())
    return clock.ends, took[0], report["first_loss"]


def run_theirs(model, rows_file, folder, checkpointing):
    """Train with TRL's DPOTrainer; return the end of each step."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in open(rows_file, encoding="utf-8")]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    data = {}
    for name, role in roles.items():
        data[name] = [[{"role": role, "content": row[name]}] for row in rows]
    settings = DPOConfig(
        **their_settings(folder, checkpointing),
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=1e-4,
        beta=BETA,
        logging_steps=10,
    )
    return their_training(DPOTrainer, model, settings, Dataset.from_dict(data)), 0.0, None


def run_side(job):
    """Run one side in this process and print its figures as the last line."""
    run = run_ours if job.pop("side") == "ours" else run_theirs
    ends, reference, loss = run(**job)
    pair = (ends[-1] - ends[0]) / (len(ends) - 1) / BATCH / ACCUMULATION
    figures = {
        "pairs_per_second": 1 / (pair + reference),
        "pairs_per_second_in_steps": 1 / pair,
        "peak_gib": peak_gib(),
        "first_loss": loss,
    }
    print(json.dumps(figures))


def texts_of(row):
    """Return the texts of the turns of a pair."""
    sides = [side for side in row.values() if isinstance(side, list)]
    return [turn["content"] for side in sides for turn in side]


def learn(data, folder):
    """Train a random tiny Qwen3 on pairs; return its metrics, training accuracies, the seconds."""
    sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("", "examples")]
    import train_sft_lora

    import tiny_qwen3

    texts = []
    for line in (data / "train.jsonl").open(encoding="utf-8"):
        texts += texts_of(json.loads(line))
    tiny_qwen3.make_model(f"{folder}/model", texts, vocabulary=6000, positions=2048)
    flags = (
        f"--model_name {folder}/model --train_file {data}/train.jsonl --dev_file {data}/dev.jsonl "
        f"--output_dir {folder}/run --pref_loss sigmoid --lr 2e-3 --epochs 3 --max_length 1024 "
        "--no-gradient_checkpointing --report_to none"
    )
    report = train_sft_lora.main(flags.split())
    logs = json.loads(Path(f"{folder}/run/detailed_training_logs.json").read_text())
    return {
        "flags": flags.replace(str(folder), "RUN"),
        "metrics": report["metrics"],
        "train_accuracy": [entry["accuracy"] for entry in logs if "loss" in entry],
        "seconds": report["seconds"],
    }


def run_both(rounds, steps, checkpointing, device):
    """Run both sides in turn; return the figures of their runs."""
    sides = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        rows = make_pairs(BATCH * ACCUMULATION * (steps + 1))
        model = f"{folder}/model"
        make_model(model, [text for row in rows for text in row.values()], device)
        rows_file = write_rows(folder, rows)
        for i in range(rounds):
            for side, figures in sides.items():
                job = {
                    "side": side,
                    "model": model,
                    "rows_file": rows_file,
                    "folder": f"{folder}/{side}{i}",
                    "checkpointing": checkpointing,
                }
                figures.append(figures_of(__file__, job))
                print(side, figures[-1], flush=True)
    return sides


def summary(sides):
    """Return the medians of both sides, ours by theirs, and the runs."""
    medians = {}
    for side, runs in sides.items():
        names = [name for name in runs[0] if name != "first_loss"]
        medians[side] = {name: statistics.median(run[name] for run in runs) for name in names}
    ratios = {}
    for name, ours in medians["ours"].items():
        ratios[name] = ours / medians["theirs"][name]
    return {"medians": medians, "ours_by_theirs": ratios, "runs": sides}


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=2)
    add("--steps", type=int, default=2, help="measured steps, after one that warms up")
    add("--no_checkpointing", action="store_true", help="no gradient checkpointing on both sides")
    add("--learn", type=Path, metavar="DIR", help="a folder of train.jsonl and dev.jsonl")
    add("--side", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Run both sides in turn; print medians, and write every figure."""
    args = parse_args()
    if args.side:
        return run_side(args.side)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.learn:
        with tempfile.TemporaryDirectory() as folder:
            report[f"learning {args.learn.name}"] = learn(args.learn, folder)
        return RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    sides = run_both(args.rounds, args.steps, not args.no_checkpointing, device)
    key = f"{device}, checkpointing {'off' if args.no_checkpointing else 'on'}"
    report[key] = summary(sides)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report[key]["medians"]), json.dumps(report[key]["ours_by_theirs"]))


if __name__ == "__main__":
    main()

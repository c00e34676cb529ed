"""Compare preference steps of train_sft_lora.py with TRL's DPOTrainer: same model, pairs, LoRA, sigmoid, micro-batch.

    pip install -r tests/requirements.txt "trl>=1.16,<2"
    python benchmarks/preference.py               # alternating; writes benchmarks/results/preference.json
    python benchmarks/preference.py --learn DATA  # no comparison: what a tiny Qwen3 learns from DATA/{train,dev}.jsonl

Model and tokenizer are those of benchmarks/sft.py (Qwen3's shape, 151,936 tokens of vocabulary); a prompt has about 480
tokens, an answer about 120. Each side runs in a process of its own. pairs/s are those of one epoch: the steps after the
first, and, on our side, the reference log-probabilities that are computed before them; memory is the process' peak.
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

from sft import ALPHA, RANK, make_model, timer

BATCH, ACCUMULATION, LENGTH, BETA = 2, 4, 2048, 0.1
RESULTS = Path(__file__).parent / "results/preference.json"


def make_pairs(count):
    """Return pairs of texts: prompts four times as long as the answers, all of differing lengths."""
    rng, words = random.Random(0), [f"word{i}" for i in range(3000)]

    def text(mean):
        return " ".join(
            rng.choice(words) for _ in range(max(8, int(rng.lognormvariate(0, 0.3) * mean)))
        )

    return [{"prompt": text(400), "chosen": text(100), "rejected": text(100)} for _ in range(count)]


def run_ours(model, rows_file, folder, checkpointing):
    """Train with our script; return the end of each step, and the seconds that the reference took for each pair."""
    import train_sft_lora
    import utils

    clock, train, before = timer(), utils.train, train_sft_lora.PreferenceTrainer.before_training
    took = []

    def timed(trainer, *rest):
        trainer.add_callback(clock)
        return train(trainer, *rest)

    def timed_reference(trainer):
        started = time.perf_counter()
        before(trainer)
        took.append((time.perf_counter() - started) / len(trainer.train_dataset))

    utils.train, train_sft_lora.PreferenceTrainer.before_training = timed, timed_reference
    flags = (
        f"--model_name {model} --train_file {rows_file} --output_dir {folder} --max_length {LENGTH} "
        f"--pref_loss sigmoid --pref_beta {BETA} --batch_size {BATCH} --gradient_accumulation {ACCUMULATION} "
        f"--epochs 1 --lora_r {RANK} --lora_alpha {ALPHA} --dev_size 0 --checkpoint_strategy no --report_to none "
        f"--lr 1e-4 --{'' if checkpointing else 'no-'}gradient_checkpointing"
    )
    report = train_sft_lora.main(flags.split())
    return clock.ends, took[0], report["first_loss"]


def run_theirs(model, rows_file, folder, checkpointing):
    """Train with TRL's DPOTrainer; return the end of each step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in open(rows_file, encoding="utf-8")]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    data = {
        name: [[{"role": role, "content": row[name]}] for row in rows]
        for name, role in roles.items()
    }
    clock, gpu = timer(), torch.cuda.is_available()
    arguments = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=1,
        learning_rate=1e-4,
        beta=BETA,
        max_length=LENGTH,
        gradient_checkpointing=checkpointing,
        bf16=gpu,
        use_cpu=not gpu,
        save_strategy="no",
        report_to=[],
        logging_steps=10,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.bfloat16 if gpu else torch.float32
        ),
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
    )
    trainer.train()
    return clock.ends, 0.0, None


def run_side(job):
    """Run one side in this process and print its figures as the last line."""
    import torch

    ends, reference, loss = {"ours": run_ours, "theirs": run_theirs}[job.pop("side")](**job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    pair = (ends[-1] - ends[0]) / (len(ends) - 1) / BATCH / ACCUMULATION
    figures = {
        "pairs_per_second": 1 / (pair + reference),
        "pairs_per_second_in_steps": 1 / pair,
        "peak_gib": peak,
    }
    print(json.dumps(figures | {"first_loss": loss}))


def learn(data, folder):
    """Train a random tiny Qwen3 on pairs; return its metrics, the last logged training accuracy, and the seconds."""
    sys.path[:0] = [str(Path(__file__).parent.parent / name) for name in ("", "examples")]
    import train_sft_lora

    import tiny_qwen3

    rows = [json.loads(line) for line in (data / "train.jsonl").open(encoding="utf-8")]
    texts = [
        turn["content"]
        for row in rows
        for side in row.values()
        if isinstance(side, list)
        for turn in side
    ]
    tiny_qwen3.make_model(f"{folder}/model", texts, vocabulary=6000, positions=2048)
    flags = (
        f"--model_name {folder}/model --train_file {data}/train.jsonl --dev_file {data}/dev.jsonl"
    )
    flags += f" --output_dir {folder}/run"
    flags += " --pref_loss sigmoid --lr 2e-3 --epochs 3 --max_length 1024 --no-gradient_checkpointing --report_to none"
    report = train_sft_lora.main(flags.split())
    logs = json.loads(Path(f"{folder}/run/detailed_training_logs.json").read_text())
    trained = [entry["accuracy"] for entry in logs if "loss" in entry]
    return {"flags": flags.replace(str(folder), "RUN"), "metrics": report["metrics"], "train_accuracy": trained,
            "seconds": report["seconds"]}  # fmt: skip


def main():
    """Run both sides in turn; print medians, and write every figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=2, help="measured steps, after one that warms up"
    )
    parser.add_argument(
        "--no_checkpointing", action="store_true", help="gradient checkpointing off on both sides"
    )
    parser.add_argument(
        "--learn", type=Path, metavar="DIR", help="a folder of train.jsonl and dev.jsonl"
    )
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return run_side(args.side)
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.learn:
        with tempfile.TemporaryDirectory() as folder:
            report[f"learning {args.learn.name}"] = learn(args.learn, folder)
        return RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    import torch

    device, sides = "cuda" if torch.cuda.is_available() else "cpu", {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        rows, model = make_pairs(BATCH * ACCUMULATION * (args.steps + 1)), f"{folder}/model"
        texts = [{"messages": [{"content": text} for text in row.values()]} for row in rows]
        make_model(model, texts, device)
        rows_file = Path(folder) / "rows.jsonl"
        rows_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for i in range(args.rounds):
            for side, figures in sides.items():
                job = {
                    "side": side,
                    "model": model,
                    "rows_file": str(rows_file),
                    "folder": f"{folder}/{side}{i}",
                }
                job["checkpointing"] = not args.no_checkpointing
                command = [sys.executable, __file__, "--side", json.dumps(job)]
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
                if done.returncode:
                    sys.exit(done.stderr)
                figures.append(json.loads(done.stdout.splitlines()[-1]))
                print(side, figures[-1], flush=True)
    medians = {side: {name: statistics.median(run[name] for run in runs) for name in runs[0] if name != "first_loss"}
               for side, runs in sides.items()}  # fmt: skip
    ratios = {name: medians["ours"][name] / medians["theirs"][name] for name in medians["ours"]}
    key = f"{device}, checkpointing {'off' if args.no_checkpointing else 'on'}"
    report[key] = {"medians": medians, "ours_by_theirs": ratios, "runs": sides}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report[key]["medians"]), json.dumps(ratios))


if __name__ == "__main__":
    main()

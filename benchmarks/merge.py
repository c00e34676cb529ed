"""Merge a LoRA adapter into a 1.2 GB bf16 base: merge.py against peft's merge_and_unload.

    python benchmarks/merge.py --rounds 3

The base has the shape of Qwen3-0.6B (random weights), the adapter r 16 on all linear layers. Each
side merges in a process of its own, alternating, up to an fsync. `seconds` is the work without
imports, `command_seconds` the whole process, as a user waits for it; memory is the peak above an
interpreter that has only imported torch. The limit is a plain file copy with fsync.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
MEASURED = """
import os, re, sys, time, torch
sys.argv = sys.argv[1:]
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
bare = peak()
{imports}
started = time.perf_counter()
{body}
print("MEASURED", time.perf_counter() - started, peak() - bare)
"""
SIDES = {
    "ours": (
        f"sys.path.insert(0, {str(ROOT)!r})\nimport merge",
        'merge.main(["--base_model_path", sys.argv[0], "--lora_adapter_path", sys.argv[1], '
        '"--output_path", sys.argv[2], "--training_precision", "bfloat16", "--verify", "off"])',
    ),
    "peft": (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM",
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[0], dtype=torch.bfloat16)\n"
        "model = PeftModel.from_pretrained(model, sys.argv[1]).merge_and_unload()\n"
        "model.save_pretrained(sys.argv[2])\n"
        'os.fsync(os.open(sys.argv[2] + "/model.safetensors", os.O_RDONLY))',
    ),
    "copy": (
        "import shutil",
        "os.makedirs(sys.argv[2])\n"
        'source, target = [folder + "/model.safetensors" for folder in sys.argv[::2]]\n'
        "shutil.copyfile(source, target)\nos.fsync(os.open(target, os.O_RDONLY))",
    ),
}


def make_model(folder, layers):
    """Write base and adapter, once."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.002)
    model.save_pretrained(folder / "adapter")


def measure(side, folder):
    """Run one side in a process of its own; returns (seconds, MiB above bare, whole seconds)."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    imports, body = SIDES[side]
    code = MEASURED.format(imports=imports, body=body)
    started = time.perf_counter()
    command = [sys.executable, "-c", code, folder / "base", folder / "adapter", out]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    command_seconds = time.perf_counter() - started
    seconds, mebibytes = map(float, done.stdout.split("MEASURED")[1].split())
    return seconds, mebibytes, command_seconds


def measure_all(folder, rounds):
    """Return {side: [what measure() returns]}, the sides in turn."""
    runs = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side in SIDES:
            seconds, mebibytes, command_seconds = measure(side, folder)
            runs[side].append((seconds, mebibytes, command_seconds))
            print(f"{side}: {seconds:.2f} s, {mebibytes:.0f} MiB above bare", flush=True)
    return runs


def summary(runs, gigabytes):
    """Return the medians of all runs, and how many times as fast as peft ours is."""
    seconds = {}
    mebibytes = {}
    command_seconds = {}
    for side, rows in runs.items():
        seconds[side] = statistics.median(row[0] for row in rows)
        mebibytes[side] = statistics.median(row[1] for row in rows)
        command_seconds[side] = statistics.median(row[2] for row in rows)
    return {
        "seconds": seconds,
        "mebibytes_above_bare": mebibytes,
        "gigabytes_per_second": {side: gigabytes / each for side, each in seconds.items()},
        "command_seconds": command_seconds,
        "speedup": {
            "work": seconds["peft"] / seconds["ours"],
            "command": command_seconds["peft"] / command_seconds["ours"],
        },
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--folder", metavar="DIR", help="where the files go [a temporary folder]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        folder = Path(folder)
        make_model(folder, args.layers)
        gigabytes = (folder / "base/model.safetensors").stat().st_size / 1e9
        runs = measure_all(folder, args.rounds)
    facts = {"torch": torch.__version__, "cores": os.cpu_count()}
    report = {"gigabytes": gigabytes, "rounds": args.rounds, "runs": runs}
    report |= facts | summary(runs, gigabytes)
    path = ROOT / "benchmarks/results/merge.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    del report["runs"]
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

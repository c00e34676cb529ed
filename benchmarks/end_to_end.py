"""Train, merge, convert to GGUF, quantise, and evaluate the same rows at every stage.

    python benchmarks/end_to_end.py --data NER_FOLDER --llama_cpp LLAMA_CPP

NER_FOLDER holds stage1_train.jsonl (chats whose answers are JSON); LLAMA_CPP is llama.cpp's source;
llama-cpp-python with its server must be installed. A Qwen3 of 4 layers of 256 with random weights
and Qwen2's real tokenizer half learns 100 rows (all weights), LoRA learns the rest. It is far too
small to find names in new texts, so what is evaluated is what it has learnt: the same rows on the
base, with the adapter, merged, as f16 GGUF and as quantised GGUF behind a server.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import torch
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).parent.parent
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUIET = ["--overwrite", "--report_to", "none"]
LEARN = ["--dev_size", "0", "--weight_decay", "0", *QUIET]
ASK = ["--eval_generate", "100", "--max_new_tokens", "96", *QUIET]


def make_tokenizer(llama_cpp, folder):
    """Rebuild Qwen2's tokenizer from the vocabulary that llama.cpp tests with."""
    sys.path.insert(0, str(llama_cpp / "gguf-py"))
    from gguf import GGUFReader

    fields = GGUFReader(llama_cpp / "models/ggml-vocab-qwen2.gguf").fields

    def read(name):
        field = fields[f"tokenizer.ggml.{name}"]
        return [field.parts[i] for i in field.data]

    tokens = [bytes(part).decode() for part in read("tokens")]
    merges = [bytes(part).decode() for part in read("merges")]
    plain = [int(part[0]) == 1 for part in read("token_type")]
    tokenizer = Qwen2TokenizerFast(
        vocab={token: i for i, token in enumerate(tokens) if plain[i]},
        merges=[tuple(merge.split(" ")) for merge in merges],
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_base(llama_cpp, folder):
    """Save the random Qwen3."""
    tokenizer = make_tokenizer(llama_cpp, folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=768,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_rows(data, folder):
    """Write a hundred rows, half of them without a name (all), and those with names alone (pos)."""
    rows = [json.loads(line) for line in (data / "stage1_train.jsonl").open(encoding="utf-8")]
    counts = [len(json.loads(row["messages"][-1]["content"])["persons"]) for row in rows]
    short = [i for i, row in enumerate(rows) if len(row["messages"][1]["content"]) < 80]
    found = [i for i in short if counts[i]][:50]
    empty = [i for i in short if not counts[i]][:50]
    for name, part in (("all", found + empty), ("pos", found)):
        lines = (json.dumps(rows[i], ensure_ascii=False) + "\n" for i in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def run(script, *flags):
    print(">", script, *flags, flush=True)
    subprocess.run([sys.executable, ROOT / script, *map(str, flags)], check=True)


def evaluate(folder, name, *flags):
    """Return the metrics of the two dev sets."""
    files = []
    for dev in ("all", "pos"):
        files += ["--dev_file", f"{dev}={folder / dev}.jsonl"]
    out = folder / f"eval-{name}"
    run("train_sft_lora.py", "--eval_only", *flags, *files, *ASK, "--output_dir", out)
    return json.loads((out / "evaluation_report.json").read_text())["metrics"]


def evaluate_gguf(folder, name, path):
    """Return the metrics of a GGUF behind llama.cpp's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", path]
    command += ["--n_ctx", "1024", "--port", str(port)]
    server = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").read()
                break
            except OSError:
                time.sleep(0.5)
        return evaluate(folder, name, "--endpoint", f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait()


def train(folder, model, out, *flags):
    """Train on all rows."""
    files = ["--train_file", folder / "all.jsonl", "--output_dir", folder / out]
    run("train_sft_lora.py", "--model_name", folder / model, *files, *flags, *LEARN)


def make_models(folder, llama_cpp, kind):
    """Leave base/final, sft/final, merged and two GGUFs in the folder."""
    make_base(llama_cpp, folder / "random")
    full = ["--finetune_type", "full", "--lr", "2e-3", "--max_steps", "110"]
    train(folder, "random", "base", *full)
    lora = ["--lora_r", "64", "--lora_alpha", "128", "--lr", "3e-3", "--max_steps", "300"]
    train(folder, "base/final", "sft", *lora)
    merged = folder / "merged"
    adapter = ["--lora_adapter_path", folder / "sft/final"]
    run("merge.py", *adapter, "--output_path", merged, "--overwrite")
    gguf = ["--model_path", merged, "--output_path", folder / "gguf", "--overwrite"]
    llama = ["--llama_cpp", llama_cpp, "--quantize", kind]
    run("examples/gguf_ollama.py", *gguf, *llama)


def evaluate_all(folder, kind):
    """Return {stage: its metrics}."""
    metrics = {}
    for name, model in (("base", "base/final"), ("adapter", "sft/final"), ("merged", "merged")):
        metrics[name] = evaluate(folder, name, "--model_name", folder / model)
    for name in ("f16", kind):
        metrics[name] = evaluate_gguf(folder, name, folder / f"gguf/model-{name}.gguf")
    return metrics


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--llama_cpp", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/end_to_end"), metavar="DIR", help="where files go"
    )
    parser.add_argument("--quantize", default="q4_k_m")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    make_rows(args.data, folder)
    make_models(folder, args.llama_cpp, args.quantize)
    metrics = evaluate_all(folder, args.quantize)
    report = {
        "metrics": metrics,
        "merge": json.loads((folder / "merged/merge_report.json").read_text())["verification"],
        "gguf": json.loads((folder / "gguf/gguf_report.json").read_text()),
    }
    path = ROOT / "benchmarks/results/end_to_end.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, found in metrics.items():
        shown = {}
        for key, value in found.items():
            if key.endswith(("exact_match", "_f1", "stop_rate")):
                shown[key] = round(value, 4)
        print(name, shown)


if __name__ == "__main__":
    main()

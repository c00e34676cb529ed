"""Kill a short run at random moments with kill -9, resume it, and compare with the run that nobody killed.

python tests/kill_and_resume.py MODEL_FOLDER WORK_FOLDER KILLS
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from conftest import make_rows, write_jsonl  # noqa: E402, I001
from utils import read_json  # noqa: E402

model, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
data = write_jsonl(folder / "pairs.jsonl", make_rows(96))
flags = [
    "--model_name",
    model,
    "--train_file",
    data,
    "--batch_size",
    "4",
    "--gradient_accumulation",
    "2",
    "--epochs",
    "4.5",
    "--lora_dropout",
    "0.1",
    "--eval_every",
    "3",
    "--logging_steps",
    "4",
    "--lr",
    "1e-3",
    "--report_to",
    "none",
]
environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(out, *more):
    command = [sys.executable, "train_embed_lora.py", *flags, "--output_dir", str(out), *more]
    return subprocess.Popen(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def contents(out):
    return load_file(out / "final/adapter_model.safetensors"), read_json(out / "detailed_training_logs.json")


process = start(folder / "whole")
first_step = None
for line in process.stdout:
    if line.startswith("rehearsal"):
        first_step = time.perf_counter()
process.wait()
assert process.returncode == 0
training_seconds = time.perf_counter() - first_step
weights, log = contents(folder / "whole")

rng, done, run = random.Random(0), 0, 0
while done < kills:
    run += 1
    out, attempts = folder / f"killed{run}", 0
    while True:  # one run, killed at up to three moments after the rehearsal, each time resumed
        process = start(out, *(["--resume_from_checkpoint"] if attempts else []))
        if attempts < 3 and done < kills:
            while "rehearsal" not in process.stdout.readline():
                pass
            time.sleep(rng.uniform(0, training_seconds))
            process.kill()
            done += 1
            attempts += 1
            process.communicate()
            found = sorted(path.name for path in out.glob("checkpoint-*"))
            print(f"kill {done}: {found}{', final' if (out / 'final').exists() else ''}", flush=True)
            continue
        said = process.communicate()[0]
        assert process.returncode == 0, said
        break
    found_weights, found_log = contents(out)
    assert all(torch.equal(weights[key], found_weights[key]) for key in weights), f"{out}: other weights"
    assert found_log == log, f"{out}: another log\n{found_log}\n{log}"
print(f"{done} kills, same weights, same log")

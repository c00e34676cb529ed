"""Kill a short run at random moments with kill -9, resume it, and compare with the run that nobody killed.

python tests/kill_and_resume.py train_embed_lora.py|train_sft_lora.py MODEL_FOLDER WORK_FOLDER KILLS [FLAGS]
"""

import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from conftest import make_chats, make_rows, write_jsonl  # noqa: E402
from utils import read_json  # noqa: E402

script, model, folder, kills = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
is_sft = script == "train_sft_lora.py"
data = write_jsonl(folder / "rows.jsonl", make_chats(60) if is_sft else make_rows(96))
flags = (
    shlex.split(
        f"--model_name {model} --train_file {data} --batch_size 4 --gradient_accumulation 2 --epochs 4.5 --lr 1e-3 "
        "--lora_dropout 0.1 --eval_every 3 --logging_steps 4 --report_to none"
        f"{' --eval_generate 3 --max_new_tokens 8' if is_sft else ''}"
    )
    + sys.argv[5:]
)
rng, done = random.Random(0), 0


def run_until(out, moment, *more):
    """Start a run and kill it some time after its log line number `moment`; return (was it killed, log lines)."""
    command = [sys.executable, script, *flags, "--output_dir", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=environment, **pipes)
    lines = 0
    while lines <= moment and (line := process.stdout.readline()):
        lines += line.startswith(("step", "rehearsal"))
    if lines > moment:
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
    errors = process.communicate()[1]
    assert process.returncode in (0, -9), errors
    return process.returncode == -9, lines


def contents(out):
    return load_file(out / "final/adapter_model.safetensors"), read_json(
        out / "detailed_training_logs.json"
    )


was_killed, moments = run_until(folder / "whole", 10**6)
assert not was_killed
weights, log = contents(folder / "whole")
for run in range(kills):
    out, attempts = folder / f"killed{run}", 0
    while (
        done < kills
        and attempts < 3
        and run_until(
            out, rng.randrange(moments >> attempts), *["--resume_from_checkpoint"] * (attempts > 0)
        )[0]
    ):
        done, attempts = done + 1, attempts + 1
        state = sorted(path.name for path in out.glob("checkpoint-*"))
        print(f"kill {done}, run {run}: left {', '.join(state) or 'no checkpoint'}", flush=True)
    more = ["--resume_from_checkpoint"] if attempts else ["--overwrite"]
    assert not run_until(out, 10**6, *more)[0]
    found_weights, found_log = contents(out)
    assert all(torch.equal(weights[key], found_weights[key]) for key in weights), (
        f"{out}: other weights"
    )
    assert found_log == log, f"{out}: another log\n{found_log}\n{log}"
    if done == kills:
        break
print(f"{done} kills, same weights, same log")

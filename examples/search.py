"""Search a file's answers with a trained model: a run's final/ or a merged folder.

The file is one to train on, or has a column `text`. Needs sentence-transformers.

python examples/search.py runs/search/merged pairs.csv "how do I reset it?" "how heavy is it?"
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import utils
from parts.base import LOADING_ERRORS
from parts.corpus import read_corpus
from parts.flag_types import integer
from parts.pairs import Columns, read_examples
from parts.rows import read_rows
from utils import InputError, reason


def parse_args(argv=None):
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("model", help="folder or hub id that sentence-transformers loads")
    add("file", type=Path, help="what is searched: .csv, .jsonl, .tsv, .json or .parquet")
    add("questions", nargs="+", metavar="question")
    add("--top", type=integer(1), default=3, metavar="N", help="answers to each question [3]")
    return parser.parse_args(argv)


def answers_of(file):
    """Return each answer of a file once: its positives, or the texts of its column `text`.

    Raises InputError for a file that cannot be read, or in which no column is known.
    """
    rows = read_rows(file)
    if "text" in rows[0][1]:
        return read_corpus([str(file)])
    examples, _ = read_examples(rows, Columns(), query_prefix=None)
    positives = [text for example in examples for text in example.pos]
    return list(dict.fromkeys(positives))


def load_model(source):
    """Load a model with its pooling, prompts and length."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError("searching needs: pip install sentence-transformers") from None
    try:
        return SentenceTransformer(str(source))
    except LOADING_ERRORS as error:
        raise InputError(f"{source} cannot be loaded: {reason(error)}") from None


def search(model, answers, questions, top=3):
    """Return [(cosine, answer), ...] for each question, the best first."""
    from sentence_transformers.util import semantic_search

    # each side with its own prompt, where the model has stored some
    asked = model.encode_query(questions, convert_to_tensor=True)
    searched = model.encode_document(answers, convert_to_tensor=True)
    ranked = []
    for hits in semantic_search(asked, searched, top_k=top):  # by cosine
        ranked.append([(hit["score"], answers[hit["corpus_id"]]) for hit in hits])
    return ranked


def main(argv=None):
    """Print what each question finds; return [(cosine, answer), ...] for each."""
    args = parse_args(argv)
    utils.quiet_libraries()
    answers = answers_of(args.file)
    ranked = search(load_model(args.model), answers, args.questions, args.top)
    print(f"searched  {len(answers)} answers of {args.file}")
    for question, hits in zip(args.questions, ranked, strict=True):
        print(question)
        for score, answer in hits:
            print(f"  {score:.3f}  {' '.join(answer.split())}", flush=True)
    return ranked


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")

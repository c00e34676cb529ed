"""Hard negatives: the documents nearest to a query that are none of its positives, and their files.

A document nearer than the threshold of NV-Retriever (Moreira et al. 2024, TopK-PercPos) is left
out: it is likely to be a positive that nobody has listed.
Shapes: Q queries, C documents of the pool, D embedding, N negatives to be mined for a query.
"""

import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from parts.memory import memory_errors_as_ours
from parts.retrieval import best_columns
from parts.rows import read_rows, text_id
from utils import InputError, say, shows_bars

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

SHOWN = 3  # queries, before training
# cosines of equal vectors differ by so much: a product adds in another order in another block
SAME = 1e-6
TOO_MANY = (
    "--mine_negatives: out of memory, which holds the vectors of all queries and documents. Name "
    "fewer documents in --mine_corpus, or lower --train_sample_limit."
)

# ---------------------------------------------------------------- the pool


class Pool:
    """Documents that may be mined, each once, in the order of rows, then of --mine_corpus."""

    def __init__(self, examples, corpus, texts, doc_prefix):
        """texts: those of the run, which the documents are added to."""
        self.words = []  # each document's text, without the prefix
        self.documents = []  # (text index, text_id), as a row has them
        self.column = {}  # text_id -> place in the two lists
        for example in examples:
            self.add([*example.pos, *example.neg], texts, doc_prefix)
        self.add(corpus, texts, doc_prefix)

    def add(self, words, texts, doc_prefix):
        for text in words:
            key = text_id(text)  # by hash: the same text in another case is the same document
            if key not in self.column:
                self.column[key] = len(self.words)
                self.words.append(text)
                self.documents.append((texts.add(doc_prefix, text, False), key))

    def __len__(self):
        return len(self.words)

    def relevant(self, dev):
        """Return how many documents a DevSet's queries are to find, and how many are here."""
        texts = {dev.corpus[name] for names in dev.relevant.values() for name in names}
        ids = {text_id(text) for text in texts}
        return len(ids), len(self.columns(ids))

    def columns(self, text_ids):
        """Return the columns of those texts that are in the pool."""
        return [self.column[key] for key in text_ids if key in self.column]


# ---------------------------------------------------------------- the search


@dataclass
class Mined:
    """What was found for each query, best first; where it is fewer than N, -1 and -inf."""

    columns: torch.Tensor  # (Q, N) of the pool
    scores: torch.Tensor  # (Q, N) cosines
    positive_scores: list  # of each query: the cosines of its positives, in their order


def thresholds(lowest, margin):
    """Return the highest cosine of a negative; lowest (Q,): that of each query's positives.

    p - |p| (1 - margin): below p by a share of it, whichever its sign.
    """
    return lowest - lowest.abs() * (1 - margin)


def hard_negatives(query_emb, doc_emb, positives, known, margin, count, chunk=2**23, show=False):
    """Mine `count` negatives for each query by exact search; returns a Mined.

    query_emb (Q, D), doc_emb (C, D): unit vectors; positives: the columns of all that are listed
    for a query; known: the columns that are no negatives of it. In order of falling cosine, then of
    documents. `chunk` scores are in memory at once. show: with a bar.
    """
    # many queries and many documents at once: a product of few with a million takes twice as long
    size = max(1, min(len(query_emb), math.isqrt(chunk)))  # queries
    width = max(1, chunk // size)  # documents
    own = positive_scores(query_emb, doc_emb, positives)
    lowest = torch.tensor([min(row) for row in own], device=query_emb.device)
    limits = thresholds(lowest, margin) + SAME  # a document exactly at the threshold stays
    found = Mined(
        torch.full((len(query_emb), count), -1),
        torch.full((len(query_emb), count), -torch.inf),
        own,
    )
    starts = range(0, len(query_emb), size)
    for start in tqdm(starts, desc="mining", unit_scale=size, disable=not show, leave=False):
        part = slice(start, start + size)
        columns, scores = best_negatives(
            query_emb[part], doc_emb, limits[part], known[part], count, width
        )
        found.columns[part] = columns.masked_fill(scores == -torch.inf, -1).cpu()
        found.scores[part] = scores.cpu()
    return found


def best_negatives(query_emb, doc_emb, limits, known, count, width):
    """Return columns and scores (Q, count) of the best documents that are not above `limits` (Q,).

    `width` documents at a time; -inf where there are none.
    """
    rows, known_columns = places(known)
    shape = (len(query_emb), count)
    best = torch.full(shape, -1, device=query_emb.device)
    best_scores = torch.full(shape, -torch.inf, device=query_emb.device)
    for start in range(0, len(doc_emb), width):
        scores = query_emb @ doc_emb[start : start + width].T  # (Q, width)
        # before the best are taken: behind it, a query of many likely positives would find nothing
        scores.masked_fill_(scores > limits[:, None], -torch.inf)
        here = (known_columns >= start) & (known_columns < start + width)
        scores[rows[here], known_columns[here] - start] = -torch.inf
        columns = best_columns(scores, count)
        # those of earlier documents in front, where a stable sort leaves them in ties
        both = torch.cat([best, columns + start], dim=1)
        both_scores = torch.cat([best_scores, scores.gather(1, columns)], dim=1)
        order = both_scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
        best = both.gather(1, order)
        best_scores = both_scores.gather(1, order)
        del scores  # or the next ones are made beside them
    return best, best_scores


def positive_scores(query_emb, doc_emb, positives):
    """Return the cosines of each query's positives as lists; query_emb (Q, D), doc_emb (C, D)."""
    rows, columns = places(positives)
    values = []
    for start in range(0, len(rows), 2**14):  # pairs at once: 24 MiB of 384 dimensions
        part = slice(start, start + 2**14)
        values += (query_emb[rows[part]] * doc_emb[columns[part]]).sum(1).tolist()
    values = iter(values)
    return [[next(values) for _ in own] for own in positives]


def places(columns_of_rows):
    """Return the rows and the columns that lists of columns, one a row, stand for."""
    rows = []
    columns = []
    for row, of_row in enumerate(columns_of_rows):
        rows += [row] * len(of_row)
        columns += of_row
    return torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


# ---------------------------------------------------------------- a run's mining


@dataclass(frozen=True)
class MiningRules:
    """How a run mines."""

    count: int  # negatives of a query
    margin: float
    each_epoch: bool  # else before the first step alone


class Miner:
    """Mines negatives for the training rows of a run, and keeps them in files.

    Rows of the same query, prompt included, share what is mined for it.
    """

    def __init__(self, examples, rows, pool, rules):
        """examples, rows: the same rows as texts and as text indices.

        Raises InputError where the pool is too small for any query to find as many as are asked.
        """
        if rules.count >= len(pool):
            raise InputError(
                f"--mine_negatives {rules.count}: the pool has {len(pool)} documents, and a "
                "query's positives are no negatives. Lower it, or add --mine_corpus."
            )
        self.examples = examples
        self.pool = pool
        self.rules = rules
        first = {}  # text index of a query -> its first row
        for row in rows:
            first.setdefault(row.query, row)
        self.queries = list(first)  # text indices
        self.positives = [pool.columns(row.listed) for row in first.values()]
        self.known = [pool.columns(row.known) for row in first.values()]
        place = {query: i for i, query in enumerate(self.queries)}
        self.place = [place[row.query] for row in rows]  # in self.queries, of each row

    # ------------------------------------------------------------ before anything was mined

    def typical(self, seed):
        """Return documents for each row as it may find them, to count tokens by."""
        rng = random.Random(seed)
        return [rng.sample(self.pool.documents, self.rules.count) for _ in self.place]

    def longest(self, texts, rows_at_once):
        """Return the longest documents that rows may find, for a rehearsal of so many rows."""
        count = self.rules.count
        by_length = sorted(self.pool.documents, key=lambda document: -len(texts[document[0]]))
        # rows in turn have different ones, or a step would hold a few texts alone
        heavy = by_length[: 2 * rows_at_once * count]
        found = []
        for row in range(len(self.place)):
            found.append([heavy[(row * count + k) % len(heavy)] for k in range(count)])
        return found

    # ------------------------------------------------------------ mining

    @memory_errors_as_ours(TOO_MANY)
    def mine(self, trainer, limit=None):
        """Mine for all queries, or the first `limit`, with the model as it is.

        Returns for each of them (columns, cosines, cosines of its positives). Raises InputError
        where none finds any, and where memory runs out.
        """
        count = min(limit or len(self.queries), len(self.queries))
        world = trainer.accelerator.num_processes
        own = list(range(trainer.accelerator.process_index, count, world))
        query_emb = trainer.vectors.of(self.queries[:count])
        doc_emb = trainer.vectors.of([index for index, _ in self.pool.documents])
        mined = hard_negatives(
            query_emb[own],
            doc_emb,
            [self.positives[i] for i in own],
            [self.known[i] for i in own],
            self.rules.margin,
            self.rules.count,
            show=shows_bars(),
        )
        found = list(zip(own, as_lists(mined), strict=True))
        if world > 1:
            found = gather_object(found)
        found = [of_query for _, of_query in sorted(found)]
        if not any(columns for columns, *_ in found):
            raise InputError(
                f"--mine_negatives: no query found one among {len(self.pool)} documents: all are "
                "its positives, or as near as those. Add --mine_corpus, or raise --mine_margin."
            )
        return found

    def of_rows(self, found):
        """Return the documents that were found for each row; found: as mine() returns it."""
        return [[self.pool.documents[column] for column in found[i][0]] for i in self.place]

    # ------------------------------------------------------------ words

    def show(self, found, seconds):
        """Print how many were mined, and why there are no more."""
        mined = sum(len(columns) for columns, *_ in found)
        text = f"mined     {mined:,} negatives for {len(found):,} queries in {seconds:.0f} s"
        count = self.rules.count
        lacking = [i for i, (columns, *_) in enumerate(found) if len(columns) < count]
        if lacking:
            few = sum(len(self.pool) - len(set(self.known[i])) < count for i in lacking)
            near = len(lacking) - few
            why = []
            if near:
                why.append(f"{near:,} whose other documents are as near as their positives")
            if few:
                why.append(f"{few:,} with too few others in the pool")
            text += f"; {len(lacking):,} found fewer than {count}: {', '.join(why)}"
        say(text)

    def show_examples(self, found):
        """Print a few queries with their positives and what was mined for them, with cosines."""
        first_row = {}
        for row, place in enumerate(self.place):
            first_row.setdefault(place, row)
        for place in range(min(SHOWN, len(found))):
            columns, scores, positive_scores = found[place]
            say(f"query     {shortened(self.examples[first_row[place]].query)}")
            pairs = zip(self.positives[place], positive_scores, strict=True)
            for column, score in pairs:
                say(f"  positive {score:6.3f}  {shortened(self.pool.words[column])}")
            for column, score in zip(columns, scores, strict=True):
                say(f"  mined    {score:6.3f}  {shortened(self.pool.words[column])}")

    # ------------------------------------------------------------ files

    def write(self, path, found, trainer):
        """Write the rows with what was mined for them, so that --train_file reads them.

        A reader finds the whole file or none.
        """
        part = Path(f"{path}.part")
        with part.open("w", encoding="utf-8") as file:
            for row in self.file_rows(found, trainer):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        part.replace(path)

    def file_rows(self, found, trainer):
        """Yield the rows of a file."""
        for example, place in zip(self.examples, self.place, strict=True):
            columns, scores, _ = found[place]
            own = [*example.pos, *example.neg]
            own_columns = self.pool.columns(map(text_id, own))
            texts = [self.pool.documents[column][0] for column in own_columns]
            vectors = trainer.vectors.of([self.queries[place], *texts])
            cosines = (vectors[1:] @ vectors[0]).tolist()
            count = len(example.pos)
            row = {
                "query": example.query,
                "pos": example.pos,
                "neg": example.neg + [self.pool.words[column] for column in columns],
                "pos_cosines": rounded(cosines[:count]),
                "neg_cosines": rounded(cosines[count:] + scores),
                "source": ["own"] * len(example.neg) + ["mined"] * len(columns),
            }
            if example.prompt is not None:
                row["prompt"] = example.prompt
            yield row

    def read(self, path):
        """Return the documents of each row that `write` wrote; raises InputError for other rows."""
        if not Path(path).is_file():
            raise InputError(
                f"{path} is not there, and the model that mined it has been trained on since. Copy "
                "it back, or start anew."
            )
        rows = read_rows(path)
        if len(rows) != len(self.examples):
            raise InputError(
                f"{path} has {len(rows)} rows of {len(self.examples)}. Copy it back, or start anew."
            )
        found = []
        for (where, row), example in zip(rows, self.examples, strict=True):
            mined = []
            for text, source in zip(row.get("neg", []), row.get("source", []), strict=False):
                if source == "mined":
                    mined.append(text)
            columns = self.pool.columns(map(text_id, mined))
            if row.get("query") != example.query or len(columns) < len(mined):
                raise InputError(
                    f"{where}: not what this run has mined. Copy it back, or start anew."
                )
            found.append([self.pool.documents[column] for column in columns])
        return found


def show_pool(pool, dev_sets):
    """Print how many documents may be mined, and how many of them dev queries are to find."""
    parts = [f"{len(pool):,} documents to find negatives in"]
    for name, dev in dev_sets.items():
        relevant, here = pool.relevant(dev)
        parts.append(f"{here:,} of the {relevant:,} relevant ones of {name or 'dev'} among them")
    say(f"mining    {'; '.join(parts)}")


def as_lists(mined):
    """Return (columns, scores, positive scores) of each query of a Mined, as far as found."""
    rows = []
    parts = zip(mined.columns.tolist(), mined.scores.tolist(), mined.positive_scores, strict=True)
    for columns, scores, positive_scores in parts:
        count = sum(column >= 0 for column in columns)
        rows.append((columns[:count], scores[:count], positive_scores))
    return rows


def rounded(cosines):
    """Return cosines to five digits, which is what float32 vectors are good for."""
    return [round(cosine, 5) for cosine in cosines]


def shortened(text):
    """Return the beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def mined_file(folder, epoch):
    """Return the path of what was mined for an epoch, which is counted from 0."""
    return Path(folder) / f"mined_negatives-{epoch + 1}.jsonl"


def copy_mined(folder, target, epoch):
    """Copy what was mined for an epoch into another folder, in which a run is resumed."""
    if Path(folder).resolve() != Path(target).resolve():
        shutil.copy(mined_file(folder, epoch), target)

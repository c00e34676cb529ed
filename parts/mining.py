"""Hard negatives: the documents nearest to a query that are none of its positives.

A document nearer than the threshold of NV-Retriever (Moreira et al. 2024, TopK-PercPos) is left
out: it is likely to be a positive that nobody has listed.
Shapes: Q queries, C documents of the pool, D embedding, N negatives to be mined for a query.
"""

import math
import random
from array import array
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass

from parts.memory import memory_errors_as_ours
from parts.retrieval import best_columns
from parts.rows import text_id
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
    """Documents that may be mined, each once, in the order of rows, then of --mine_corpus.

    `searched`: {file: ascending columns that its queries are searched in}: those of its own rows
    and of --mine_corpus. Without `by_file` it is {None: all}.
    """

    def __init__(self, examples, corpus, texts, doc_prefix, by_file=False):
        """texts: those of the run, which the documents are added to."""
        self.by_file = by_file
        self.words = []  # each document's text, without the prefix
        self.documents = []  # (text index, text_id), as a row has them
        self.column = {}  # text_id -> place in the two lists
        of_file = defaultdict(set)  # columns
        for example in examples:
            columns = self.add([*example.pos, *example.neg], texts, doc_prefix)
            if by_file:
                of_file[example.file].update(columns)
        of_corpus = self.add(corpus, texts, doc_prefix)
        self.searched = {}
        for file, columns in of_file.items():
            # 8 bytes each: a million documents of the corpus stand here once a file
            self.searched[file] = array("q", sorted(columns.union(of_corpus)))
        if not by_file:
            self.searched[None] = range(len(self))

    def file_of(self, example):
        """Return the file in whose documents an Example's query is searched; None: in any."""
        return example.file if self.by_file else None

    def add(self, words, texts, doc_prefix):
        """Add documents that are not there yet; return the columns of all of them."""
        columns = []
        for text in words:
            key = text_id(text)  # by hash: the same text in another case is the same document
            if key not in self.column:
                self.column[key] = len(self.words)
                self.words.append(text)
                self.documents.append((texts.add(doc_prefix, text, False), key))
            columns.append(self.column[key])
        return columns

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


def places_among(columns, searched):
    """Return where those of `columns` that are among the ascending `searched` stand in them."""
    found = []
    for column in columns:
        place = bisect_left(searched, column)
        if place < len(searched) and searched[place] == column:
            found.append(place)
    return found


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
    """Mines negatives for the training rows of a run.

    Rows of the same query, prompt included, share what is mined for it; where a query is searched
    in its own file's documents, rows of the same file.
    """

    def __init__(self, examples, rows, pool, rules):
        """examples, rows: the same rows as texts and as text indices.

        Raises InputError where the pool is too small for any query to find as many as are asked.
        """
        for file, searched in pool.searched.items():
            check_count(rules.count, file, len(searched))
        self.examples = examples
        self.pool = pool
        self.rules = rules
        place = {}  # (file, text index of a query) -> its place in the lists below
        self.place = []  # of each row
        self.queries = []  # text indices
        self.files = []  # in which they are searched
        self.positives = []  # columns, of those that are searched
        self.known = []  # columns of no use: of no negatives, and of those that its rows have
        for example, row in zip(examples, rows, strict=True):
            file = pool.file_of(example)
            key = (file, row.query)
            if key not in place:
                place[key] = len(self.queries)
                self.queries.append(row.query)
                self.files.append(file)
                self.positives.append(self.among(file, row.listed))
                self.known.append(self.among(file, row.known))
            own = [hashed for _, hashed in row.neg]
            self.known[place[key]] += self.among(file, own)
            self.place.append(place[key])

    def among(self, file, text_ids):
        """Return the columns of those texts that a query of the file is searched in."""
        searched = self.pool.searched[file]
        return [searched[i] for i in places_among(self.pool.columns(text_ids), searched)]

    # ------------------------------------------------------------ before anything was mined

    def typical(self, seed):
        """Return documents for each row as it may find them, to count tokens by."""
        rng = random.Random(seed)
        found = []
        for place in self.place:
            searched = self.pool.searched[self.files[place]]
            drawn = rng.sample(range(len(searched)), self.rules.count)
            found.append([self.pool.documents[searched[i]] for i in drawn])
        return found

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
        places = defaultdict(list)  # of queries, by file
        for i in range(count):
            places[self.files[i]].append(i)
        query_emb = trainer.vectors.of(self.queries[:count])
        found = []
        for file, of_file in places.items():
            own = of_file[trainer.accelerator.process_index :: world]
            found += self.search(file, own, query_emb[own], trainer.vectors)
        if world > 1:
            found = gather_object(found)
        found = [of_query for _, of_query in sorted(found)]
        if not any(columns for columns, *_ in found):
            raise InputError(
                f"--mine_negatives: no query found one among {len(self.pool)} documents: all are "
                "of its own rows, or as near as its positives. Add --mine_corpus, or raise "
                "--mine_margin."
            )
        return found

    def search(self, file, places, query_emb, vectors):
        """Return [(place, what mine() returns of it)] for queries of a file at these places.

        query_emb: theirs; vectors: of documents, whose copy is let go of before the next file's.
        """
        searched = self.pool.searched[file]
        mined = hard_negatives(
            query_emb,
            vectors.of([self.pool.documents[column][0] for column in searched]),
            [places_among(self.positives[i], searched) for i in places],
            [places_among(self.known[i], searched) for i in places],
            self.rules.margin,
            self.rules.count,
            show=shows_bars(),
        )
        found = []
        for place, (columns, *scores) in zip(places, as_lists(mined), strict=True):
            found.append((place, ([searched[i] for i in columns], *scores)))
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
            few = sum(self.others(i) < count for i in lacking)
            near = len(lacking) - few
            why = []
            if near:
                why.append(f"{near:,} whose other documents are as near as their positives")
            if few:
                why.append(f"{few:,} with too few others in the pool")
            text += f"; {len(lacking):,} found fewer than {count}: {', '.join(why)}"
        say(text)

    def others(self, place):
        """Return how many documents a query is searched in that may be mined for it."""
        return len(self.pool.searched[self.files[place]]) - len(set(self.known[place]))

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


def check_count(count, file, documents):
    """Raise InputError where the `documents` of a file's queries, of all for None, are too few."""
    if count >= documents:
        whose = f"{file}, with --mine_corpus," if file else "the pool"
        raise InputError(
            f"--mine_negatives {count}: {whose} has {documents} documents, and a query's positives "
            "are no negatives. Lower it, or add --mine_corpus."
        )


def show_pool(pool, dev_sets):
    """Print how many documents may be mined, and how many of them dev queries are to find."""
    parts = [f"{len(pool):,} documents to find negatives in"]
    if pool.by_file:
        parts[0] += ", a query in those of its own file and of --mine_corpus"
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


def shortened(text):
    """Return the beginning of a text, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:97]}..."

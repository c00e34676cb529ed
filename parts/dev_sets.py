"""Dev sets of the embedding trainer, and the pools of documents that queries are searched in."""

import itertools
import math
import random
from bisect import bisect
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from parts.beir import read_beir
from parts.pairs import by_query, read_examples
from parts.rows import read_rows, text_id
from parts.splits import hold_out, leave_out, read_enough, too_few
from utils import InputError, note, say

import numpy as np

HELD_OUT = 0.1  # of the rows, where no dev set is named
MAX_HELD = 1000  # queries held out where no flag says how many
MAX_POOL = 10_000  # documents that held-out queries are searched in
SMALL_POOL = 100  # fewer documents hardly tell models apart


@dataclass
class DevSet:
    """Queries {id: (text, prompt)}, corpus {id: text}, and the relevant document ids of each query.

    `own`: a query's own text among the documents, as {query id: document id}; it is not ranked.
    `spare`: training documents that may fill the corpus of held-out rows, in the order drawn.
    """

    queries: dict
    corpus: dict
    relevant: dict
    own: dict = field(default_factory=dict)
    spare: list = field(default_factory=list)


# ---------------------------------------------------------------- training rows and dev sets


def read_data(
    source,
    sizes,
    columns,
    query_prefix,
    max_negs,
    corpus=None,
    by_file=False,
    own_alone=False,
    served=(),
):
    """Read, check and split the data.

    corpus: the documents of --dev_corpus, or None; by_file, served: see read_examples; own_alone:
    rows without negatives of their own cannot be trained on. Returns (training Examples,
    {name: DevSet}, counts for the report).
    """
    as_examples = partial(
        read_examples, columns=columns, query_prefix=query_prefix, by_file=by_file, served=served
    )
    split = partial(
        split_rows, sizes=sizes, as_examples=as_examples, corpus=corpus, own_alone=own_alone
    )
    examples, dev_sets, dropped = read_enough(source, sizes, split)
    has_mined = max_negs and any(example.neg for example in examples)
    if own_alone and not examples:
        need = "--no-in_batch_negatives needs rows with negatives of their own"
        raise too_few(0, dropped, dev_sets, source, need)
    if len(examples) < 2 and not has_mined:
        need = "in-batch negatives need two, or one with mined negatives"
        raise too_few(len(examples), dropped, dev_sets, source, need)
    counted = dev_sizes(dev_sets)
    parts = [f"{len(examples)} rows to train on"]
    for name, size in counted.items():
        parts.append(f"{name}: {size['queries']} queries over {size['corpus']} documents")
    say(f"data      {'; '.join(parts)}")
    return examples, dev_sets, {"train_rows": len(examples), "dropped": dropped, "dev": counted}


def split_rows(rows, sources, sizes, as_examples, corpus=None, own_alone=False):
    """Turn training rows and dev sources into (training Examples, {name: DevSet}, {reason: count}).

    sources: {name: path, or rows}; as_examples(rows) reads them; corpus: documents that join every
    dev set of rows, or None; own_alone: as in read_data.
    """
    examples, dropped = as_examples(rows)
    rng = random.Random(sizes.seed)
    rng.shuffle(examples)  # the first groups are held out, the first rows trained on
    dev_sets, dev_rows = read_dev_sets(sources, sizes.dev, as_examples, rng)
    held = {}
    if not dev_sets:
        groups = mirrored_groups(examples)
        examples, held = hold_out(
            examples, lambda example: groups[by_query(example)], sizes, "query", MAX_HELD, by_query
        )
        dev_sets = {name: dev_from_examples(rows) for name, rows in held.items()}
    trained, leaks = without_leaks(examples, dev_sets)
    if own_alone:
        trained, bare = leave_out(trained, lacks_negatives)
        leaks |= bare
    trained = trained[: sizes.train]
    if corpus is not None:
        dev_sets = with_corpus(dev_sets, corpus, dev_rows | held, examples, sizes.seed)
    else:
        for name in held:
            dev_sets[name].spare = spare_documents(dev_sets[name], trained, examples, sizes.seed)
    return trained, dev_sets, dropped | leaks


def lacks_negatives(example):
    """Return why a row that is contrasted with its own negatives alone is left out, or None."""
    return None if example.neg else "rows without negatives of their own (--no-in_batch_negatives)"


def read_dev_sets(sources, limit, as_examples, rng):
    """Return ({name: DevSet}, {name: its Examples} of those that are rows) of the dev sources.

    Of each, `limit` queries are drawn; None: all are taken.
    """
    dev_sets = {}
    dev_rows = {}
    for name, source in sources.items():
        if isinstance(source, str) and Path(source).is_dir():
            dev = dev_from_beir(source)
        else:
            rows = read_rows(source) if isinstance(source, str) else source
            dev_rows[name], _ = as_examples(rows)
            dev = dev_from_examples(dev_rows[name])
        count = min(limit or len(dev.queries), len(dev.queries))
        # sorted, so that the draw does not depend on the order of a file's lines
        kept = rng.sample(sorted(dev.queries), count)
        dev.queries = {key: dev.queries[key] for key in sorted(kept)}
        if not dev.queries:
            raise InputError(f"--dev_file {source} holds no query with a relevant document.")
        dev_sets[name] = dev
    return dev_sets, dev_rows


def mirrored_groups(examples):
    """Return {query id: group}: each other's positives, (a, b) and (b, a), share a group.

    Paraphrases often come in both directions: one would be trained on, the other measured.
    """
    pairs = set()
    for example in examples:
        for text in example.pos:
            pairs.add((by_query(example), text_id(text)))
    group = {query: query for query, _ in pairs}  # each leads to another of its group, or is first

    def first_of(query):
        while group[query] != query:
            group[query] = group[group[query]]  # halves the way for the next search
            query = group[query]
        return query

    for query, document in pairs:
        if (document, query) in pairs:
            group[first_of(query)] = first_of(document)
    return {query: first_of(query) for query in group}


def without_leaks(examples, dev_sets):
    """Leave out rows that give dev rows away: one's query, or one's pair the other way round.

    Returns (kept, {reason: count}).
    """
    pairs = set()
    for dev in dev_sets.values():
        for name, (query, _) in dev.queries.items():
            for document in dev.relevant[name]:
                pairs.add((text_id(query), text_id(dev.corpus[document])))
    queries = {query for query, _ in pairs}

    def leak(example):
        query = by_query(example)
        if query in queries:
            return "training rows whose query is in a dev set"
        if any((text_id(text), query) in pairs for text in example.pos):
            return "training rows that are a pair of a dev set turned round"
        return None

    return leave_out(examples, leak)


# ---------------------------------------------------------------- one dev set


def dev_from_examples(examples):
    """Make a dev set of rows: the pool is every positive and negative, each text once."""
    queries = {}
    corpus = {}
    relevant = {}
    ids = {}  # text id -> document id
    for example in examples:
        key = f"q{text_id(example.query)}"
        queries.setdefault(key, (example.query, example.prompt))
        for text in example.pos + example.neg:
            name = ids.setdefault(text_id(text), f"d{len(ids):09d}")
            corpus.setdefault(name, text)
        relevant.setdefault(key, set()).update(ids[text_id(text)] for text in example.pos)
    own = {}
    for key, (text, _) in queries.items():
        name = ids.get(text_id(text))
        if name and name not in relevant[key]:  # it would always rank first, and never count
            own[key] = name
    return DevSet(queries, corpus, relevant, own)


def spare_documents(dev, examples, rest, seed):
    """Draw at most MAX_POOL documents of `examples`, trained on, that are wrong for all of `dev`.

    rest: the rows that tell which are not.
    """
    documents = {}  # a dict keeps their order, which the draw depends on
    for example in examples:
        documents |= dict.fromkeys(example.pos + example.neg)
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    return wrong_documents(dev, documents, rest, MAX_POOL)


def wrong_documents(dev, documents, rest, most=math.inf):
    """Return the first `most` of `documents` that are wrong for all of `dev`, each text once.

    Left aside are texts that `dev` has, as a document or as a query, and what any row of `rest`
    pairs with a query of `dev`, in either direction.
    """
    queries = {text_id(text) for text, _ in dev.queries.values()}
    aside = queries | {text_id(text) for text in dev.corpus.values()}
    for example in rest:
        positives = {text_id(text) for text in example.pos}
        if by_query(example) in queries:
            aside |= positives
        if not queries.isdisjoint(positives):
            aside.add(by_query(example))
    wrong = []
    for text in documents:
        if len(wrong) < most and text_id(text) not in aside:
            aside.add(text_id(text))
            wrong.append(text)
    return wrong


def with_corpus(dev_sets, corpus, dev_rows, rest, seed):
    """Return the dev sets, those of rows with the documents of --dev_corpus in their pools.

    dev_rows: {name: Examples} of the dev sets that are rows; `rest`: all other Examples.
    """
    if not dev_sets:
        note("--dev_corpus is not used: no rows are held out, and no --dev_file is given")
    known = [*rest, *itertools.chain.from_iterable(dev_rows.values())]
    found = dict(dev_sets)
    for name, dev in dev_sets.items():
        if name not in dev_rows:
            note(f"{name or 'dev'}: a BEIR folder keeps its own corpus, without --dev_corpus")
            continue
        wrong = wrong_documents(dev, corpus, known)
        say(
            f"corpus    {name or 'dev'}: {len(wrong)} of {len(corpus)} documents of --dev_corpus "
            "stand in the way (the others are in the pool, or right for one of its queries)"
        )
        if not wrong:
            note(f"{name or 'dev'}: --dev_corpus adds no document to the pool")
        found[name] = replace(dev, corpus=mixed(dev.corpus, wrong, seed))
    return found


def dev_from_beir(folder):
    """Make a dev set of a BEIR folder, of the queries that have a relevant document."""
    queries, corpus, relevant = read_beir(folder)
    return DevSet({name: (queries[name], None) for name in relevant}, corpus, relevant)


def dev_sizes(dev_sets):
    """Return how many queries and documents each dev set has, for the report."""
    sizes = {}
    for name, dev in dev_sets.items():
        sizes[name or "dev"] = {"queries": len(dev.queries), "corpus": len(dev.corpus)}
    return sizes


# ---------------------------------------------------------------- pools


def dev_indices(dev, texts, query_prefix, doc_prefix):
    """Return the text indices of a dev set's queries, and of its documents by ascending id."""
    queries = []
    for text, prompt in dev.queries.values():
        prefix = query_prefix if prompt is None else prompt
        queries.append(texts.add(prefix, text, True))
    return queries, [texts.add(doc_prefix, dev.corpus[key], False) for key in sorted(dev.corpus)]


def evaluations_of(plan):
    """Return how many times a run measures its dev sets: before, after, and in between."""
    steps = {0, plan.total_steps, *range(plan.eval_steps, plan.total_steps, plan.eval_steps)}
    if plan.epoch_save_steps:  # each epoch's end is evaluated, so that the best can be kept
        steps |= set(range(plan.steps_per_epoch, plan.total_steps, plan.steps_per_epoch))
    return len(steps)


def filled(dev, texts, doc_prefix, room, seed):
    """Return a DevSet with spare documents in its corpus: as `room` tokens and MAX_POOL allow."""
    spare = dev.spare[: max(0, MAX_POOL - len(dev.corpus))]
    tokens = np.cumsum([len(texts[texts.add(doc_prefix, text, False)]) for text in spare])
    count = int(np.searchsorted(tokens, room, side="right"))
    return DevSet(dev.queries, mixed(dev.corpus, spare[:count], seed), dev.relevant, dev.own)


def mixed(corpus, texts, seed):
    """Return a corpus {id: text} with more texts, whose ids stand anywhere among its own.

    Equal scores are ranked by id: were all the new ones behind the others, those would be favoured.
    """
    rng = random.Random(seed)
    own = sorted(corpus)
    places = sorted(rng.random() for _ in own)  # of all documents, in [0, 1)
    more = {}
    for i, text in enumerate(texts):
        before = bisect(places, rng.random())  # how many of its own stand before it
        # "-" sorts before digits, and "d7-" behind "d7": next to its neighbour on the left
        more[f"{own[before - 1] if before else ''}-{i:07d}"] = text
    return corpus | more


def fill_pools(dev_sets, texts, query_prefix, doc_prefix, plan, training, seed):
    """Fill the pool of held-out queries with training documents, and say what evaluations cost.

    It is filled to MAX_POOL documents, or until the evaluations of the run embed as many tokens as
    its `training`, at a third of the cost. Returns ({name: DevSet}, tokens of all evaluations /
    those of the training; None without evaluations).
    """
    if not plan.has_dev:
        return dev_sets, None

    def tokens_of(dev):
        queries, documents = dev_indices(dev, texts, query_prefix, doc_prefix)
        return sum(len(texts[i]) for i in queries + documents)

    times = evaluations_of(plan)
    room = training / times - sum(map(tokens_of, dev_sets.values()))
    full = {}
    said = []
    for name, dev in dev_sets.items():
        full[name] = filled(dev, texts, doc_prefix, room, seed)
        said.append(describe_pool(name or "dev", dev, full[name]))
    share = times * sum(map(tokens_of, full.values())) / training
    say(
        f"pool      {'; '.join(said)}; {times} evaluations embed {share:.0%} as many tokens as the "
        "training"
    )
    return full, share


def describe_pool(name, before, full):
    """Return in words what a dev set is searched in; note a pool that hardly tells models apart."""
    size = len(full.corpus)
    added = size - len(before.corpus)
    out_of_room = len(before.spare) > added and size < MAX_POOL
    text = f"{name}: {size} documents"
    if added:
        text += f", {added} of them the training's"
    if out_of_room:
        text += " (evaluating less often, --eval_every, makes room for more)"
    if size < SMALL_POOL:
        advice = "take more dev rows"
        if out_of_room:
            advice += ", or evaluate less often (--eval_every)"
        note(f"{name}: {size} documents to search in hardly tell models apart: {advice}")
    return text

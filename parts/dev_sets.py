"""Dev sets of the embedding trainer, and the pools of documents that queries are searched in."""

import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from parts.cells import number_of
from parts.corpus import document_of
from parts.pairs import by_query, read_examples
from parts.rows import read_rows, read_table, text_id
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


def read_data(source, sizes, columns, query_prefix, max_negs):
    """Read, check and split the data.

    Returns (training Examples, {name: DevSet}, counts for the report).
    """
    as_examples = partial(read_examples, columns=columns, query_prefix=query_prefix)
    split = partial(split_rows, sizes=sizes, as_examples=as_examples)
    examples, dev_sets, dropped = read_enough(source, sizes, split)
    has_mined = max_negs and any(example.neg for example in examples)
    if len(examples) < 2 and not has_mined:
        need = "in-batch negatives need two, or one with mined negatives"
        raise too_few(len(examples), dropped, dev_sets, source, need)
    counted = dev_sizes(dev_sets)
    parts = [f"{len(examples)} rows to train on"]
    for name, size in counted.items():
        parts.append(f"{name}: {size['queries']} queries over {size['corpus']} documents")
    say(f"data      {'; '.join(parts)}")
    return examples, dev_sets, {"train_rows": len(examples), "dropped": dropped, "dev": counted}


def split_rows(rows, sources, sizes, as_examples):
    """Turn training rows and dev sources into (training Examples, {name: DevSet}, {reason: count}).

    sources: {name: path, or rows}; as_examples(rows) reads them.
    """
    examples, dropped = as_examples(rows)
    rng = random.Random(sizes.seed)
    rng.shuffle(examples)  # the first groups are held out, the first rows trained on
    dev_sets = {}
    for name, source in sources.items():
        dev = read_dev_set(source, as_examples)
        count = min(sizes.dev or len(dev.queries), len(dev.queries))
        # sorted, so that the draw does not depend on the order of a file's lines
        kept = rng.sample(sorted(dev.queries), count)
        dev.queries = {key: dev.queries[key] for key in sorted(kept)}
        if not dev.queries:
            raise InputError(f"--dev_file {source} holds no query with a relevant document.")
        dev_sets[name] = dev
    held = {}
    if not dev_sets:
        groups = mirrored_groups(examples)
        examples, held = hold_out(
            examples, lambda example: groups[by_query(example)], sizes, "query", MAX_HELD, by_query
        )
        dev_sets = {name: dev_from_examples(rows) for name, rows in held.items()}
    trained, leaks = without_leaks(examples, dev_sets)
    trained = trained[: sizes.train]
    for name in held:
        dev_sets[name].spare = spare_documents(dev_sets[name], trained, examples, sizes.seed)
    return trained, dev_sets, dropped | leaks


def read_dev_set(source, as_examples):
    """Return the DevSet of a BEIR folder, a file, or rows."""
    if not isinstance(source, str):
        rows = source
    elif Path(source).is_dir():
        return dev_from_beir(source)
    else:
        rows = read_rows(source)
    examples, _ = as_examples(rows)
    return dev_from_examples(examples)


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
    documents = {}  # a dict keeps their order, which the draw depends on
    for example in examples:
        documents |= dict.fromkeys(example.pos + example.neg)
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    spare = []
    for text in documents:
        if len(spare) < MAX_POOL and text_id(text) not in aside:
            aside.add(text_id(text))
            spare.append(text)
    return spare


def dev_from_beir(folder):
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/*.tsv.

    Of several qrels it takes dev.tsv, else test.tsv.
    """
    folder = Path(folder)
    missing = [name for name in ("corpus.jsonl", "queries.jsonl") if not (folder / name).is_file()]
    qrels = sorted(folder.glob("qrels/*.tsv"), key=order_of_qrels)
    if missing or not qrels:
        raise InputError(f"{folder} is no BEIR folder: no {', '.join(missing) or 'qrels/*.tsv'}.")
    corpus = read_beir_texts(folder / "corpus.jsonl")
    queries = read_beir_texts(folder / "queries.jsonl")
    relevant = {}
    for where, query, document, score in read_qrels(qrels[0], queries):
        # a judgement of what is not there would make recall 1 unreachable
        if query not in queries or document not in corpus:
            unknown = query if query not in queries else document
            raise InputError(f"{where}: {unknown} is in no file of {folder}.")
        if score > 0:  # 0: looked at, and found irrelevant
            relevant.setdefault(query, set()).add(document)
    return DevSet({name: (queries[name], None) for name in relevant}, corpus, relevant)


def order_of_qrels(path):
    """Return a key that puts dev.tsv first, test.tsv second."""
    return path.stem not in ("dev", "test"), path.stem


def read_beir_texts(path):
    """Read corpus.jsonl or queries.jsonl into {id: text}."""
    texts = {}
    for where, row in read_rows(path):
        if "_id" not in row or "text" not in row:
            raise InputError(
                f'{where}: no _id or no text. A line is {{"_id": "7", "text": "..."}}.'
            )
        text = document_of(row, where) or "-"  # an empty document counts too
        if texts.setdefault(str(row["_id"]), text) != text:
            raise InputError(
                f"{where}: the _id {row['_id']} stood before another text. Delete one of the two."
            )
    return texts


def read_qrels(path, queries):
    """Read judgements into [(where, query id, document id, score)]; a first line may name them."""
    lines = read_table(path)
    width = len(lines[0][1]) if lines else 0
    if width not in (2, 3):
        raise InputError(
            f"{path} has lines of {width} columns. Write query id, document id and score, "
            "tab-separated."
        )
    first = lines[0][1]
    has_no_score = width == 2 or number_of(first[2]) is None
    if first[0] not in queries and has_no_score:  # column names
        lines = lines[1:]
    judgements = []
    for where, cells in lines:
        score = 1.0 if width == 2 else number_of(cells[-1])
        if len(cells) != width or score is None:
            raise InputError(
                f"{where}: not the {width} columns of the first line, or a score that is no number."
            )
        judgements.append((where, cells[0], cells[1], score))
    return judgements


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
    # equal scores are ranked by id: ids behind all others would favour the held-out documents,
    # so the new ones mix with them
    rng = random.Random(seed)
    own = list(dev.corpus)
    more = {}
    for i, text in enumerate(spare[:count]):
        more[f"{rng.choice(own)}-{i:05d}"] = text
    return DevSet(dev.queries, dev.corpus | more, dev.relevant, dev.own)


def fill_pools(dev_sets, texts, query_prefix, doc_prefix, plan, training, seed):
    """Fill the pool of held-out queries with training documents, and say what evaluations cost.

    It is filled to MAX_POOL documents, or until the evaluations of the run embed half as many
    tokens as its `training`. Returns ({name: DevSet}, tokens of all evaluations / those of the
    training; None without evaluations).
    """
    if not plan.has_dev:
        return dev_sets, None

    def tokens_of(dev):
        queries, documents = dev_indices(dev, texts, query_prefix, doc_prefix)
        return sum(len(texts[i]) for i in queries + documents)

    times = evaluations_of(plan)
    room = training / 2 / times - sum(map(tokens_of, dev_sets.values()))
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

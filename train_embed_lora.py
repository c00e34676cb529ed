"""Fine-tune a text-embedding model with LoRA: in-batch negatives, recall measured before, during and after.

    python train_embed_lora.py --train_file examples/sample_data.jsonl --output_dir runs/first
    python train_embed_lora.py --model_name Qwen/Qwen3-Embedding-0.6B --train_file pairs.jsonl --load_in_4bit
    python train_embed_lora.py --train_file pairs.jsonl --dry_run

A data line: {"query": "how do I reset it?", "pos": ["Hold the button for ten seconds."], "neg": ["It weighs 2 kg."]}
output_dir: final/ (adapter, loads in sentence-transformers), checkpoints, logs, training_curves.png, a report.
Shapes: B sequences, T tokens, D embedding, Q queries and N documents of a step, C corpus of a dev set.
"""

import argparse
import contextlib
import itertools
import json
import math
import random
import re
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unicodedata import category

import utils
from utils import InputError, integer, one_of, real, say

import numpy as np
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher
from tokenizers import processors
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerFast, set_seed
from transformers.pytorch_utils import Conv1D

# ---------------------------------------------------------------- arguments


def parse_args(argv=None):
    """Parse and check the command line; exits 2 with one sentence on what is wrong."""
    parser = argparse.ArgumentParser(
        "train_embed_lora.py", usage="%(prog)s --train_file FILE [flags, see --help]", description=__doc__,
        allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter,
    )
    base = "sentence-transformers/all-MiniLM-L6-v2"
    utils.add_input_flags(parser, base, dev_size="0.1, of at most 1000 queries")
    utils.add_training_flags(parser, batch=32, step=32, epochs=2, checkpointing=False, metric="ndcg@10")
    add = parser.add_argument_group("embedding").add_argument
    add("--max_length", "--max_sequence_length", type=integer(4), default=512, metavar="N",
        help="tokens of a query or document [512]")
    add("--query_max_len", type=integer(4), metavar="N", help="tokens of a query [--max_length]")
    add("--passage_max_len", type=integer(4), metavar="N", help="tokens of a document [--max_length]")
    add("--query_prefix", metavar="TEXT", help="put before every query [the base's own prompt]")
    add("--doc_prefix", metavar="TEXT", help="put before every document [the base's own prompt]")
    add("--max_negs", "--neg_nums", type=integer(0), default=1, metavar="N", help="mined negatives per query [1]")
    add("--temperature", type=real(0, 10, {0}), default=0.05, metavar="X", help="divides the cosines [0.05]")
    add("--pooling", default="auto", **one_of("auto", "mean", "cls", "last"),
        help="tokens to one vector [the base's]")
    add("--append_eos", action="store_true", help="end every text with the EOS token, truncated ones too")
    add("--false_negative_margin", type=real(0, 2), metavar="X", help="mask documents so much above the positive")
    add("--negatives_cross_device", action=argparse.BooleanOptionalAction, default=True,
        help="contrast with the documents of all processes [on]")
    add("--matryoshka_dims", type=integer(1), nargs="+", metavar="D", help="train these prefixes of the vector too")
    add("--query_column", metavar="NAME", help="where its name is not recognised")
    add("--positive_column", metavar="NAME", help="where its name is not recognised")
    add("--negative_column", metavar="NAME", help="where its name is not recognised")
    return utils.finish_flags(parser, parser.parse_args(argv), base, step=32)


# ---------------------------------------------------------------- data

QUERY_NAMES = ("query", "anchor", "question")
POSITIVE_NAMES = ("pos", "positive", "positives", "answer", "document", "passage", "response",
                  "positive_passages", "pos_doc")
HELD_OUT = 0.1  # of the rows, where no dev set is named
MAX_HELD = 1000  # queries held out where no flag says how many
MAX_POOL = 10_000  # documents that held-out queries are searched in
SMALL_POOL = 100  # fewer documents hardly tell models apart
NEGATIVE_NAMES = re.compile(r"(hard_?)?neg(ative)?s?_?\d*|negative_passages|neg_docs?|rejected_responses?")
LABEL_NAMES = ("label", "relevance", "score")
TABLE_LINE = re.compile(r"\.[ct]sv, line \d+", re.IGNORECASE)  # part of where a row of a table stands
NO_TEXT = {"", "nan", "NaN", "NULL", "None", "null"}  # what programs write into a table's cell that holds nothing


@dataclass
class Example:
    """One training row: `prompt` is BGE's, which replaces the query prefix."""

    query: str
    pos: list
    neg: list
    prompt: str | None = None


@dataclass
class DevSet:
    """Queries {id: (text, prompt)}, corpus {id: text} and the relevant document ids of each query.

    `own`: a query's own text among the documents, as {query id: document id}; it is not ranked. `spare`: training
    documents that may fill the corpus of held-out rows, in the order drawn.
    """

    queries: dict
    corpus: dict
    relevant: dict
    own: dict = field(default_factory=dict)
    spare: list = field(default_factory=list)


def find_columns(rows, args):
    """Find the query, positive and negative columns by name.

    Returns (query, positive, [negative, ...], [unused, ...]); raises InputError where a name is missing or unclear.
    """
    where = rows[0][0]
    fields = list(dict.fromkeys(name for _, row in rows[:1000] for name in row))
    listed = ", ".join(f'"{name}"' for name in fields)
    chosen = []
    for kind, names in (("query", QUERY_NAMES), ("positive", POSITIVE_NAMES)):
        flag = getattr(args, f"{kind}_column")
        found = [name for name in fields if (name == flag if flag else name.lower() in names)]
        if len(found) != 1:
            what = f"{len(found)} columns could be the {kind}: {', '.join(found)}" if found else (
                f"no column {flag}" if flag else f"no {kind}")
            raise InputError(f"{where}: {what} (fields: {listed}). Rename one to \"{names[0]}\" "
                             f"(known: {', '.join(names)}), or pass --{kind}_column NAME.")
        chosen += found
    flag = args.negative_column
    if flag and flag not in fields:
        raise InputError(f"{where}: no --negative_column {flag} (fields: {listed}).")
    negatives = [name for name in fields if (name == flag if flag else NEGATIVE_NAMES.fullmatch(name.lower()))]
    return *chosen, negatives, [name for name in fields if name not in {*chosen, *negatives, "prompt"}]


def texts_of(value, where, name):
    """Return the non-empty texts of a cell: a text, a {title, text} passage, a list of them, a JSON list of texts."""
    return [text.strip() for text in passages_of(unpacked(value, where, name), where, name)]


def unpacked(value, where, name):
    """Return a cell as it is meant: a JSON list of texts as that list, a table's word for nothing as None."""
    if not isinstance(value, str):
        return value
    text, is_table = value.strip(), TABLE_LINE.search(where)
    if is_table and text in NO_TEXT:
        return None
    if not (text.startswith("[") and text.endswith("]")):
        return value
    with contextlib.suppress(ValueError, RecursionError):
        items = json.loads(text)
        if all(isinstance(item, str) for item in items):
            return items
    if is_table and text.startswith("['"):
        raise InputError(f"{where}: {name} is {text[:60]}, a list as Python prints it. Write it with json.dumps.")
    return value


def passages_of(value, where, name):
    """Return the texts in a value or a list of values, white space around them and all; without blank ones."""
    if isinstance(value, list | tuple):
        return [text for item in value for text in passages_of(item, where, name)]
    if isinstance(value, dict):
        value = text_of_passage(value, where, name)
    if value is None or value != value:  # NaN is what a table has for nothing
        return []
    if not isinstance(value, str):
        what = f"{where}: {name} is the {type(value).__name__} {str(value)[:60]}"
        if isinstance(value, int | float) and not isinstance(value, bool):
            raise InputError(f"{what}, an id rather than a text. Look the texts up first.")
        raise InputError(f"{what}, not a text. Write it as one.")
    return [value.encode(errors="replace").decode()] if shows(value) else []  # half an emoji cannot be encoded


def shows(text):
    """Tell whether a text has more than white space and what is not seen, zero-width spaces and controls."""
    return any(not character.isspace() and category(character) not in ("Cc", "Cf") for character in text)


def text_of_passage(passage, where, name):
    """Return title and text of a {title, text} passage, whose text may be called content."""
    body = passage.get("content") if passage.get("text") is None else passage["text"]
    parts = [part for part in (passage.get("title"), body) if part is not None]
    if passage and not parts:
        raise InputError(f'{where}: {name} is {str(passage)[:60]}, an id rather than a text, or its text is not '
                         'called "text". Look the texts up first.')
    for part in parts:
        if not isinstance(part, str):
            raise InputError(f"{where}: {name} has the {type(part).__name__} {str(part)[:60]} where a text belongs.")
    return " ".join(filter(None, parts))


def prompt_of(value, where):
    """Return a row's own prompt with the white space it ends in, or None."""
    prompts = passages_of(unpacked(value, where, "prompt"), where, "prompt")
    if len(prompts) > 1:
        raise InputError(f"{where}: {len(prompts)} prompts in one row. Write the one that its query gets.")
    return prompts[0] if prompts else None


def number_of(value):
    """Return a cell as a number, which a text ("0", "true") may hold too; None where it is none."""
    if isinstance(value, str):
        value = {"true": 1, "false": 0}.get(value.strip().lower(), value)
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf
    except (TypeError, ValueError):
        return None


def label_of(value):
    """Return the number in a cell of labels, None where the cell is empty; raises ValueError for a class name."""
    if value is None or value != value or isinstance(value, str) and value.strip() in NO_TEXT:
        return None
    number = number_of(value)
    if number is None:
        raise ValueError
    return number


def find_label(rows, names):
    """Return the column in `names` that says of each row's document whether it is a match, 1 or 0; None without one.

    Raises InputError where it holds other numbers: which of them are matches is not known here.
    """
    labels, others = {}, []  # column -> its numbers, and what is said of the columns with other numbers
    for name in sorted(names, key=lambda name: name.lower()):  # label, relevance, score
        if name.lower() not in LABEL_NAMES:
            continue
        places = {}  # number -> where it stands first
        try:
            for where, row in rows:
                cell = row.get(name)
                for value in cell if isinstance(cell, list) else [cell]:
                    places.setdefault(label_of(value), where)
        except ValueError:
            continue
        has_lists = any(isinstance(row.get(name), list) for _, row in rows)
        places.pop(None, None)
        if places and places.keys() <= {0, 1} and not has_lists:
            labels[name] = places
        elif len(places) > 1:
            number, where = next((pair for pair in places.items() if pair[0] not in (0, 1)), next(iter(places.items())))
            what = "a list of labels" if has_lists else f"{number:g}, one of {len(places)} different numbers"
            others.append(f"{where}: {name} is {what}")
    telling = [name for name in labels if len(labels[name]) == 2]
    if len(telling) > 1:
        raise InputError(f"{rows[0][0]}: {len(telling)} columns could be the label: {', '.join(telling)}. Rename one.")
    if others and not telling:
        raise InputError(f"{others[0]}. Write 1 (the document matches the query) or 0 into each row, or rename the "
                         "column: it is then unused and every row a match.")
    return next(iter(telling or labels), None)


def join_labelled(found, drops):
    """Join the rows [(where, Example)] of a query into one; a query without a positive goes to `drops`."""
    by_prompt = {}
    for where, example in found:
        key = by_query(example), example.prompt
        _, joined = by_prompt.setdefault(key, (where, Example(example.query, [], [], example.prompt)))
        joined.pos += example.pos
        joined.neg += example.neg
    for where, joined in by_prompt.values():
        joined.pos, joined.neg = list(dict.fromkeys(joined.pos)), list(dict.fromkeys(joined.neg))
        if not joined.pos:
            drops.setdefault("queries without a document of label 1", []).append(where)
    return [(where, joined) for where, joined in by_prompt.values() if joined.pos]


def read_examples(rows, args):
    """Turn [(where, row)] into Examples; counts, and says, what cannot be learnt from. Returns (examples, counts)."""
    query_name, positive_name, negative_names, unused = find_columns(rows, args)
    has_prompt = any("prompt" in row for _, row in rows) and "prompt" not in (query_name, positive_name)
    has_negatives = args.negative_column or any(
        unpacked(row.get(name), where, name) not in (None, "", []) for where, row in rows for name in negative_names)
    label_name = None if has_negatives else find_label(rows, unused)
    unused = [name for name in unused if name != label_name]
    say(f"columns   query = {query_name}, positive = {positive_name}, negatives = {', '.join(negative_names) or 'none'}"
        + (f", label = {label_name}" if label_name else "") + ", query prefix = prompt" * has_prompt
        + (f" (unused: {', '.join(unused)})" if unused else ""))
    found, drops = [], {}
    for where, row in rows:
        query = texts_of(row.get(query_name), where, query_name)
        pos = texts_of(row.get(positive_name), where, positive_name)
        neg = [text for name in negative_names for text in texts_of(row.get(name), where, name)]
        label = label_of(row.get(label_name)) if label_name else 1
        if len(query) > 1:
            raise InputError(f"{where}: {len(query)} queries in one row. Write a row for each.")
        if not query or not pos or label is None:
            what = "an empty query" if not query else "an empty positive" if not pos else f"an empty {label_name}"
            drops.setdefault(f"rows with {what}", []).append(where)
            continue
        prompt = prompt_of(row.get("prompt"), where) if has_prompt else None
        found.append((where, Example(query[0], pos, neg, prompt) if label else Example(query[0], [], pos, prompt)))
    if label_name:
        found = join_labelled(found, drops)
    examples = distinct(found, drops)
    if args.query_prefix is not None and examples and all(example.prompt for example in examples):
        raise InputError(f"{found[0][0]}: every row has a prompt of its own, {found[0][1].prompt!r}, which "
                         f"--query_prefix {args.query_prefix!r} does not replace. Drop the flag, or rename the column.")
    for name, values in ((query_name, [e.query for e in examples]), (positive_name, [e.pos[0] for e in examples])):
        if len(values) > 1 and all(value.isdecimal() for value in values):
            raise InputError(f"{rows[0][0]}: every {name} is a number, ids rather than texts. Look the texts up first.")
    return examples, utils.say_drops(drops)


def distinct(found, drops):
    """Return each Example of [(where, Example)] once, without negatives that are positives; adds to `drops`."""
    examples, seen = [], set()
    for where, example in found:
        known = {utils.text_id(text) for text in example.pos}
        true_neg = [text for text in example.neg if utils.text_id(text) not in known]
        if len(true_neg) < len(example.neg):
            drops.setdefault("negatives equal to a positive", []).extend([where] * (len(example.neg) - len(true_neg)))
        example.neg = true_neg
        key = (by_query(example), *sorted(known), *sorted(map(utils.text_id, true_neg)))
        if key in seen:
            drops.setdefault("duplicate rows", []).append(where)
            continue
        seen.add(key)
        examples.append(example)
    return examples


def dev_from_examples(examples):
    """Make a dev set of rows: the pool is every positive and negative, each text once."""
    ids, queries, corpus, relevant = {}, {}, {}, {}
    for example in examples:
        key = f"q{utils.text_id(example.query)}"
        queries.setdefault(key, (example.query, example.prompt))
        for text in example.pos + example.neg:
            name = ids.setdefault(utils.text_id(text), f"d{len(ids):09d}")
            corpus.setdefault(name, text)
        relevant.setdefault(key, set()).update(ids[utils.text_id(text)] for text in example.pos)
    same = {key: ids.get(utils.text_id(text)) for key, (text, _) in queries.items()}
    own = {key: name for key, name in same.items() if name and name not in relevant[key]}
    return DevSet(queries, corpus, relevant, own)


def spare_documents(dev, examples, rest, seed):
    """Draw at most MAX_POOL documents of `examples`, which are trained on, that are wrong for every query of `dev`.

    Left aside are texts that `dev` has, as a document or as a query, and what any row of `rest` pairs with a query of
    `dev`, in either direction.
    """
    queries = {utils.text_id(text) for text, _ in dev.queries.values()}
    aside = queries | {utils.text_id(text) for text in dev.corpus.values()}
    for example in rest:
        positives = {utils.text_id(text) for text in example.pos}
        if utils.text_id(example.query) in queries:
            aside |= positives
        if not queries.isdisjoint(positives):
            aside.add(utils.text_id(example.query))
    documents = list(dict.fromkeys(text for example in examples for text in example.pos + example.neg))
    random.Random(seed).shuffle(documents)
    spare = []
    for text in documents:
        if len(spare) < MAX_POOL and utils.text_id(text) not in aside:
            aside.add(utils.text_id(text))
            spare.append(text)
    return spare


def dev_from_beir(folder):
    """Read a BEIR folder: corpus.jsonl, queries.jsonl, qrels/*.tsv (dev.tsv if there are several, else test.tsv)."""
    folder = Path(folder)
    qrels = sorted(folder.glob("qrels/*.tsv"), key=lambda path: (path.stem not in ("dev", "test"), path.stem))
    missing = [name for name in ("corpus.jsonl", "queries.jsonl") if not (folder / name).is_file()]
    if missing or not qrels:
        raise InputError(f"{folder} is no BEIR folder: no {', '.join(missing) or 'qrels/*.tsv'}.")
    texts = {"corpus.jsonl": {}, "queries.jsonl": {}}
    for name, by_id in texts.items():
        for where, row in utils.read_rows(folder / name):
            if "_id" not in row or "text" not in row:
                raise InputError(f"{where}: no _id or no text. A line is {{\"_id\": \"7\", \"text\": \"...\"}}.")
            passage = {"title": row.get("title"), "text": row["text"] or ""}
            text = next(iter(texts_of(passage, where, name)), "-")  # an empty document counts too
            if by_id.setdefault(str(row["_id"]), text) != text:
                raise InputError(f"{where}: the _id {row['_id']} stood before another text. Delete one of the two.")
    corpus, queries, relevant = texts["corpus.jsonl"], texts["queries.jsonl"], {}
    for where, query, document, score in read_qrels(qrels[0], queries):
        if query not in queries or document not in corpus:
            raise InputError(f"{where}: {query if query not in queries else document} is in no file of {folder}.")
        if score > 0:
            relevant.setdefault(query, set()).add(document)
    return DevSet({name: (queries[name], None) for name in relevant}, corpus, relevant)


def read_qrels(path, queries):
    """Read judgements into [(where, query id, document id, score)]; the first line may hold column names."""
    lines = utils.read_table(path)
    width = len(lines[0][1]) if lines else 0
    if width not in (2, 3):
        raise InputError(f"{path} has lines of {width} columns. Write query id, document id and score, tab-separated.")
    first = lines[0][1]
    if first[0] not in queries and (width == 2 or number_of(first[2]) is None):
        lines = lines[1:]
    judgements = []
    for where, cells in lines:
        score = 1.0 if width == 2 else number_of(cells[-1])
        if len(cells) != width or score is None:
            raise InputError(f"{where}: not the {width} columns of the first line, or a score that is no number.")
        judgements.append((where, cells[0], cells[1], score))
    return judgements


def by_query(example):
    """Return what rows of the same query share."""
    return utils.text_id(example.query)


def mirrored_groups(examples):
    """Return {query id: group}: queries that are each other's positive, (a, b) and (b, a), share a group."""
    pairs = {(by_query(example), utils.text_id(text)) for example in examples for text in example.pos}
    group = {query: query for query, _ in pairs}

    def first_of(query):
        while group[query] != query:
            group[query] = group[group[query]]  # halves the way for the next search
            query = group[query]
        return query

    for query, document in pairs:
        if (document, query) in pairs:
            group[first_of(query)] = first_of(document)
    return {query: first_of(query) for query in group}


def without_leaks(examples, dev_sets, dropped):
    """Leave out the rows that give dev rows away: one's query, or one's pair the other way round."""
    pairs = set()
    for dev in dev_sets.values():
        for name, (query, _) in dev.queries.items():
            for document in dev.relevant[name]:
                pairs.add((utils.text_id(query), utils.text_id(dev.corpus[document])))
    queries = {query for query, _ in pairs}

    def leak(example):
        query = by_query(example)
        if query in queries:
            return "training rows whose query is in a dev set"
        if any((utils.text_id(text), query) in pairs for text in example.pos):
            return "training rows that are a pair of a dev set turned round"
        return None

    return utils.leave_out(examples, leak, dropped)


def read_data(args):
    """Read, check and split the data. Returns (training Examples, {name: DevSet}, counts for the report)."""
    examples, dev_sets, dropped = utils.read_enough(args, partial(split_rows, args), HELD_OUT)
    if len(examples) < 2 and not (args.max_negs and any(example.neg for example in examples)):
        need = "in-batch negatives need two, or one with mined negatives"
        raise utils.too_few(args, len(examples), dropped, dev_sets, need)
    sizes = dev_sizes(dev_sets)
    parts = [f"{len(examples)} rows to train on"]
    for name, size in sizes.items():
        parts.append(f"{name}: {size['queries']} queries over {size['corpus']} documents")
    say(f"data      {'; '.join(parts)}")
    return examples, dev_sets, {"train_rows": len(examples), "dropped": dropped, "dev": sizes}


def split_rows(args, rows, sources):
    """Turn training rows and dev sources into (training Examples, {name: DevSet}, {reason: rows dropped})."""
    examples, dropped = read_examples(rows, args)
    rng, dev_sets = random.Random(args.seed), {}
    rng.shuffle(examples)
    for name, source in sources.items():
        if isinstance(source, str) and Path(source).is_dir():
            dev = dev_from_beir(source)
        else:
            rows = utils.read_rows(source) if isinstance(source, str) else source
            dev = dev_from_examples(read_examples(rows, args)[0])
        kept = rng.sample(sorted(dev.queries), min(args.dev_sample_limit or len(dev.queries), len(dev.queries)))
        dev.queries = {key: dev.queries[key] for key in sorted(kept)}
        if not dev.queries:
            raise InputError(f"--dev_file {source} holds no query with a relevant document.")
        dev_sets[name] = dev
    held = {}
    if not dev_sets:
        group = mirrored_groups(examples)
        examples, held = utils.hold_out(
            examples, lambda example: group[by_query(example)], args, "query", HELD_OUT, MAX_HELD, by_query)
        dev_sets = {name: dev_from_examples(rows) for name, rows in held.items()}
    trained = without_leaks(examples, dev_sets, dropped)[: args.train_sample_limit]
    for name in held:
        dev_sets[name].spare = spare_documents(dev_sets[name], trained, examples, args.seed)
    return trained, dev_sets, dropped


def dev_sizes(dev_sets):
    """Return how many queries and documents each dev set has, for the report."""
    return {name or "dev": {"queries": len(dev.queries), "corpus": len(dev.corpus)} for name, dev in dev_sets.items()}


def encode_texts(tokenizer, texts, sides, query_max_len, passage_max_len):
    """Return the token ids of each text; sides: whether it is a query."""
    ids = [None] * len(texts)
    for side, limit in ((True, query_max_len), (False, passage_max_len)):
        at = [i for i, is_query in enumerate(sides) if is_query == side]
        rows = tokenizer([texts[i] for i in at], truncation=True, max_length=limit)["input_ids"] if at else []
        for i, row in zip(at, rows, strict=True):
            ids[i] = row
    return ids


class Texts:
    """Every text of a run once, as token ids: `add` gives its index, then `tokenise`, then `texts[index]`."""

    def __init__(self):
        self.index = {}

    def add(self, prefix, text, is_query):
        return self.index.setdefault((prefix + text, is_query), len(self.index))

    def tokenise(self, tokenizer, query_max_len, passage_max_len, workers):
        """Tokenise all texts, cached by `datasets` under a hash of texts, tokenizer and lengths."""
        texts, sides = zip(*self.index, strict=True)
        made_by = utils.tokens_key(tokenizer, Texts.tokenise)

        def encode(batch):
            ids = encode_texts(tokenizer, batch["text"], batch["is_query"], query_max_len, passage_max_len)
            return {"input_ids": ids}

        key = [texts, sides, made_by, query_max_len, passage_max_len]
        data = utils.cached_map({"text": texts, "is_query": sides}, encode, key, workers)
        self.values, self.offsets = utils.ragged(data, "input_ids")
        if (lengths := np.diff(self.offsets)).min() == 0:
            raise InputError(f"the base's tokenizer makes no token of the text {texts[lengths.argmin()]!r}. Delete its "
                             "row, or choose another base.")
        return self

    def __getitem__(self, i):
        return self.values[self.offsets[i] : self.offsets[i + 1]]


class TrainSet(torch.utils.data.Dataset):
    """Rows of text indices; which positive and negatives a row shows depends on seed, epoch and row alone."""

    def __init__(self, examples, texts, args):
        self.rows, self.seed, self.max_negs, self.epoch = [], args.seed, args.max_negs, 0
        known = {}  # query text -> every positive listed for it, in any row
        for example in examples:
            known.setdefault(utils.text_id(example.query), set()).update(map(utils.text_id, example.pos))
        for example in examples:
            query_id = utils.text_id(example.query)
            prefix = args.query_prefix if example.prompt is None else example.prompt
            documents = [[(texts.add(args.doc_prefix, text, False), utils.text_id(text)) for text in side]
                         for side in (example.pos, example.neg)]
            self.rows.append((texts.add(prefix, example.query, True), *documents, sorted({query_id, *known[query_id]})))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        query, pos, neg, known = self.rows[i]
        rng = random.Random(f"{self.seed} {self.epoch} {i}")
        return query, rng.choice(pos), rng.sample(neg, min(self.max_negs, len(neg))), known


class Collator:
    """Make one step of rows: each distinct text once, and which document belongs to which query.

    `sequences` token ids; `queries` (Q,), `documents` (N,) positions in it; `texts` (N,) text indices of the documents,
    `document_ids` (N,) their hashes; `target` (Q,) column of each query's positive; `known` (Q, K) hashes of texts
    that are no negatives of a query, 0-padded.
    """

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, rows):
        position, column = {}, {}  # text index -> place in `sequences`, document -> column
        for query, positive, negatives, _ in rows:
            position.setdefault(query, len(position))
            for document in (positive, *negatives):
                position.setdefault(document[0], len(position))
                column.setdefault(document, len(column))
        known = [torch.tensor(row[3]) for row in rows]
        return {
            "rows": len(rows),
            "sequences": [self.texts[i] for i in position],
            "queries": torch.tensor([position[row[0]] for row in rows]),
            "documents": torch.tensor([position[i] for i, _ in column]),
            "texts": torch.tensor([i for i, _ in column]),
            "document_ids": torch.tensor([text_id for _, text_id in column]),
            "target": torch.tensor([column[row[1]] for row in rows]),
            "known": nn.utils.rnn.pad_sequence(known, batch_first=True),
        }


# ---------------------------------------------------------------- loss and metrics


def excluded_columns(document_ids, target, known):
    """Mark the documents (Q, N) that are no negatives of a query: itself, or a positive of it other than the target."""
    mask = torch.zeros(len(target), len(document_ids), dtype=torch.bool, device=target.device)
    for ids in known.T:
        mask |= document_ids == ids[:, None]
    return mask.scatter(1, target[:, None], False)


def contrastive_loss(query_emb, doc_emb, target, excluded, temperature, margin=None, dims=None):
    """InfoNCE over one step (van den Oord et al. 2018, eq. 4), averaged over D and `dims`.

    dims: prefixes of the vector (Matryoshka, Kusupati et al. 2022); without D the rest of it would get no gradient.
    query_emb (Q, D) and doc_emb (N, D) have unit length; target (Q,) is each query's column; excluded (Q, N) columns
    are left out, and with a margin those whose cosine exceeds the positive's by more.
    """
    losses = []
    for dim in sorted({query_emb.shape[1], *(dims or ())}):
        scores = F.normalize(query_emb[:, :dim], dim=1) @ F.normalize(doc_emb[:, :dim], dim=1).T  # (Q, N)
        skip = excluded
        if margin is not None:
            skip = skip | (scores > scores.gather(1, target[:, None]) + margin)
        losses.append(F.cross_entropy(scores.masked_fill(skip, -torch.inf) / temperature, target))
    return torch.stack(losses).mean()


def pool(hidden, lengths, pooling):
    """Pool hidden states (B, T, D) of right-padded sequences of `lengths` (B,) into unit vectors (B, D) in float32."""
    hidden = hidden.float()
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "last":
        # by length, not by id: a pad id may be a real token (Qwen3-Embedding ends in its pad token)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    else:
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]  # (B, T)
        vectors = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
    return F.normalize(vectors, dim=1)


METRICS = [f"{kind}@{k}" for kind in ("accuracy", "precision", "recall") for k in (1, 3, 5, 10)]
METRICS += ["mrr@10", "ndcg@10", "map@100"]


def best_columns(scores, count):
    """Return the columns of the `count` highest scores (Q, C) of each row, best first, ties by ascending column.

    As scores.sort(descending=True, stable=True), without sorting all columns: topk leaves the order of ties open.
    """
    if count >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True).indices
    values, columns = scores.topk(count + 1, dim=1)
    for row in (values[:, count] == values[:, count - 1]).nonzero().flatten().tolist():
        # a tie across the border: of the columns at the last value, the first ones belong in
        last = values[row, count - 1]
        above = (scores[row] > last).nonzero().flatten()
        equal = (scores[row] == last).nonzero().flatten()
        columns[row, :count] = torch.cat([above, equal[: count - len(above)]])
    columns = columns[:, :count].sort(dim=1).values
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


def retrieval_metrics(query_emb, corpus_emb, relevant, own=(), chunk=2**25):
    """Rank the corpus by cosine for each query, ties by ascending index, and score the ranks.

    query_emb (Q, D), corpus_emb (C, D), relevant: a set of corpus indices per query; own: the corpus index, or None, of
    each query's own text, which ranks last. The metrics are those of sentence-transformers'
    InformationRetrievalEvaluator; queries without a relevant document are dropped.
    """
    hits, found = [], []
    query_emb, corpus_emb = F.normalize(query_emb.float(), dim=1), F.normalize(corpus_emb.float(), dim=1)
    rows = max(1, chunk // len(corpus_emb))
    for start in range(0, len(query_emb), rows):
        scores = query_emb[start : start + rows] @ corpus_emb.T
        if scores.sum().isnan():
            scores.nan_to_num_(nan=torch.inf)  # comes first, as in a sort, and equals itself
        for row, column in enumerate(own[start : start + rows]):
            if column is not None:
                scores[row, column] = -torch.inf
        ranked = best_columns(scores, 100).tolist()
        for row, gold in zip(ranked, relevant[start : start + rows], strict=True):
            if gold:
                hits.append(np.pad([index in gold for index in row], (0, 100 - len(row))))
                found.append(len(gold))
    hits, found = np.array(hits, dtype=float), np.array(found)  # (Q, 100), (Q,)
    cumulative, ranks = hits.cumsum(1), np.arange(1, 101)
    metrics = {}
    for k in (1, 3, 5, 10):
        metrics[f"accuracy@{k}"] = (cumulative[:, k - 1] > 0).mean()
        metrics[f"precision@{k}"] = (cumulative[:, k - 1] / k).mean()
        metrics[f"recall@{k}"] = (cumulative[:, k - 1] / found).mean()
    first = hits[:, :10].argmax(1)
    metrics["mrr@10"] = np.where(hits[:, :10].any(1), 1 / (first + 1), 0).mean()
    discount = 1 / np.log2(ranks[:10] + 1)
    ideal = discount.cumsum()[np.minimum(found, 10) - 1]
    metrics["ndcg@10"] = (hits[:, :10] @ discount / ideal).mean()
    metrics["map@100"] = ((hits * cumulative / ranks).sum(1) / np.minimum(found, 100)).mean()
    return {name: float(value) for name, value in metrics.items()}


# ---------------------------------------------------------------- training


class EmbedTrainer(utils.StepTrainer):
    """Contrasts all queries of a step with all its documents, however many pieces the step is cut into."""

    def __init__(self, *, flags, causal, **kwargs):
        super().__init__(batch_size=flags.batch_size, **kwargs)
        self.flags, self.causal = flags, causal
        self.world = self.accelerator.num_processes if flags.negatives_cross_device else 1

    def encode(self, model, step, piece):
        """Embed a piece's sequences: unit vectors (B, D) in float32."""
        input_ids, lengths = self.pad(step, piece)
        inputs = {"input_ids": input_ids}
        if not self.causal:  # a causal model never sees the padding on its right
            positions = torch.arange(input_ids.shape[1], device=lengths.device)
            inputs["attention_mask"] = (positions < lengths[:, None]).long()  # (B, T)
        with self.accelerator.autocast():
            hidden = model(**inputs).last_hidden_state
        return pool(hidden, lengths, self.flags.pooling)

    def loss(self, vectors, step):
        """Loss of the step from its sequences' vectors (B, D); over all processes' queries and documents at once."""
        query_emb, doc_emb = vectors[step["queries"]], vectors[step["documents"]]
        ids, target, known = step["document_ids"], step["target"], step["known"]
        repeated = False
        if self.world > 1:
            rank = self.accelerator.process_index
            before = sum(map(len, self.gather(ids)[:rank]))
            known = torch.cat(self.gather(self.accelerator.pad_across_processes(known, dim=1)))
            target, ids, texts = (torch.cat(self.gather(x)) for x in (target + before, ids, step["texts"]))
            # one's own part stays attached, so that each process has the gradient of the whole loss for it
            query_emb, doc_emb = (
                torch.cat([own if i == rank else other for i, other in enumerate(self.gather(own.detach()))])
                for own in (query_emb, doc_emb)
            )
            column = (texts[:, None] == texts).int().argmax(1)  # (N,) a text is one column, whoever has it
            target, repeated = column[target], column != torch.arange(len(column), device=column.device)
        excluded = excluded_columns(ids, target, known) | repeated
        margin, dims = self.flags.false_negative_margin, self.flags.matryoshka_dims
        return contrastive_loss(query_emb, doc_emb, target, excluded, self.flags.temperature, margin, dims)

    def gather(self, rows):
        """Return the rows (n, ...) of every process, whose numbers may differ, as a list."""
        sizes = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device))
        parts = self.accelerator.gather(self.accelerator.pad_across_processes(rows)).chunk(len(sizes))
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def run_step(self, model, step, pieces, tokens_at_once):
        """Forward and backward of one step by gradient caching (Gao et al. 2021, section 3.2).

        As many of the last pieces as memory allows keep their graphs: all of them without accumulation, which makes it
        one plain pass. The others are computed without a graph first, and again once the loss has given the gradient
        of their vectors.
        """
        sizes = [len(piece) * len(step["sequences"][piece[0]]) for piece in pieces]
        early = sum(total > tokens_at_once for total in itertools.accumulate(reversed(sizes)))
        early = min(early, len(pieces) - 1)
        vectors, states = [], []
        with self.unsynced(model, early > 0):
            for i, piece in enumerate(pieces):
                states.append(get_rng_state())
                with torch.set_grad_enabled(i >= early):
                    vectors.append(self.encode(model, step, piece))
        leaves = [vector.detach().requires_grad_() for vector in vectors]
        order = torch.tensor([i for piece in pieces for i in piece], device=self.args.device).argsort()
        loss = self.loss(torch.cat(leaves)[order], step)
        (self.world * loss).backward()  # DDP averages the gradients
        with self.unsynced(model, early > 0):  # first, so that the kept graphs are gone before others are made
            kept = zip(vectors[early:], leaves[early:], strict=True)
            self.accelerator.backward(sum((vector * leaf.grad).sum() for vector, leaf in kept))
        del vectors
        for i in range(early):
            with self.unsynced(model, i < early - 1), replayed(states[i]):
                vector = self.encode(model, step, pieces[i])
                self.accelerator.backward((vector * leaves[i].grad).sum())
        return loss.detach()

    def embed(self, sequences):
        """Embed token sequences in evaluation mode, shared out over the processes: (len(sequences), D) on each."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if len(sequences) < world:
            world, rank = 1, 0
        step, own = {"sequences": sequences}, range(rank, len(sequences), world)
        lengths = [len(sequences[i]) for i in own]
        limit = min(self.device_tokens, self.flags.batch_size * self.flags.passage_max_len)

        def encode_own():
            pieces = [[own[i] for i in piece] for piece in utils.cut(lengths, 2 * limit // 2**self.halvings)]
            vectors = torch.cat([self.encode(self.model, step, piece) for piece in pieces])
            return torch.tensor([i for piece in pieces for i in piece], device=self.args.device), vectors

        order, vectors = self.evaluated(encode_own)
        if world > 1:
            order, vectors = torch.cat(self.gather(order)), torch.cat(self.gather(vectors))
        return vectors[order.argsort()]


def get_rng_state():
    """Return the state that dropout draws from: the CPU's, and the GPU's where there is one."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextlib.contextmanager
def replayed(state):
    """Run a block with an earlier random state, and go on with the present one after it."""
    cpu, gpu = state
    with torch.random.fork_rng(devices=[] if gpu is None else [torch.cuda.current_device()]):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
        yield


# ---------------------------------------------------------------- the model


POOLINGS = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}


def stored_pooling(stored):
    """Return how a base's Pooling module pools, as --pooling says it; several ways, which it joins, with a +."""
    named = stored.get("pooling_mode")  # newer versions
    names = named if isinstance(named, list) else [named] if named else [
        key.removeprefix("pooling_mode_") for key, value in stored.items() if key.startswith("pooling_mode_") and value]
    return " + ".join(str(POOLINGS.get(str(name), name)) for name in names) or None


def st_files(args, notes):
    """Read what the base's sentence-transformers files say: (pooling or None, {name: prompt}); adds to `notes`.

    Raises InputError where they hold a layer that would be missing from what is trained here.
    """
    modules = utils.base_json(args, "modules.json", list) or []
    if not all(isinstance(module, dict) and isinstance(module.get("type"), str) for module in modules):
        raise InputError(f"{args.model_name}: modules.json has a module without a type. Fetch it again.")
    kinds = [module["type"].split(".")[-1] for module in modules]
    if extra := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise InputError(f"{args.model_name} has a {extra.pop()} layer behind its pooling, which would get lost. "
                         "Choose a base without one.")
    pooling = None
    if "Pooling" in kinds:
        stored = utils.base_json(args, f"{modules[kinds.index('Pooling')].get('path')}/config.json") or {}
        pooling = stored_pooling(stored)
        if args.pooling == "auto" and pooling not in POOLINGS.values():
            raise InputError(f"{args.model_name} pools by {pooling}, which is not known here. Pass --pooling.")
        if stored.get("include_prompt") is False:
            notes.append("the base leaves the tokens of a prompt out of its pooling; here they take part, as in final/")
    stored = utils.base_json(args, "config_sentence_transformers.json") or {}
    prompts = stored.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise InputError(f"{args.model_name}: the prompts in config_sentence_transformers.json are no texts with "
                         "names. Fetch it again, or mend them.")
    return pooling, prompts


def added_tokens(tokenizer):
    """Return the ids that the tokenizer puts before every text, and behind it; None where that cannot be told."""
    for text in ("a", "1", "的"):
        bare, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[:start], whole[start + len(bare) :]
    return None


def append_eos(tokenizer, args, notes):
    """Return a tokenizer that by itself ends every text with EOS, so that whoever loads it does so, truncated or not.

    Raises InputError if it cannot be made to.
    """
    eos = tokenizer.eos_token or tokenizer.sep_token
    if not eos or not tokenizer.is_fast:
        raise InputError("--append_eos: the tokenizer has no EOS token, or is none of `tokenizers`'. Drop the flag.")
    before, after = added_tokens(tokenizer) or (None, None)
    if before is None:
        raise InputError(f"--append_eos: the {type(tokenizer).__name__} of {args.model_name} reads none of 'a', '1', "
                         "'的', so that it cannot be told what it puts around a text. Choose another base.")
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if after and after[-1] in special | set(tokenizer.all_special_ids):
        notes.append("--append_eos changes nothing: the tokenizer ends every text in "
                     f"{tokenizer.convert_ids_to_tokens(after[-1])} by itself")
        return tokenizer
    before, after = (tokenizer.convert_ids_to_tokens(ids) for ids in (before, after))
    after.append(eos)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys([*before, *after])]
    try:
        template = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", *after, *before, "$B:1", *after], special_tokens=ids)
    except ValueError as error:  # a token with a colon in it, say
        raise InputError(f"--append_eos: no template can be made of the tokens {', '.join(before + after)} "
                         f"({utils.reason(error)}). Choose another base, or drop the flag.") from None
    tokenizer.backend_tokenizer.post_processor = template
    limit = len(before) + len(after) + 2
    if always_ends(tokenizer, args, eos, limit):
        return tokenizer
    # some classes rebuild the template when they are loaded (GPTNeoXTokenizer): the plain one takes it as it stands
    plain = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=tokenizer.model_max_length, padding_side="right",
        model_input_names=tokenizer.model_input_names, **tokenizer.special_tokens_map)
    if always_ends(plain, args, eos, limit):
        return plain
    raise InputError(f"--append_eos: the {type(tokenizer).__name__} of {args.model_name} does not end short and "
                     f"truncated texts in {eos} once it is saved and read back. Choose another base, or drop the flag.")


def always_ends(tokenizer, args, token, limit):
    """Tell whether a tokenizer that is saved and read back ends a short text and a truncated one in `token`."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = utils.read_tokenizer(folder, args)
    found = [saved(text, truncation=True, max_length=limit)["input_ids"] for text in ("a", "a b c " * 100)]
    return len(found[1]) <= limit and all(ids[-1] == saved.convert_tokens_to_ids(token) for ids in found)


def hidden_states(model, precision, last):
    """Return the hidden states (1, T, D) of four tokens of which the fourth is `last`, in float32."""
    with torch.autocast(model.device.type, dtype=utils.DTYPES[precision], enabled=precision != "none"):
        return model(torch.tensor([[5, 6, 7, last]], device=model.device)).last_hidden_state.float()


def probe(model, precision):
    """Run a forward pass: (whether attention is causal, D, the linear layers that the hidden states do not need)."""
    outputs, hooks, thresholds = {}, [], {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            keep = lambda _, __, output, name=name: outputs.update({name: output.requires_grad_()})  # noqa: E731
            hooks.append(layer.register_forward_hook(keep))
        if hasattr(getattr(layer, "state", None), "threshold"):  # LLM.int8: outlier columns depend on every token
            thresholds[layer], layer.state.threshold = layer.state.threshold, 0.0
    model.eval()
    first, changed = (hidden_states(model, precision, last) for last in (8, 9))
    for hook in hooks:
        hook.remove()
    for layer, threshold in thresholds.items():
        layer.state.threshold = threshold
    causal = torch.allclose(first[0, 0], changed[0, 0], rtol=1e-3, atol=1e-4)
    gradients = torch.autograd.grad(changed.sum(), list(outputs.values()), allow_unused=True)
    unused = [name for name, gradient in zip(outputs, gradients, strict=True) if gradient is None]
    return causal, first.shape[-1], unused


def save_st_files(folder, args, dimension, prompts):
    """Write the files that make `folder` a SentenceTransformer, in the names that old versions, vLLM and TEI read."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate(kinds)]
    keys = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    others = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    modes = {f"pooling_mode_{key}": key == keys[args.pooling] for key in others}
    for path, _ in kinds:
        (folder / path).mkdir(exist_ok=True)
    length = max(args.query_max_len, args.passage_max_len)
    utils.write_json(folder / "modules.json", modules)
    pooling = {"word_embedding_dimension": dimension, **modes, "include_prompt": True}
    utils.write_json(folder / "1_Pooling/config.json", pooling)
    utils.write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    default = (utils.base_json(args, "config_sentence_transformers.json") or {}).get("default_prompt_name")
    default = default if isinstance(default, str) and default in prompts else None
    utils.write_json(folder / "config_sentence_transformers.json", {
        "prompts": prompts, "default_prompt_name": default, "similarity_fn_name": "cosine"})


# ---------------------------------------------------------------- main


def settle_texts(args, examples, config, tokenizer, notes):
    """Fill in lengths and prefixes where no flag gives them.

    Returns (the base's own pooling or None, the prompts to save: the base's with those that are trained).
    """
    limit = utils.position_limit(config, tokenizer)
    for name in ("query_max_len", "passage_max_len"):
        wanted = getattr(args, name) or args.max_length
        if wanted > limit:
            notes.append(f"{name} {wanted} is above the {limit} positions of the base model: lowered to {limit}")
        setattr(args, name, int(min(wanted, limit)))
    pooling, prompts = st_files(args, notes)
    lowers = (utils.base_json(args, "sentence_bert_config.json") or {}).get("do_lower_case")
    if lowers and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
        notes.append("sentence-transformers makes this base's texts lower case (do_lower_case), here they stay as they "
                     "are, as with final/: write yours in lower case")
    if args.query_prefix is None:
        args.query_prefix = prompts.get("query") or ""
    if args.doc_prefix is None:
        args.doc_prefix = prompts.get("document") or prompts.get("passage") or ""
    others = [name for name in prompts if name not in ("query", "document", "passage")]
    if others:
        example = next((name for name in others if "query" in name.lower()), others[0])
        notes.append(f"the base has prompts under other names, {', '.join(others)} ({example}: "
                     f"{json.dumps(prompts[example], ensure_ascii=False)}): to train with one of them pass it as "
                     "--query_prefix or --doc_prefix; final/ keeps all")
    own = {example.prompt for example in examples}
    if own != {None}:
        first = next(example for example in examples if example.prompt)
        joined = json.dumps(first.prompt + first.query[:40], ensure_ascii=False)
        notes.append(f"a row's prompt stands before its query as it is: {joined}; for a base that was trained with "
                     r"'Instruct: ...\nQuery: ' write all of that into the column, line break included")
    if len(own) == 1 and own != {None}:
        args.query_prefix = own.pop()  # the rows' own prompt is the one to save
    elif len(own) > 1:
        notes.append(f"the rows carry {len(own)} query prefixes and final/ stores one, '{args.query_prefix}': put a "
                     "query's own prompt before it when you encode it")
    note_typed_breaks(args, own, notes)
    trained = {"query": args.query_prefix, "document": args.doc_prefix}
    if "passage" in prompts:  # the same under the name that e5 uses
        trained["passage"] = args.doc_prefix
    return pooling, prompts | trained


def note_typed_breaks(args, prompts, notes):
    """Note the prefixes with a backslash and an n, which is what a shell and a table make of a line break."""
    for prefix in sorted({args.query_prefix, args.doc_prefix, *filter(None, prompts)}):
        if r"\n" in prefix:
            notes.append(rf"the prefix '{prefix}' holds a backslash and an n, which is no line break: in bash write "
                         r"$'Instruct: ...\nQuery: ', in a table a real line break")


def note_cut_texts(args, texts, tokenizer, notes):
    """Note how many texts are cut at the shorter of two lengths, since final/ can store the longer one alone."""
    shorter, longer = sorted((args.query_max_len, args.passage_max_len))
    if shorter == longer:
        return
    of_queries = shorter == args.query_max_len
    full = [text for i, (text, is_query) in enumerate(texts.index)
            if is_query == of_queries and len(texts[i]) >= shorter]
    cut = sum(len(row) > shorter for row in tokenizer(full, verbose=False)["input_ids"]) if full else 0
    if cut:
        what, flag = ("queries", "--query_max_len") if of_queries else ("documents", "--passage_max_len")
        notes.append(f"{cut} {what} are cut at {flag} {shorter}, but sentence-transformers has one length for both "
                     f"sides and will cut them at {longer}: set model.max_seq_length = {shorter} before it encodes "
                     f"{what}, or train with one length")


def settle_pooling(args, stored, causal, texts, config, notes):
    """Choose the pooling, and say what about it is suspicious."""
    if args.pooling == "auto":
        args.pooling = stored or ("last" if causal else "mean")
    ends = {int(texts[i][-1]) for i in range(min(50, len(texts.index)))}
    if args.pooling == "last" and len(ends) > 1:
        notes.append("last-token pooling, but texts end in different tokens: --append_eos gives them one to learn")
    two_way = getattr(config, "is_causal", True) is False or "bidirec" in config.model_type
    if causal and (two_way or args.pooling == "mean" and stored):
        notes.append("the base should see both ways, but its first token does not see its last: it runs causal here")


def text_indices(row):
    """Return the text indices of a row as TrainSet gives it: query, positive, negatives."""
    query, positive, negatives, _ = row
    return [query, positive[0], *(negative[0] for negative in negatives)]


def unknown_share(texts, tokenizer):
    """Return the share of unknown tokens in the texts themselves, without what the tokenizer adds to each."""
    added = [token for side in added_tokens(tokenizer) or () for token in side]
    count = len(texts.values) - len(texts.index) * len(added)
    unknown = (texts.values == tokenizer.unk_token_id).sum() - len(texts.index) * added.count(tokenizer.unk_token_id)
    return unknown / max(1, count)


def show_examples(train_set, texts, tokenizer, notes):
    """Print three rows as the model sees them, special tokens and prefixes included; note what it cannot read."""
    for i in range(min(3, len(train_set))):
        for name, j in zip(("query", "positive", "negative"), text_indices(train_set[i]), strict=False):
            text = tokenizer.decode(texts[j])
            text = text if len(text) < 160 else f"{text[:100]} ... {text[-50:]}"
            say(f"example {i + 1} {name:8} {len(texts[j]):4} tokens  {text}")
    unknown = unknown_share(texts, tokenizer)
    if unknown > 0.01:
        notes.append(f"{unknown:.0%} of all tokens are {tokenizer.unk_token}: the base cannot read these texts. "
                     "Choose one made for their language.")


def dev_indices(dev, texts, args):
    """Return the text indices of a dev set's queries, and of its documents by ascending id."""
    queries = [texts.add(args.query_prefix if prompt is None else prompt, text, True)
               for text, prompt in dev.queries.values()]
    return queries, [texts.add(args.doc_prefix, dev.corpus[key], False) for key in sorted(dev.corpus)]


def tokens_of_rows(train_set, texts):
    """Return how many tokens each training row has."""
    return [sum(len(texts[j]) for j in text_indices(train_set[i])) for i in range(len(train_set))]


def step_tokens(train_set, texts, tokens, rows, seed):
    """Return the mean tokens of a step of `rows` rows, in which a text that several rows share is computed once."""
    rng, total, distinct = random.Random(seed), 0, 0
    for _ in range(10):
        drawn = rng.sample(range(len(train_set)), rows)
        step = {j for i in drawn for j in text_indices(train_set[i])}
        total += sum(tokens[i] for i in drawn)
        distinct += sum(len(texts[j]) for j in step)
    return sum(tokens) / len(tokens) * rows * distinct / total


def evaluations_of(args, plan):
    """Return how many times a run measures its dev sets: before, after, and in between."""
    steps = {0, plan.total_steps, *range(plan.eval_steps, plan.total_steps, plan.eval_steps)}
    if args.save_on_epoch_end:  # each is evaluated, so that the best can be kept
        steps |= set(range(plan.steps_per_epoch, plan.total_steps, plan.steps_per_epoch))
    return len(steps)


def filled(dev, texts, args, room):
    """Return a DevSet with the first spare documents in its corpus, as many as `room` tokens and MAX_POOL allow."""
    spare = dev.spare[: max(0, MAX_POOL - len(dev.corpus))]
    tokens = np.cumsum([len(texts[texts.add(args.doc_prefix, text, False)]) for text in spare])
    count = int(np.searchsorted(tokens, room, side="right"))
    # equal scores are ranked by id: ids behind all others would favour the held-out documents, so they mix
    rng, own = random.Random(args.seed), list(dev.corpus)
    more = {f"{rng.choice(own)}-{i:05d}": text for i, text in enumerate(spare[:count])}
    return DevSet(dev.queries, dev.corpus | more, dev.relevant, dev.own)


def fill_pools(args, plan, training, dev_sets, texts, notes):
    """Fill the pool of held-out queries with training documents, and say what all evaluations cost.

    It is filled to MAX_POOL documents, or until the evaluations of the run embed half as many tokens as its `training`.
    Returns {name: DevSet}.
    """
    if not plan.has_dev:
        return dev_sets
    times = evaluations_of(args, plan)

    def tokens_of(dev):
        return sum(len(texts[j]) for side in dev_indices(dev, texts, args) for j in side)

    room = training / 2 / times - sum(map(tokens_of, dev_sets.values()))
    full = {name: filled(dev, texts, args, room) for name, dev in dev_sets.items()}
    plan.evaluation_share = times * sum(map(tokens_of, full.values())) / training
    said = []
    for name, dev in full.items():
        size, before, what = len(dev.corpus), dev_sets[name], name or "dev"
        added = size - len(before.corpus)
        stopped = len(before.spare) > added and size < MAX_POOL
        said.append(f"{what}: {size} documents" + f", {added} of them the training's" * bool(added)
                    + " (evaluating less often, --eval_every, makes room for more)" * stopped)
        if size < SMALL_POOL:
            notes.append(f"{what}: {size} documents to search in hardly tell models apart: take more dev rows"
                         + ", or evaluate less often (--eval_every)" * stopped)
    say(f"pool      {'; '.join(said)}; {times} evaluations embed {plan.evaluation_share:.0%} as many tokens as the "
        "training")
    return full


def make_measure(dev_sets, texts, args):
    """Return measure(trainer) -> {metric: value} over all dev sets, whose names stand in front of the metrics."""
    tokens = {}
    for name, dev in dev_sets.items():
        column = {key: i for i, key in enumerate(sorted(dev.corpus))}
        relevant = [{column[key] for key in dev.relevant[query]} for query in dev.queries]
        own = [column.get(dev.own.get(query)) for query in dev.queries]
        tokens[name] = *dev_indices(dev, texts, args), relevant, own

    def measure(trainer):
        metrics = {}
        for name, (queries, corpus, relevant, own) in tokens.items():
            query_emb, corpus_emb = (trainer.embed([texts[i] for i in side]) for side in (queries, corpus))
            found = retrieval_metrics(query_emb, corpus_emb, relevant, own)
            for dim in args.matryoshka_dims or []:
                part = retrieval_metrics(query_emb[:, :dim], corpus_emb[:, :dim], relevant, own)
                found[f"ndcg@10_dim{dim}"] = part["ndcg@10"]
            metrics |= {utils.named(name, key): value for key, value in found.items()}
        return metrics

    return measure


def plan_run(args, train_set, dev_sets, notes):
    """Make the plan, and say how many documents a query is contrasted with; raises InputError for an unknown metric."""
    first, metric = next(iter(dev_sets), ""), args.metric_for_best
    dims = [f"ndcg@10_dim{dim}" for dim in args.matryoshka_dims or []]
    known = [utils.named(name, key) for name in dev_sets for key in METRICS + dims]
    metric = utils.measured(metric, known) if metric and dev_sets else metric
    metric = metric or utils.named(first, "ndcg@10")
    plan = utils.make_plan(args, len(train_set), bool(dev_sets), metric, True, drop_last=True, notes=notes)
    shown = [utils.named(name, key) for name in dev_sets for key in ("ndcg@10", "recall@10")]
    plan.shown = list(dict.fromkeys([metric, *shown] if dev_sets else []))
    mined = sum(min(args.max_negs, len(neg)) for _, _, neg, _ in train_set.rows) / len(train_set)
    contrasted = plan.examples_per_step if args.negatives_cross_device else plan.step_rows
    plan.negatives_per_query = round(contrasted * (1 + mined) - 1, 1)
    say(f"negatives {plan.negatives_per_query:g} per query: the other documents of a step")
    return plan


def load_model(args, config, stored_pooling, texts, notes):
    """Load the base, look at what it does, wrap it. Returns (model, whether it is causal, D, precision)."""
    precision, in_words = utils.choose_precision(args)
    model, absent = utils.load_base(args, AutoModel, config, precision, notes)
    say(f"model     {args.model_name}, {in_words}" + (f", {args.bits}-bit base" if args.bits else ""))
    causal, dimension, unused = probe(model, precision)
    utils.check_loaded(model, absent, lambda: hidden_states(model, precision, 8), args, notes)
    if max(args.matryoshka_dims or [0]) > dimension:
        raise InputError(f"--matryoshka_dims {max(args.matryoshka_dims)} exceeds the model's {dimension} dimensions.")
    settle_pooling(args, stored_pooling, causal, texts, config, notes)
    return utils.add_adapter(model, args, "FEATURE_EXTRACTION", unused, notes), causal, dimension, precision


def main(argv=None):
    """Run the command line `argv`; return what training_summary_report.json holds."""
    args, notes = parse_args(argv), []
    state = utils.start_process(args)
    checkpoint = utils.open_output_dir(args)
    set_seed(args.seed)
    with state.main_process_first():
        examples, dev_sets, counts = read_data(args)

    config, tokenizer = utils.load_config(args), utils.load_tokenizer(args)
    if tokenizer.pad_token is None:  # as Llama's: SentenceTransformer cannot encode two texts without
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if args.append_eos:
        tokenizer = append_eos(tokenizer, args, notes)
    stored_pooling, prompts = settle_texts(args, examples, config, tokenizer, notes)
    texts = Texts()
    train_set = TrainSet(examples, texts, args)
    for dev in dev_sets.values():
        dev_indices(dev, texts, args)  # adds its texts, to be tokenised with the others
    with state.main_process_first():
        texts.tokenise(tokenizer, args.query_max_len, args.passage_max_len, args.num_workers)
    note_cut_texts(args, texts, tokenizer, notes)
    plan = plan_run(args, train_set, dev_sets, notes)
    tokens = tokens_of_rows(train_set, texts)
    training = plan.total_steps * step_tokens(train_set, texts, tokens, plan.examples_per_step, args.seed)
    dev_sets = fill_pools(args, plan, training, dev_sets, texts, notes)
    counts["dev"] = dev_sizes(dev_sets)
    model, causal, dimension, precision = load_model(args, config, stored_pooling, texts, notes)
    utils.check_vocabulary(model, args, tokenizer, texts.values.max())
    trainer = EmbedTrainer(
        flags=args, causal=causal, model=model, measure=make_measure(dev_sets, texts, args), train_dataset=train_set,
        eval_dataset=train_set,  # never read: Trainer refuses to evaluate without one
        args=utils.training_arguments(args, plan, precision, drop_last=True), data_collator=Collator(texts),
        processing_class=tokenizer,
    )
    run = utils.describe_run(args, precision, Hasher.hash([examples, dev_sets]), checkpoint) | {"data": counts}
    show_examples(train_set, texts, tokenizer, notes)
    compared = [*list(texts.index)[:7], list(texts.index)[np.diff(texts.offsets).argmax()]]  # the longest, too

    def inputs(tokenizer):
        return encode_texts(tokenizer, *zip(*compared, strict=True), args.query_max_len, args.passage_max_len)

    return utils.carry_out(trainer, args, plan, run, checkpoint, tokens, inputs, trainer.embed, AutoModel,
                           write_files=partial(save_st_files, args=args, dimension=dimension, prompts=prompts))


if __name__ == "__main__":
    utils.run(main, parse_args)

"""Let a teacher score the documents of training rows: adds BGE's columns pos_scores, neg_scores.

python examples/teacher_scores.py pairs.jsonl scored.jsonl --model_name BAAI/bge-reranker-v2-m3
python examples/teacher_scores.py pairs.jsonl scored.jsonl --model_name Qwen/Qwen3-Reranker-0.6B \\
    --instruction "Given a question about Python, retrieve passages that answer it"

{"query": "how do I reset it?", "pos": ["Hold the button."], "neg": ["It weighs 2 kg.", ""]} gets
"pos_scores": [7.12], "neg_scores": [-9.8, null]: a score for each text, null for an empty one.

A score is raw: the logit of a sequence classifier with one label, what Qwen3-Reranker's logit of
"yes" is above that of "no", or the cosine of an embedding model of sentence-transformers, as the
final/ of train_embed_lora.py is one. Rows that have all their scores are kept as they are. The same
command goes on after a kill; scored.teacher.json says whose scores they are.
Shapes: B pairs, T tokens, V vocabulary.
"""

import argparse
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import utils
from parts.base import (
    LOADING_ERRORS,
    Origin,
    base_json,
    check_loaded,
    choose_precision,
    load,
    load_config,
    position_limit,
)
from parts.cells import texts_of, written
from parts.columns import fields_of, find_column, find_negatives, positive_names, query_names
from parts.flag_types import count
from parts.memory import is_out_of_memory
from parts.relevance import is_score
from parts.rows import parse_lines, read_rows
from parts.tokenizer import check_vocabulary, load_tokenizer, within_limit
from utils import InputError, say

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

ROWS_AT_ONCE = 256  # scored and written together, sorted by length: what a kill may lose
# flags that must be the same to go on with an output
SETTINGS = (
    "model_name",
    "instruction",
    "max_length",
    "query_column",
    "positive_column",
    "negative_column",
)
DTYPES = {"float32": "none", "bfloat16": "bf16", "float16": "fp16"}
# the format of https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


# ---------------------------------------------------------------- arguments


def parse_args(argv=None):
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("input", type=Path, help="rows to score: .jsonl, .ndjson or .json")
    add("output", type=Path, help="the same rows with scores: .jsonl")
    add("--model_name", required=True, metavar="MODEL", help="the teacher: hub id or folder")
    add("--instruction", metavar="TEXT", help=f"Qwen3-Reranker's task [{INSTRUCTION}]")
    add("--max_length", type=count, default=512, metavar="N", help="tokens of a pair [512]")
    add("--batch_size", type=count, default=32, metavar="N", help="pairs at once [32]")
    add("--dtype", choices=list(DTYPES), help="[a CPU float32, a GPU bfloat16 or else float16]")
    for kind in ("query", "positive", "negative"):
        add(f"--{kind}_column", metavar="NAME", help=f"column of the {kind} [by its name]")
    add("--trust_remote_code", action="store_true", help="run Python code of the model's own")
    args = parser.parse_args(argv)
    if args.input.suffix.lower() not in (".jsonl", ".ndjson", ".json"):
        parser.error(f"{args.input} is none of .jsonl, .ndjson, .json: convert it to JSON Lines")
    if args.output.suffix.lower() != ".jsonl":
        parser.error(f"{args.output} is no .jsonl: rows are written one a line, name it so")
    if args.input.resolve() == args.output.resolve():
        parser.error(f"{args.output} would be written over itself: name another output")
    return args


# ---------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One row of the input, and what of it is scored."""

    where: str
    cells: dict  # as read
    query: str | None
    pos: list  # of texts in the order as written, None for an empty one
    neg: list
    is_scored: bool  # it has all of its scores, and keeps them

    def pairs(self):
        """Return (query, document) of each text that a score is needed for."""
        return [(self.query, text) for text in self.pos + self.neg if text is not None]


def read_input(args):
    """Read the Rows of a file; raises InputError naming the line of what is no row."""
    rows = read_rows(args.input)
    fields = fields_of(rows)
    where = rows[0][0]
    query = find_column(fields, "query", query_names(fields), args.query_column, where)
    names = positive_names(fields)
    positive = find_column(fields, "positive", names, args.positive_column, where)
    negatives = find_negatives(fields, args.negative_column, where)
    said = ", ".join(negatives) or "none"
    say(f"columns   query = {query}, positive = {positive}, negatives = {said}")
    return [read_row(where, cells, query, positive, negatives) for where, cells in rows]


def read_row(where, cells, query, positive, negatives):
    """Return the Row of a line, whose texts are those that a trainer reads there."""
    queries = texts_of(cells.get(query), where, query)
    if len(queries) > 1:
        raise InputError(f"{where}: {len(queries)} queries in one row. Write a row for each.")
    pos = written(cells.get(positive), where, positive)
    neg = []
    for name in negatives:
        neg += written(cells.get(name), where, name)
    if all(cells.get(name) is None for name in negatives):
        neg = []  # there is no list to stand beside
    if not queries:  # nothing to score the texts by
        pos = [None] * len(pos)
        neg = [None] * len(neg)
    return Row(where, cells, next(iter(queries), None), pos, neg, has_scores(cells, pos, neg))


def has_scores(cells, pos, neg):
    """Tell whether a row has a score for each of these texts."""
    return covers(cells.get("pos_scores"), pos) and covers(cells.get("neg_scores"), neg)


def covers(scores, texts):
    """Tell whether a cell is a list with a finite number for each text; None needs none."""
    if not isinstance(scores, list) or len(scores) != len(texts):
        return False
    for score, text in zip(scores, texts, strict=True):
        is_left_out = score is None and text is None
        if not is_left_out and not is_score(score):
            return False
    return True


def with_scores(row, known):
    """Return the cells of a row with its scores, of {pair: score}."""
    pos = [known.get((row.query, text)) for text in row.pos]
    neg = [known.get((row.query, text)) for text in row.neg]
    return row.cells | {"pos_scores": pos, "neg_scores": neg}


def line_of(cells):
    """Return a row as the bytes of one line of JSON."""
    try:
        return (json.dumps(cells, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half an emoji, which only an escape can hold
        return (json.dumps(cells) + "\n").encode()


# ---------------------------------------------------------------- what an earlier run left


def take_up(args, rows):
    """Return (how many rows the output has, {pair: score} of these), or begin a new output.

    Raises InputError for an output of other rows or of another teacher.
    """
    record = args.output.with_suffix(".teacher.json")
    settings = {name: getattr(args, name) for name in SETTINGS}
    if not args.output.exists() or not args.output.stat().st_size:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        utils.write_json(record, settings)
        return 0, {}
    remedy = "Name another output, or delete it"
    begun = utils.checked_json(record)
    if begun is None:
        raise InputError(f"{args.output} is there, without {record} to say whose it is. {remedy}.")
    for name, value in settings.items():
        if begun.get(name) != value:
            raise InputError(
                f"{args.output} was begun with --{name} {begun.get(name)}, and this is {value}. "
                f"{remedy}."
            )
    return standing(args.output, rows, remedy)


def standing(path, rows, remedy):
    """Return (how many rows an output has, {pair: score}), and cut off what is behind these.

    Whole blocks alone are kept: a row is scored beside the same others as without a kill.
    """
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)  # the last may be half a line
    if len(lines) > len(rows):
        raise InputError(f"{path} has {len(lines)} rows, the input {len(rows)}. {remedy}.")
    there = parse_lines(b"".join(lines).decode(errors="replace"), path)
    if len(there) < len(lines):
        raise InputError(f"{path} has empty lines between its rows. {remedy}.")
    for row, (where, cells) in zip(rows, there, strict=False):  # the output may lack rows
        is_same = line_of(without_scores(cells)) == line_of(without_scores(row.cells))
        if not is_same or not has_scores(cells, row.pos, row.neg):
            raise InputError(f"{where} is not {row.where} with scores. {remedy}.")
    done = len(lines)
    if done < len(rows):
        done -= done % ROWS_AT_ONCE
    known = {}
    for row, (_, cells) in zip(rows[:done], there[:done], strict=True):
        if not row.is_scored:  # else they may be another teacher's
            scores = cells["pos_scores"] + cells["neg_scores"]
            for text, score in zip(row.pos + row.neg, scores, strict=True):
                known[row.query, text] = score
    with path.open("r+b") as file:
        file.truncate(sum(map(len, lines[:done])))
    return done, known


def without_scores(cells):
    """Return a row without its scores, which the input may have had in part."""
    return {name: cell for name, cell in cells.items() if name not in ("pos_scores", "neg_scores")}


# ---------------------------------------------------------------- the two kinds of teachers


class CrossEncoder:
    """A sequence classifier with one label, which reads query and document as a pair."""

    auto_class = AutoModelForSequenceClassification

    def __init__(self, name, config, tokenizer, max_length):
        """Raises InputError for a model whose logit is no score of a pair."""
        if config.num_labels != 1:
            raise InputError(
                f"{name} has {config.num_labels} labels, and a score is the logit of one. Choose a "
                "reranker with one label, such as BAAI/bge-reranker-v2-m3."
            )
        if not tokenizer.num_special_tokens_to_add(pair=True):
            raise InputError(
                f"{name} has no token between query and document, so that it was trained on a "
                "format of its own. Choose a cross-encoder, or a Qwen3-Reranker."
            )
        text = config.get_text_config()
        # a decoder finds the last token of a row by the id that its config has for padding
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = tokenizer.pad_token_id
        if text.pad_token_id is None:
            raise InputError(
                f"{name} has no padding token. Name one as pad_token in its tokenizer_config.json."
            )
        self.pad_id = text.pad_token_id
        self.tokenizer = tokenizer
        self.max_length = max_length

    def free_tokens(self, queries):
        """Return how many tokens each query leaves to a document."""
        free = self.max_length - self.tokenizer.num_special_tokens_to_add(pair=True)
        ids = self.tokenizer(queries, add_special_tokens=False)["input_ids"]
        return [free - len(each) for each in ids]

    def encode(self, pairs):
        """Return the inputs {name: [T]} of each (query, document); the document is cut."""
        found = self.tokenizer(
            [query for query, _ in pairs],
            [document for _, document in pairs],
            truncation="only_second",
            max_length=self.max_length,
        )
        return [{name: found[name][i] for name in found} for i in range(len(pairs))]

    def logits(self, model, batch):
        """Return the scores (B,) of encoded pairs, in float32."""
        inputs = padded(batch, "right", self.pad_id, model.device)
        return model(**inputs).logits[:, 0].float()


class Judge:
    """A causal language model that says yes or no in Qwen3-Reranker's format."""

    auto_class = AutoModelForCausalLM

    def __init__(self, name, tokenizer, max_length, instruction):
        """Raises InputError for a tokenizer that does not know the format."""
        for mark in ("<|im_start|>", "<|im_end|>"):
            only_token(tokenizer, mark, name)
        self.answers = [only_token(tokenizer, answer, name) for answer in ("yes", "no")]
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.instruction = instruction
        self.before = self.ids([BEFORE])[0]
        self.after = self.ids([AFTER])[0]
        self.room = max_length - len(self.before) - len(self.after)  # tokens between the two

    def ids(self, texts):
        """Return the token ids of each text, as it stands."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def heads(self, queries):
        """Return what stands before the document of each query."""
        task = f"<Instruct>: {self.instruction}"
        return [f"{task}\n<Query>: {query}\n<Document>:" for query in queries]

    def free_tokens(self, queries):
        """Return how many tokens each query leaves to a document."""
        return [self.room - len(ids) for ids in self.ids(self.heads(queries))]

    def encode(self, pairs):
        """Return the inputs {name: [T]} of each (query, document); the document is cut."""
        heads = self.heads([query for query, _ in pairs])
        # in one text: the blank before a document belongs to its first token
        bodies = [f"{head} {pair[1]}" for head, pair in zip(heads, pairs, strict=True)]
        encoded = []
        for ids in self.ids(bodies):
            ids = self.before + ids[: self.room] + self.after
            encoded.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
        return encoded

    def logits(self, model, batch):
        """Return logit of yes - logit of no (B,) of encoded pairs, in float32."""
        # on the left: the last token of every row is the last of the batch, and only there the
        # logits, of V tokens each, are computed
        inputs = padded(batch, "left", 0, model.device)
        logits = model(**inputs, logits_to_keep=1).logits  # (B, 1, V)
        yes, no = logits[:, -1, self.answers].float().unbind(-1)
        return yes - no


def only_token(tokenizer, text, name):
    """Return the id of a text that is one token; raises InputError where it is not."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    raise InputError(
        f'{name} has no token "{text}", which Qwen3-Reranker\'s format needs. Choose a '
        "Qwen3-Reranker, or a sequence classifier with one label."
    )


def padded(batch, side, pad_id, device):
    """Return the inputs {name: (B, T)} of encoded pairs, padded on a side."""
    inputs = {}
    for name in batch[0]:
        rows = [torch.tensor(each[name]) for each in batch]
        value = pad_id if name == "input_ids" else 0
        together = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
        inputs[name] = together.to(device)
    return inputs


def make_teacher(args, origin, config):
    """Return the CrossEncoder or Judge that a config asks for; raises InputError for others."""
    name = origin.name
    tokenizer = load_tokenizer(origin)
    limit = position_limit(config, tokenizer)
    max_length = within_limit("--max_length", args.max_length, limit, "the teacher")
    architecture = architecture_of(config)
    if architecture.endswith("ForSequenceClassification"):
        if args.instruction is not None:
            raise InputError(f"{name} is a {architecture}, without a task: drop --instruction.")
        return CrossEncoder(name, config, tokenizer, max_length)
    if architecture.endswith("ForCausalLM"):
        instruction = INSTRUCTION if args.instruction is None else args.instruction
        return Judge(name, tokenizer, max_length, instruction)
    raise InputError(
        f"{name} has {architecture} in its config.json, neither ...ForSequenceClassification nor "
        "...ForCausalLM. Choose a reranker."
    )


def architecture_of(config):
    """Return the class that a model was saved from."""
    return next(iter(config.architectures or []), "no architecture")


def load_model(args, origin, config, teacher, pair):
    """Return the model of a teacher; raises InputError where weights that it needs are not there.

    pair: a (query, document) to try it on.
    """
    precision, in_words = choose_precision(DTYPES.get(args.dtype))
    say(f"teacher   {origin.name}, {architecture_of(config)}, {in_words}")
    options = {"full": False, "bits": None, "attention": "auto", "keep_dropout": False}
    loaded = load(origin, teacher.auto_class, config, precision, **options)
    model = loaded.model.eval()
    encoded = teacher.encode([pair])
    say(f"sees      {teacher.tokenizer.decode(encoded[0]['input_ids'])!r}")
    check_loaded(model, loaded.absent, partial(teacher.logits, model, encoded), origin)
    return model


# ---------------------------------------------------------------- an embedding model


class Embedder:
    """An embedding model of sentence-transformers, which reads query and document apart."""

    def __init__(self, args):
        """Raises InputError for flags that it has no use for, and where it cannot be loaded."""
        name = args.model_name
        for flag in ("instruction", "dtype"):
            if getattr(args, flag) is not None:
                raise InputError(
                    f"{name} is an embedding model, with prompts and a dtype of its own: drop "
                    f"--{flag}."
                )
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise InputError(
                f"{name} is an embedding model. Run: pip install sentence-transformers"
            ) from None
        try:
            self.model = SentenceTransformer(name, trust_remote_code=args.trust_remote_code)
        except LOADING_ERRORS as error:
            raise InputError(f"{name} cannot be loaded: {utils.reason(error)}.") from None
        longest = self.model.max_seq_length or args.max_length
        self.model.max_seq_length = min(longest, args.max_length)
        self.batch_size = args.batch_size
        self.vectors = {}  # (text, is it a query) -> vector (D,) of unit length
        say(f"teacher   {name}, an embedding model: scores are cosines")

    def score(self, pairs, bar):
        """Return ({pair: cosine}, 0) of {pair: where}; each text is embedded once."""
        self.embed({query for query, _ in pairs}, True)
        self.embed({document for _, document in pairs}, False)
        scores = {}
        for (query, document), where in pairs.items():
            score = (self.vectors[query, True] * self.vectors[document, False]).sum().item()
            if not math.isfinite(score):
                raise InputError(f"{where}: the teacher's cosine is {score}. Fetch it again.")
            scores[query, document] = round(score, 6)  # digits beyond are rounding
        bar.update(len(pairs))
        return scores, 0

    def embed(self, texts, are_queries):
        """Embed the texts that were not seen before, with the model's own prompts."""
        new = sorted(text for text in texts if (text, are_queries) not in self.vectors)
        if not new:
            return
        encode = self.model.encode_query if are_queries else self.model.encode_document
        found = encode(
            new,
            batch_size=self.batch_size,
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        for text, vector in zip(new, found.float().cpu(), strict=True):
            self.vectors[text, are_queries] = vector


# ---------------------------------------------------------------- scoring


def refuse_long_queries(teacher, rows):
    """Raise InputError naming the first row whose query leaves no token to a document."""
    places = {}
    for row in rows:
        places.setdefault(row.query, row.where)
    queries = list(places)
    for start in range(0, len(queries), ROWS_AT_ONCE):
        part = queries[start : start + ROWS_AT_ONCE]
        for query, free in zip(part, teacher.free_tokens(part), strict=True):
            if free < 1:
                raise InputError(
                    f"{places[query]}: with this query, --max_length {teacher.max_length} has no "
                    f"token for a document. Raise it by {1 - free} or more, or shorten the query."
                )


def score_pairs(teacher, model, pairs, batch_size, bar):
    """Return ({pair: score}, how many pairs are as long as they may be) of {pair: where}.

    Raises InputError for a score that is no number, and where memory runs out.
    """
    places = list(pairs.items())
    encoded = teacher.encode(list(pairs))
    lengths = [len(each["input_ids"]) for each in encoded]
    largest = max(max(each["input_ids"]) for each in encoded)
    check_vocabulary(model, teacher.tokenizer, largest, model.name_or_path)
    # the longest first: a batch that memory cannot hold shows at once
    order = sorted(range(len(places)), key=lengths.__getitem__, reverse=True)
    scores = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        logits = logits_of(teacher, model, [encoded[i] for i in part])
        for i, logit in zip(part, logits, strict=True):
            pair, where = places[i]
            if not math.isfinite(logit):
                remedy = "Fetch its weights again"
                if model.dtype != torch.float32:
                    remedy += ", or pass --dtype float32"
                raise InputError(f"{where}: the teacher's logit is {logit}. {remedy}.")
            scores[pair] = round(logit, 6)  # digits beyond are rounding
        bar.update(len(part))
    return scores, sum(length >= teacher.max_length for length in lengths)


@torch.inference_mode()
def logits_of(teacher, model, batch):
    """Return the scores [B] of encoded pairs; raises InputError where memory runs out."""
    try:
        return teacher.logits(model, batch).tolist()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"memory ran out with {len(batch)} pairs at once. Lower --batch_size: the same command "
            "goes on from what is written."
        ) from None


def missing_pairs(rows, known):
    """Return {pair: where} of what Rows lack a score for, each pair once."""
    missing = {}
    for row in rows:
        if row.is_scored:
            continue
        for pair in row.pairs():
            if pair not in known:
                missing.setdefault(pair, row.where)
    return missing


def write_scored(path, rows, known, score):
    """Append Rows with their scores, a block at a time; returns a Counter of what was done.

    known: {pair: score} of earlier blocks, whose pairs are not scored again; score({pair: where}):
    as score_pairs has it.
    """
    known = dict(known)
    done = Counter()
    with path.open("ab") as file:
        for start in range(0, len(rows), ROWS_AT_ONCE):
            block = rows[start : start + ROWS_AT_ONCE]
            missing = missing_pairs(block, known)
            if missing:
                found, cut = score(missing)
                known.update(found)
                done["pairs"] += len(found)
                done["cut"] += cut
            lines = []
            for row in block:
                cells = row.cells if row.is_scored else with_scores(row, known)
                done[order_of(cells)] += 1
                lines.append(line_of(cells))
            file.write(b"".join(lines))
            file.flush()
    return done


def order_of(cells):
    """Return "right" for a row with every positive above every negative, "wrong", or "no order"."""
    pos = [score for score in cells["pos_scores"] if score is not None]
    neg = [score for score in cells["neg_scores"] if score is not None]
    if not pos or not neg:
        return "no order"
    return "right" if min(pos) > max(neg) else "wrong"


# ---------------------------------------------------------------- main


def make_scorer(args, rows):
    """Return score(pairs, bar) of the teacher that is asked for, as score_pairs has it.

    rows: those to be scored, of which none may be too long for it.
    """
    origin = Origin(args.model_name, trust_remote_code=args.trust_remote_code)
    if base_json(origin, "modules.json", list) is not None:
        return Embedder(args).score
    config = load_config(origin)
    teacher = make_teacher(args, origin, config)
    refuse_long_queries(teacher, rows)
    model = load_model(args, origin, config, teacher, rows[0].pairs()[0])
    return partial(score_pairs, teacher, model, batch_size=args.batch_size)


def main(argv=None):
    """Write the input's rows with scores; returns how many pairs were scored."""
    args = parse_args(argv)
    utils.quiet_libraries()
    rows = read_input(args)
    begun, known = take_up(args, rows)
    left = rows[begun:]
    lacking = [row for row in left if not row.is_scored and row.pairs()]
    say(f"data      {len(rows)} rows, {begun} of them in {args.output}, {len(lacking)} to score")
    score = make_scorer(args, lacking) if lacking else None
    texts = sum(len(row.pairs()) for row in lacking)  # of pairs that repeat, one is scored
    with tqdm(total=texts, unit="text", leave=False, disable=not utils.shows_bars()) as bar:
        done = write_scored(args.output, left, known, lambda pairs: score(pairs, bar=bar))
    compared = done["right"] + done["wrong"]
    say(f"scored    {done['pairs']} pairs, {done['cut']} of them up to --max_length")
    say(f"order     every positive above every negative in {done['right']} of {compared} rows")
    return done["pairs"]


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped: the same command goes on", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT

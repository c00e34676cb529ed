"""Fine-tune a text-embedding model with LoRA: in-batch negatives, recall before, during and after.

    python train_embed_lora.py --train_file examples/sample_data.jsonl --output_dir runs/first
    python train_embed_lora.py --model_name Qwen/Qwen3-Embedding-0.6B --train_file pairs.jsonl \\
      --load_in_4bit
    python train_embed_lora.py --train_file pairs.jsonl --dry_run

A row: {"query": "how do I reset it?", "pos": ["Hold the button."], "neg": ["It weighs 2 kg."]}
output_dir: final/ (adapter, loads in sentence-transformers), checkpoints, logs,
training_curves.png, report.html.
Shapes: B sequences, T tokens, D embedding, Q queries and N documents of a step, C corpus of a set.
"""

# ruff: noqa: E402  a wrong flag is answered before the imports that take five seconds
import argparse
import itertools
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from functools import partial

import utils
from parts import flags
from parts.flag_types import integer, margin, one_of, real

# ---------------------------------------------------------------- arguments

BASE = "sentence-transformers/all-MiniLM-L6-v2"


def parse_args(argv=None):
    """Parse and check the command line; exits 2 with one sentence on what is wrong."""
    parser = flags.make_parser("train_embed_lora.py", __doc__)
    flags.add_first_flags(parser, BASE, batch=32, epochs=2)
    add_embedding_flags(parser)
    flags.add_data_flags(parser, dev_size="0.1, of at most 1000 queries")
    flags.add_training_flags(parser, step=32, checkpointing="off")
    flags.add_output_flags(parser, metric="ndcg@10")
    flags.add_lora_flags(parser)
    flags.add_model_flags(parser)
    args = parser.parse_args(argv)
    refuse_contradictions(parser, args)
    if args.max_negs is None:
        args.max_negs = args.mine_negatives or 1
    return flags.finish(parser, args, BASE, step=32)


# fmt: off
def add_embedding_flags(parser):
    """Declare what this script has beside the shared flags."""
    add = parser.add_argument_group("embedding").add_argument
    add("--max_length", "--max_sequence_length", type=integer(4), default=512, metavar="N",
        help="tokens of a query or document [512]")
    add("--query_max_len", type=integer(4), metavar="N", help="tokens of a query [--max_length]")
    add("--passage_max_len", type=integer(4), metavar="N",
        help="tokens of a document [--max_length]")
    add("--query_prefix", metavar="TEXT", help="put before every query [the base's own prompt]")
    add("--doc_prefix", metavar="TEXT", help="put before every document [the base's own prompt]")
    add("--max_negs", "--neg_nums", type=integer(0), metavar="N",
        help="negatives of its own that a query shows in a step [1, or --mine_negatives]")
    add("--mine_negatives", type=integer(0), default=0, metavar="N",
        help="hard negatives to find for each query, with the model as it is [0]")
    add("--mine_corpus", nargs="+", metavar="FILE",
        help="more documents to find them in: .jsonl with text, or a BEIR corpus.jsonl")
    add("--mine_margin", type=real(0), default=0.95, metavar="X",
        help="a negative's cosine is at most this share of the positive's [0.95]")
    add("--mine_every", default="run", **one_of("run", "epoch"),
        help="mine before the first step alone, or each epoch anew [run]")
    add("--temperature", type=real(0, 10, {0}), default=0.05, metavar="X",
        help="divides the cosines [0.05]")
    add("--pooling", default="auto", **one_of("auto", "mean", "cls", "last"),
        help="tokens to one vector [the base's]")
    add("--append_eos", action="store_true",
        help="end every text with the EOS token, truncated ones too")
    add("--false_negative_margin", type=margin, metavar="X",
        help="mask other rows' documents so much above the positive: 0.05, or 1.05x its cosine")
    add("--in_batch_negatives", action=argparse.BooleanOptionalAction, default=True,
        help="contrast with the documents of a step's other rows [on]")
    add("--negatives_cross_device", action=argparse.BooleanOptionalAction, default=True,
        help="contrast with the documents of all processes [on]")
    add("--distill_weight", type=real(0), default=0, metavar="X",
        help="learn a teacher's pos_scores and neg_scores, with this weight beside the labels [0]")
    add("--teacher_temperature", type=real(1e-6), default=1, metavar="X",
        help="divides the teacher's scores [1]")
    add("--matryoshka_dims", type=integer(1), nargs="+", metavar="D",
        help="train these prefixes of the vector too")
    add("--dev_corpus", nargs="+", metavar="FILE",
        help="documents that dev queries are searched in too [the training's]")
    add("--steps_from", default="all", **one_of("all", "one_file"),
        help="rows of a step are drawn from all files, or from one --train_file alone [all]")
    add("--query_column", metavar="NAME", help="column of queries [recognised by its name]")
    add("--positive_column", metavar="NAME", help="column of positives [recognised by its name]")
    add("--negative_column", metavar="NAME", help="column of negatives [recognised by its name]")


def refuse_contradictions(parser, args):
    """Exit 2 where this script's own flags exclude one another, or one lacks what it needs."""
    flags.refuse(parser, (
        (args.mine_negatives and args.max_negs == 0,
         "--mine_negatives finds what --max_negs 0 leaves out: drop one"),
        (args.mine_corpus and not args.mine_negatives,
         "--mine_corpus is where --mine_negatives N looks: add that"),
        (args.max_negs == 0 and not args.in_batch_negatives,
         "--max_negs 0 and --no-in_batch_negatives leave no negatives: drop one"),
        (args.max_negs == 0 and args.distill_weight,
         "--distill_weight orders the documents of a row, of which --max_negs 0 shows one: "
         "drop one"),
    ))
# fmt: on


if __name__ == "__main__":
    utils.check_command(parse_args)

from parts import run as runs
from parts.adapters import Lora
from parts.base import Origin, check_loaded, choose_precision, load, load_config, position_limit
from parts.batches import FileSteps, loader_of, mean_fullness, rows_of_files, show_files
from parts.behaviour import hidden_states, what_an_embedder_does
from parts.checkpoints import stored_cut
from parts.corpus import read_corpus
from parts.cutting import cut, moved
from parts.dev_sets import HELD_OUT, dev_indices, dev_sizes, fill_pools, read_data
from parts.examples import carry_over, draw, shortened, showing
from parts.mined_files import copy_mined, mined_file, read_mined, write_mined
from parts.mining import Miner, MiningRules, Pool, show_pool
from parts.pairs import Columns
from parts.plan import advice, chosen_metric, make_plan, named
from parts.processes import agree, largest
from parts.proof import check_saved_tokenizer, prove, save_final
from parts.rehearsal import note_inexact, rehearse
from parts.relevance import types_served
from parts.report import Report, Results, command_of, write_report
from parts.retrieval import METRICS, Vectors, rank, retrieval_metrics
from parts.rows import HubSet, text_id
from parts.sentence_files import (
    Prompts,
    Stored,
    choose_prompts,
    note_lower_case,
    read_sentence_files,
    write_sentence_files,
)
from parts.shards import note_savings
from parts.splits import Sizes, Source
from parts.step import StepTrainer, get_rng_state, replayed
from parts.teacher import show_teacher
from parts.texts import (
    TextRules,
    Texts,
    encode_texts,
    note_cut_texts,
    note_full_texts,
    note_unknown,
)
from parts.tokenizer import append_eos, check_vocabulary, load_tokenizer, within_limit
from utils import InputError, note, say

import numpy as np
import torch
import torch.nn.functional as F
from datasets.fingerprint import Hasher
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase

TRIED = 1000  # queries that --dry_run mines for

# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Row:
    """A training row in text indices; a document is (its text index, its text_id)."""

    query: int
    pos: list
    neg: list
    listed: list  # text_ids of all positives that any row lists for the query
    known: list  # text_ids that are no negatives of the query: itself, and these
    scores: dict  # text index -> a teacher's score of the query with that document


@dataclass(frozen=True)
class Shown:
    """What a row shows in a step, in text indices; a document is what it is in a Row."""

    query: int
    documents: list  # a positive, then negatives
    known: list  # as in Row
    spared: list  # text_ids of all documents of its own, shown or not
    scores: list  # a teacher's of each document, NaN where it has given none


def add_documents(texts, prefix, documents):
    """Add documents to the texts of a run; returns [(text index, text_id)]."""
    return [(texts.add(prefix, text, False), text_id(text)) for text in documents]


class TrainSet(torch.utils.data.Dataset):
    """Rows of text indices.

    Which positive and negatives a row shows depends on seed, epoch and row alone; `epoch` is set
    by the training loop. `negatives` are those that a row draws from: its own and what was mined.
    """

    def __init__(self, examples, texts, rules, max_negs, seed):
        self.max_negs = max_negs
        self.seed = seed
        self.epoch = 0
        positives = {}  # query -> every positive listed for it, in any row
        for example in examples:
            # by hash: a query in another case, or with another space, is the same query
            of_query = positives.setdefault(text_id(example.query), set())
            of_query.update(map(text_id, example.pos))
        # once a query: a list for each of n rows with one query would hold n ids n times
        listed = {query: sorted(ids) for query, ids in positives.items()}
        known = {query: sorted({query, *ids}) for query, ids in positives.items()}
        self.rows = []
        for example in examples:
            query_id = text_id(example.query)
            pos = add_documents(texts, rules.doc_prefix, example.pos)
            neg = add_documents(texts, rules.doc_prefix, example.neg)
            # a row's own prompt beats the flag's, also where it is empty
            prefix = rules.query_prefix if example.prompt is None else example.prompt
            query = texts.add(prefix, example.query, True)
            # not by hash: to a teacher a text in another case is another one
            scores = {
                texts.add(rules.doc_prefix, text, False): score
                for text, score in example.scores.items()
            }
            self.rows.append(Row(query, pos, neg, listed[query_id], known[query_id], scores))
        self.negatives = [row.neg for row in self.rows]

    def take_mined(self, mined):
        """Let rows draw from `mined`, documents for each row, too, in place of earlier ones."""
        self.negatives = []
        for row, documents in zip(self.rows, mined, strict=True):
            own = {hashed for _, hashed in row.neg}
            new = [document for document in documents if document[1] not in own]
            self.negatives.append(row.neg + new)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """Return what row i shows."""
        row = self.rows[i]
        # no generator of a worker's: a resumed run, or one with more workers, draws the same
        rng = random.Random(f"{self.seed} {self.epoch} {i}")
        positive = rng.choice(row.pos)
        negatives = self.negatives[i]
        drawn = rng.sample(negatives, min(self.max_negs, len(negatives)))
        documents = [positive, *drawn]
        spared = [hashed for _, hashed in (*row.pos, *negatives)]
        scores = [row.scores.get(index, math.nan) for index, _ in documents]
        return Shown(row.query, documents, row.known, spared, scores)


class Collator:
    """Make one step of rows: each distinct text once, and which document belongs to which query.

    `sequences` token ids; `queries` (Q,), `documents` (N,) positions in it; `texts` (N,) text
    indices of the documents, `document_ids` (N,) their hashes; `own` (Q, W) columns of what each
    query's row shows: its positive, its negatives, and the positive again up to the widest row's W;
    `teacher` (Q, W) a teacher's scores of these, NaN without; hashes, 0-padded: `known` (Q, K) of
    texts that are no negatives of a query, `spared` (Q, S) of all documents of its row.
    """

    def __init__(self, texts):
        self.texts = texts

    def __call__(self, rows):
        # a text of several rows is embedded once; as a document of several it is one column, or it
        # would be counted as a negative twice
        position = {}  # text index -> place in `sequences`
        column = {}  # document -> column
        for row in rows:
            position.setdefault(row.query, len(position))
            for document in row.documents:
                position.setdefault(document[0], len(position))
                column.setdefault(document, len(column))
        width = max(len(row.documents) for row in rows)
        own = []
        for row in rows:
            columns = [column[document] for document in row.documents]
            own.append(columns + columns[:1] * (width - len(columns)))
        return {
            "rows": len(rows),
            "sequences": [self.texts[i] for i in position],
            "queries": torch.tensor([position[row.query] for row in rows]),
            "documents": torch.tensor([position[i] for i, _ in column]),
            "texts": torch.tensor([i for i, _ in column]),
            "document_ids": torch.tensor([hashed for _, hashed in column]),
            "own": torch.tensor(own),
            "known": padded([row.known for row in rows], 0),
            "spared": padded([row.spared for row in rows], 0),
            "teacher": padded([row.scores for row in rows], math.nan),
        }


def padded(rows, value):
    """Return lists of numbers as one tensor (rows, longest), with `value` behind the shorter."""
    tensors = [torch.tensor(row) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def text_indices(row):
    """Return the text indices of a row as TrainSet gives it: query, positive, negatives."""
    return [row.query, *(index for index, _ in row.documents)]


def tokens_of_rows(train_set, texts):
    """Return how many tokens each training row has."""
    counts = []  # of the first epoch's draws: others differ little
    for row in map(train_set.__getitem__, range(len(train_set))):
        counts.append(sum(len(texts[i]) for i in text_indices(row)))
    return counts


def tokens_of_steps(train_set, texts, row_tokens, plan, seed, file_steps=None):
    """Return how many tokens all steps of a run have, a text that rows of a step share once.

    file_steps: FileSteps, where each step is of one file's rows.
    """
    rng = random.Random(seed)
    # what a text saves by being shared depends on who meets whom: ten steps are drawn and counted
    if file_steps:
        steps = file_steps.of_epoch(0)
        mean_tokens = sum(row_tokens[i] for step in steps for i in step) / len(steps)
        some_steps = rng.choices(steps, k=10)
    else:
        mean_tokens = sum(row_tokens) / len(row_tokens) * plan.examples_per_step
        rows = range(len(train_set))
        some_steps = [rng.sample(rows, plan.examples_per_step) for _ in range(10)]
    drawn_tokens = 0
    distinct_tokens = 0
    for drawn in some_steps:
        step = {j for i in drawn for j in text_indices(train_set[i])}
        drawn_tokens += sum(row_tokens[i] for i in drawn)
        distinct_tokens += sum(len(texts[j]) for j in step)
    return plan.total_steps * (mean_tokens * distinct_tokens / drawn_tokens)


# ---------------------------------------------------------------- loss and metrics

SCORES_AT_ONCE = 2**20  # of queries with documents, in a loss: 16 MiB with its gradient


@dataclass(frozen=True)
class LossRules:
    """What the loss of a step is made of.

    margin: (a, r) of masked_above, or None; dims: prefixes of the vector beside D, or None.
    """

    temperature: float
    margin: tuple | None = None
    in_batch: bool = True  # documents of other rows are negatives, too
    dims: list | None = None
    distill_weight: float = 0  # of the distillation loss beside the contrastive one
    teacher_temperature: float = 1


def holds(ids, document_ids):
    """Mark the documents (Q, N) whose hash, of document_ids (N,), is among a query's ids (Q, K)."""
    size = (len(ids), len(document_ids))
    mask = torch.zeros(size, dtype=torch.bool, device=ids.device)
    for of_queries in ids.T:
        mask |= document_ids == of_queries[:, None]
    return mask


def excluded_columns(document_ids, own, known, in_batch=True):
    """Mark the documents (Q, N) that are no negatives of a query.

    Those are the query itself, its positives other than the target, which own (Q, W) begins with,
    and, without in_batch, all that its row does not show.
    """
    mask = holds(known, document_ids)
    if not in_batch:
        mask |= torch.ones_like(mask).scatter(1, own, False)
    return mask.scatter(1, own[:, :1], False)  # the target is among the known ones


def masked_above(positive, margin):
    """Return the cosine above which another row's document is left out: p + a + r |p|.

    positive: p, a tensor; margin: (a, r), as margin_of gives it.
    """
    absolute, relative = margin
    return positive + absolute + relative * positive.abs()


def contrastive_losses(scores, target, excluded, temperature):
    """InfoNCE (van den Oord et al. 2018, eq. 4) of each query (Q,).

    scores (Q, N): cosines; target (Q,): the positive's column; excluded (Q, N) are left out.
    """
    logits = scores.masked_fill(excluded, -torch.inf) / temperature
    return F.cross_entropy(logits, target, reduction="none")


def distillation_losses(scores, teacher, temperature, teacher_temperature):
    """KL divergence of the student from the teacher over a row's own documents (Q,).

    scores (Q, W): cosines of the documents that a row shows; teacher (Q, W): its scores of them,
    NaN where it has none, which are left out. Below two there is no order to teach, and it is 0.
    The gradient is that of FlagEmbedding's "kl_div".
    """
    # not -inf: a row without any would divide 0 by 0
    unknown = teacher.isnan()
    nothing = torch.finfo(scores.dtype).min
    wanted = (teacher / teacher_temperature).masked_fill(unknown, nothing).log_softmax(1)
    found = (scores / temperature).masked_fill(unknown, nothing).log_softmax(1)
    return F.kl_div(found, wanted, reduction="none", log_target=True).sum(1)


def losses_of_queries(query_emb, doc_emb, own, known, spared, teacher, document_ids, rules):
    """Return the contrastive and the distillation loss of each query, (Q,) both.

    query_emb (Q, D), doc_emb (N, D): unit vectors; the others as Collator makes them. Both are
    means over D and rules.dims (Matryoshka, Kusupati et al. 2022; without D the rest of the vector
    would get no gradient).
    """
    excluded = excluded_columns(document_ids, own, known, rules.in_batch)
    if rules.margin is not None:
        of_others = ~holds(spared, document_ids)
    contrastive = []
    distillation = [torch.zeros_like(query_emb[:, 0])]
    for dim in sorted({query_emb.shape[1], *(rules.dims or ())}):
        # again: the beginning of a unit vector is shorter
        queries = F.normalize(query_emb[:, :dim], dim=1)
        documents = F.normalize(doc_emb[:, :dim], dim=1)
        scores = queries @ documents.T  # (Q, N)
        own_scores = scores.gather(1, own)  # (Q, W)
        skip = excluded
        if rules.margin is not None:
            above = scores > masked_above(own_scores[:, :1], rules.margin)
            skip = excluded | (above & of_others)
        contrastive.append(contrastive_losses(scores, own[:, 0], skip, rules.temperature))
        if rules.distill_weight:
            temperatures = rules.temperature, rules.teacher_temperature
            distillation.append(distillation_losses(own_scores, teacher, *temperatures))
    # each prefix counts alike
    return sum(contrastive) / len(contrastive), sum(distillation) / len(contrastive)


def first_places(values):
    """Return where each distinct value of (N,) stands first (M,), and of all which it is (N,)."""
    distinct, which = values.unique(return_inverse=True)
    places = torch.arange(len(values), device=values.device)
    # amin: of several places the first, on every device and process
    behind_all = places.new_full((len(distinct),), len(values))
    return behind_all.scatter_reduce(0, which, places, "amin"), which


class LossInBlocks(torch.autograd.Function):
    """apply(query_emb, doc_emb, loss, *columns): a step's loss, a block of queries after the other.

    columns: tensors (Q, ...); loss(query_emb, doc_emb, *columns): what a block of the queries adds.
    Its gradient is taken before the next one is begun, so that at most SCORES_AT_ONCE of the Q x N
    scores are held.
    """

    @staticmethod
    def forward(ctx, query_emb, doc_emb, loss, *columns):
        documents = doc_emb.detach().requires_grad_()
        size = max(1, SCORES_AT_ONCE // len(documents))
        total = 0
        gradients = []  # of the queries, (b, D) each
        blocks = zip(*(column.split(size) for column in (query_emb, *columns)), strict=True)
        for queries, *of_block in blocks:
            queries = queries.detach().requires_grad_()
            with torch.enable_grad():  # which forward is without
                share = loss(queries, documents, *of_block)
            share.backward()  # adds to what the documents have from the blocks before
            total += share.detach()
            gradients.append(queries.grad)
        ctx.save_for_backward(torch.cat(gradients), documents.grad)
        ctx.columns = len(columns)
        return total

    @staticmethod
    def backward(ctx, gradient):
        of_queries, of_documents = ctx.saved_tensors
        return gradient * of_queries, gradient * of_documents, None, *[None] * ctx.columns


def pool(hidden, lengths, pooling):
    """Pool hidden states (B, T, D) of right-padded sequences into unit vectors (B, D) in float32.

    lengths (B,): tokens of each sequence.
    """
    hidden = hidden.float()
    if pooling == "cls":
        vectors = hidden[:, 0]
    elif pooling == "last":
        # by length, not by id: a pad id may be a real token (Qwen3-Embedding ends in its pad token)
        vectors = hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    else:
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        mask = positions < lengths[:, None]  # (B, T)
        vectors = (hidden * mask[:, :, None]).sum(1) / lengths[:, None]
    return F.normalize(vectors, dim=1)


# ---------------------------------------------------------------- training


class EmbedTrainer(StepTrainer):
    """Contrasts all queries of a step with all its documents, however many pieces it is cut into.

    max_length: tokens of the longest document; cross_device: contrast with the documents of all
    processes. miner: finds negatives, or None; earlier_run: the folder of the one that is resumed;
    file_steps: FileSteps, where each step is of one file's rows.
    """

    keeps_graphs = True  # of as many pieces as fit: the others run twice

    def __init__(
        self,
        *,
        texts,
        miner,
        earlier_run,
        file_steps,
        rules,
        pooling,
        causal,
        cross_device,
        max_length,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.texts = texts
        self.vectors = Vectors(self.embed_texts)
        self.miner = miner
        self.earlier_run = earlier_run
        self.file_steps = file_steps
        self.mined_epoch = None  # that the negatives of now were mined for
        if miner:
            self.seconds_aside["mining"] = 0
        self.rules = rules  # LossRules
        self.pooling = pooling
        self.causal = causal
        self.max_length = max_length
        # processes whose documents are contrasted; else each has its own, and the mean is taken
        self.world = self.accelerator.num_processes if cross_device else 1

    def get_train_dataloader(self):
        """Return the loader of training rows, whose steps may each be of one file."""
        if self.file_steps:
            return loader_of(self.file_steps, self)
        return super().get_train_dataloader()

    def encode(self, model, inputs):
        """Embed a piece's sequences: unit vectors (B, D) in float32."""
        input_ids, lengths = inputs["input_ids"], inputs["lengths"]
        more = {}
        if not self.causal:  # a causal model never sees the padding on its right
            positions = torch.arange(input_ids.shape[1], device=lengths.device)
            more["attention_mask"] = (positions < lengths[:, None]).long()  # (B, T)
        with self.accelerator.autocast():
            hidden = model(input_ids=input_ids, **more).last_hidden_state  # (B, T, D)
        return pool(hidden, lengths, self.pooling)

    def loss(self, vectors, step):
        """Return the loss of the step from its sequences' vectors (B, D)."""
        query_emb = vectors[step["queries"]]
        doc_emb = vectors[step["documents"]]
        document_ids = step["document_ids"]
        columns = [step[name] for name in ("own", "known", "spared", "teacher")]
        agree(self.accelerator)  # that all have the vectors, before each waits for the others'
        if self.world > 1:
            query_emb, doc_emb, document_ids, columns = self.gathered(query_emb, doc_emb, step)
        rows, taught = self.counts_of(columns[-1])

        def loss_of_block(*block):
            contrastive, distillation = losses_of_queries(*block, document_ids, self.rules)
            weight = self.rules.distill_weight / taught
            return contrastive.sum() / rows + weight * distillation.sum()

        return LossInBlocks.apply(query_emb, doc_emb, loss_of_block, *columns)

    def counts_of(self, teacher):
        """Return how many rows have a contrastive loss, and how many a distillation loss.

        teacher (Q, W), as Collator makes it. Where each process has rows of its own: the mean over
        processes, since the mean of what they make of them is taken.
        """
        is_taught = (~teacher.isnan()).sum(1) > 1
        counts = torch.stack([torch.ones_like(is_taught).sum(), is_taught.sum()]).float()
        if self.accelerator.num_processes > self.world:
            counts = self.accelerator.reduce(counts, "mean")
        # none: a sum of 0 stands over 1. Not over something tiny, where a weight would be infinite
        return counts.where(counts > 0, 1)

    def gathered(self, query_emb, doc_emb, step):
        """Return (query_emb, doc_emb, document_ids, columns) of all processes, as `loss` has them.

        A text is one document, whoever has it: that of the first process.
        """
        texts = self.gather(step["texts"])
        # columns stand in the order of processes: one's own begin behind those of the ones before
        before = sum(map(len, texts[: self.accelerator.process_index]))
        # as wide as the widest; a narrower one shows its positive again
        own = self.gather_wide(step["own"] + before, -1)
        own = own.where(own >= 0, own[:, :1])
        # 0, the padding, is the hash of no text
        known = self.gather_wide(step["known"], 0)
        spared = self.gather_wide(step["spared"], 0)
        teacher = self.gather_wide(step["teacher"], torch.nan)
        document_ids = torch.cat(self.gather(step["document_ids"]))
        first, column = first_places(torch.cat(texts))
        doc_emb = self.with_others(doc_emb)[first]
        columns = [column[own], known, spared, teacher]
        return self.with_others(query_emb), doc_emb, document_ids[first], columns

    def gather_wide(self, rows, padding):
        """Return the rows (n, width) of all processes, whose widths may differ, as one tensor."""
        rows = self.accelerator.pad_across_processes(rows, dim=1, pad_index=padding)
        return torch.cat(self.gather(rows))

    def with_others(self, vectors):
        """Return the vectors of all processes.

        One's own part stays attached, so that each process has the gradient of the whole loss for
        it.
        """
        parts = self.gather(vectors.detach())
        parts[self.accelerator.process_index] = vectors
        return torch.cat(parts)

    def gather(self, rows):
        """Return the rows (n, ...) of every process, whose numbers may differ, as a list."""
        sizes = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device))
        padded = self.accelerator.gather(self.accelerator.pad_across_processes(rows))
        parts = padded.chunk(len(sizes))
        return [part[:size] for part, size in zip(parts, sizes, strict=True)]

    def cut_step(self, step):
        """Return pieces as StepTrainer does; with the base in parts of as many sequences on each.

        Shared texts stand in a step once, so that processes differ in how many they have. What a
        step is filled up with no query and no document refers to: its gradient is 0.
        """
        sequences = step["sequences"]
        if self.in_parts:
            missing = largest(self.accelerator, len(sequences)) - len(sequences)
            sequences += [min(sequences, key=len)] * missing
        return super().cut_step(step)

    def run_step(self, model, step, pieces, tokens_at_once):
        """Forward and backward of one step by gradient caching (Gao et al. 2021, section 3.2).

        As many of the last pieces as memory allows keep their graphs: all of them without
        accumulation, which makes it one plain pass. The early ones are computed without a graph
        first, and again once the loss has given the gradient of their vectors.

            piece       0 1 2 | 3 4     0, 1, 2 are early
            forward     . . . | g g     . without a graph, g with one
            loss        all vectors of the step, and their gradients
            backward          | b b     through the graphs that were kept
            again       g b, g b, g b   one early piece after the other
        """
        early = count_early(pieces, step, tokens_at_once)
        if self.in_parts:  # or processes would make different numbers of passes
            early = largest(self.accelerator, early)
        inputs = self.inputs_of(step, pieces)
        vectors, states = self.embed_pieces(model, inputs, early)
        loss, gradients = self.loss_and_gradients(vectors, step, pieces)
        # the kept graphs first, so that they are gone before others are made
        self.backward_kept(vectors[early:], gradients[early:])
        del vectors
        self.backward_early(model, inputs[:early], gradients[:early], states)
        return loss

    def embed_pieces(self, model, inputs, early):
        """Return the vectors (B, D) of each piece, the first `early` ones without a graph.

        Also returns the random state before each.
        """
        vectors = []
        states = []
        for i, piece in enumerate(inputs):
            states.append(get_rng_state())  # its dropout is to be drawn again
            with torch.set_grad_enabled(i >= early):
                vectors.append(self.encode(model, piece))
        return vectors, states

    def loss_and_gradients(self, vectors, step, pieces):
        """Return the step's loss, and its gradient (B, D) for the vectors of each piece."""
        # the loss ends at these leaves: of the model it needs no graph
        leaves = [vector.detach().requires_grad_() for vector in vectors]
        places = list(itertools.chain.from_iterable(pieces))
        # pieces are sorted by length, the step's indices are not
        [order] = moved([torch.tensor(places).argsort()], self.args.device)
        loss = self.loss(torch.cat(leaves)[order], step)
        # the mean of the processes' gradients is taken, and their sum is wanted. No loss scale:
        # float32 needs none, and accelerator.backward scales what follows
        (self.world * loss).backward()
        return loss.detach(), [leaf.grad for leaf in leaves]

    def backward_kept(self, vectors, gradients):
        """Run backward through the graphs that were kept."""
        # the gradient of v . g for fixed g is g times that of v: the chain rule
        products = [
            (vector * gradient).sum() for vector, gradient in zip(vectors, gradients, strict=True)
        ]
        self.accelerator.backward(sum(products))

    def backward_early(self, model, inputs, gradients, states):
        """Embed the early pieces again, with the dropout of the first time, and run backward."""
        for i, piece in enumerate(inputs):
            with replayed(states[i]):
                vector = self.encode(model, piece)
                self.accelerator.backward((vector * gradients[i]).sum())

    def embed(self, sequences):
        """Embed token sequences in evaluation mode, shared out over the processes.

        Returns vectors (len(sequences), D) on each process.
        """
        world = self.accelerator.num_processes
        own, fillers = self.own_share(len(sequences))
        if len(sequences) < world:  # each does all: one without any would have nothing to gather
            world = 1
            own, fillers = range(len(sequences)), []
        rows = [*own, *fillers]
        places, vectors = self.evaluated(lambda: self.embed_share(sequences, rows))
        if fillers:
            counted = [k for k, i in enumerate(places) if i < len(own)]
            places = [places[k] for k in counted]
            vectors = vectors[counted]
        [order] = moved([torch.tensor([own[i] for i in places])], self.args.device)
        if world > 1:
            order = torch.cat(self.gather(order))
            vectors = torch.cat(self.gather(vectors))
        return vectors[order.argsort()]

    def embed_share(self, sequences, rows):
        """Embed the sequences of `rows`; returns (places in rows, the vectors of these)."""
        lengths = [len(sequences[i]) for i in rows]
        # without a backward pass twice as many fit
        at_once = max(self.batch_size * self.max_length, self.piece_tokens or 0)
        limit = 2 * min(self.device_tokens, at_once)
        pieces = self.in_step(cut(lengths, limit // 2**self.halvings), lengths)
        # the largest first, and the results in one place: a pass then fits into what the ones
        # before have freed. Else the heap grew by 347 MiB for 2,000 documents, so by 140
        pieces.sort(key=lambda piece: -len(piece) * lengths[piece[0]])
        vectors = None
        done = 0
        for piece in pieces:
            [inputs] = self.inputs_of({"sequences": sequences}, [[rows[i] for i in piece]])
            found = self.encode(self.model, inputs)
            if vectors is None:
                vectors = found.new_empty(len(rows), found.shape[1])
            vectors[done : done + len(piece)] = found
            done += len(piece)
        return list(itertools.chain.from_iterable(pieces)), vectors

    def embed_texts(self, indices):
        """Embed texts of the run by index; returns vectors (len(indices), D)."""
        return self.embed([self.texts[i] for i in indices])

    def training_step(self, *args, **kwargs):
        self.vectors.forget()  # they are the model's before this step
        return super().training_step(*args, **kwargs)

    # ------------------------------------------------------------ mined negatives

    def before_training(self):
        """Mine with the model as it is before the first step; a resumed run has a file of that."""
        if self.miner and not self.earlier_run:
            self.mine(epoch=0)

    def begin_epoch(self, epoch, steps_in):
        """Mine for an epoch, or read what was mined for it; steps_in: see StepTrainer."""
        super().begin_epoch(epoch, steps_in)
        if not self.miner:
            return
        due = epoch if self.miner.rules.each_epoch else 0
        if self.mined_epoch == due:
            return
        if epoch > due or steps_in:  # the model is no longer the one that mined
            self.train_dataset.take_mined(read_mined(mined_file(self.earlier_run, due), self.miner))
            self.mined_epoch = due
            if self.is_world_process_zero():
                copy_mined(self.earlier_run, self.args.output_dir, due)
        else:
            self.mine(due)

    def mine(self, epoch):
        """Let the rows draw from what is mined with the model as it is, and write it down."""
        started = time.perf_counter()
        self.vectors.forget()
        found = self.miner.mine(self)
        self.train_dataset.take_mined(self.miner.of_rows(found))
        self.mined_epoch = epoch
        seconds = time.perf_counter() - started
        self.seconds_aside["mining"] += seconds
        self.miner.show(found, seconds)
        self.note_bare_rows()
        if epoch == 0:
            self.miner.show_examples(found)
        if self.is_world_process_zero():
            write_mined(mined_file(self.args.output_dir, epoch), self.miner, found, self.vectors)

    def note_bare_rows(self):
        """Note how many rows have no negatives, where a row is contrasted with its own alone."""
        bare = sum(not negatives for negatives in self.train_dataset.negatives)
        if bare and not self.rules.in_batch:
            note(
                f"{bare:,} rows have no negatives, neither mined ones nor their own: with "
                "--no-in_batch_negatives they teach nothing. Add --mine_corpus, or raise "
                "--mine_margin"
            )

    def try_mining(self):
        """Show what would be mined for the first queries, for --dry_run."""
        if self.miner:
            started = time.perf_counter()
            found = self.miner.mine(self, TRIED)
            self.miner.show(found, time.perf_counter() - started)
            self.miner.show_examples(found)


def count_early(pieces, step, tokens_at_once):
    """Return how many pieces cannot keep their graphs: as many of the last as fit in memory do."""
    early = len(pieces)
    total = 0  # padded tokens whose graphs are kept
    for piece in reversed(pieces):
        total += len(piece) * len(step["sequences"][piece[0]])  # padded to its longest, the first
        if total > tokens_at_once:
            break
        early -= 1
    return min(early, len(pieces) - 1)  # one must fit in any case


def columns_of(dev, texts, rules):
    """Return a DevSet in numbers: text indices of its queries and documents, relevant, own.

    A column is a document's place by ascending id, in which sentence-transformers ranks documents
    of equal scores. relevant: the set of each query's columns; own: the column of a query that
    stands in the corpus, too, else None: it would be found by itself, and ranks last.
    """
    column = {key: i for i, key in enumerate(sorted(dev.corpus))}
    relevant = [{column[key] for key in dev.relevant[query]} for query in dev.queries]
    own = [column.get(dev.own.get(query)) for query in dev.queries]
    queries, documents = dev_indices(dev, texts, rules.query_prefix, rules.doc_prefix)
    return queries, documents, relevant, own


def make_measure(dev_sets, texts, rules, dims):
    """Return measure(trainer) -> {metric: value} over all dev sets, whose names stand in front.

    dims: prefixes of the vector to measure as well, or None.
    """
    prepared = {name: columns_of(dev, texts, rules) for name, dev in dev_sets.items()}

    def measure(trainer):
        metrics = {}
        for name, (queries, documents, relevant, own) in prepared.items():
            # all at once: 10,000 documents of 1,024 dimensions are 40 MB
            query_emb = trainer.vectors.of(queries)
            corpus_emb = trainer.vectors.of(documents)
            found = retrieval_metrics(query_emb, corpus_emb, relevant, own)
            for dim in dims or []:
                part = retrieval_metrics(query_emb[:, :dim], corpus_emb[:, :dim], relevant, own)
                found[f"ndcg@10_dim{dim}"] = part["ndcg@10"]
            for key, value in found.items():
                metrics[named(name, key)] = value
        return metrics

    return measure


def make_look(dev, texts, rules, seed):
    """Return look(trainer): what three queries of a dev set find, as parts/examples.py keeps it."""
    queries, documents, relevant, own = columns_of(dev, texts, rules)
    words = [dev.corpus[key] for key in sorted(dev.corpus)]
    asked = [text for text, _ in dev.queries.values()]
    drawn = draw(range(len(queries)), seed)

    def look(trainer):
        # those that were just measured: no text is embedded again
        query_emb = F.normalize(trainer.vectors.of([queries[i] for i in drawn]).float(), dim=1)
        corpus_emb = F.normalize(trainer.vectors.of(documents).float(), dim=1)
        cosines = (query_emb @ corpus_emb.T).tolist()
        ranking = rank(query_emb, corpus_emb, [own[i] for i in drawn])
        shown = []
        for i, of_query, ranked in zip(drawn, cosines, ranking, strict=True):
            found = []
            for column in ranked[:3]:
                note = f"cosine {of_query[column]:.3f}"
                is_right = column in relevant[i]
                found.append({"text": shortened(words[column]), "note": note, "is_right": is_right})
            example = {
                "asked": shortened(asked[i]),
                "expected": [shortened(words[column]) for column in sorted(relevant[i])[:1]],
                "note": place_in_words(ranked, relevant[i], len(words)),
                "found": found,
            }
            shown.append(example)
        return shown

    return look


def place_in_words(ranked, relevant, count):
    """Return where the first relevant document of a query stands among `count` documents."""
    for place, column in enumerate(ranked, 1):
        if column in relevant:
            return f"a right document stands at place {place} of {count:,}"
    return f"no right document among the first {len(ranked)} of {count:,}"


# ---------------------------------------------------------------- display


def show_examples(train_set, texts, tokenizer):
    """Print three rows as the model sees them, special tokens and prefixes included.

    Note if it cannot read them.
    """
    for i in range(min(3, len(train_set))):
        indices = text_indices(train_set[i])[:2]
        indices += [index for index, _ in train_set.rows[i].neg[:1]]  # not what it may yet mine
        # strict=False: a row may have no negative
        for name, j in zip(("query", "positive", "negative"), indices, strict=False):
            text = tokenizer.decode(texts[j])
            if len(text) >= 160:
                text = f"{text[:100]} ... {text[-50:]}"
            say(f"example {i + 1} {name:8} {len(texts[j]):4} tokens  {text}")
    note_unknown(texts, tokenizer)


def show_scores(train_set, args):
    """Print what the rows of the first epoch bring of a teacher's scores."""
    scores = [train_set[i].scores for i in range(len(train_set))]
    show_teacher(scores, args.distill_weight, args.teacher_temperature)


# ---------------------------------------------------------------- main


def read_rows(args):
    """Read, check and split the rows: (training Examples, {name: DevSet}, counts)."""
    hub = None
    if args.dataset_name:
        hub = HubSet(args.dataset_name, args.dataset_subset, args.hf_revision)
    source = Source(args.train_file, args.dev_file, hub, args.dataset_split, args.dataset_dev_split)
    sizes = Sizes(
        seed=args.seed,
        share=HELD_OUT,
        train=args.train_sample_limit,
        dev=args.dev_sample_limit,
        dev_size=args.dev_size,
        evaluates=args.eval_strategy != "no",
    )
    columns = Columns(args.query_column, args.positive_column, args.negative_column)
    corpus = read_corpus(args.dev_corpus) if args.dev_corpus else None
    return read_data(
        source,
        sizes,
        columns,
        args.query_prefix,
        args.max_negs,
        corpus,
        by_file=args.steps_from == "one_file",
        own_alone=not (args.in_batch_negatives or args.mine_negatives),
        served=types_served(args.max_negs, args.in_batch_negatives, args.doc_prefix),
    )


@dataclass
class Data:
    """The rows of a run as the model will see them."""

    tokenizer: PreTrainedTokenizerBase
    stored: Stored  # what the base's sentence-transformers files say
    prompts: Prompts
    rules: TextRules
    texts: Texts
    train_set: TrainSet
    miner: Miner | None
    files: dict | None  # --steps_from one_file: {file: its rows' places in train_set}

    def file_steps(self, plan, seed):
        """Return FileSteps, None where the rows of a step are of any file."""
        return FileSteps(self.files, plan.examples_per_step, seed) if self.files else None


def tokenise_rows(args, state, origin, config, examples, dev_sets, corpus):
    """Settle how texts become tokens, and tokenise those of all sets; returns Data."""
    tokenizer = load_text_tokenizer(origin, args.append_eos)
    limit = position_limit(config, tokenizer)
    within = partial(within_limit, limit=limit, of="the base model")
    query_max_len = within("query_max_len", args.query_max_len or args.max_length)
    passage_max_len = within("passage_max_len", args.passage_max_len or args.max_length)
    # prompts and pooling as the base's own sentence-transformers files have them
    stored = read_sentence_files(origin, args.pooling)
    note_lower_case(stored, tokenizer)
    prompts = choose_prompts(stored.prompts, args.query_prefix, args.doc_prefix, examples)
    rules = TextRules(prompts.query, prompts.document, query_max_len, passage_max_len)
    # all texts are collected before any is tokenised: one pass, and one entry in the cache
    texts = Texts()
    train_set = TrainSet(examples, texts, rules, args.max_negs, args.seed)
    files = None
    if args.steps_from == "one_file":
        files = rows_of_files(examples, state.num_processes)
    miner = None
    if args.mine_negatives:
        pool = Pool(examples, corpus, texts, rules.doc_prefix, by_file=files is not None)
        mining = MiningRules(args.mine_negatives, args.mine_margin, args.mine_every == "epoch")
        miner = Miner(examples, train_set.rows, pool, mining)
        show_pool(pool, dev_sets)
        train_set.take_mined(miner.typical(args.seed))  # to count tokens by, until it has mined
    for dev in dev_sets.values():
        dev_indices(dev, texts, rules.query_prefix, rules.doc_prefix)  # adds its texts
    show_scores(train_set, args)
    with state.main_process_first():
        texts.tokenise(tokenizer, rules, args.num_workers)
    note_cut_texts(texts, rules, tokenizer)
    note_full_texts(texts, rules)
    return Data(tokenizer, stored, prompts, rules, texts, train_set, miner, files)


def load_text_tokenizer(origin, ends_in_eos):
    """Load the base's tokenizer, with a padding token, and an EOS behind each text if asked."""
    tokenizer = load_tokenizer(origin)
    if tokenizer.pad_token is None:  # as Llama's: SentenceTransformer cannot encode two texts then
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if not ends_in_eos:
        return tokenizer
    return append_eos(tokenizer, origin)  # by itself, so that whoever loads final/ does so, too


def plan_run(args, train_set, dev_sets, processes, files):
    """Make the plan; raises InputError for a metric that is not measured. files: see Data."""
    each = [len(rows) for rows in (files or {}).values()]
    dims = [f"ndcg@10_dim{dim}" for dim in args.matryoshka_dims or []]
    # the metric of a dev set without a name has no prefix; of several sets the first decides
    known = {named(name, key): name for name in dev_sets for key in METRICS + dims}
    metric = args.metric_for_best or named(next(iter(dev_sets), ""), "ndcg@10")
    if args.metric_for_best and dev_sets:
        metric = chosen_metric(metric, known)
    shown = {named(name, key): name for name in dev_sets for key in ("ndcg@10", "recall@10")}
    plan = make_plan(
        args,
        len(train_set),
        processes,
        has_dev=bool(dev_sets),
        metric=metric,
        greater_is_better=True,
        watched=[[metric, True]],
        shown={metric: known[metric]} | shown if dev_sets else {},
        drop_last=True,  # a smaller step has fewer negatives, and another loss
        each=each,
    )
    for sentence in advice(args, plan, len(train_set), each):
        note(sentence)
    fullness = 1
    if files:
        show_files(files, plan.examples_per_step)
        fullness = mean_fullness(files, plan.examples_per_step)
    return replace(plan, negatives_per_query=count_negatives(args, train_set, plan, fullness))


def count_negatives(args, train_set, plan, fullness):
    """Return how many documents of a step are no positive of a query's, on average; say it, too.

    fullness: the share of a step's examples that a query meets, on average.
    """
    shown = sum(min(args.max_negs, len(found)) for found in train_set.negatives) / len(train_set)
    queries = plan.examples_per_step if args.negatives_cross_device else plan.step_rows
    queries *= fullness
    if args.in_batch_negatives:
        negatives = round(queries * (1 + shown) - 1, 1)  # each brings a positive; one is its own
        whose = "the other documents of a step"
    else:
        negatives = round(shown, 1)
        whose = "those of its own row"
    cost = ""
    if args.mine_negatives:
        texts = plan.examples_per_step * (2 + shown)
        cost = f", up to {shown:g} of them its own: a step has {texts:g} texts"
    say(f"negatives {negatives:g} per query: {whose}{cost}")
    return negatives


def with_full_pools(plan, data, dev_sets, seed):
    """Fill the pools that held-out queries are searched in, as far as the plan's steps pay for it.

    Returns (the plan with its evaluation_share, {name: DevSet}).
    """
    row_tokens = tokens_of_rows(data.train_set, data.texts)
    file_steps = data.file_steps(plan, seed)
    training = tokens_of_steps(data.train_set, data.texts, row_tokens, plan, seed, file_steps)
    prefixes = data.rules.query_prefix, data.rules.doc_prefix
    dev_sets, share = fill_pools(dev_sets, data.texts, *prefixes, plan, training, seed)
    return replace(plan, evaluation_share=share), dev_sets


def tokens_to_rehearse(data, plan):
    """Return the tokens of each training row; until it has mined, with the longest it may find."""
    if data.miner:
        data.train_set.negatives = data.miner.longest(data.texts, plan.step_rows)
    return tokens_of_rows(data.train_set, data.texts)


@dataclass
class Embedder:
    """The model to train, and what was found out about it."""

    model: nn.Module
    causal: bool
    dimension: int
    precision: str
    pooling: str
    bits: int | None  # the base is quantised to
    dropout: float | None  # of the adapter


def load_model(args, origin, config, data):
    """Load the base, look at what it does, wrap it; returns an Embedder."""
    precision, in_words = choose_precision(flags.asked_precision(args))
    loaded = load(origin, AutoModel, config, precision, **flags.asked_base(args))
    quantised = f", {loaded.bits}-bit base" if loaded.bits else ""
    say(f"model     {args.model_name}, {in_words}{quantised}")
    # before the adapter, whose layers would hide which of the base's are used
    does = what_an_embedder_does(loaded.model, precision)
    check_loaded(
        loaded.model, loaded.absent, lambda: hidden_states(loaded.model, precision, 8), origin
    )
    widest = max(args.matryoshka_dims or [0])  # the model alone tells whether it has as many
    if widest > does.dimension:
        raise InputError(
            f"--matryoshka_dims {widest} exceeds the model's {does.dimension} dimensions."
        )
    pooling = choose_pooling(args.pooling, data.stored.pooling, does.is_causal, data.texts, config)
    lora = Lora(**flags.asked_lora(args), task_type="FEATURE_EXTRACTION")
    model, dropout = runs.wrapped(
        loaded.model,
        origin,
        lora,
        does.unused,
        full=args.finetune_type == "full",
        merges=args.merge_adapter,
    )
    note_savings(args.zero_stage, model)
    return Embedder(model, does.is_causal, does.dimension, precision, pooling, loaded.bits, dropout)


def choose_pooling(asked, stored, causal, texts, config):
    """Return how hidden states are pooled, and note what is suspicious about it.

    asked: --pooling; stored: what the base's sentence-transformers files say, or None.
    """
    pooling = asked
    if asked == "auto":
        # the last token of a causal model alone has seen all others
        pooling = stored or ("last" if causal else "mean")
    # the last token is to sum the text up: it must know that it is the last. Fifty texts tell
    ends = {int(texts[i][-1]) for i in range(min(50, len(texts.index)))}
    if pooling == "last" and len(ends) > 1:
        note(
            "last-token pooling, but texts end in different tokens: --append_eos gives them one to "
            "learn"
        )
    # models that were made two-way bring code or a config for it, which did not take effect
    two_way = getattr(config, "is_causal", True) is False or "bidirec" in config.model_type
    if causal and (two_way or (pooling == "mean" and stored)):
        note(
            "the base should see both ways, but its first token does not see its last: it runs "
            "causal here"
        )
    return pooling


def make_trainer(args, output_dir, checkpoint, data, dev_sets, plan, embedder):
    """Return the EmbedTrainer of a run, its model and data checked against one another."""
    check_vocabulary(embedder.model, data.tokenizer, data.texts.values.max(), args.model_name)
    arguments = runs.training_arguments(
        plan,
        embedder.precision,
        seed=args.seed,
        workers=args.num_workers,
        report_to=args.report_to,
        full_determinism=args.full_determinism,
    )
    # the step's index tensors; from memory that is pinned, no copy waits for the device
    arguments.accelerator_config.non_blocking = arguments.dataloader_pin_memory
    dropout = embedder.dropout or args.model_dropout
    half = embedder.precision != "none"
    note_inexact(dropout=dropout, half=half)
    return EmbedTrainer(
        model=embedder.model,
        args=arguments,
        train_dataset=data.train_set,
        eval_dataset=data.train_set,  # never read: Trainer refuses to evaluate without one
        data_collator=Collator(data.texts),
        processing_class=data.tokenizer,
        measure=measure_of(args, output_dir, data, dev_sets),
        rules=loss_rules(args),
        pooling=embedder.pooling,
        causal=embedder.causal,
        texts=data.texts,
        miner=data.miner,
        earlier_run=checkpoint and checkpoint.parent,
        file_steps=data.file_steps(plan, args.seed),
        cross_device=args.negatives_cross_device,
        max_length=data.rules.passage_max_len,  # as documents are what evaluations embed most
        **flags.asked_cut(args),
    )


def measure_of(args, output_dir, data, dev_sets):
    """Return measure(trainer), which keeps what three queries of the first dev set find as well."""
    measure = make_measure(dev_sets, data.texts, data.rules, args.matryoshka_dims)
    if not dev_sets:
        return measure
    first = next(iter(dev_sets.values()))  # which decides on the best state, too
    return showing(measure, make_look(first, data.texts, data.rules, args.seed), output_dir)


def loss_rules(args):
    """Return the LossRules that the flags ask for."""
    return LossRules(
        temperature=args.temperature,
        margin=margin_of(args.false_negative_margin),
        in_batch=args.in_batch_negatives,
        dims=args.matryoshka_dims,
        distill_weight=args.distill_weight,
        teacher_temperature=args.teacher_temperature,
    )


def margin_of(asked):
    """Return --false_negative_margin as masked_above takes it, None without; note one that harms.

    asked: 0.05, above the positive's cosine, or "1.05x", times it.
    """
    if asked is None:
        return None
    is_relative = isinstance(asked, str)
    margin = (0.0, float(asked.removesuffix("x")) - 1) if is_relative else (asked, 0.0)
    if max(margin) <= 0:
        note(
            f"--false_negative_margin {asked} hides what ranks above a positive: the queries that "
            "are still wrong do not learn from it (1.05x hides what stands clearly above)"
        )
    return margin


def settled_of(data, embedder, zero_stage):
    """Return what this run has settled of the flags, as the flags are called.

    Whoever reads training_config.json, as merge.py and --init_adapter do, takes these first.
    """
    return {
        **asdict(data.rules),
        "pooling": embedder.pooling,
        "zero_stage": zero_stage,
        "bits": embedder.bits,
        "lora_dropout": embedder.dropout,
    }


def fingerprint_of(examples, dev_sets, corpus, by_file=False):
    """Return a hash of the rows; of their contents alone, so that code may change around them.

    by_file: also of which rows share a file.
    """
    rows = []
    files = {}  # each file's number
    for example in examples:
        row = dict(vars(example))
        file = row.pop("file")  # it may be moved
        if by_file:
            row["file"] = files.setdefault(file, len(files))
        if not example.scores:
            del row["scores"]  # such rows had none when the first runs began
        rows.append(row)
    sets = {name: vars(dev) for name, dev in dev_sets.items()}
    parts = [rows, sets, corpus] if corpus else [rows, sets]
    return f"rows:{Hasher.hash(parts)}"


def files_writer(data, embedder):
    """Return write_files(folder), which makes `folder` a SentenceTransformer."""
    return partial(
        write_sentence_files,
        pooling=embedder.pooling,
        dimension=embedder.dimension,
        # sentence-transformers has one for both sides
        max_length=max(data.rules.query_max_len, data.rules.passage_max_len),
        prompts=data.prompts.saved,
        default_prompt=data.stored.default_prompt,
    )


def compared_inputs(texts, rules):
    """Return inputs(tokenizer): the ids of a few texts, the longest too, to compare models by."""
    # the longest shows whether it is cut alike
    some = list(texts.index)
    some = [*some[:7], some[np.diff(texts.offsets).argmax()]]
    words = [text for text, _ in some]
    sides = [is_query for _, is_query in some]
    return partial(encode_texts, texts=words, sides=sides, rules=rules)


def prepare(argv=None):
    """Do all that comes before the first step; returns the run, as parts/run.py describes it."""
    args = parse_args(argv)  # finished here: what is settled later stands elsewhere
    state, output_dir, checkpoint = runs.start(
        args.output_dir, args.resume_from_checkpoint, args.overwrite, args.seed
    )
    with state.main_process_first():  # data first: a mistake in them shows in seconds
        examples, dev_sets, counts = read_rows(args)
        corpus = read_corpus(args.mine_corpus) if args.mine_corpus else []
    # before pools are filled, which depends on the steps of the run
    fingerprint = fingerprint_of(examples, dev_sets, corpus, args.steps_from == "one_file")
    origin = Origin(args.model_name, args.model_revision, args.trust_remote_code, args.init_adapter)
    config = load_config(origin)
    data = tokenise_rows(args, state, origin, config, examples, dev_sets, corpus)
    plan = plan_run(args, data.train_set, dev_sets, state.num_processes, data.files)
    plan, dev_sets = with_full_pools(plan, data, dev_sets, args.seed)
    row_tokens = tokens_to_rehearse(data, plan)
    counts["dev"] = dev_sizes(dev_sets)
    embedder = load_model(args, origin, config, data)
    trainer = make_trainer(args, output_dir, checkpoint, data, dev_sets, plan, embedder)
    settled = settled_of(data, embedder, trainer.zero_stage)
    defaults = vars(parse_args(["--train_file", "any"]))
    record = runs.record_of(
        origin, checkpoint, vars(args), defaults, settled, embedder.precision, fingerprint
    )
    show_examples(data.train_set, data.texts, data.tokenizer)
    return runs.Prepared(
        trainer=trainer,
        plan=plan,
        origin=origin,
        auto_class=AutoModel,
        output_dir=output_dir,
        record=record | {"data": counts, "command": command_of("train_embed_lora.py", argv)},
        checkpoint=checkpoint,
        row_tokens=row_tokens,
        inputs=compared_inputs(data.texts, data.rules),
        outputs=trainer.embed,
        write_files=files_writer(data, embedder),
        **flags.asked_run(args),
    )


def train_and_prove(prepared):
    """Rehearse, train, save, prove; returns the report."""
    # what can be refused is refused here, and not after hours of training
    check_saved_tokenizer(prepared)
    settled = rehearse(
        prepared.trainer,
        prepared.plan,
        prepared.row_tokens,
        prepared.seed,
        stored_cut(prepared.checkpoint),
    )
    prepared.record["settled"] |= settled
    if prepared.dry_run:
        prepared.trainer.try_mining()
        return runs.dry_report(prepared)
    started = time.perf_counter()
    resumed_after = runs.resumed_after(prepared.checkpoint)
    runs.begin(prepared)
    carry_over(prepared)
    # for the proof: what is saved must differ from these. The checkpoint of a resumed run is not
    # loaded yet
    untrained = prepared.outputs(prepared.inputs(prepared.trainer.processing_class))
    before, after, warnings = runs.train(prepared)
    seconds = time.perf_counter() - started
    save_final(prepared, before, after)
    proof = prove(prepared, untrained)
    results = Results(before, after, proof, warnings, seconds, resumed_after)
    report = write_report(
        prepared.trainer, prepared.output_dir, prepared.record, prepared.plan, results
    )
    runs.merge_or_tell(prepared)
    return report


@utils.gives_memory_back
def main(argv=None):
    """Run the command line `argv`; return what training_summary_report.json holds, a Report."""
    prepared = prepare(argv)
    return Report(runs.finished_report(prepared) or train_and_prove(prepared))


if __name__ == "__main__":
    utils.run(main)

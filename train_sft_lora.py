"""Fine-tune a causal language model with LoRA, on the responses alone or on preferences.

    python train_sft_lora.py --train_file examples/sample_chats.jsonl --output_dir runs/first
    python train_sft_lora.py --model_name Qwen/Qwen3-4B --train_file chats.jsonl --load_in_4bit \\
      --eval_generate 100
    python train_sft_lora.py --train_file pairs.jsonl --pref_loss sigmoid \\
      --init_adapter runs/first/final

A row: {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
With --pref_loss: {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
output_dir: final/ (adapter, tokenizer, stop tokens), checkpoints, logs, training_curves.png,
predictions, report.html.
Shapes: B sequences, T tokens, N supervised tokens, V vocabulary, P pairs; (P, 2): chosen, rejected.
"""

# ruff: noqa: E402  a wrong flag is answered before the imports that take five seconds
import os
import re
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean as mean

import utils
from parts import flags
from parts.flag_types import integer, one_of, real

# ---------------------------------------------------------------- arguments

BASE = "Qwen/Qwen3-0.6B"


def parse_args(argv=None):
    """Parse and check the command line; exits 2 with one sentence on what is wrong."""
    parser = flags.make_parser("train_sft_lora.py", __doc__)
    flags.add_first_flags(parser, BASE, batch=2, epochs=1)
    add_sft_flags(parser)
    add_preference_flags(parser)
    flags.add_data_flags(parser, dev_size="0.2")
    flags.add_training_flags(parser, step=16, checkpointing="auto")
    flags.add_output_flags(parser, metric="loss")
    flags.add_lora_flags(parser)
    flags.add_model_flags(parser)
    args = parser.parse_args(argv)
    refuse_contradictions(parser, args)
    names_adapter = args.model_name and (Path(args.model_name) / "adapter_config.json").is_file()
    if args.eval_only and names_adapter:  # it is measured on the base that its config names
        args.init_adapter = args.model_name
        args.model_name = None
    # filled in only now: the checks above know by None that a flag was not given
    args.pref_beta = args.pref_beta or 0.1
    args.pref_ftx = args.pref_ftx or 0.0
    args.dpo_label_smoothing = args.dpo_label_smoothing or 0.0
    args.simpo_gamma = 0.5 if args.simpo_gamma is None else args.simpo_gamma
    if args.pref_loss or args.sanity_overfit:  # of an adapter that is trained on, too
        args.lora_dropout = 0.0
    if args.sanity_overfit:  # the model's own rows are its dev set
        args.eval_generate = args.sanity_overfit
        args.save_best = 0  # the last state is the one that must know them
        args.max_steps = args.max_steps or 200
    return flags.finish(parser, args, BASE, step=16)


# fmt: off
def add_sft_flags(parser):
    """Declare what this script has beside the shared flags."""
    add = parser.add_argument_group("SFT").add_argument
    add("--max_length", "--max_seq_length", "--max_sequence_length", type=integer(8), default=2048,
        metavar="N", help="tokens of a row [2048]")
    add("--overlong", default="drop", **one_of("drop", "truncate_prompt", "error"),
        help="rows above --max_length; a response is never cut [drop]")
    add("--train_turns", default="all", **one_of("all", "last"),
        help="assistant turns to learn from [all]")
    add("--enable_thinking", default="auto", **one_of("auto", "true", "false"),
        help="what the template is told [auto: true if a training row has reasoning]")
    add("--system_prompt", metavar="TEXT", help="system turn of the rows that have none")
    add("--chat_template", metavar="FILE", help="Jinja template in place of the tokenizer's")
    add("--drop_regex", metavar="REGEX", help="drop rows in which a text matches")
    add("--eval_generate", type=integer(0), default=0, metavar="N",
        help="rows of each dev set to generate on [0]")
    add("--max_new_tokens", type=integer(1), default=256, metavar="N",
        help="longest generated answer, in tokens [256]")
    add("--sanity_overfit", type=integer(1), metavar="N",
        help="learn N rows by heart in 200 steps, or exit 1")
    add("--eval_only", action="store_true",
        help="measure the dev sets on --model_name (base, adapter, merged folder)")
    add("--endpoint", metavar="URL",
        help="with --eval_only: ask this OpenAI-compatible server instead")
    add("--endpoint_model", default="default", metavar="NAME",
        help="the model's name there [default]")


def add_preference_flags(parser):
    """Declare the flags of preference losses."""
    add = parser.add_argument_group("preferences").add_argument
    add("--pref_loss", **one_of(*flags.PREFERENCE_LOSSES),
        help="learn which answer is better, from chosen/rejected rows [off]")
    add("--pref_beta", type=real(0, without={0}), metavar="X",
        help="strength of the preference loss [0.1]")
    add("--pref_ftx", type=real(0, 10), metavar="X",
        help="weight of an SFT loss on the chosen answers beside it [0]")
    add("--dpo_label_smoothing", type=real(0, 0.5), metavar="X",
        help="share of wrong labels, for sigmoid [0]")
    add("--simpo_gamma", type=real(0, without={0}), metavar="X",
        help="margin that simpo asks for [0.5]")


def refuse_contradictions(parser, args):
    """Exit 2 where this script's own flags exclude one another, or one lacks what it needs."""
    has_data = args.dev_file or args.train_file or args.dataset_name
    wants_best = args.save_best or args.early_stopping_patience  # None, not given, is neither
    is_address = (args.endpoint or "").startswith(("http://", "https://"))
    flags.refuse(parser, (
        (args.sanity_overfit and args.eval_only,
         "--sanity_overfit trains and --eval_only does not: pass one"),
        (args.sanity_overfit and args.eval_strategy == "no",
         "--sanity_overfit must measure: drop --eval_strategy no"),
        (args.endpoint and not is_address,
         f"--endpoint {args.endpoint} is no address of a server: "
         "write it as http://localhost:8080"),
        (args.endpoint and not args.eval_only,
         "--endpoint is evaluated, not trained: add --eval_only"),
        (args.sanity_overfit and (args.dev_file or wants_best),
         "--sanity_overfit measures the rows it trains on: "
         "drop --dev_file, --save_best, --early_stopping_patience"),
        (args.eval_only and not has_data, "--eval_only needs rows to evaluate on: pass --dev_file"),
        (not args.pref_loss and (args.pref_beta or args.pref_ftx),
         "--pref_beta and --pref_ftx need --pref_loss"),
        (args.dpo_label_smoothing and args.pref_loss != "sigmoid",
         "--dpo_label_smoothing is for --pref_loss sigmoid"),
        (args.simpo_gamma is not None and args.pref_loss != "simpo",
         "--simpo_gamma is for --pref_loss simpo"),
        (args.pref_loss and (args.sanity_overfit or args.endpoint),
         "--pref_loss compares log-probabilities: drop --sanity_overfit and --endpoint"),
        (args.pref_loss and args.train_turns == "last",
         "--train_turns: of a pair only the last answer is learnt from"),
        (args.pref_loss and (args.lora_dropout or args.model_dropout),
         "--pref_loss compares a model with what it was: drop --lora_dropout and --model_dropout"),
    ))
    try:  # now, and not at the first row
        re.compile(args.drop_regex or "")
    except re.error as error:
        parser.error(f"--drop_regex {args.drop_regex}: {error}")
# fmt: on


if __name__ == "__main__":
    utils.check_command(parse_args)

from parts import run as runs
from parts.adapters import Lora
from parts.answers import (
    DevSet,
    choose_asked,
    choose_generated,
    first_answers,
    measure_trainer,
)
from parts.base import (
    Origin,
    base_json,
    check_loaded,
    choose_precision,
    load,
    load_config,
    position_limit,
)
from parts.behaviour import middle_logits, what_a_language_model_does
from parts.causal import CausalTrainer, predicted, token_losses, token_scores
from parts.chats import TAG_RESIDUE, has_reasoning, read_data
from parts.checkpoints import stored_cut
from parts.cutting import pad
from parts.endpoint import Endpoint, measure_endpoint
from parts.examples import carry_over, showing
from parts.masks import Rules, find_frame
from parts.plan import advice, chosen_metric, make_plan, named
from parts.preference import Preference, PreferenceTrainer
from parts.proof import check_saved_tokenizer, prove, save_final
from parts.rehearsal import note_inexact, rehearse
from parts.report import Report, Results, command_of, write_evaluation, write_report
from parts.rows import HubSet
from parts.samples import TrainSet, first_ids, flat, make_samples, tokens_of, unknown_share
from parts.scores import LOWER_IS_BETTER, WATCHED, metric_names, shown_of
from parts.shards import note_savings
from parts.splits import Sizes, Source
from parts.template import Chat, note_oddities, read_template, stored_stops
from parts.tokenizer import check_vocabulary, load_tokenizer, within_limit
from utils import InputError, note, say

import torch
from datasets.fingerprint import Hasher
from torch import nn
from transformers import AutoModelForCausalLM

HELD_OUT = 0.2  # of the rows, where no dev set is named
# --sanity_overfit asks for an exact match up to this length: a long one goes astray at one token
SHORT_ANSWER_TOKENS = 64


# ---------------------------------------------------------------- data


def collate(samples):
    """Make one step of samples."""
    return {
        "rows": len(samples),
        "sequences": [sample["input_ids"] for sample in samples],
        "supervised": [sample["supervised"] for sample in samples],
    }


# ---------------------------------------------------------------- loss and metrics


def share_of_loss(losses, tokens, processes):
    """Return what one piece adds to the loss of a step: its losses (N,) over the step's tokens.

    tokens: the supervised ones of all processes, whose gradients are averaged: a sum is wanted.
    """
    return losses.sum() / tokens * processes


def measured_metrics(dev_sets, of_pairs):
    """Return {name of a dev set: names of the metrics that are measured on it}."""
    # before any is measured, so that a misspelt --metric_for_best is no surprise of hour three
    scores = ["loss", "token_accuracy"]
    if of_pairs:
        scores = ["loss", "accuracy", "margin", "length_accuracy"]
    measured = {}
    for name, dev in dev_sets.items():
        # which of the metrics of answers there are depends on whether these are JSON
        references = [example.answer for _, example in dev.generated]
        measured[name] = [*scores, *metric_names(references)]
    return measured


def check_overfit(after, train_set):
    """Raise InputError unless --sanity_overfit has learnt its rows by heart."""
    exact = after.get("exact_match")  # None where all answers are too long to be generated
    accuracy = after["token_accuracy"]
    # a short answer must be generated; a long one is judged by what it was taught, token by token
    has_long = any(sample["supervised"].sum() > SHORT_ANSWER_TOKENS for sample in train_set)
    figures = f"token accuracy {accuracy:.1%}"
    if exact is not None:
        figures = f"exact match {exact:.1%}, {figures}"
    short_fail = exact is not None and exact < 0.9
    long_fail = (has_long or exact is None) and accuracy < 0.95
    if short_fail or long_fail:
        raise InputError(
            f"sanity overfit failed on {len(train_set)} samples: {figures}; 90 % exact match is "
            "needed, or 95 % token accuracy for long answers. If the loss hardly fell: raise --lr, "
            "--max_steps or --lora_r. If it fell: training and generation see different prompts "
            "(template, --enable_thinking, BOS), labels are shifted, or the stop token is wrong."
        )
    say(f"sanity    passed: {figures}")


# ---------------------------------------------------------------- training


class SftTrainer(CausalTrainer):
    """Minimises the mean loss of a step's supervised tokens, however many pieces it is cut into."""

    def lay_out(self, step, piece):
        """Return a piece's input_ids (B, T), and positions and labels (N,) of supervised tokens."""
        # padded with False, as ids are with 0: no token behind a row's end is learnt
        masks = [torch.tensor(step["supervised"][i]) for i in piece]
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True)  # (B, T)
        input_ids, _ = pad([step["sequences"][i] for i in piece])
        return {"input_ids": input_ids} | predicted(input_ids, mask)

    def run_step(self, model, step, pieces, tokens_at_once):
        """Forward and backward of one step; its loss is a mean over the tokens of all processes."""
        counted = self.counted_rows(model, step)
        # a row that only fills the step up has no token to learn
        pairs = zip(step["supervised"], counted, strict=True)
        step["supervised"] = [mask & bool(counts) for mask, counts in pairs]
        # a mean over pieces, or processes, would weigh the tokens of a short answer more
        own_tokens = sum(int(mask.sum()) for mask in step["supervised"])
        tokens = self.over_all(own_tokens)
        total = 0
        for inputs in self.inputs_of(step, pieces):
            losses = self.score_tokens(model, token_losses, inputs)
            loss = share_of_loss(losses, tokens, self.accelerator.num_processes)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def score(self, samples):
        """Return {"loss", "token_accuracy"} over the supervised tokens of samples."""
        rows, fillers = self.own_share(len(samples))
        own = collate([samples[i] for i in (*rows, *fillers)])
        for i in range(len(rows), len(own["supervised"])):
            own["supervised"][i] = own["supervised"][i] & False  # counted by another process

        def score_own():
            scores = []
            for piece in self.pieces_of(own):
                [inputs] = self.inputs_of(own, [piece])
                scores.append(self.score_tokens(self.model, token_scores, inputs))
            # of losses, of hits, of tokens; float32 counts no further than 16 million
            sums = torch.zeros(3, dtype=torch.float64)
            for losses, hits in (each.cpu().double() for each in scores):
                sums += torch.stack([losses.sum(), hits.sum(), torch.tensor(len(hits))])
            return sums

        loss, hits, count = self.over_processes(self.evaluated(score_own)).tolist()
        return {"loss": loss / count, "token_accuracy": hits / count}


def first_logits(trainer, samples, ids):
    """Return logits (N, V) of the first answer tokens of `samples`, to compare models by.

    ids: the samples' token ids, as one of two tokenizers made them.
    """

    def logits_of(i):
        # the positions before its tokens, which give their logits; eight are enough to differ in
        answer = samples[i]["supervised"][1:].nonzero()[0][:8]
        keep = torch.tensor(answer, device=trainer.args.device)
        input_ids = pad([ids[i]])[0].to(trainer.args.device)
        with trainer.accelerator.autocast():
            logits = trainer.model(input_ids=input_ids, logits_to_keep=keep).logits
        return logits[0].float()

    # one row at a time: what padding does to the sums of a batch is no difference of models
    return trainer.evaluated(lambda: torch.cat([logits_of(i) for i in range(len(ids))]))


# ---------------------------------------------------------------- display


def show_examples(train_set, examples, chat):
    """Print three samples, or pairs, with the supervised tokens marked, and what answers share."""
    is_paired = "sides" in train_set[0]
    for i, sample in enumerate(flat(train_set[:3]), 1):
        kind = f"example {i}"
        if is_paired:
            kind = f"{'chosen  ' if i % 2 else 'rejected'} {(i + 1) // 2}"
        size = f"{len(sample['input_ids']):5} tokens, {sample['supervised'].sum()} supervised"
        say(f"{kind} {size}: {marked(sample, chat.tokenizer)}")
    if train_set.unrolled >= 1.05:  # a twentieth more would hardly be noticed in the time it takes
        note(
            "the chat template rewrites past turns, so that each answer is a sample of its own, of "
            f"all that inference sees: {train_set.unrolled:.1f} times the tokens of the "
            "conversations. --train_turns last learns the last answer of each alone, without the "
            "repeats"
        )
    samples = flat(train_set)  # of a pair both sides
    show_masks(samples, chat)
    answers = [(example.answer, example.where) for example in examples]
    show_commonest([answer for answer, _ in answers])
    note_residue(answers)
    unknown = unknown_share(samples, chat)
    if unknown > 0.01:
        note(
            f"{unknown:.0%} of all tokens are {chat.tokenizer.unk_token}: the base cannot read "
            "these texts"
        )


def marked(sample, tokenizer):
    """Return the text of a sample, its supervised parts in green or, in a file, in brackets."""
    on, off = ("\033[32m", "\033[0m") if os.isatty(1) else ("[[", "]]")  # 1: standard output
    ids = sample["input_ids"]
    mask = sample["supervised"]
    edges = [t for t in range(1, len(ids)) if mask[t] != mask[t - 1]]
    text = ""
    for start, end in zip([0, *edges], [*edges, len(ids)], strict=True):
        # line breaks in sight: a missing one behind a role is what masks go wrong by
        part = tokenizer.decode(ids[start:end]).replace("\n", "\\n")
        if len(part) >= 400:
            part = f"{part[:200]} ... {part[-200:]}"
        text += f"{on}{part}{off}" if mask[start] else part
    return text


def show_masks(samples, chat):
    """Print how much of the samples is learnt, and how many end as an answer has to."""
    learnt = sum(int(sample["supervised"].sum()) for sample in samples)
    total = sum(len(sample["input_ids"]) for sample in samples)
    # an answer that ends in no stop token teaches a model not to stop
    ends = mean([sample["input_ids"][-1] in chat.stop_ids for sample in samples])
    say(
        f"masks     {len(samples)} samples, {total:,} tokens, {learnt:,} of them supervised "
        f"({learnt / total:.1%}); {ends:.0%} end in {' or '.join(chat.stops)}; enable_thinking "
        f"{str(chat.thinking).lower()}"
    )


def show_commonest(answers):
    """Print the answer, and the opening of one, that most rows share."""
    # what half of the rows answer, or begin with, is what a model learns first
    for name, length in (("response", None), ("response opening", 16)):
        counts = Counter(answer[:length] for answer in answers)
        [(text, count)] = counts.most_common(1)
        if count > 1:
            say(f"commonest {name}, in {count / len(answers):.1%} of the rows: {text[:80]!r}")


def note_residue(answers):
    """Note tags that were left in answers, [(text, where)]."""
    residue = []
    for answer, where in answers:
        found = TAG_RESIDUE.search(answer)
        if found:
            residue.append((where, found[0]))
    if residue:
        where, tag = residue[0]
        note(
            f"{len(residue)} responses look as if tags were left in them (first: {where}: "
            f"{tag!r}); --drop_regex drops such rows"
        )


# ---------------------------------------------------------------- main


def read_rows(args):
    """Read, check and split the rows: (training Examples, {name: dev Examples}, counts)."""
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
        whole=bool(args.sanity_overfit),
    )
    return read_data(
        source,
        sizes,
        args.system_prompt,
        args.drop_regex,
        as_pairs=bool(args.pref_loss),
        overfit=args.sanity_overfit,
        trains=not args.eval_only,
    )


@dataclass
class Data:
    """The rows of a run as the model will see them."""

    chat: Chat
    rules: Rules
    position_limit: float  # tokens that the base can take
    train_set: TrainSet  # with dev sets alone the first one's, which is not trained on
    dev_sets: dict  # {name: DevSet}
    counts: dict  # of what was dropped and shortened


def tokenise_rows(args, state, origin, config, examples, dev_examples):
    """Make the Chat, and samples of all rows; returns Data."""
    tokenizer = load_tokenizer(origin)
    # the template is tried out before it renders rows: what it shows there decides how
    chat = make_chat(args, origin, tokenizer, examples, dev_examples)
    limit = position_limit(config, tokenizer)
    max_length = within_limit("--max_length", args.max_length, limit)
    rules = Rules(max_length, args.overlong, args.train_turns)
    as_pairs = bool(args.pref_loss)
    with state.main_process_first():
        train_set, dev_samples, counts = make_samples(
            examples, dev_examples, chat, rules, as_pairs, args.num_workers
        )
    dev_sets = {}
    for name, samples in dev_samples.items():
        generated = choose_generated(
            name,
            dev_examples[name],
            chat,
            count=args.eval_generate,
            seed=args.seed,
            max_length=max_length,
            # of the rows that are learnt by heart, those that can be asked for to the letter
            longest_answer=SHORT_ANSWER_TOKENS if args.sanity_overfit else None,
        )
        dev_sets[name] = DevSet(samples, generated)
    if not train_set:  # --eval_only of dev sets alone: a plan and a Trainer ask for rows
        train_set = TrainSet(next(iter(dev_samples.values())))
    return Data(chat, rules, limit, train_set, dev_sets, counts)


def make_chat(args, origin, tokenizer, examples, dev_examples):
    """Return the Chat of this run: its template, whether it thinks; notes what is odd about it."""
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    own_template = bool(tokenizer.chat_template)  # now: Chat sets a plain one where there is none
    recorded = {}
    if args.enable_thinking == "auto":  # else nobody asks for a file that may be broken, or far
        recorded = utils.recorded_flags(base_json(origin, "training_config.json") or {})
    seen = examples or sum(dev_examples.values(), [])
    thinking = choose_thinking(args.enable_thinking, recorded, seen)
    stops = stored_stops(base_json(origin, "generation_config.json"), tokenizer)
    chat = Chat(tokenizer, thinking, stops)
    note_oddities(chat, own_template, stops, examples, dev_examples)
    return chat


def choose_thinking(asked, recorded, examples):
    """Tell whether answers begin with thinking: as asked, as the adapter was trained, as data do.

    asked: --enable_thinking; recorded: the flags that an adapter's run recorded.
    """
    if asked == "auto":
        asked = recorded.get("enable_thinking", str(has_reasoning(examples)).lower())
    return asked == "true"


def plan_run(args, train_set, dev_sets, processes):
    """Make the plan; raises InputError for a metric that is not measured."""
    measured = measured_metrics(dev_sets, bool(args.pref_loss))
    pairs = [(name, key) for name, keys in measured.items() for key in keys]
    # length_accuracy is of the data: no training changes it
    known = {named(name, key): name for name, key in pairs if key != "length_accuracy"}
    metric = args.metric_for_best
    if metric and dev_sets:
        hint = "" if args.eval_generate else " More are with --eval_generate N."
        metric = chosen_metric(metric, known, hint)
    metric = metric or named(next(iter(dev_sets), ""), "accuracy" if args.pref_loss else "loss")
    # of these, less is better; a run without dev sets has its loss alone
    lower = [named(name, key) for name in measured for key in LOWER_IS_BETTER]
    shown = {named(name, key): name for name in measured for key in shown_of(measured[name])}
    plan = make_plan(
        args,
        len(train_set),
        processes,
        has_dev=bool(dev_sets),
        metric=metric,
        greater_is_better=metric not in (*lower, "loss"),
        watched=[[named(name, key), WATCHED[key]] for name, key in pairs if key in WATCHED],
        shown={metric: known[metric]} | shown if dev_sets else {},
        drop_last=False,  # the loss is a mean over tokens: a smaller step is as good as any
    )
    for sentence in (*advice(args, plan, len(train_set)), *own_advice(args)):
        note(sentence)
    if args.sanity_overfit:  # what counts is known by heart at the end, not on the way
        plan = replace(plan, eval_steps=plan.total_steps)
    return plan


def own_advice(args):
    """Yield what about this script's own flags a user would want to know."""
    if args.pref_loss == "simpo" and args.pref_beta < 1:
        yield (
            f"simpo is nearly flat at --pref_beta {args.pref_beta:g}: take 2.5 to 10, and a "
            "quarter to a half of that as --simpo_gamma"
        )
    if args.epochs > 3 and not args.max_steps:
        yield f"{args.epochs:g} epochs: more than 3 usually learn the answers by heart"


@dataclass
class LanguageModel:
    """The model to train, and what was found out about it."""

    model: nn.Module
    plain_head: bool  # its output is the logits
    precision: str
    bits: int | None  # the base is quantised to
    dropout: float | None  # of the adapter


def load_model(args, origin, config):
    """Load the base, look at what it does, wrap it; returns a LanguageModel.

    Raises InputError for a model that sees the future, or gives no logits of some tokens alone.
    """
    precision, in_words = choose_precision(flags.asked_precision(args))
    loaded = load(origin, AutoModelForCausalLM, config, precision, **flags.asked_base(args))
    quantised = f", {loaded.bits}-bit base" if loaded.bits else ""
    say(f"model     {args.model_name}, {in_words}{quantised}")
    # before the adapter, whose layers would hide which of the base's are used
    does = what_a_language_model_does(loaded.model, precision, loaded.bits, args.model_name)
    if not does.is_causal:
        raise InputError(
            f"{args.model_name} sees the tokens that it is to predict. Choose a causal language "
            "model."
        )
    check_loaded(
        loaded.model, loaded.absent, lambda: middle_logits(loaded.model, precision, 8), origin
    )
    lora = Lora(**flags.asked_lora(args), task_type="CAUSAL_LM")
    model, dropout = runs.wrapped(
        loaded.model,
        origin,
        lora,
        does.unused,
        full=args.finetune_type == "full",
        merges=args.merge_adapter,
    )
    note_savings(args.zero_stage, model)
    return LanguageModel(model, does.plain_head, precision, loaded.bits, dropout)


def make_trainer(args, output_dir, data, plan, language_model):
    """Return the trainer of a run, its model and data checked against one another."""
    tokenizer = data.chat.tokenizer
    check_vocabulary(language_model.model, tokenizer, largest_token(data), args.model_name)
    arguments = runs.training_arguments(
        plan,
        language_model.precision,
        seed=args.seed,
        workers=args.num_workers,
        report_to=args.report_to,
        full_determinism=args.full_determinism,
    )
    if not args.eval_only:
        dropout = language_model.dropout or args.model_dropout
        half = language_model.precision != "none"
        note_inexact(dropout=dropout, half=half)
    trainer_class = partial(SftTrainer, data_collator=collate)
    if args.pref_loss:
        trainer_class = preference_trainer(args, data)
    return trainer_class(
        model=language_model.model,
        args=arguments,
        train_dataset=data.train_set,
        eval_dataset=data.train_set,  # never read: Trainer refuses to evaluate without one
        processing_class=tokenizer,
        measure=measure_of(args, output_dir, data.dev_sets),
        chat=data.chat,
        frame=find_frame(data.chat),
        plain_head=language_model.plain_head,
        max_length=data.rules.max_length,
        max_new_tokens=args.max_new_tokens,
        position_limit=data.position_limit,
        **flags.asked_cut(args),
    )


def measure_of(args, output_dir, dev_sets):
    """Return measure(trainer), which keeps a few answers for report.html as well, if there are."""
    folder = None if args.dry_run else output_dir  # of predictions; a dry run leaves nothing
    measure = partial(measure_trainer, dev_sets, folder)
    answered = [name for name, dev in dev_sets.items() if dev.generated]
    if not answered or args.dry_run or args.eval_only:
        return measure
    return showing(measure, partial(first_answers, folder, answered[0]), folder)


def preference_trainer(args, data):
    """Return PreferenceTrainer with what --pref_loss adds filled in."""
    preference = Preference(
        args.pref_loss,
        args.pref_beta,
        args.pref_ftx,
        args.dpo_label_smoothing,
        args.simpo_gamma,
    )
    # the sets whose pairs need the reference's log-probabilities
    pair_sets = [dev.samples for dev in data.dev_sets.values()]
    if not args.eval_only:
        pair_sets.append(data.train_set)
    return partial(
        PreferenceTrainer,
        preference=preference,
        pair_sets=pair_sets,
        compares_base=args.eval_only,
        bare_base=None if args.init_adapter else args.model_name,  # it has nothing to switch off
    )


def largest_token(data):
    """Return the largest token id of all samples."""
    sets = [data.train_set, *(dev.samples for dev in data.dev_sets.values())]
    return max(sample["input_ids"].max() for samples in sets for sample in flat(samples))


def settled_of(data, language_model, zero_stage):
    """Return what this run has settled of the flags, as the flags are called.

    Whoever reads training_config.json, as merge.py and --init_adapter do, takes these first.
    """
    return {
        "max_length": data.rules.max_length,
        "enable_thinking": str(data.chat.thinking).lower(),
        "zero_stage": zero_stage,
        "bits": language_model.bits,
        "lora_dropout": language_model.dropout,
    }


def fingerprint_of(examples, dev_examples, template):
    """Return a hash of the rows, and of the chat template, which tokens depend on as much."""
    sets = []
    for part in (examples, *dev_examples.values()):
        sets.append([(each.messages, each.tools, each.rejected) for each in part])
    return Hasher.hash([sets, template])


def save_stops(folder, origin, chat):
    """Write the base's generation_config with the stop tokens, for whoever serves the model."""
    # many bases name <|endoftext|> alone: an answer that ends in <|im_end|> would go on for ever
    stored = base_json(origin, "generation_config.json") or {}
    utils.write_json(folder / "generation_config.json", stored | {"eos_token_id": chat.stop_ids})


def merged_counts(rows, tokens):
    """Return the report's counts: those of reading rows, with those of making tokens of them."""
    return rows | tokens | {"dropped": rows["dropped"] | tokens["dropped"]}


def prepare(argv=None):
    """Do all that comes before the first step; returns the run, as parts/run.py describes it."""
    args = parse_args(argv)  # finished here: what is settled later stands elsewhere
    state, output_dir, checkpoint = runs.start(
        args.output_dir, args.resume_from_checkpoint, args.overwrite, args.seed
    )
    with state.main_process_first():  # data first: a mistake in them shows in seconds
        examples, dev_examples, counts = read_rows(args)
    origin = Origin(args.model_name, args.model_revision, args.trust_remote_code, args.init_adapter)
    config = load_config(origin)
    data = tokenise_rows(args, state, origin, config, examples, dev_examples)
    plan = plan_run(args, data.train_set, data.dev_sets, state.num_processes)
    language_model = load_model(args, origin, config)
    trainer = make_trainer(args, output_dir, data, plan, language_model)
    settled = settled_of(data, language_model, trainer.zero_stage)
    fingerprint = fingerprint_of(examples, dev_examples, data.chat.tokenizer.chat_template)
    defaults = vars(parse_args(["--train_file", "any"]))
    record = runs.record_of(
        origin, checkpoint, vars(args), defaults, settled, language_model.precision, fingerprint
    )
    if not args.eval_only:
        show_examples(data.train_set, examples, data.chat)
    counts = merged_counts(counts, data.counts)
    compared = flat(data.train_set[:8])[:8]  # samples for the proof; of pairs the first four
    return runs.Prepared(
        trainer=trainer,
        plan=plan,
        origin=origin,
        auto_class=AutoModelForCausalLM,
        output_dir=output_dir,
        record=record | {"data": counts, "command": command_of("train_sft_lora.py", argv)},
        checkpoint=checkpoint,
        row_tokens=[tokens_of(sample) for sample in data.train_set],
        inputs=partial(first_ids, examples, data.chat, data.rules, len(compared)),
        outputs=partial(first_logits, trainer, compared),
        write_files=partial(save_stops, origin=origin, chat=data.chat),
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


def ask_server(args):
    """Measure the dev sets on --endpoint; returns the report, None on all processes but one."""
    state, output_dir, _ = runs.start(
        args.output_dir, args.resume_from_checkpoint, args.overwrite, args.seed
    )
    with state.main_process_first():
        _, dev_examples, counts = read_rows(args)
    if not state.is_main_process:  # one asks; there is nothing to share out but its waiting
        return None
    thinking = choose_thinking(args.enable_thinking, {}, sum(dev_examples.values(), []))
    count = args.eval_generate or max(map(len, dev_examples.values()))  # all: it has no loss
    dev_sets = {}
    for name, examples in dev_examples.items():
        dev_sets[name] = DevSet([], choose_asked(name, examples, count=count, seed=args.seed))
    settled = {"eval_generate": count, "enable_thinking": str(thinking).lower()}
    record = {"flags": vars(args), "settled": settled, "data": counts}
    if args.dry_run:
        return Report(record)
    endpoint = Endpoint(args.endpoint, args.endpoint_model, thinking, args.max_new_tokens)
    return write_evaluation(output_dir, record, measure_endpoint(dev_sets, output_dir, endpoint))


def evaluate(prepared):
    """Measure the dev sets on the model as it is; returns the report."""
    if prepared.dry_run:
        return prepared.record
    prepared.trainer.before_training()
    metrics = prepared.trainer.measure(prepared.trainer)
    if not prepared.trainer.is_world_process_zero():  # all have the metrics, one writes the file
        return prepared.record | {"metrics": metrics}
    return write_evaluation(prepared.output_dir, prepared.record, metrics)


@utils.gives_memory_back
def main(argv=None):
    """Run the command line `argv`; return what training_summary_report.json holds, a Report."""
    args = parse_args(argv)  # prepare parses again: tests and notebooks call it alone
    if args.endpoint:  # no model is loaded
        return ask_server(args)
    prepared = prepare(argv)
    if args.eval_only:
        return Report(evaluate(prepared))
    report = Report(runs.finished_report(prepared) or train_and_prove(prepared))
    if args.sanity_overfit and "metrics" in report:
        check_overfit(report["metrics"]["after"], prepared.trainer.train_dataset)
    return report


if __name__ == "__main__":
    utils.run(main)

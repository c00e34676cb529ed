"""What every trainer of a causal language model does: scores at chosen positions, greedy answers.

Shapes: B sequences, T tokens, N supervised tokens, D hidden size, V vocabulary.
"""

import contextlib
import math

from parts.cutting import cut
from parts.masks import decode_answer
from parts.processes import largest
from parts.shards import gathered
from parts.step import StepTrainer

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import GenerationConfig

LOGITS_AT_ONCE = 2**26  # positions x vocabulary: 256 MiB in float32
GENERATED_AT_ONCE = 32  # rows
STOPS_SELDOM = 0.9  # share of answers that stop, below which a user is warned


def token_losses(logits, labels):
    """Return the cross entropy (N,) of logits (N, V) and labels (N,).

    Computed in float32, since bfloat16 has three digits.
    """
    return F.cross_entropy(logits.float(), labels, reduction="none")


def token_scores(logits, labels):
    """Return token_losses, and below them 1 where the label is the likeliest token, else 0: (2, N).

    For evaluations alone: the likeliest of 150,000 tokens takes one more pass over all logits.
    """
    hits = logits.argmax(1) == labels
    return torch.stack([token_losses(logits, labels), hits.float()])


def generate_greedily(model, prompts, stop_ids, max_new_tokens):
    """Continue prompts (token ids) in one batch.

    Returns [(ids before the first stop token, whether there was one)].
    """
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=stop_ids,
        pad_token_id=stop_ids[0],
    )
    model.generation_config = greedy  # or the base's own would fill in a repetition penalty, say
    longest = max(map(len, prompts))
    rows, mask = [], []
    for prompt in prompts:  # padded on the left: answers begin in one column
        padding = [0] * (longest - len(prompt))
        rows.append([*padding, *prompt])
        mask.append([*padding, *[1] * len(prompt)])
    rows = torch.tensor(rows, device=model.device)
    mask = torch.tensor(mask, device=model.device)
    with torch.no_grad():
        rows = model.generate(input_ids=rows, generation_config=greedy, attention_mask=mask)
    found = []
    for ids in rows[:, longest:].tolist():
        end = next((t for t, token in enumerate(ids) if token in stop_ids), None)
        found.append((ids[:end], end is not None))
    return found


def predicted(input_ids, mask):
    """Return {"positions", "labels"} (N,) of the tokens where `mask` (B, T) is, row by row.

    positions: of the tokens before them, which predict them; they count on from row to row.
    """
    tokens = mask.flatten().nonzero()[:, 0]
    return {"positions": tokens - 1, "labels": input_ids.flatten()[tokens]}


class CausalTrainer(StepTrainer):
    """A StepTrainer of a causal language model; a subclass adds the loss of a step and a score."""

    def __init__(
        self,
        *,
        chat,
        frame,
        plain_head,
        max_length,
        max_new_tokens,
        position_limit,
        **kwargs,
    ):
        """chat, frame: how answers are ended and read; lengths and the limit in tokens.

        plain_head: the logits are the head's output as it is, without softcapping or scaling.
        """
        super().__init__(**kwargs)
        self.chat = chat
        self.frame = frame
        self.plain_head = plain_head
        self.max_length = max_length
        self.max_new_tokens = max_new_tokens
        self.position_limit = position_limit
        self.head = self.model.get_output_embeddings()

    def score_tokens(self, model, score, inputs, **more):
        """Return score(logits, labels) of a piece's tokens, as `predicted` has chosen them.

        score: token_losses or token_scores; more: inputs of the model's beside input_ids.
        """
        labels = inputs["labels"]
        chunk = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        in_chunks = self.scores_chunks(len(labels), chunk)
        with self.accelerator.autocast():
            with self.head_at(inputs["positions"], runs=not in_chunks):
                # no attention mask: a causal model never sees the padding on its right
                found = model(input_ids=inputs["input_ids"], **more).logits
            if in_chunks:
                return self.scores_in_chunks(score, found, labels, chunk)
            return score(found, labels)

    def scores_chunks(self, count, chunk):
        """Tell whether the scores of `count` tokens are taken `chunk` at a time."""
        if not self.plain_head:  # behind the head stands code of the model's own
            return False
        if self.in_parts:
            # always, as all processes must; but an adapter on the head would gather it each time
            return isinstance(self.head, nn.Linear)
        return count > chunk

    @contextlib.contextmanager
    def head_at(self, positions, runs):
        """Context in which the model's head is given the hidden states (N, D) at `positions` alone.

        positions (N,) count the tokens of all rows; a mask as logits_to_keep would wait for the
        device to count them. Where the head does not run, its input takes the logits' place.
        """
        forward = self.head.forward

        def forward_at(hidden):
            chosen = hidden.flatten(0, 1).index_select(0, positions)
            return forward(chosen) if runs else chosen

        self.head.forward = forward_at
        try:
            yield
        finally:
            self.head.forward = forward

    def scores_in_chunks(self, score, hidden, labels, chunk):
        """Return score(logits, labels) from hidden states (N, D), `chunk` positions at a time.

        The backward pass computes their logits again: those of all positions at once are what
        memory is short of, at a vocabulary of 150,000.
        """
        head = self.head
        if self.in_parts:
            # once a piece: processes have different numbers of chunks, and all gather it together
            weight, bias = gathered(head.weight), gathered(head.bias)

            def head(hidden):
                return F.linear(hidden, weight, bias)

        def score_chunk(hidden, labels):
            with self.accelerator.autocast():  # once more, as the backward pass calls it outside
                return score(head(hidden), labels)

        scores = []
        for part in zip(hidden.split(chunk), labels.split(chunk), strict=True):
            scores.append(recomputed(score_chunk, *part, use_reentrant=False))
        return torch.cat(scores, -1)

    def counted_rows(self, model, step):
        """Return which rows of a step carry loss (rows,).

        Under DDP the last step of an epoch repeats rows to fill up; those carry none. Then `model`
        is a wrapper around self.model; a step outside it, as the rehearsal's, counts all its rows.
        """
        if model is self.model:
            return torch.ones(step["rows"], dtype=torch.bool)
        rows = self.args.per_device_train_batch_size
        count = len(self.train_dataset)
        world = self.accelerator.num_processes
        steps_per_epoch = math.ceil(count / rows / world)
        share = self.state.global_step % steps_per_epoch * world + self.accelerator.process_index
        return share * rows + torch.arange(step["rows"]) < count

    def over_all(self, count):
        """Return the sum of all processes' counts, as a tensor on the device."""
        # written by the device: torch.tensor(count) would be copied, and wait for its queue
        return self.accelerator.reduce(torch.full((), count, device=self.args.device))

    def over_processes(self, sums):
        """Return sums added up over all processes."""
        if self.accelerator.num_processes == 1:
            return sums  # not moved: some devices have no float64
        return self.accelerator.reduce(sums.to(self.args.device))

    def pieces_of(self, step):
        """Cut rows that are only measured; without a backward pass twice as many fit."""
        at_once = max(self.batch_size * self.max_length, self.piece_tokens or 0)
        limit = min(self.device_tokens, 2 * at_once)
        lengths = self.lengths_of(step)
        return self.in_step(cut(lengths, limit // 2**self.halvings), lengths)

    def warnings_about(self, after):
        """Return a warning for each dev set whose answers seldom stop."""
        warnings = []
        for name, rate in after.items():
            if name.endswith("stop_rate") and rate < STOPS_SELDOM:
                name = name.removeprefix("eval_")
                warnings.append(
                    f"{1 - rate:.0%} of the generated answers ({name}) do not "
                    f"stop in --max_new_tokens {self.max_new_tokens}: look at predictions-*.jsonl "
                    "for repetition; more steps teach the stop token, more tokens give room"
                )
        return warnings

    def generate(self, prompts):
        """Answer prompts (token ids) greedily, shared out over the processes.

        Returns [(text, whether it stopped)].
        """
        # the longest first: memory that runs out does so at once, and parts are padded little
        own, fillers = self.own_share(len(prompts))
        own = sorted([*own, *fillers], key=lambda i: -len(prompts[i]))
        answers = self.evaluated(lambda: self.generate_own(prompts, own))
        if self.accelerator.num_processes > 1:
            answers = dict(gather_object(list(answers.items())))
        return [answers[i] for i in range(len(prompts))]

    def generate_own(self, prompts, own):
        """Answer prompts[i] for i in `own`, longest first: {i: (text, whether it stopped)}."""
        answers = {}
        size = max(1, GENERATED_AT_ONCE // 2**self.halvings)
        for start in range(0, len(own), size):
            part = own[start : start + size]
            room = self.position_limit - len(prompts[part[0]])  # behind the longest of the part
            if self.in_parts:  # all go on until the last process has its answers
                room = -largest(self.accelerator, -room)
            with self.accelerator.autocast():
                found = generate_greedily(
                    self.model,
                    [prompts[i] for i in part],
                    self.chat.stop_ids,
                    min(self.max_new_tokens, room),
                )
            for i, (ids, stopped) in zip(part, found, strict=True):
                answers[i] = decode_answer(self.chat.tokenizer, ids, self.frame), stopped
        return answers

"""Learning which of two answers is better: six losses, the reference, the step.

Shapes: P pairs, T tokens; (P, 2) is chosen, rejected.
"""

import contextlib
from dataclasses import dataclass
from functools import partial
from statistics import fmean as mean

from parts.causal import CausalTrainer, token_losses
from parts.cutting import moved
from parts.layouts import collate_pairs, lay_out_pairs, positions_and_mask
from parts.processes import agree
from parts.samples import longest_side
from utils import InputError, say

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object

WITHOUT_REFERENCE = ("orpo", "simpo")
PER_TOKEN = ("ipo", "orpo", "simpo")
# figures of both answers, in the order of PreferenceTrainer.pair_sums
SIDES = [
    f"{figure}_{side}" for figure in ("reward", "logp", "tokens") for side in ("chosen", "rejected")
]


@dataclass(frozen=True)
class Preference:
    """Which loss, and its numbers; beta times an answer's gain is its reward."""

    kind: str
    beta: float = 0.1
    ftx: float = 0.0  # weight of an SFT loss on the chosen answers beside it
    label_smoothing: float = 0.0  # share of wrong labels, for sigmoid
    simpo_gamma: float = 0.5  # margin that simpo asks for


def gains(kind, logps, reference, lengths):
    """Return how much likelier answers have become (P, 2); times beta these are the rewards.

    logps, reference: summed log-probabilities (P, 2) of the answers, lengths: their tokens. ipo,
    orpo and simpo take means over tokens; orpo and simpo have no reference. None: not computed yet,
    as in a rehearsal; the model is its own.
    """
    if reference is None:
        reference = logps.detach()
    gained = logps if kind in WITHOUT_REFERENCE else logps - reference
    return gained / lengths if kind in PER_TOKEN else gained


def preference_losses(preference, logps, reference, lengths, kl=(0.0, 0.0)):
    """Return each pair's loss (P,), from (P, 2) as in gains().

    kl: mean gains of the step's answers, for kto_pair.

    sigmoid: Rafailov et al. 2023, eq. 7, smoothed as in Mitchell 2023; hinge: Zhao et al. 2023
    (SLiC); ipo: Azar et al. 2023, eq. 17, on means; kto_pair: Ethayarajh et al. 2024, eq. 8; orpo:
    Hong et al. 2024, eq. 6 and 7; simpo: Meng et al. 2024, eq. 6.
    """
    kind, beta = preference.kind, preference.beta
    gained = gains(kind, logps, reference, lengths)
    chosen, rejected = gained.unbind(1)
    margin = chosen - rejected
    fine_tuning = -logps[:, 0] / lengths[:, 0]  # the SFT loss of the chosen answer, per token
    if kind == "sigmoid":
        right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
        smoothing = preference.label_smoothing
        losses = -(1 - smoothing) * right - smoothing * wrong
    elif kind == "hinge":
        losses = F.relu(1 - beta * margin)
    elif kind == "ipo":
        losses = (margin - 1 / (2 * beta)).square()
    elif kind == "kto_pair":
        better = torch.sigmoid(beta * (chosen - kl[1]))
        worse = torch.sigmoid(beta * (kl[0] - rejected))
        losses = 1 - (better + worse) / 2
    elif kind == "orpo":
        # log(p / (1 - p)) of mean token probabilities; p = 1 would have none
        odds = gained - torch.log(-torch.expm1(gained.clamp(max=-1e-6)))
        losses = fine_tuning - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
    else:
        losses = -F.logsigmoid(beta * margin - preference.simpo_gamma)
    return losses + preference.ftx * fine_tuning


def pair_means(sums):
    """Return {name: mean} from a list of PreferenceTrainer.pair_sums."""
    count, accurate, loss, *sides = sums
    means = {name: value / count for name, value in zip(SIDES, sides, strict=True)}
    margin = means["reward_chosen"] - means["reward_rejected"]
    return {"loss": loss / count, "accuracy": accurate / count, "margin": margin, **means}


def as_share(sign):
    """Return how much of a comparison, whose sign is given, is won: 1, 0 or, of a tie, a half."""
    return (1 + sign) / 2


def length_accuracy(pairs):
    """Return the better accuracy of two rules: take the longer, take the shorter answer."""
    longer = []
    for pair in pairs:
        chosen, rejected = pair["sides"]
        difference = len(chosen["input_ids"]) - len(rejected["input_ids"])
        longer.append(as_share((difference > 0) - (difference < 0)))
    return max(mean(longer), 1 - mean(longer))


class PreferenceTrainer(CausalTrainer):
    """Minimises the mean preference loss of a step's pairs.

    A pair's common prompt is computed once if `shares`. The reference is the model as it is before
    the first step: the base, or what --init_adapter holds. Its log-probabilities are computed once.
    """

    def __init__(self, *, preference, pair_sets, compares_base=False, bare_base=None, **kwargs):
        """pair_sets: lists of all pairs that are trained on or measured.

        compares_base: nothing is trained, and the reference is the model with its adapter switched
        off; bare_base: its name where it has none, so that there is nothing to compare.
        """
        super().__init__(**kwargs)
        self.preference = preference
        self.pair_sets = pair_sets
        self.compares_base = compares_base
        self.bare_base = bare_base
        longest = max((pair for pairs in pair_sets for pair in pairs), key=longest_side)
        self.lay_out_prompts(self.can_share(longest))

    def settled(self):
        return super().settled() | {"shares_prompts": self.shares}

    def take_over(self, settled, may_grow):
        super().take_over(settled, may_grow)
        self.lay_out_prompts(settled["shares_prompts"])

    # ------------------------------------------------------------ a pair's two layouts

    def lay_out_prompts(self, shares):
        """Compute a pair's prompt once if `shares`, else with each answer."""
        self.shares = shares
        self.data_collator = partial(collate_pairs, shares)

    def can_share(self, pair):
        """Tell whether prompts may be computed once: both layouts of `pair`, the longest, agree."""
        window = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if window and window < longest_side(pair):
            return False  # some layer would see less of the prompt
        apart = self.trial_logps(pair, False)
        try:
            shared = self.trial_logps(pair, True)
        except (TypeError, ValueError, RuntimeError):  # attention that takes no mask of its own
            return False
        # relative to sums over whole answers; half precision has three digits
        in_half = self.args.fp16 or self.args.bf16
        return torch.allclose(apart, shared, rtol=2e-3 if in_half else 1e-5)

    def trial_logps(self, pair, shares):
        """Return the log-probabilities (1, 2) of one pair in one of the two layouts."""
        step = collate_pairs(shares, [pair])
        return self.evaluated(lambda: self.pair_logps(self.model, *self.inputs_of(step, [[0]])))

    def pair_logps(self, model, inputs):
        """Return summed log-probabilities (P, 2) of a piece's answers."""
        more = self.shared_inputs(inputs) if "middle" in inputs else {}
        losses = self.score_tokens(model, token_losses, inputs, **more)  # (N,)
        lengths = inputs["lengths"]
        logps = -losses.new_zeros(lengths.numel()).index_add(0, inputs["side"], losses)
        return logps.view(-1, 2)

    def shared_inputs(self, inputs):
        """Return the model's inputs beside input_ids, of a piece whose prompts stand there once."""
        position_ids, seen = positions_and_mask(**inputs)
        return {"position_ids": position_ids, "attention_mask": self.as_mask(seen[:, None])}

    def as_mask(self, seen):
        """Return seen (P, 1, T, T) as attention takes it: of eager, which adds it, as numbers."""
        if self.model.config._attn_implementation != "eager":
            return seen
        mask = torch.zeros(seen.shape, device=seen.device)
        # not -inf, and finite in every precision that it may be cast to
        return mask.masked_fill(~seen, torch.finfo(torch.float16).min)

    def lay_out(self, step, piece):
        """Return {name: int64 tensor} of a piece's pairs, on the CPU."""
        return lay_out_pairs(step, piece)

    def lengths_of(self, step):
        """Return how many tokens each pair takes in a piece."""
        whole = super().lengths_of(step)
        if step["shares"]:
            return whole
        sides = zip(step["chosen"], whole, strict=True)
        return [2 * max(first, both - first) for first, both in sides]  # both are padded alike

    # ------------------------------------------------------------ the reference

    def before_training(self):
        """Compute the reference log-probabilities of all pairs, once: sample["reference"]."""
        kind = self.preference.kind
        if kind in WITHOUT_REFERENCE:
            return
        shared = "once a pair" if self.shares else "with each answer"
        say(f"reference of {sum(map(len, self.pair_sets))} pairs; prompts are computed {shared}")
        if self.compares_base and self.bare_base:
            raise InputError(
                f"--pref_loss {kind} compares an adapter with its base, and {self.bare_base} is no "
                "adapter. Name one, or pass --pref_loss simpo."
            )
        off = self.model.disable_adapter() if self.compares_base else contextlib.nullcontext()
        with off:
            for samples in self.pair_sets:
                # kept in the sample, which each epoch puts into another step
                for row, logps in self.reference_logps(samples).items():
                    samples[row]["reference"] = logps

    def reference_logps(self, samples):
        """Return {row: [its two log-probabilities]} of pairs, shared out over the processes."""

        def own():
            pieces = [(rows, logps) for rows, logps, *_ in self.each_pair(samples)]
            found = []
            for rows, logps in pieces:  # read once all are queued
                found += zip(rows, logps.tolist(), strict=True)
            return found

        found = self.evaluated(own)
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        return dict(found)

    def references(self, step, pieces):
        """Return the reference log-probabilities (P, 2) of each piece, None where not computed."""
        if step["reference"][0] is None:  # then all are
            return [None] * len(pieces)
        known = [torch.tensor([step["reference"][i] for i in piece]) for piece in pieces]
        return moved(known, self.args.device)

    # ------------------------------------------------------------ the step and its figures

    def run_step(self, model, step, pieces, tokens_at_once):
        """Forward and backward of one step; its loss is a mean over the pairs of all processes."""
        step["counted"] = self.counted_rows(model, step).int().tolist()
        pairs = self.over_all(sum(step["counted"]))
        inputs = self.inputs_of(step, pieces)
        references = self.references(step, pieces)
        kl = (0.0, 0.0)
        if self.preference.kind == "kto_pair":  # of the whole step, before any of its pieces
            kl = self.sum_of_gains(model, inputs, references) / pairs
            kl = kl.clamp(min=0)  # an estimate may be below the 0 that a divergence is at least
        total = 0
        seen = torch.zeros(9, device=self.args.device, dtype=torch.float64)
        for piece, reference in zip(inputs, references, strict=True):
            lengths, counted = piece["lengths"], piece["counted"]
            logps = self.pair_logps(model, piece)
            losses = preference_losses(self.preference, logps, reference, lengths, kl)
            losses = losses * counted
            # the mean of the processes' gradients is taken, and their sum is wanted
            loss = losses.sum() / pairs * self.accelerator.num_processes
            self.accelerator.backward(loss)
            total += loss.detach()
            logps, losses = logps.detach(), losses.detach()
            seen += self.pair_sums(logps, reference, lengths, losses, counted)
        self.seen = seen
        return total

    def sum_of_gains(self, model, inputs, references):
        """Return the sums (2,) over a step's pairs, of all processes, of what answers gained."""
        sums = torch.zeros(2, device=self.args.device)
        for piece, reference in zip(inputs, references, strict=True):
            with torch.no_grad():
                logps = self.pair_logps(model, piece)
            gained = gains(self.preference.kind, logps, reference, piece["lengths"])
            sums += (gained * piece["counted"][:, None]).sum(0)
        agree(self.accelerator)
        return self.accelerator.reduce(sums)

    def numbers_of_step(self, loss):
        """Return the loss of the step, and sums of what it did to rewards and log-probabilities."""
        return torch.cat([super().numbers_of_step(loss), self.over_processes(self.seen)])

    def figures_of(self, numbers):
        """Return {name: number} from the list of numbers_of_step."""
        loss, *sums = numbers
        return pair_means(sums) | {"loss": loss}

    def pair_sums(self, logps, reference, lengths, losses, counted):
        """Return sums (9,) over the `counted` pairs: count, accurate, loss, then those of SIDES."""
        gained = gains(self.preference.kind, logps, reference, lengths)
        rewards = self.preference.beta * gained
        accurate = as_share((rewards[:, :1] - rewards[:, 1:]).sign())
        columns = [torch.ones_like(accurate), accurate, losses[:, None], rewards, logps, lengths]
        return (torch.cat(columns, 1) * counted[:, None]).double().sum(0)

    # ------------------------------------------------------------ pairs that are only measured

    def each_pair(self, samples):
        """Yield of this process' share, piece by piece, what is known of its pairs.

        That is: their rows in `samples`, their logps, lengths, reference.
        """
        own, fillers = self.own_share(len(samples))
        step = collate_pairs(self.shares, [samples[i] for i in (*own, *fillers)])
        for piece in self.pieces_of(step):
            [inputs] = self.inputs_of(step, [piece])
            [reference] = self.references(step, [piece])
            found = [self.pair_logps(self.model, inputs), inputs["lengths"], reference]
            if fillers:
                counted = [k for k, i in enumerate(piece) if i < len(own)]
                piece = [piece[k] for k in counted]
                found = [None if each is None else each[counted] for each in found]
            yield [own[i] for i in piece], *found

    def score(self, samples):
        """Return pair_means of a dev set, and its length_accuracy.

        The loss of kto_pair is that without its KL terms, which are those of a step.
        """

        def score_own():
            sums = torch.zeros(9, device=self.args.device, dtype=torch.float64)
            for _, logps, lengths, reference in self.each_pair(samples):
                losses = preference_losses(self.preference, logps, reference, lengths)
                all_count = torch.ones(len(logps), device=logps.device)
                sums += self.pair_sums(logps, reference, lengths, losses, all_count)
            return sums

        sums = self.over_processes(self.evaluated(score_own))
        return pair_means(sums.tolist()) | {"length_accuracy": length_accuracy(samples)}

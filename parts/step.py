"""The exact step: cut into pieces that fit in memory, with the gradient of the uncut step."""

import gc
import itertools
import math
import time
from contextlib import contextmanager

from parts.cutting import cut, moved, pad, padded_tokens, split
from parts.figures import Figures
from parts.memory import is_out_of_memory
from parts.processes import OutOfMemoryElsewhere, agree, average_gradients, largest
from parts.shards import collect, is_in_parts, leave_to_fsdp, let_go, shared_optimizer
from utils import InputError, say

import torch
from peft import PeftModel
from transformers import Trainer

PIECE_TOKENS = {"cpu": 448, "cuda": 32768}  # padded tokens of a forward pass: each device's fastest


def broken_weight(model, untrained):
    """Return the name of a weight that is not finite and that training did not change, or None.

    untrained: no step was taken, so that no weight was changed.
    """
    for name, parameter in model.named_parameters():
        unchanged = untrained or not parameter.requires_grad
        if unchanged and not parameter.isfinite().all():
            return name.removeprefix("base_model.model.").replace(".base_layer", "")  # peft's
    return None


class StepTrainer(Trainer):
    """A Trainer whose batch is one whole step: {"sequences": [token ids], "rows": examples, ...}.

    The step is cut into pieces of batch_size examples' tokens, or of as many more as memory was
    found to hold. A subclass' run_step(model, step, pieces, tokens_at_once) runs forward and
    backward so that the gradient is that of the uncut step. When memory runs out, the step starts
    again from zero gradients, with activations recomputed or with half the tokens in memory, and
    all later ones do the same.
    """

    keeps_graphs = False  # of several pieces at once
    file_steps = None  # FileSteps, where each step is of one file's rows

    def __init__(
        self, *, batch_size, grow_pieces, gradient_checkpointing, zero_stage, measure, **kwargs
    ):
        """batch_size: examples that must fit into memory; measure(trainer): {metric: value}.

        grow_pieces: whether more may be in memory, where there is a GPU to ask for how many.
        gradient_checkpointing: "on", "off", or "auto", which leaves it to the rehearsal on a GPU.
        """
        optimizer = shared_optimizer(zero_stage, kwargs["model"], kwargs["args"])
        super().__init__(**kwargs, optimizer_cls_and_kwargs=optimizer)
        self.in_parts = is_in_parts(self.model)
        if self.in_parts:
            leave_to_fsdp(self.model)
        self.zero_stage = 3 if self.in_parts else int(optimizer is not None)
        self.batch_size = batch_size  # not Trainer's, for which a whole step is one batch
        self.grow_pieces = grow_pieces
        self.gradient_checkpointing = gradient_checkpointing
        self.measure = measure
        self.device_tokens = PIECE_TOKENS.get(self.args.device.type, PIECE_TOKENS["cuda"])
        # padded tokens that memory was found to hold at once; None: those of batch_size examples
        self.piece_tokens = None
        self.halvings = 0  # of what is in memory at once, since it ran out
        self.recomputes = False  # activations, in the backward pass
        self.may_recompute = False  # once memory runs out
        self.evaluation_halvings = 0
        self.figures = None  # of the step that was queued last
        self.real_tokens = 0
        self.padded_tokens = 0
        self.seconds_aside = {"evaluation": 0}  # that are not those of steps

    def training_step(self, model, step, num_items_in_batch=None):
        """Run forward and backward of one step; return its loss."""
        model.train()
        step = self._prepare_inputs(step)  # the rehearsal's comes from no data loader
        loss = self.until_it_fits(lambda: self.attempt_step(model, step), together=True)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        average_gradients(self.accelerator, trained)
        before = self.figures
        step_number = self.state.global_step + 1
        self.figures = Figures(step_number, self.numbers_of_step(loss), self.figures_of)
        if before:
            self.look_at(before)
        # fp16: the loss scaler waits for the gradients in any case. The first: what is broken from
        # the start is told from what the step would break
        if self.args.fp16 or self.state.global_step == 0:
            self.look_at(self.figures)
        return loss

    def attempt_step(self, model, step):
        """Run forward and backward of the pieces of a step; gradients stay each process' own.

        They are added up once all processes have theirs: one that runs out of memory within DDP's
        own sum could not start again.
        """
        # cut anew by each attempt: `halvings` may have grown
        pieces, tokens_at_once = self.cut_step(step)
        with self.accelerator.no_sync(model):
            return self.run_step(model, step, pieces, tokens_at_once)

    def numbers_of_step(self, loss):
        """Return the numbers (n,) of the step that was just queued, over all processes.

        They stay on the device, as `figures_of` reads them; the loss is the first.
        """
        # each process scales its part so that the mean over processes is the step's loss
        if self.accelerator.num_processes > 1:
            loss = self.accelerator.reduce(loss, "mean")
        return loss.view(1)

    def figures_of(self, numbers):
        """Return {name: number} from the list of numbers_of_step."""
        return {"loss": numbers[0]}

    def look_at(self, figures):
        """Raise InputError if the loss of a step is not finite.

        Steps are looked at when the next one is queued, so that the device is never without work,
        and at once where something is about to outlive the process, or to be measured or shown.
        """
        loss = figures.read()["loss"]
        if not math.isfinite(loss):
            raise self.diverged(figures.step, loss)

    def diverged(self, step_number, loss):
        """Return the InputError on a loss of NaN or infinity in a step."""
        # the weights that are trained may be NaN by now because the loss was, but for the first
        broken = broken_weight(self.model, untrained=step_number == 1)
        if broken:
            return InputError(
                f"the loss is {loss}, because {broken} of the base or adapter holds NaN or "
                "infinity: fetch it again, or take an earlier checkpoint."
            )
        return InputError(f"the loss is {loss} in step {step_number}: {self.remedy()}.")

    def remedy(self):
        """Return what to do about numbers that have left the range."""
        half = ", or pass --mixed_precision none" if self.args.fp16 else ""
        return f"lower --lr{half}"

    def check_weights(self):
        """Raise InputError if a step has left a weight that is not finite: a finite loss may."""
        # NaN is the least and the largest of what it is in; isfinite() would take a weight's memory
        trained = [p.detach() for p in self.model.parameters() if p.requires_grad]
        extremes = [extreme for weight in trained for extreme in weight.aminmax()]
        if not torch.stack(extremes).isfinite().all():
            raise InputError(
                f"step {self.state.global_step} has left NaN or infinity in the weights: "
                f"{self.remedy()}."
            )

    def log(self, logs, *args, **kwargs):
        """Show training figures as means over the last --logging_steps steps, resumed or not.

        The history holds each step's own figures, which RunCallback has put there: what Trainer
        knows of a step beside them, the gradient's norm, joins its entry.
        """
        history = self.state.log_history
        is_of_training = "loss" in logs
        if is_of_training:
            steps = [entry for entry in history if "loss" in entry][-self.args.logging_steps :]
            for name in self.figures.read():
                logs[name] = sum(entry[name] for entry in steps) / len(steps)
        super().log(logs, *args, **kwargs)
        if is_of_training:  # what was just logged, means, is not what the history is to hold
            shown = history.pop()
            history[-1] = shown | history[-1]

    def until_it_fits(self, attempt, together=False):
        """Return attempt(), called again in less memory each time it runs out.

        together: all processes attempt it, and start again where one of them runs out. Each attempt
        starts from zero gradients. Raises InputError where pieces cannot get smaller.
        """
        while True:
            try:
                found = attempt()
                if together:
                    agree(self.accelerator)
                return found
            except OutOfMemoryElsewhere:
                ran_out = False
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if 2**self.halvings > self.device_tokens:
                    raise InputError(
                        "out of memory: lower --max_length or --batch_size, or quantise."
                    ) from error
                if self.in_parts:
                    raise self.out_of_memory_alone() from error
                ran_out = True
            # outside the except block, where the error no longer holds the graph
            self.free_memory()
            if ran_out:
                self.take_less_memory()
                if together:
                    agree(self.accelerator, fits=False)

    def out_of_memory_alone(self):
        """Return the InputError on a process that runs out of memory with the base in parts.

        The others wait in the middle of a pass for its share of a layer, and cannot be told.
        """
        less = "--gradient_checkpointing"
        if self.recomputes:
            less = f"--batch_size {self.batch_size // 2}" if self.batch_size > 1 else "--max_length"
        return InputError(
            f"out of memory in process {self.accelerator.process_index}, and with --zero_stage 3 "
            f"no process can start again by itself: pass {less}, "
            "--no-grow_pieces, or more processes."
        )

    def take_less_memory(self):
        """Recompute activations from here on, if that is left to us, or halve the pieces."""
        recomputed_before = self.recomputes
        if self.may_recompute and torch.is_grad_enabled():
            self.recompute_activations(True)
        # not all models can: those halve at once
        if self.recomputes and not recomputed_before:
            how = "with gradient checkpointing"
        else:
            self.halvings += 1
            how = f"in pieces 1/{2**self.halvings} the size"
        say(f"memory    ran out: this again, and what follows, {how}")

    def free_memory(self):
        """Let go of gradients, and of what an attempt that failed has left."""
        self.model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()

    def recompute_activations(self, recomputes):
        """Switch gradient checkpointing on or off: the gradient is the same.

        Raises InputError for a model that cannot do so, unless it is "auto" that asks for it.
        """
        self.may_recompute = False
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        if not recomputes:
            base.activation_checkpointing_disable()
            self.recomputes = False
            return
        try:
            # use_reentrant would need inputs with a gradient, which a frozen embedding gives not
            base.activation_checkpointing_enable({"use_reentrant": False})
            self.recomputes = True
        except ValueError:  # its class says that it cannot, or no module of it can
            if self.gradient_checkpointing == "on":
                raise InputError(
                    f"a {type(base).__name__} does not support gradient checkpointing: pass "
                    "--gradient_checkpointing off."
                ) from None
            self.gradient_checkpointing = "off"

    @torch.no_grad()
    def evaluated(self, attempt):
        """Return until_it_fits(attempt) in evaluation mode.

        An evaluation remembers its own halvings: the pieces of training stay as large as they were.
        """
        training = self.model.training
        halvings = self.halvings
        self.halvings = max(halvings, self.evaluation_halvings)
        self.model.eval()
        try:
            return self.until_it_fits(attempt)
        finally:
            self.model.train(training)
            self.evaluation_halvings = self.halvings
            self.halvings = halvings

    def settled(self):
        """Return how steps are cut, as flags and by the names that `take_over` knows."""
        return {
            "gradient_checkpointing": "on" if self.recomputes else "off",
            "piece_tokens": self.piece_tokens,
            "halvings": self.halvings,
        }

    def take_over(self, settled, may_grow):
        """Cut steps as an earlier run did, whose settled() this is, but for what flags say.

        may_grow: there is a GPU's memory here, too, for pieces that had grown.
        """
        has_grown = settled["piece_tokens"] is not None
        if not has_grown or (self.grow_pieces and may_grow):
            self.piece_tokens = settled["piece_tokens"]
            self.halvings = settled["halvings"]  # of this size
        if self.gradient_checkpointing == "auto":
            self.recompute_activations(settled["gradient_checkpointing"] == "on")

    def cut_step(self, step):
        """Return the step's pieces, and how many padded tokens may be in memory at once."""
        lengths = self.lengths_of(step)
        # so many tokens as batch_size examples have must fit into memory; maybe more do
        parts = math.ceil(step["rows"] / self.batch_size)
        tokens = max(math.ceil(sum(lengths) / parts), self.piece_tokens or 0)
        # the device's: less in a piece than fits may be faster
        pieces = cut(lengths, min(self.device_tokens, tokens) // 2**self.halvings)
        pieces = self.in_step(pieces, lengths)
        padded = padded_tokens(pieces, lengths)
        self.real_tokens += sum(map(len, step["sequences"]))
        self.padded_tokens += padded
        at_once = max(padded / parts, self.piece_tokens or 0)
        return pieces, at_once / 2**self.halvings

    def in_step(self, pieces, lengths):
        """Return pieces as many as the process with the most has, where the base is in parts.

        All gather each layer together, so that all make the same number of passes.
        """
        if not self.in_parts:
            return pieces
        return split(pieces, lengths, largest(self.accelerator, len(pieces)))

    def own_share(self, count):
        """Return which of `count` rows this process measures, and which only fill its share up.

        These are to be computed and not counted: with the base in parts all have as many rows.
        """
        world = self.accelerator.num_processes
        own = range(self.accelerator.process_index, count, world)
        fillers = [0] * (math.ceil(count / world) - len(own)) if self.in_parts else []
        return own, fillers

    def lengths_of(self, step):
        """Return how many tokens each sequence takes in a piece."""
        return [len(ids) for ids in step["sequences"]]

    def lay_out(self, step, piece):
        """Return {name: int64 tensor} of a piece, on the CPU: all that its forward pass needs."""
        input_ids, lengths = pad([step["sequences"][i] for i in piece])
        return {"input_ids": input_ids, "lengths": lengths}

    def inputs_of(self, step, pieces):
        """Return lay_out of each piece, on the device, to which one copy takes them all."""
        laid_out = [self.lay_out(step, piece) for piece in pieces]
        tensors = itertools.chain.from_iterable(inputs.values() for inputs in laid_out)
        on_device = iter(moved(list(tensors), self.args.device))
        return [{name: next(on_device) for name in inputs} for inputs in laid_out]

    def save_model(self, *args, **kwargs):
        """Save; what all processes must do for one that saves is done first."""
        let_go(self.model)
        collect(self.optimizer)
        super().save_model(*args, **kwargs)

    def before_training(self):
        """Do what needs the model of before the first step, on which a resumed run starts too."""

    def begin_epoch(self, epoch, steps_in):
        """Begin an epoch, from 0; steps_in: its steps that a resumed run has behind it."""
        if self.figures:  # what an epoch begins with may measure the model
            self.look_at(self.figures)
        self.train_dataset.epoch = epoch

    def warnings_about(self, after):
        """Return what the last metrics should warn a user of, in words."""
        return []

    def measure_dev_sets(self):
        """Return {"eval_<metric>": value} over all dev sets."""
        started = time.perf_counter()
        metrics = {f"eval_{name}": value for name, value in self.measure(self).items()}
        self.seconds_aside["evaluation"] += time.perf_counter() - started
        return metrics

    def evaluate(self, *args, **kwargs):
        """Measure and log; Trainer's own evaluation would average per-batch means of a loss."""
        metrics = self.measure_dev_sets()
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def get_rng_state():
    """Return the state that dropout draws from: the CPU's, and the GPU's where there is one."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), gpu


@contextmanager
def replayed(state):
    """Run a block with an earlier random state, and go on with the present one after it."""
    cpu, gpu = state
    devices = [] if gpu is None else [torch.cuda.current_device()]
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu)
        yield

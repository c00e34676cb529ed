"""What happens around the steps: progress and log lines, stops on signals, warnings in words."""

import math
import signal
import time
from contextlib import contextmanager
from statistics import fmean
from threading import current_thread, main_thread

import utils
from parts.checkpoints import CUT
from parts.curves import running_mean
from parts.lines import best_step_of, evaluation_lines
from parts.notebook import evaluation_table, has_cells, show_table
from parts.report import write_logs
from utils import InputError, say

import torch
from tqdm.auto import tqdm
from transformers import ProgressCallback

MAX_SKIPPED_STEPS = 20  # fp16: the loss scale falls from 65536 to below 1 in 17 skipped steps


class RunCallback(ProgressCallback):
    """Progress and log lines, stops on signals, the logs on disk, warnings in words.

    `signal` is the number of the one that stops the run, None while there is none.
    """

    def __init__(self, trainer, plan, output_dir, before):
        super().__init__()
        self.trainer = trainer
        self.plan = plan
        self.output_dir = output_dir
        self.before = before  # metrics of the untrained model, {} without a dev set
        self.signal = None
        self.table = None  # a notebook's handle of the evaluations that a cell shows
        self.unlogged = []  # (figures, entry of the log) of steps that were not looked at yet
        self.skipped = 0  # steps in a row whose gradients overflowed

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = self.first_step = state.global_step
        self.started = time.perf_counter()
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                dynamic_ncols=True,
                delay=0,
                disable=not utils.shows_bars(),
            )
        if state.global_step == 0 and self.before:
            self.trainer.log(dict(self.before))

    def on_epoch_begin(self, args, state, control, **kwargs):
        # from the step, since a resumed run begins within an epoch: rows show what they would have
        self.trainer.begin_epoch(*divmod(state.global_step, self.plan.steps_per_epoch))

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # now, as the step is taken with it: behind it the scheduler has moved on
        self.learning_rate = optimizer.param_groups[0]["lr"]

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        entry = {"learning_rate": self.learning_rate, "epoch": state.epoch}
        entry["step"] = state.global_step
        self.unlogged.append((self.trainer.figures, entry))
        state.stateful_callbacks[CUT] = self.trainer.settled()  # a checkpoint holds it
        self.count_skipped()
        stop = self.must_stop(args.device)
        if stop:
            args.save_total_limit = None  # at 1, Trainer would delete the checkpoint we stop with
        every = self.plan.epoch_save_steps
        ends_epochs = every > 0 and state.global_step % every == 0
        if stop or ends_epochs:
            control.should_save = True
            control.should_training_stop |= stop
            # a checkpoint without figures can be no best one; whoever stops a run waits for none
            control.should_evaluate |= self.plan.save_best and not stop
        self.look_if_due(state, control)

    def look_if_due(self, state, control):
        """Look at the step at once if something follows it; log the steps that were looked at."""
        stays = control.should_save or control.should_evaluate or control.should_training_stop
        if stays or control.should_log:
            self.trainer.look_at(self.trainer.figures)
        if stays:
            self.trainer.check_weights()
        while self.unlogged and self.unlogged[0][0].known:
            figures, entry = self.unlogged.pop(0)
            # each step's own: a log line shows means of as many as --logging_steps says, of these
            state.log_history.append(figures.known | entry)

    def count_skipped(self):
        """Count steps that the loss scaler skipped; raises InputError after too many in a row."""
        # unscaled gradients of inf or NaN: the scaler skips the step and halves its scale
        if not self.trainer.accelerator.optimizer_step_was_skipped:
            self.skipped = 0
            return
        self.skipped += 1
        if self.skipped == MAX_SKIPPED_STEPS:
            raise InputError(
                f"fp16 gradients overflowed in {self.skipped} steps running: pass "
                "--mixed_precision none."
            )

    def must_stop(self, device):
        """Tell whether a signal has come, on any process: all must stop after the same step."""
        stop = self.signal is not None
        if self.trainer.accelerator.num_processes > 1:
            signs = self.trainer.accelerator.gather(torch.tensor([stop], device=device))
            stop = signs.any().item()
        if stop and self.signal is None:
            self.signal = signal.SIGTERM  # it reached another process
        return stop

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:  # others have no bar
            return
        lines = self.lines_of(state, logs)
        if has_cells():
            self.show_in_cell(state, logs, evaluated=bool(lines))
            return
        if "loss" in logs:
            lines.append(self.training_line(state, logs))
        for line in lines:
            self.training_bar.write(line)
        print(end="", flush=True)  # whoever follows a log file waits for no full buffer

    def show_in_cell(self, state, logs, evaluated):
        """Show what was logged in a notebook: a loss beside the bar, evaluations in one table."""
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}")
        if evaluated:
            self.table = show_table(self.table, evaluation_table(state.log_history, self.plan))

    def training_line(self, state, logs):
        """Return the line of a training loss, with the time left where no bar shows it."""
        left = "" if utils.shows_bars() else self.time_left(state)
        loss = f"loss {logs['loss']:<9.4g}"
        rate = f"learning_rate {logs['learning_rate']:<9.4g}"
        return f"step {state.global_step:6}  {loss}  {rate}  {left}".rstrip()

    def lines_of(self, state, logs):
        """Return the lines of an evaluation, none where `logs` are those of training."""
        plan = self.plan
        step = state.global_step
        before = self.before if step else {}
        best_step = best_step_of(state.log_history, plan.metric, plan.greater_is_better)
        best = plan.metric if step and step == best_step else None
        return evaluation_lines(step, logs, before, plan.shown, best)

    def time_left(self, state):
        """Return how long the rest will take at this pace, as "02:31 left"; "" before a step."""
        done = state.global_step - self.first_step  # a resumed run's own alone
        if not done:
            return ""
        pace = (time.perf_counter() - self.started) / done  # seconds a step
        seconds = pace * (state.max_steps - state.global_step)
        return f"{tqdm.format_interval(seconds)} left"

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        for metric, greater_is_better in self.plan.watched:
            text = worsening(state.log_history, metric, greater_is_better)
            if text:
                say(f"warning   {text}")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_logs(self.output_dir, state.log_history, self.plan.steps_per_epoch)

    def catch(self, number, frame):
        """Handle SIGINT or SIGTERM: stop after this step; the second time at once."""
        if self.signal:  # a step, or an evaluation behind it, may take long
            raise KeyboardInterrupt
        self.signal = number
        say("\nstopping after this step, with a checkpoint; once more stops at once")


@contextmanager
def caught_signals(handler):
    """Let handler(number, frame) take SIGINT and SIGTERM; outside the main thread none can be."""
    numbers = []
    if current_thread() is main_thread():
        numbers = [signal.SIGINT, signal.SIGTERM]
    # restored behind, since a notebook's kernel goes on with them
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in earlier.items():
            signal.signal(number, old)


def worsening(log, metric, greater_is_better):
    """Return a warning if three evaluations got worse while the training loss fell, else None."""
    name = f"eval_{metric}"
    # three, as of two one may be chance; and by more than a hundredth, which is noise
    points = [(entry["step"], entry[name]) for entry in log if name in entry][-3:]
    if len(points) < 3:
        return None
    (first, before), (middle, between), (_, now) = points
    sign = 1 if greater_is_better else -1
    twice = sign * before > sign * between > sign * now
    worse = twice and sign * (before - now) > 0.01 * abs(before)
    trained = [entry for entry in log if "loss" in entry and entry["step"] >= first]
    early = [entry["loss"] for entry in trained if entry["step"] <= middle]
    late = [entry["loss"] for entry in trained if entry["step"] > middle]
    early_loss = fmean(early) if early else math.nan  # which no comparison is true of
    late_loss = fmean(late) if late else math.nan
    if not (worse and late_loss < early_loss):
        return None
    return (
        f"the loss fell from {early_loss:.3f} to {late_loss:.3f} while {metric} worsened from "
        f"{before:.4f} to {now:.4f}: overfitting. Fewer epochs, or a lower --lr."
    )


def worsenings(log, watched):
    """Return the warnings of all evaluations of a run, those before it was resumed too.

    watched: a plan's [[metric, greater is better], ...].
    """
    found = []
    for count, entry in enumerate(log, 1):
        for metric, greater_is_better in watched:
            if f"eval_{metric}" in entry:
                text = worsening(log[:count], metric, greater_is_better)
                if text:
                    found.append(text)
    return found


def last_warnings(trainer, plan, before, after):
    """Return what a user should be warned of once training is over, in words."""
    found = trainer.warnings_about(after)
    name = f"eval_{plan.metric}"
    if after:
        gained = after[name] - before[name]
        if not plan.greater_is_better:
            gained = -gained
        if gained < 0:
            found.append(
                f"{plan.metric} is worse than before training: lower --lr, and look at the data"
            )
    # smoothed, or one step of easy rows would do
    losses = running_mean([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    if not plan.has_dev and len(losses) > 1 and losses[-1] < 0.1 * losses[0]:
        found.append(
            f"the loss fell by {1 - losses[-1] / losses[0]:.0%} with no dev set to tell learning "
            "from learning by heart: pass --dev_file or --dev_size"
        )
    return found

"""What a run leaves to be read: logs, curves, page and summary; the lines it ends with."""

import dataclasses
import sys
from collections import defaultdict
from pathlib import Path

import utils
from parts.curves import draw_curves, entries_with
from parts.examples import before_and_after
from parts.lines import metric_lines, result_lines
from parts.notebook import has_cells, show_picture
from parts.page import page
from utils import say, write_json

import torch


@dataclasses.dataclass(frozen=True)
class Results:
    """What training came to."""

    before: dict  # {metric: value} before training, "eval_" in front as Trainer has it
    after: dict  # those of what final/ holds
    proof: dict  # what reading final/ back has shown
    warnings: list  # sentences
    seconds: float  # evaluations included
    resumed_after: int  # the step of the checkpoint that the run went on from, or 0


class Report(dict):
    """What main returns; at the end of a notebook's cell it shows its main figures alone."""

    def __repr__(self):
        title = "Report"
        if "flags" in self:
            title += f" of {self['flags']['output_dir']}"
        if "steps" in self:
            title += f", {self['steps']} steps"
        metrics = self.get("metrics", {})
        if "before" in metrics:  # those of training
            lines = result_lines(metrics["before"], metrics["after"], self["plan"]["shown"])
        else:
            lines = metric_lines(metrics)
        lines = [f"  {line.removeprefix('result').lstrip()}" for line in lines]
        if len(lines) > 10:
            lines[10:] = [f"  ... {len(lines) - 10} more"]
        keys = f"its keys: {', '.join(self)}; all of it: dict(report)"
        return "\n".join([title, *lines, keys])


def peak_gib():
    """Return the most memory this process has had, in GiB: of the GPU, without one resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource  # not on Windows

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return resident / unit


def write_logs(folder, log, steps_per_epoch):
    """Write every logged step, and the mean training loss of each epoch."""
    folder = Path(folder)
    losses = []
    for epoch, loss in epoch_losses(log, steps_per_epoch).items():
        losses.append({"epoch": epoch, "loss": loss})
    logged = [entry for entry in log if "train_runtime" not in entry]  # Trainer's own summary
    write_json(folder / "detailed_training_logs.json", logged)
    write_json(folder / "training_losses.json", losses)


def epoch_losses(log, steps_per_epoch):
    """Return {epoch: mean training loss of its steps}; a logged loss is the mean since the last."""
    sums = defaultdict(float)
    counts = defaultdict(int)
    last = 0
    for entry in entries_with(log, "loss"):
        epoch = (entry["step"] - 1) // steps_per_epoch + 1
        steps = entry["step"] - last
        last = entry["step"]
        sums[epoch] += entry["loss"] * steps
        counts[epoch] += steps
    return {epoch: total / counts[epoch] for epoch, total in sums.items()}


def command_of(script, argv):
    """Return the command of a run as a list of words; argv: as main has it, None: the shell's.

    Without --resume_from_checkpoint: the command is for whoever repeats the run from its start.
    """
    words = ["python", script]
    is_name = False  # of a checkpoint, behind the flag
    for word in sys.argv[1:] if argv is None else argv:
        is_name = is_name and not word.startswith("-")
        if word.partition("=")[0] == "--resume_from_checkpoint":
            is_name = word == "--resume_from_checkpoint"
        elif not is_name:
            words.append(word)
        else:
            is_name = False  # the flag has one
    return words


def write_report(trainer, output_dir, record, plan, results):
    """Write logs, curves, page and report of a finished run, say so, and return the report."""
    folder = Path(output_dir)
    log = trainer.state.log_history
    report = Report(record | summary(trainer, plan, results))
    if trainer.is_world_process_zero():
        write_logs(folder, log, plan.steps_per_epoch)
        draw_curves(folder / "training_curves.png", log, report)
        write_page(folder, report)
        # last: a run that has it is finished
        write_json(folder / "training_summary_report.json", report)
    say_results(report, plan.shown, trainer.seconds_aside, results)
    say(f"page      {folder}/report.html")
    if trainer.is_world_process_zero() and has_cells():
        show_picture(folder / "training_curves.png")
    return report


def write_page(folder, report):
    """Write report.html, at once, of what stands in a run's folder and its report."""
    pairs = []
    if report["plan"]["has_dev"]:
        step = report["best_step"] or report["steps"]  # of what final/ holds
        pairs = before_and_after(folder, step)
    curves = (folder / "training_curves.png").read_bytes()
    part = folder / "report.html.part"
    part.write_text(page(report, curves, pairs), encoding="utf-8")
    part.replace(folder / "report.html")


def summary(trainer, plan, results):
    """Return what training_summary_report.json has beside the record of the run."""
    state = trainer.state
    losses = [entry["loss"] for entry in entries_with(state.log_history, "loss")]
    seconds = results.seconds - sum(trainer.seconds_aside.values())
    real_tokens, padded_tokens = tokens_of_all_processes(trainer)
    return {
        "plan": dataclasses.asdict(plan) | {"notes": list(utils.NOTES)},
        "metrics": {"before": plainly(results.before), "after": plainly(results.after)},
        "proof": results.proof,
        "warnings": results.warnings,
        "seconds": results.seconds,
        "seconds_aside": trainer.seconds_aside,
        "resumed_after": results.resumed_after,
        "steps": state.global_step,
        "best_step": state.best_global_step if plan.save_best else None,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "tokens_per_second": real_tokens / seconds,
        "peak_gib": peak_gib(),
        "padded_per_real_token": padded_tokens / max(1, real_tokens),
    }


def plainly(metrics):
    """Return metrics without the "eval_" that Trainer puts in front of them."""
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def tokens_of_all_processes(trainer):
    """Return how many real and how many padded tokens were computed, over all processes."""
    own = [trainer.real_tokens, trainer.padded_tokens]
    return trainer.accelerator.reduce(torch.tensor(own, device=trainer.args.device)).tolist()


def say_results(report, shown, seconds_aside, results):
    """Print the metrics before and after, what the steps took, and how fast they were."""
    for line in result_lines(report["metrics"]["before"], report["metrics"]["after"], shown):
        say(line)
    steps = f"{report['steps'] - results.resumed_after} steps"
    if results.resumed_after:  # seconds and tokens are those of the steps behind it
        steps += f" after step {results.resumed_after}"
    seconds = results.seconds - sum(seconds_aside.values())
    aside = ", ".join(f"{value:.0f} s of {name}" for name, value in seconds_aside.items())
    say(
        f"          {steps} in {seconds:.0f} s and {aside}, "
        f"{report['tokens_per_second']:,.0f} tokens/s, "
        f"{report['padded_per_real_token']:.2f} padded per real token, "
        f"{report['peak_gib']:.1f} GiB"
    )


def write_evaluation(output_dir, record, metrics):
    """Print and write the metrics of --eval_only; return the report."""
    for line in metric_lines(metrics):
        say(line)
    folder = Path(output_dir)
    report = Report(record | {"metrics": metrics})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation_report.json", report)
    return report

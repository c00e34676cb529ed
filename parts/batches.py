"""Steps of one file each: which rows make which step of an epoch, by seed and epoch alone."""

import itertools
import random
from collections import defaultdict

from utils import InputError, note, say

from torch.utils.data import DataLoader


def rows_of_files(examples, processes):
    """Return {file: its rows' places}, which steps are made of apart; None where there is one.

    Raises InputError for a file whose step would leave a process without a row, or a row without
    another one.
    """
    files = defaultdict(list)
    for row, example in enumerate(examples):
        files[example.file].append(row)
    if len(files) == 1:
        note("--steps_from one_file: all rows are of one file, which is the same as all")
        return None
    needed = max(2, processes)
    shared = f" over {processes} processes" if processes > 1 else ""
    for file, rows in files.items():
        if len(rows) < needed:
            raise InputError(
                f"--steps_from one_file: {file} has {len(rows)} rows to train on, and a step"
                f"{shared} needs {needed}. Add rows to it, leave the file out, or let dev sets "
                "and --train_sample_limit leave it more."
            )
    return dict(files)


def show_files(files, size):
    """Print how many steps an epoch has of each file, and how many of its rows it leaves out."""
    for file, rows in sorted(files.items()):
        if len(rows) < size:
            say(f"steps     {file}: 1 an epoch, of its {len(rows)} rows")
            continue
        left = len(rows) % size
        left_out = f", {left} left out, drawn anew each epoch" if left else ""
        say(f"steps     {file}: {len(rows) // size} an epoch, of {len(rows)} rows{left_out}")


def mean_fullness(files, size):
    """Return how full, of `size` rows, the step is that a row stands in, on average."""
    trained = 0
    met = 0  # rows that each row meets, itself included, added up
    for rows in files.values():
        of_step = min(size, len(rows))
        in_steps = len(rows) // of_step * of_step
        trained += in_steps
        met += in_steps * of_step
    return met / trained / size


class FileSteps:
    """The steps of any epoch: `size` rows of one file, or all of a file that has fewer."""

    def __init__(self, files, size, seed):
        """files: {file: its rows' places}."""
        self.groups = list(files.values())
        self.size = size
        self.seed = seed

    def of_epoch(self, epoch):
        """Return the steps of an epoch, each a list of rows, in the order they are taken.

        The rows of a file that do not fill its last step are others each epoch.
        """
        rng = random.Random(f"{self.seed} {epoch} steps")
        steps = []
        for group in self.groups:
            rows = rng.sample(group, len(group))
            size = min(self.size, len(rows))
            whole = len(rows) // size * size
            steps += [rows[start : start + size] for start in range(0, whole, size)]
        # one shuffle over the steps of all files: each is drawn in proportion to its rows
        rng.shuffle(steps)
        return steps

    def steps_of(self, group):
        """Return how many steps an epoch has of a group of rows."""
        return max(1, len(group) // self.size)


class FileBatches:
    """The batches of an epoch's FileSteps: `processes` in a row are the shares of one step.

    accelerate gives batch i to process i mod `processes`. The epoch is the training set's, which a
    resumed run has set before it skips batches; of several processes it would tell no sampler.
    """

    drop_last = True  # or accelerate would look for a last step to fill up: all of them are whole

    def __init__(self, steps, train_set, processes):
        self.steps = steps
        self.train_set = train_set
        self.processes = processes

    def __len__(self):
        return self.processes * sum(map(self.steps.steps_of, self.steps.groups))

    def __iter__(self):
        for step in self.steps.of_epoch(self.train_set.epoch):
            yield from shared_out(step, self.processes)


def shared_out(rows, processes):
    """Return the rows of each process, whose numbers differ by one at most."""
    ends = [len(rows) * i // processes for i in range(processes + 1)]
    return [rows[start:end] for start, end in itertools.pairwise(ends)]


def loader_of(steps, trainer):
    """Return Trainer's loader of training rows, of this process' shares of FileSteps."""
    loader = DataLoader(
        trainer.train_dataset,
        batch_sampler=FileBatches(steps, trainer.train_dataset, trainer.accelerator.num_processes),
        collate_fn=trainer.data_collator,
        num_workers=trainer.args.dataloader_num_workers,
        pin_memory=trainer.args.dataloader_pin_memory,
    )
    return trainer.accelerator.prepare(loader)

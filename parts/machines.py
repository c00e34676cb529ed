"""Several machines: what they were started by, and whether they share the disk of a run."""

import contextlib
import os
import secrets
import socket
import time
from pathlib import Path

from utils import InputError, agreed

from accelerate.utils import gather_object

PATIENCE = 60.0  # seconds until a file that one machine writes has to be seen on the others


def refuse_unshared(folder, state, patience=PATIENCE):
    """Raise InputError if what this run's first process writes is not there on another machine.

    folder: --output_dir; state: accelerate's. The first process alone raises, and the others end
    with exit code 1.
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:  # machines, as torchrun counts them
        return
    word = agreed(secrets.token_hex(8))
    path = Path(folder) / f"is-shared-{word}"
    made = []
    if state.is_main_process:
        made = write_word(path, word)
    sees = not state.is_local_main_process or has_word(path, word, patience)
    blind = gather_object([] if sees else [socket.gethostname()])
    if state.is_main_process:
        path.unlink()
        for parent in made:
            parent.rmdir()
    if not blind:
        return
    if not state.is_main_process:
        raise SystemExit(1)
    raise InputError(
        f"--output_dir {folder} is not on a disk that all machines share: {', '.join(blind)} did "
        f"not see within {patience:g} s what {socket.gethostname()} wrote. Name a folder on one, "
        "by its absolute path."
    )


def write_word(path, word):
    """Write a file and the folders that it needs; return these folders, the deepest first."""
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(word)
    return made


def has_word(path, word, patience):
    """Wait until a file holds a word, for so many seconds; tell whether it does."""
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # or a network's disk would go on saying what it said before
            if path.read_text() == word:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)

"""Three rows of a dev set as the model answers them, kept at each evaluation for report.html.

An example is {"asked": text, "expected": [texts], "note": text, "found": [{"text", "note",
"is_right"}]}; is_right is None where a glance must tell.
"""

import random
from pathlib import Path

from utils import read_json, write_json

FILE = "training_examples.json"  # {step: [examples]}, 0 the untrained model's
COUNT = 3
LONGEST = 600  # characters of a text that are kept


def draw(rows, seed):
    """Draw COUNT rows of a list, or all of fewer."""
    # a generator of its own: what else is drawn stays as it is
    return random.Random(seed).sample(rows, min(COUNT, len(rows)))


def shortened(text):
    """Return the beginning of a long text, in characters that a file can hold."""
    text = text.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair: no file can
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def showing(measure, look, folder):
    """Return measure(trainer) that also keeps look(trainer), the examples, in `folder`.

    look is called on the first process alone, right behind measure.
    """

    def measure_and_keep(trainer):
        metrics = measure(trainer)
        if trainer.is_world_process_zero():
            keep(folder, trainer.state.global_step, look(trainer))
        return metrics

    return measure_and_keep


def keep(folder, step, examples):
    """Write what a step's evaluation shows beside what those before it have shown."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # nothing stands before step 0 but what an earlier start has left
    kept = {} if step == 0 else stored(folder)
    write_json(folder / FILE, kept | {str(step): examples})


def stored(folder):
    """Return {step: examples} of a folder, {} where it has none."""
    found = read_json(folder / FILE)
    return found if isinstance(found, dict) else {}


def carry_over(prepared):
    """Copy what a resumed run has kept, if it goes on in another folder."""
    if prepared.checkpoint and prepared.trainer.is_world_process_zero():
        kept = stored(prepared.checkpoint.parent)
        if kept:
            write_json(prepared.output_dir / FILE, kept)


def before_and_after(folder, step):
    """Return [(example of the untrained model, the same of a step)]."""
    kept = stored(folder)
    # either is missing of a run that an older version has begun
    return list(zip(kept.get("0", []), kept.get(str(step), []), strict=False))

"""Evaluation of dev sets: their loss, and rows to which answers are generated, scored and kept."""

import json
import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from parts.examples import COUNT, shortened
from parts.masks import turn
from parts.messages import Drop
from parts.plan import named
from parts.scores import answer_of, generation_metrics
from utils import InputError


@dataclass
class DevSet:
    """Samples for the loss, and rows to generate on: (prompt ids, or None of a server, Example)."""

    samples: list
    generated: list


def measure(dev_sets, score, answer, written):
    """Return {metric: value} over all dev sets, their names in front.

    score(samples): {metric: value}, or None where answers alone can be scored; answer(name,
    prompts, examples): [(text, whether it stopped)]; written(name, examples, answers) keeps them.
    """
    metrics = {}
    for name, dev in dev_sets.items():
        found = score(dev.samples) if score else {}
        if dev.generated:
            prompts = [prompt for prompt, _ in dev.generated]
            examples = [example for _, example in dev.generated]
            answers = answer(name, prompts, examples)
            written(name, examples, answers)
            found |= answer_metrics(examples, answers)
        for key, value in found.items():
            metrics[named(name, key)] = value
    return metrics


def answer_metrics(examples, answers):
    """Return generation_metrics of answers, (text, whether it stopped), to Examples."""
    references = [example.answer for example in examples]
    predictions = [answer_of(text) for text, _ in answers]
    return generation_metrics(references, predictions, [stopped for _, stopped in answers])


def measure_trainer(dev_sets, folder, trainer):
    """Return what measure finds with the model of a CausalTrainer, which the trainer calls for.

    Answers are written to predictions-<dev set>-<step>.jsonl in `folder`, if there is one.
    """

    def answer(name, prompts, examples):
        return trainer.generate(prompts)

    def written(name, examples, answers):
        # all processes have all answers, and share the folder
        if folder and trainer.is_world_process_zero():
            label = label_of(name, trainer.state.global_step)
            write_predictions(folder, label, examples, answers)

    return measure(dev_sets, trainer.score, answer, written)


def label_of(dev_name, step):
    """Return what the predictions file of a dev set is called after a step."""
    return f"{dev_name or 'dev'}-{step}"


def draw_rows(name, examples, count, seed):
    """Draw at most `count` Examples of a dev set whose last answer can be compared with another."""
    rows = []
    for example in examples:
        is_weighted = "weight" in example.messages[example.last]  # 0: not to be learnt, either
        if example.answer and not is_weighted:  # an answer that is a call alone has no words
            rows.append(example)
    # a generator of its own: the same rows whatever was drawn before, and in a server's evaluation
    return random.Random(f"{seed} {name}").sample(rows, min(count, len(rows)))


def choose_generated(name, examples, chat, *, count, seed, max_length, longest_answer=None):
    """Choose the rows of a dev set that a model answers: [(prompt ids, Example)].

    Prompts that leave no room in max_length are left out, and so are, with longest_answer, rows
    whose own answer has more tokens.
    """
    chosen = []
    for example in draw_rows(name, examples, count, seed):
        try:
            # the answer with its prompt, as preparing may fold the system turn into the first
            messages = chat.prepare(example.messages[: example.last + 1])
            prompt, answer = turn(chat, messages, len(messages) - 1, example.tools)
        except Drop:
            continue  # counted where the dev set was tokenised
        is_short = longest_answer is None or len(answer) <= longest_answer
        if len(prompt) < max_length and is_short:
            chosen.append((prompt, example))
    return chosen


def choose_asked(name, examples, *, count, seed):
    """Choose the rows of a dev set that a server answers: [(None, Example)]."""
    rows = draw_rows(name, examples, count, seed)
    if not rows:
        raise InputError(f"dev set {name or 'dev'}: no row has an answer in words to compare with.")
    return [(None, example) for example in rows]


def predictions_file(folder, name):
    """Return the path of predictions-<name>.jsonl, its folder made."""
    path = Path(folder) / f"predictions-{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def prediction_line(example, text, stopped):
    """Return a line of JSON: what was asked, what was expected, what came."""
    line = {
        "messages": example.messages[: example.last],
        "reference": example.answer,
        "prediction": answer_of(text),
        "stopped": stopped,
        "where": example.where,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


def write_predictions(folder, name, examples, answers):
    """Write predictions-<name>.jsonl in the order of the rows.

    At once, so that a reader finds all lines or those that were there before.
    """
    path = predictions_file(folder, name)
    part = Path(f"{path}.part")
    lines = []
    for example, (text, stopped) in zip(examples, answers, strict=True):
        lines.append(prediction_line(example, text, stopped))
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)


def first_answers(folder, dev_name, trainer):
    """Return the first predictions of a step that are written, as parts/examples.py keeps them.

    They are random ones: the rows were drawn.
    """
    path = predictions_file(folder, label_of(dev_name, trainer.state.global_step))
    shown = []
    with path.open(encoding="utf-8") as file:
        for text in islice(file, COUNT):
            line = json.loads(text)
            answer = {"text": shortened(line["prediction"]), "note": "", "is_right": None}
            if not line["stopped"]:
                answer["note"] = "cut at --max_new_tokens"
            example = {"asked": shortened(str(line["messages"][-1]["content"])), "note": ""}
            example["expected"] = [shortened(line["reference"])]
            shown.append(example | {"found": [answer]})
    return shown

"""Scores of generated answers: exact match, stop rate, what an extraction in JSON gets right."""

import json
from collections import Counter
from statistics import fmean as mean

LOWER_IS_BETTER = ("loss", "false_positive_rate", "empty_rate")  # of all others more is better
WATCHED = {"loss": False, "recall": True}  # warned about as they worsen; whether greater is better
# of the log lines, the curves and the report, beside the metric that a run is chosen by
SHOWN = (
    "loss",
    "f1",
    "recall",
    "false_positive_rate",
    "json_valid",
    "margin",
    "accuracy",
    "length_accuracy",
)


def shown_of(measured):
    """Return those of the metrics measured on a dev set that are shown."""
    shown = SHOWN
    if "f1" not in measured:
        shown = (*shown, "exact_match")  # says something new where answers are no JSON alone
    return [name for name in measured if name in shown]


def answer_of(text):
    """Return what follows the thinking in a generated or written answer."""
    return text.rpartition("</think>")[2].strip()


def parse_answer(text):
    """Return the object or list that an answer is in JSON, else None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # a model that repeats "[" a thousand times
        return None
    return value if isinstance(value, dict | list) else None


def leaves(value, path=""):
    """Yield (path, scalar) of a JSON value.

    List indices are left out of the path; null and "" are no leaves.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, path)
    elif value not in (None, ""):
        yield path, value


def is_empty(value):
    """Tell whether a JSON value has no truthy leaf; None, an answer that is no JSON, has none."""
    return not any(scalar for _, scalar in leaves(value))


def generation_metrics(references, predictions, stopped):
    """Score generated answers: stop_rate, exact_match and, where references are JSON, extraction.

    json_valid; false_positive_rate (the reference is empty, the prediction not, or no JSON);
    empty_rate (the reference is not empty, the prediction is, or no JSON); micro precision, recall
    and f1 over (path, value) leaves as multisets, also by path.
    """
    exact, pairs = [], []
    for reference, text in zip(references, predictions, strict=True):
        exact.append(reference == text)
        gold = parse_answer(reference)
        if gold is not None:
            pairs.append((gold, parse_answer(text)))
    found = {"stop_rate": mean(stopped), "exact_match": mean(exact)}
    if not pairs:  # no extraction: to have no JSON is right
        return found
    return found | emptiness(pairs) | leaf_scores(pairs)


def emptiness(pairs):
    """Score (reference, prediction) pairs of JSON by whether anything is there where it should."""
    valid, on_empty, on_full = [], [], []
    for gold, predicted in pairs:
        is_json = predicted is not None
        valid.append(is_json)
        if is_empty(gold):
            on_empty.append(not is_json or not is_empty(predicted))  # does not say: nothing there
        else:
            on_full.append(is_empty(predicted))
    found = {"json_valid": mean(valid)}
    if on_empty:
        found["false_positive_rate"] = mean(on_empty)
    if on_full:
        found["empty_rate"] = mean(on_full)
    return found


def leaf_scores(pairs):
    """Return precision, recall and f1 over the leaves of all pairs, then of each path by itself."""
    hits, claims, golds = Counter(), Counter(), Counter()  # leaves by path
    for gold, predicted in pairs:
        wanted = count_leaves(gold)
        claimed = count_leaves(predicted)
        golds.update(by_path(wanted))
        claims.update(by_path(claimed))
        hits.update(by_path(wanted & claimed))
    if not golds:  # every reference is empty: nothing could be recalled
        return {}
    found = figures("", hits.total(), claims.total(), golds.total())
    for path in sorted(golds):  # claims of other paths count above alone
        found |= figures(f".{path}", hits[path], claims[path], golds[path])
    return found


def count_leaves(value):
    """Return how often each (path, scalar) is a leaf of a JSON value."""
    # JSON text as the value: true is not 1, and 1 is not "1"
    return Counter((path, json.dumps(scalar)) for path, scalar in leaves(value))


def by_path(counted):
    """Return how many leaves each path has, of what count_leaves found."""
    totals = Counter()
    for (path, _), count in counted.items():
        totals[path] += count
    return totals


def figures(suffix, hits, claimed, gold):
    """Return precision, recall and f1 of `hits` right leaves of `claimed`, where `gold` are."""
    return {
        f"precision{suffix}": hits / max(1, claimed),
        f"recall{suffix}": hits / gold,
        f"f1{suffix}": 2 * hits / (claimed + gold),
    }


def metric_names(references):
    """Return the names that generation_metrics gives for such references, in its order."""
    if not references:
        return []
    names = ["stop_rate", "exact_match"]
    golds = [gold for gold in map(parse_answer, references) if gold is not None]
    if not golds:
        return names
    names.append("json_valid")
    empty = [is_empty(gold) for gold in golds]
    if any(empty):
        names.append("false_positive_rate")
    if not all(empty):
        names.append("empty_rate")
    paths = {path for gold in golds for path, _ in leaves(gold)}
    suffixes = ["", *(f".{path}" for path in sorted(paths))] if paths else []
    for suffix in suffixes:
        names.extend(figures(suffix, 0, 0, 1))
    return names

"""Metrics in columns: the lines of an evaluation, and those that a run ends with.

`shown` is {metric as the logs name it: its dev set}, the metric that best is measured by first.
"""

import math
import unicodedata

WIDEST = 120  # columns of a line; fixed, so that a terminal and a file show the same
NUMBER = 7  # columns of a number: 0.5429, 12.3457, -0.1234


def display_width(text):
    """Return how many columns a terminal gives a text: two to a wide letter, none to an accent."""
    width = 0
    # in one piece, as a terminal shows it: files of macOS have letters in parts
    for letter in unicodedata.normalize("NFC", text):
        if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
            continue
        width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
    return width


def padded(text, width):
    """Return a text with spaces behind it, up to so many columns."""
    return text + " " * (width - display_width(text))


def number(value, sign=""):
    """Return a number in NUMBER columns, with as many of four decimals as there is room for."""
    for decimals in (4, 3, 2, 1, 0):
        text = f"{value:{sign}.{decimals}f}"
        if len(text) <= NUMBER:
            break
    return text.rjust(NUMBER)


def bare(name, dev):
    """Return a metric's name without that of its dev set in front."""
    return name.removeprefix(f"{dev}_") if dev else name


def label_of(name):
    """Return a metric's name as the log lines show it."""
    return "dev_loss" if name == "loss" else name  # beside the training loss


def table_of(shown):
    """Return {dev set: [name of a metric, None where it is not shown of this set]}, in columns."""
    columns = list(dict.fromkeys(bare(name, dev) for name, dev in shown.items()))
    table = {}
    for name, dev in shown.items():
        row = table.setdefault(dev, [None] * len(columns))
        row[columns.index(bare(name, dev))] = name
    return table


def label_widths(rows):
    """Return the widths of the labels of each column of a line, as many as fit side by side.

    rows: lists of labels, of one length. What does not fit into a line goes on in the next.
    """
    room = WIDEST - len("step 123456  ") + len("   ")  # no spaces behind the last cell
    figures = 2 * NUMBER + len("     ")  # a value and its change, and the spaces around them
    for count in range(len(rows[0]), 0, -1):
        widths = []
        for place in range(count):
            labels = [label for row in rows for label in row[place::count]]
            widths.append(max(map(display_width, labels)))
        if sum(widths) + figures * count <= room:
            break
    return widths


def evaluation_lines(step, metrics, before, shown, best=None):
    """Return the lines of an evaluation: those of a dev set stand together.

    metrics, before: as Trainer has them, "eval_" in front; before: the untrained model's, {} while
    that is what was measured. best: the metric that was never better, if it is so.
    """
    table = {}
    for dev, names in table_of(shown).items():
        if any(f"eval_{name}" in metrics for name in names):
            table[dev] = names
    if not table:
        return []
    widths = label_widths([[label_of(name or "") for name in row] for row in table.values()])
    lines = []
    for names in table.values():
        for start in range(0, len(names), len(widths)):
            cells = []
            for name, width in zip(names[start:], widths, strict=False):
                cells.append(cell_of(name, metrics, before, width))
            line = f"step {step:6}  {'   '.join(cells)}".rstrip()
            is_best = best in names[start : start + len(widths)]
            lines.append(f"{line}  best so far" if best and is_best else line)
    return lines


def cell_of(name, metrics, before, width):
    """Return a metric as it stands in a line; blank if it was not measured."""
    key = f"eval_{name}"
    empty = " " * (NUMBER + 1)
    if key not in metrics:
        return " " * width + empty + empty
    change = f" {number(metrics[key] - before[key], '+')}" if key in before else empty
    return f"{padded(label_of(name), width)} {number(metrics[key])}{change}"


def result_lines(before, after, shown):
    """Return what became of the shown metrics; before, after: {name: value}."""
    rows = []
    for name in shown:
        if name in before and name in after:
            change = after[name] - before[name]
            rows.append((name, f"{before[name]:.4f}", f"{after[name]:.4f}", f"{change:+.4f}"))
    if not rows:
        return []
    widths = [max(map(display_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, was, now, change in rows:
        was = was.rjust(widths[1])
        now = now.rjust(widths[2])
        change = change.rjust(widths[3])
        lines.append(f"result    {padded(name, widths[0])} {was} before, {now} after, {change}")
    return lines


def metric_lines(metrics):
    """Return what was measured, {name: value}, without training."""
    width = max(map(display_width, metrics), default=0)
    return [f"result    {padded(name, width)} {number(value)}" for name, value in metrics.items()]


def best_step_of(log, metric, greater_is_better):
    """Return the step of the best evaluation in a log, of equals the first; None without one.

    It is the state that Trainer would keep: never the untrained model's.
    """
    best = None
    best_step = None
    for entry in log:
        value = entry.get(f"eval_{metric}")
        if value is None or math.isnan(value) or entry["step"] == 0:
            continue
        is_first = best is None
        if is_first or (value > best if greater_is_better else value < best):
            best = value
            best_step = entry["step"]
    return best_step

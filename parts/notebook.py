"""What the cell of a notebook shows of a run beside its lines: evaluations as a table, the curves.

A terminal and a log file get lines instead: parts/lines.py.
"""

import sys
from html import escape
from statistics import fmean

from parts.lines import bare, best_step_of, label_of, table_of

STYLE = "text-align: right; padding: 2px 10px"


def has_cells():
    """Tell whether this process is a notebook's kernel, whose cells show tables and pictures."""
    from transformers.utils import is_in_notebook

    # marimo counts as a notebook there, and has neither a shell nor, perhaps, IPython
    if "IPython" not in sys.modules or not is_in_notebook():
        return False
    return sys.modules["IPython"].get_ipython() is not None


def show_table(handle, text):
    """Show HTML in the cell, in place of what `handle` stands for if not None; return the handle.

    It can be exchanged from then on, also if another cell runs.
    """
    from IPython.display import HTML, display

    if handle is None:
        return display(HTML(text), display_id=True)
    handle.update(HTML(text))
    return handle


def show_picture(path):
    """Show a PNG file in the cell."""
    from IPython.display import Image, display

    display(Image(str(path), width=800))  # the bytes stand in the notebook, whatever becomes of it


def evaluations(log, shown):
    """Return [(step, mean training loss since the one before or None, {metric: value})] of a log.

    shown: {metric: its dev set}; others are left out.
    """
    found = []
    losses = []
    for entry in log:
        if "loss" in entry:
            losses.append(entry["loss"])
        metrics = {name: entry[f"eval_{name}"] for name in shown if f"eval_{name}" in entry}
        if metrics:
            found.append((entry["step"], fmean(losses) if losses else None, metrics))
            losses = []
    return found


def evaluation_table(log, plan):
    """Return HTML with a row for every dev set of every evaluation in a log, "" without one.

    A metric stands there with its change since before the training, and the best one is marked.
    plan: a Plan, of which shown, metric and greater_is_better are read.
    """
    measured = evaluations(log, plan.shown)
    if not measured:
        return ""
    best_step = best_step_of(log, plan.metric, plan.greater_is_better)
    first_step, _, before = measured[0]
    if first_step > 0:  # no evaluation of the untrained model
        before = {}
    columns = table_of(plan.shown)
    heads = ["step", "loss"]
    if len(columns) > 1:
        heads.append("dev set")
    for names in zip(*columns.values(), strict=True):
        name = next(name for name in names if name)
        heads.append(label_of(bare(name, plan.shown[name])))
    rows = [row_of(heads, "th")]
    for step, loss, metrics in measured:
        for dev, names in columns.items():
            if not metrics.keys() & set(names):  # not measured this time
                continue
            cells = [f"{step:,}", "" if loss is None else f"{loss:.4g}"]
            if len(columns) > 1:
                cells.append(dev)
            for name in names:
                mark = " ★" if step == best_step and name == plan.metric else ""
                cells.append(value_of(name, metrics, before if step else {}) + mark)
            rows.append(row_of(cells, "td"))
    return f"<table>{''.join(rows)}</table>"


def value_of(name, metrics, before):
    """Return a metric and its change as text; "" if it was not measured."""
    if name not in metrics:
        return ""
    value = f"{metrics[name]:.4f}"
    return f"{value} ({metrics[name] - before[name]:+.4f})" if name in before else value


def row_of(cells, tag):
    """Return a row of a table; tag: "th" in its head, "td" below."""
    shown = [f'<{tag} style="{STYLE}">{escape(cell)}</{tag}>' for cell in cells]
    return f"<tr>{''.join(shown)}</tr>"

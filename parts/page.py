"""The page of a run: figures in, the text of report.html out, one file that loads nothing."""

import base64
import html
import re
import shlex

from parts.lines import bare
from parts.scores import LOWER_IS_BETTER

STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; line-height: 1.5; font-family: system-ui,
  "Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "Noto Sans CJK SC", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: 1.05rem; } h4 { margin-bottom: .3rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #8886; font-weight: normal; }
th { overflow-wrap: break-word; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.wide img { width: 100%; min-width: 40rem; max-width: 60rem; }
.sides { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit,
  minmax(min(18rem, 100%), 1fr)); }
.text { white-space: pre-wrap; }
.note { font-size: .85rem; opacity: .75; }
p.note { margin: .3rem 0; }
ol { margin: .3rem 0; padding-left: 1.8rem; }
ol li { padding: .2rem .4rem; } li.right { background: #2a52; }
section.example { border-left: 3px solid #8886; padding-left: 1rem; margin: 2rem 0; }
pre { white-space: pre-wrap; padding: .6rem; background: #8882; }
pre span { display: inline-block; }
details { margin: .3rem 0; }
@media (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); } }
@media (max-width: 40rem) { th, td { padding-right: .6rem; } }
@media print {
  body { max-width: none; } .wide { overflow: visible; } .wide img { min-width: 0; }
  h2, h3, h4, h2 + p { break-after: avoid; } tr, li, img, pre { break-inside: avoid; }
}
"""
# should a text ever get past the escaping, the browser still loads nothing and runs nothing
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# of the metrics that a run shows
MEANINGS = {
    "ndcg@10": "how far up the right documents stand in the first ten found; 1: above all others",
    "recall@10": "share of a query's right documents that are in the first ten found",
    "loss": "what the training lowers, of the dev set",
    "exact_match": "share of the answers that equal the expected one",
    "json_valid": "share of the answers that are JSON",
    "f1": "precision and recall of the values in the answers' JSON, in one number",
    "recall": "share of the expected values that are in the answers' JSON",
    "false_positive_rate": "share of the rows with nothing to extract where something was",
    "accuracy": "share of the pairs whose chosen answer has gained more than the rejected one",
    "margin": "how much more the chosen answers have gained than the rejected ones",
    "length_accuracy": "what always taking the longer, or the shorter, answer would score",
}
# line breaks and tabs aside; half of a surrogate pair can stand in no file
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


# ---------------------------------------------------------------- markup


class Html(str):
    """Markup that was written here; every other text is escaped."""


def joined(parts):
    """Return parts behind one another: Html as it is, all else as text."""
    written = []
    for part in parts:
        if not isinstance(part, Html):
            part = html.escape(UNPRINTABLE.sub("\ufffd", str(part)))
        written.append(part)
    return Html("".join(written))


def element(name, *content, **attributes):
    """Return an element around its content; class_ is the attribute class."""
    opening = name
    for key, value in attributes.items():
        opening += f' {key.rstrip("_")}="{joined([value])}"'
    return Html(f"<{opening}>{joined(content)}</{name}>")


def foreign(text):
    """Return a text of the data's: of no language that we know, and in its own direction."""
    return element("div", text, class_="text", lang="", dir="auto")


def as_list(sentences):
    """Return a list of sentences."""
    return element("ul", *[element("li", text) for text in sentences])


def table(rows, kind="word"):
    """Return a table of [(name, value)]; kind: "number" where all values are numbers."""
    written = []
    for name, value in rows:
        cell = element("td", value, class_=kind)
        written.append(element("tr", element("th", name, scope="row"), cell))
    return element("div", element("table", *written), class_="wide")


def folded(title, content):
    """Return what is shown once its title is pressed, without JavaScript."""
    return element("details", element("summary", title), content)


def section(title, *content):
    """Return a section under a heading, nothing without content."""
    if not any(content):
        return Html()
    return element("section", element("h2", title), *content)


# ---------------------------------------------------------------- figures


def in_words(value):
    """Return a value as it reads in a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(in_words, value)) or "–"
    return str(value)


def in_time(seconds):
    """Return how long something took, as "1 h 2 min 3 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    words = []
    for count, unit in ((hours, "h"), (minutes, "min"), (seconds, "s")):
        if count:
            words.append(f"{count} {unit}")
    return " ".join(words) or "0 s"


def rows_of(values, before=""):
    """Return [(name, value)] of a dict, those of the dicts in it behind their names."""
    rows = []
    for name, value in values.items():
        name = f"{before}{name}"
        if isinstance(value, dict):
            rows += rows_of(value, f"{name}: ")
        else:
            rows.append((name, in_words(value)))
    return rows


def metrics_table(before, after, names):
    """Return a table of metrics before and after training, and what changed."""
    titles = [element("th", "metric", scope="col")]
    for title in ("before", "after", "change"):
        titles.append(element("th", title, scope="col", class_="number"))
    rows = [element("tr", *titles)]
    for name in names:
        cells = [element("th", name, scope="row")]
        change = after[name] - before[name]
        for text in (f"{before[name]:.4f}", f"{after[name]:.4f}", f"{change:+.4f}"):
            cells.append(element("td", text, class_="number"))
        rows.append(element("tr", *cells))
    return element("div", element("table", *rows), class_="wide")


def meanings(shown):
    """Return what the shown metrics mean, {name: its dev set}, and where less is better."""
    sentences = {}
    for name, dev in shown.items():
        metric = bare(name, dev)
        if metric in MEANINGS:
            less = "; lower is better" if metric in LOWER_IS_BETTER else ""
            sentences[metric] = f"{metric}: {MEANINGS[metric]}{less}"
    return element("div", as_list(sentences.values()), class_="note") if sentences else Html()


def metrics_section(report):
    """Return the metrics before and after: those that the run showed, the others folded away."""
    before = report["metrics"]["before"]
    after = report["metrics"]["after"]
    shown = report["plan"]["shown"]
    both = [name for name in after if name in before]
    first = [name for name in shown if name in both]
    others = [name for name in both if name not in first]
    if not both:
        return Html()
    of = "the rows that were trained on" if report["flags"].get("sanity_overfit") else "dev sets"
    content = [element("p", f"Measured on {of}; “after” is of what final/ holds.")]
    if first:
        content.append(metrics_table(before, after, first))
        content.append(meanings({name: shown[name] for name in first}))
    if others:
        content.append(folded("all other metrics", metrics_table(before, after, others)))
    return section("Before and after", *content)


def curves_section(curves):
    """Return the curves (bytes of a PNG)."""
    data = base64.b64encode(curves).decode("ascii")
    label = "training loss and metrics of the dev sets over the optimizer steps"
    image = Html(f'<img alt="{label}" src="data:image/png;base64,{data}">')
    # the losses of two single steps, first and last, would say nothing: steps differ by more
    said = "Pale: the training loss as it was logged, which jumps from step to step. "
    said += "Dark: its running mean."
    note = element("p", said, class_="note")
    return section("Curves", element("div", image, class_="wide"), note)


# ---------------------------------------------------------------- examples


def found_by(found):
    """Return (class, content) of one document that was found, or of one answer."""
    said = found["note"]
    if found["is_right"]:
        said = f"✓ right, {said}" if said else "✓ right"
    note = element("div", said, class_="note") if said else Html()
    text = foreign(found["text"])
    if not found["text"].strip():
        text = element("div", "(nothing)", class_="note")
    return "right" if found["is_right"] else "other", Html(text + note)


def side_of(title, example):
    """Return what a model found, or answered, under a title."""
    note = element("p", example["note"], class_="note") if example["note"] else Html()
    shown = [found_by(found) for found in example["found"]]
    if len(shown) == 1:  # an answer has no place
        return element("div", element("h4", title), note, shown[0][1])
    items = [element("li", content, class_=kind) for kind, content in shown]
    return element("div", element("h4", title), note, element("ol", *items))


def example_section(before, after, title):
    """Return one row of a dev set with what was found before training and after it."""
    expected = [foreign(text) for text in before["expected"]]
    sides = [side_of("before training", before), side_of(title, after)]
    return element(
        "section",
        element("h3", before["asked"], class_="text", lang="", dir="auto"),
        element("p", "expected:", class_="note"),
        *expected,
        element("div", *sides, class_="sides"),
        class_="example",
    )


def examples_section(pairs, step):
    """Return the examples, [(before, after)]; nothing without one."""
    if not pairs:
        return Html()
    said = "Rows of a dev set, drawn at random, and how each is answered."
    if any(found["is_right"] is not None for found in pairs[0][0]["found"]):
        said = "Queries of a dev set, drawn at random, and the documents that each finds first."
    shown = [element("p", said)]
    for before, after in pairs:
        shown.append(example_section(before, after, f"after step {step}"))
    return section("Examples", *shown)


# ---------------------------------------------------------------- the page


def introduction(report):
    """Return what was trained, on what and for how long, and which state final/ holds."""
    trained = (
        f"{report['command'][1]} trained {report['flags']['model_name']} with "
        f"{report['data']['train_rows']:,} rows: {report['steps']:,} steps on "
        f"{report['device']}, {in_time(report['seconds'])} with evaluations."
    )
    if report["resumed_after"]:
        trained += f" Resumed after step {report['resumed_after']:,}; the time is since then."
    kept = "final/ holds the last state"
    if report["best_step"]:
        step = f"{report['best_step']:,}"
        kept = f"final/ holds the state after step {step}, the best by {report['plan']['metric']}"
    kept += "; its README.md says how to load it."
    if not report["plan"]["has_dev"]:
        kept += " No dev set was measured."
    return Html(element("p", trained) + element("p", kept))


def proof_section(proof):
    """Return what reading final/ back has shown."""
    sentence = (
        "final/ was read back from disk and gives the trained outputs (relative error "
        f"{proof['relative_error']:.0e}); training has changed these outputs by "
        f"{proof['relative_change']:.1%}."
    )
    return section("Proof", element("p", sentence))


def command_section(report):
    """Return the command, no flag of which is torn at the end of a line."""
    words = []  # lists of a flag and its values
    for word in report["command"]:
        if word.startswith("--") or not words:
            words.append([])
        words[-1].append(word)
    parts = []
    for flag in words:
        parts += [element("span", shlex.join(flag)), " "]
    command = element("pre", element("code", *parts[:-1]))
    hint = "With another --output_dir, or --overwrite, the same run again:"
    return section("Repeat it", element("p", hint), command)


def data_section(data):
    """Return how many rows there were."""
    counts = rows_of({name: value for name, value in data.items() if name != "dev"})
    return section("Data", table(counts + rows_of(data["dev"], "dev set "), "number"))


def run_section(report):
    """Return what the run took, and what it ran on."""
    names = ["steps", "best_step", "seconds", "seconds_aside"]
    names += ["tokens_per_second", "padded_per_real_token", "peak_gib", "device", "processes"]
    values = {name: report[name] for name in names}
    values["mixed_precision"] = report["precision"]
    values["resumed_after"] = report["resumed_after"] or None
    for name in ("data_fingerprint", "base_fingerprint"):
        values[name] = report[name]
    return section("Run", table(rows_of(values)))


def settings_section(report):
    """Return the plan, without what stands elsewhere on the page, and all flags: folded away."""
    elsewhere = ("notes", "watched", "shown")
    plan = {name: value for name, value in report["plan"].items() if name not in elsewhere}
    return section(
        "All settings",
        folded("plan", table(rows_of(plan))),
        folded("all flags", table(rows_of(report["flags"]))),
        folded("what the run made of them", table(rows_of(report["settled"]))),
    )


def page(report, curves, pairs):
    """Return the text of report.html.

    report: what training_summary_report.json holds; curves: bytes of a PNG; pairs: examples
    before and after, as parts/examples.py has them.
    """
    notes = report["plan"]["notes"]
    title = f"Report of {report['flags']['output_dir']}"
    body = element(
        "body",
        element("h1", title),
        introduction(report),
        metrics_section(report),
        section("Warnings", as_list(report["warnings"]) if report["warnings"] else Html()),
        curves_section(curves),
        examples_section(pairs, report["best_step"] or report["steps"]),
        proof_section(report["proof"]),
        command_section(report),
        section("Notes", as_list(notes) if notes else Html()),
        data_section(report["data"]),
        run_section(report),
        section("Versions", table(rows_of(report["versions"]))),
        settings_section(report),
    )
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(STYLE)),
    ]
    return f"<!DOCTYPE html>\n{element('html', element('head', *head), body, lang='en')}\n"

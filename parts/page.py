"""The page of a run: figures in, the text of report.html out, one file that loads nothing."""

import base64
import html
import re
import shlex

STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; line-height: 1.5; font-family: system-ui,
  "Noto Sans CJK JP", "Hiragino Sans", "Yu Gothic", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h1, td, p, li, summary { overflow-wrap: anywhere; }
table { border-collapse: collapse; }
th, td { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid #8886; font-weight: normal; }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
.wide img { width: 100%; min-width: 40rem; max-width: 60rem; }
.sides { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fit,
  minmax(min(18rem, 100%), 1fr)); }
.text { white-space: pre-wrap; }
.note { font-size: .85rem; opacity: .75; }
section.example { border-left: 3px solid #8886; padding-left: 1rem; margin: 1.5rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem; background: #8882; }
@media (prefers-color-scheme: dark) { img { filter: invert(1) hue-rotate(180deg); } }
"""
# should a text ever get past the escaping, the browser still loads nothing and runs nothing
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
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


def table(rows):
    """Return a table of [(name, value)]."""
    written = []
    for name, value in rows:
        written.append(element("tr", element("th", name, scope="row"), element("td", value)))
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


def metrics_section(metrics, shown):
    """Return the metrics before and after: those that the run showed, the others folded away."""
    before = metrics["before"]
    after = metrics["after"]
    both = [name for name in after if name in before]
    first = [name for name in shown if name in both]
    others = [name for name in both if name not in first]
    content = []
    if first:
        content.append(metrics_table(before, after, first))
    if others:
        content.append(folded("all other metrics", metrics_table(before, after, others)))
    return section("Before and after", *content)


def losses_in_words(report):
    """Return how the training loss went, nothing where none was logged."""
    if report["first_loss"] is None:
        return ""
    return (
        f"Training loss: {report['first_loss']:.4f} in the first step that was logged, "
        f"{report['last_loss']:.4f} in the last."
    )


def curves_section(report, curves):
    """Return the curves (bytes of a PNG)."""
    data = base64.b64encode(curves).decode("ascii")
    label = "training loss and metrics of the dev sets over the optimizer steps"
    image = Html(f'<img alt="{label}" src="data:image/png;base64,{data}">')
    losses = element("p", losses_in_words(report))
    return section("Curves", element("div", image, class_="wide"), losses)


# ---------------------------------------------------------------- examples


def side_of(title, example):
    """Return what a model found, or answered, under a title."""
    items = []
    for found in example["found"]:
        said = found["note"]
        if found["is_right"]:
            said = f"✓ right, {said}" if said else "✓ right"
        note = element("div", said, class_="note") if said else Html()
        items.append(element("li", foreign(found["text"]), note))
    note = element("p", example["note"], class_="note") if example["note"] else Html()
    return element("div", element("h4", title), note, element("ol", *items))


def example_section(before, after, title):
    """Return one row of a dev set with what was found before training and after it."""
    expected = [foreign(text) for text in before["expected"]]
    sides = element("div", side_of("before", before), side_of(title, after), class_="sides")
    return element(
        "section",
        element("h3", before["asked"], class_="text", lang="", dir="auto"),
        element("p", "expected:", class_="note"),
        *expected,
        sides,
        class_="example",
    )


def examples_section(pairs, step):
    """Return the examples, [(before, after)]; nothing without one."""
    shown = []
    for before, after in pairs:
        shown.append(example_section(before, after, f"after step {step}"))
    return section("Examples", *shown)


# ---------------------------------------------------------------- the page


def proof_section(proof):
    """Return what reading final/ back has shown."""
    sentence = (
        "final/ was read back from disk and gives the trained outputs (relative error "
        f"{proof['relative_error']:.0e}); training moved them by {proof['relative_change']:.1%}."
    )
    return section("Proof", element("p", sentence))


def plan_section(plan):
    """Return the plan, without what stands elsewhere on the page."""
    elsewhere = ("notes", "watched", "shown")
    rows = rows_of({name: value for name, value in plan.items() if name not in elsewhere})
    return section("Plan", table(rows))


def run_section(report):
    """Return what the run took, and what it ran on."""
    names = ["steps", "best_step", "resumed_after", "seconds", "seconds_aside"]
    names += ["tokens_per_second", "padded_per_real_token", "peak_gib"]
    names += ["device", "precision", "processes", "data_fingerprint", "base_fingerprint"]
    rows = rows_of({name: report[name] for name in names})
    return section("Run and versions", table(rows), table(rows_of(report["versions"])))


def command_section(report):
    """Return the command, and all flags with what the run made of them."""
    command = element("pre", element("code", shlex.join(report["command"])))
    asked = folded("all flags", table(rows_of(report["flags"])))
    settled = folded("what the run made of them", table(rows_of(report["settled"])))
    hint = "With another --output_dir, or --overwrite, the same run again:"
    return section("Command", element("p", hint), command, asked, settled)


def page(report, curves, pairs):
    """Return the text of report.html.

    report: what training_summary_report.json holds; curves: bytes of a PNG; pairs: examples
    before and after, as parts/examples.py has them.
    """
    plan = report["plan"]
    title = f"{report['flags']['model_name']} in {report['flags']['output_dir']}"
    body = element(
        "body",
        element("h1", title),
        metrics_section(report["metrics"], plan["shown"]),
        section("Warnings", as_list(report["warnings"]) if report["warnings"] else Html()),
        curves_section(report, curves),
        examples_section(pairs, report["best_step"] or report["steps"]),
        proof_section(report["proof"]),
        section("Notes", as_list(plan["notes"]) if plan["notes"] else Html()),
        plan_section(plan),
        section("Data", table(rows_of(report["data"]))),
        run_section(report),
        command_section(report),
    )
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Html(STYLE)),
    ]
    return f"<!DOCTYPE html>\n{element('html', element('head', *head), body, lang='en')}\n"

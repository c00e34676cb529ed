"""The picture of a run: its training loss and what its dev sets gave, over the optimizer steps."""

from pathlib import Path
from statistics import fmean

from parts.lines import bare, best_step_of

# fonts with Chinese, Japanese and Korean letters, of which matplotlib brings none
FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans JP",
    "IPAexGothic",
    "IPAGothic",
    "Hiragino Sans",
    "Yu Gothic",
    "Noto Sans CJK SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "Malgun Gothic",
)
OWN_SCALE = ("loss", "margin")  # all other metrics are shares, and stand in one panel
LINES = ("-", "--", ":", "-.")
MARKERS = "os^Dv"


def entries_with(log, key):
    """Return the log's entries that hold a key: "loss", or the name of a metric."""
    return [entry for entry in log if key in entry]


def running_mean(values):
    """Return the mean of each value and those before it, over at most a tenth of all and 50."""
    window = max(1, min(50, len(values) // 10))
    means = []
    for end in range(1, len(values) + 1):
        means.append(fmean(values[max(0, end - window) : end]))
    return means


# ---------------------------------------------------------------- words


def fonts_here():
    """Return the names of fonts to draw with: the user's, matplotlib's own, those of FONTS."""
    from matplotlib import rcParams
    from matplotlib.font_manager import fontManager

    known = {font.name for font in fontManager.ttflist}
    return [*rcParams["font.family"], "DejaVu Sans", *(name for name in FONTS if name in known)]


def can_be_drawn(text, families):
    """Tell whether these fonts have every character of a text between them."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    fonts = []
    for name in families:
        fonts.append(get_font(findfont(FontProperties(family=[name]))))
    return all(any(font.get_char_index(ord(letter)) for font in fonts) for letter in text)


def drawable_names(dev_names, families):
    """Return {dev set: its name in the figure}: "dev set 2" where the fonts lack a character."""
    names = {"": ""}  # a single one may have none
    for place, dev in enumerate(dev_names, 1):
        names[dev] = shortened(dev, 30) if can_be_drawn(dev, families) else f"dev set {place}"
    return names


def shortened(text, longest):
    """Return a text without its middle where it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}…{text[longest // 2 + 1 - longest :]}"


def title_of(report, labels):
    """Return the rows that were trained on, and what became of the metric that best is measured by.

    labels: {metric: its name in the figure}, {} without dev sets.
    """
    plan = report["plan"]
    metric = plan["metric"]
    rows = f"{report['data']['train_rows']:,} rows"
    seen = report["steps"] * plan["examples_per_step"]
    if seen < report["data"]["train_rows"]:
        rows = f"{seen:,} of {rows}"
    title = f"{rows}, {report['steps']:,} steps"
    before = report["metrics"]["before"]
    after = report["metrics"]["after"]
    if metric in labels and metric in before and metric in after:
        title += f": {labels[metric]} {before[metric]:.4f} → {after[metric]:.4f}"
    return title


# ---------------------------------------------------------------- the figure


def draw_curves(path, log, report):
    """Draw the training loss of each step, its running mean, and the shown metrics over steps.

    report: what training_summary_report.json holds.
    """
    from matplotlib import rc_context

    families = fonts_here()
    folder = str(Path(path).parent)
    folder = shortened(folder, 100) if can_be_drawn(folder, families) else ""
    with rc_context({"font.family": families, "text.usetex": False}):
        figure_of(log, report, families, folder).savefig(path, dpi=120)


def figure_of(log, report, families, folder):
    """Return the figure: the losses, and below them the metrics of other scales."""
    from matplotlib.figure import Figure  # not pyplot, whose backend belongs to the notebook
    from matplotlib.ticker import MaxNLocator

    plan = report["plan"]
    shown = {}
    for name, dev in plan["shown"].items():
        if entries_with(log, f"eval_{name}"):
            shown[name] = dev
    names = drawable_names(report["data"]["dev"], families)
    labels = {name: label_of(bare(name, dev), names[dev]) for name, dev in shown.items()}
    panels = panels_of(shown)
    figure = Figure(figsize=(11, 1.5 + 3 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    draw_losses(rows[0], log)
    best_step = best_step_of(log, plan["metric"], plan["greater_is_better"])
    for axes, (title, metrics) in zip(rows, panels.items(), strict=True):
        for name in metrics:
            draw_metric(axes, log, name, labels[name], style_of(name, shown))
        if best_step:
            axes.axvline(best_step, color="grey", linestyle=":", linewidth=1)
        if plan["metric"] in metrics and best_step:
            draw_best(axes, log, plan["metric"], labels[plan["metric"]], best_step)
        axes.grid(alpha=0.3)
        axes.set_ylabel(title)
        if axes.get_legend_handles_labels()[0]:  # beside the lines, none of which it hides
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    # parse_math: a folder's name may hold two dollars
    plain = {"parse_math": False, "horizontalalignment": "left"}
    figure.suptitle(title_of(report, labels), x=0.01, **plain)
    rows[0].set_title(folder, fontsize="small", color="grey", loc="left", **plain)
    rows[-1].set_xlabel("optimizer step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def panels_of(shown):
    """Return {title of a panel: the metrics in it}, the training loss's panel first."""
    panels = {"loss": []}
    for name, dev in shown.items():
        metric = bare(name, dev)
        panels.setdefault(metric if metric in OWN_SCALE else "dev sets", []).append(name)
    return panels


def label_of(metric, dev):
    """Return what a metric is called in the figure; dev: its dev set's name there, "" if none."""
    # the metric first: matplotlib leaves out what begins with "_", as the name of a set may
    if dev:
        return f"{metric} of {dev}"
    return "dev loss" if metric == "loss" else metric


def style_of(name, shown):
    """Return how a metric's line looks: of several dev sets each has a colour, else each metric."""
    metrics = list(dict.fromkeys(bare(other, dev) for other, dev in shown.items()))
    sets = list(dict.fromkeys(shown.values()))
    metric = metrics.index(bare(name, shown[name]))
    if len(sets) == 1:
        return {"color": f"C{metric + 1}", "marker": MARKERS[metric % 5]}  # C0: training
    return {
        "color": f"C{sets.index(shown[name]) + 1}",
        "linestyle": LINES[metric % 4],
        "marker": MARKERS[metric % 5],
    }


def draw_losses(axes, log):
    """Draw the logged losses, pale, and their running mean."""
    trained = entries_with(log, "loss")
    if not trained:
        return
    steps = [entry["step"] for entry in trained]
    losses = [entry["loss"] for entry in trained]
    smooth = running_mean(losses)
    label = f"training loss: {smooth[0]:.3f} → {smooth[-1]:.3f} (running mean)"
    axes.plot(steps, losses, color="C0", alpha=0.3)
    axes.plot(steps, smooth, color="C0", label=label)


def draw_metric(axes, log, name, label, style):
    """Draw one metric of a dev set, where it was measured."""
    measured = entries_with(log, f"eval_{name}")
    steps = [entry["step"] for entry in measured]
    values = [entry[f"eval_{name}"] for entry in measured]
    label = f"{label}: {values[0]:.3f} → {values[-1]:.3f}"
    axes.plot(steps, values, markersize=4, label=label, **style)


def draw_best(axes, log, name, label, step):
    """Mark the best evaluation of the metric that best is measured by."""
    values = {entry["step"]: entry[f"eval_{name}"] for entry in entries_with(log, f"eval_{name}")}
    label = f"best {label}: {values[step]:.3f}, step {step:,}"
    star = {"marker": "*", "markersize": 14, "color": "gold", "markeredgecolor": "black"}
    axes.plot(step, values[step], linestyle="", zorder=3, label=label, **star)  # above all lines

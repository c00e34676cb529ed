"""The picture of a run: what it says, and that any name can stand in it."""

import warnings

from parts import curves
from parts.curves import (
    can_be_drawn,
    draw_curves,
    drawable_names,
    figure_of,
    fonts_here,
    panels_of,
    running_mean,
    title_of,
)

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib.tables._g_l_y_f import Glyph
from matplotlib.font_manager import fontManager

JAPANESE = "質問"


def log_of(*names, best=2):
    """The log of four steps with an evaluation at each, of which one is the best."""
    log = []
    for step in range(5):
        if step:
            log.append({"step": step, "loss": 2.0 / step})
        value = 0.75 if step == best else 0.25 + step / 100
        log.append({"step": step} | {f"eval_{name}": value for name in names})
    return log


def report_of(shown, **changes):
    """A report as it stands in training_summary_report.json."""
    metric = next(iter(shown), "loss")
    plan = {"shown": shown, "metric": metric, "greater_is_better": True, "examples_per_step": 32}
    sets = {dev or "dev": 3 for dev in shown.values()}
    metrics = {"before": dict.fromkeys(shown, 0.25), "after": dict.fromkeys(shown, 0.75)}
    data = {"train_rows": 100, "dev": sets}
    return {"plan": plan, "steps": 4, "data": data, "metrics": metrics} | changes


def legends(figure):
    """The texts of the legends, a list for each panel."""
    found = []
    for axes in figure.axes:
        legend = axes.get_legend()
        found.append([text.get_text() for text in legend.get_texts()] if legend else [])
    return found


def test_running_mean_is_over_a_tenth_of_all_values():
    assert running_mean([3.0, 1.0]) == [3.0, 1.0]  # a tenth of two is one
    values = [float(i) for i in range(30)]
    assert running_mean(values)[:4] == [0.0, 0.5, 1.0, 2.0]
    assert running_mean(values)[-1] == 28.0
    assert running_mean([]) == []


def test_the_title_has_the_rows_and_what_became_of_them():
    report = report_of({"faq_ndcg@10": "faq"})
    labels = {"faq_ndcg@10": "ndcg@10 of faq"}
    assert title_of(report, labels) == "100 rows, 4 steps: ndcg@10 of faq 0.2500 → 0.7500"
    few = report | {"data": {"train_rows": 12345}}
    assert title_of(few, labels).startswith("128 of 12,345 rows, 4 steps: ")
    assert title_of(report, {}) == "100 rows, 4 steps"  # nothing was measured


def test_dev_sets_stand_in_the_legend_by_name_and_the_best_evaluation_is_marked():
    shown = {"faq_ndcg@10": "faq", "faq_recall@10": "faq", "_x_ndcg@10": "_x"}
    figure = figure_of(log_of(*shown), report_of(shown), fonts_here(), "runs/first")
    losses, shares = legends(figure)
    assert losses == ["training loss: 2.000 → 0.500 (running mean)"]
    assert shares == [
        "ndcg@10 of faq: 0.250 → 0.290",
        "recall@10 of faq: 0.250 → 0.290",
        "ndcg@10 of _x: 0.250 → 0.290",
        "best ndcg@10 of faq: 0.750, step 2",
    ]
    [star] = [line for line in figure.axes[1].lines if line.get_marker() == "*"]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([2], [0.75])
    first, second, third = figure.axes[1].lines[:3]
    assert first.get_color() == second.get_color() != third.get_color()
    assert first.get_linestyle() == third.get_linestyle() != second.get_linestyle()
    assert figure.axes[0].get_title(loc="left") == "runs/first"


def test_long_names_leave_room_for_the_lines(tmp_path):
    name = "".join(f"part{i}_" for i in range(20))
    assert curves.shortened("abcdef", 5) == "ab…ef" and curves.shortened("abcde", 5) == "abcde"
    assert len(curves.shortened(name, 30)) == 30
    shown = {f"{name}_false_positive_rate": name}
    folder = tmp_path / name
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a layout that does not work out
        draw_curves(folder / "training_curves.png", log_of(*shown), report_of(shown))
    figure = figure_of(log_of(*shown), report_of(shown), fonts_here(), "")
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().width > 0.4  # of the figure


def test_metrics_of_one_scale_share_a_panel():
    shown = {"loss": "", "accuracy": "", "margin": "", "length_accuracy": ""}
    panels = panels_of(shown)
    assert panels == {
        "loss": ["loss"],
        "dev sets": ["accuracy", "length_accuracy"],
        "margin": ["margin"],
    }
    report = report_of(shown)
    report["plan"]["greater_is_better"] = False
    losses, shares, margin = legends(figure_of(log_of(*shown), report, fonts_here(), ""))
    assert "dev loss: 0.250 → 0.290" in losses and "best dev loss: 0.260, step 1" in losses
    assert len(shares) == 2 and margin == ["margin: 0.250 → 0.290"]


@pytest.mark.parametrize("log", [[], log_of()[2:], log_of("ndcg@10")[:1]])
def test_a_run_without_dev_sets_steps_or_losses_has_a_picture_too(log, tmp_path):
    shown = {"ndcg@10": ""}
    draw_curves(tmp_path / "a.png", log, report_of(shown))
    draw_curves(tmp_path / "b.png", log, report_of({}))
    assert (
        (tmp_path / "a.png").read_bytes()[:4] == (tmp_path / "b.png").read_bytes()[:4] == b"\x89PNG"
    )
    assert "best" not in str(legends(figure_of(log, report_of(shown), fonts_here(), "")))


def test_a_name_that_no_font_has_is_left_out_and_no_glyph_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "FONTS", ())  # as on a machine without any
    families = fonts_here()
    assert can_be_drawn("runs/first, ndcg@10 →", families)
    assert not can_be_drawn(f"runs/{JAPANESE}", families)
    names = drawable_names(["faq", JAPANESE], families)
    assert names == {"": "", "faq": "faq", JAPANESE: "dev set 2"}
    shown = {f"{JAPANESE}_ndcg@10": JAPANESE, "faq_ndcg@10": "faq"}
    report = report_of(shown)
    report["data"]["dev"] = {"faq": 3, JAPANESE: 3}  # the second decides
    for name in (JAPANESE, "$a_$"):  # which is no formula either
        folder = tmp_path / name
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_curves(folder / "training_curves.png", log_of(*shown), report)
    figure = figure_of(log_of(*shown), report, families, "")
    assert "ndcg@10 of dev set 2: 0.250 → 0.290" in legends(figure)[1]
    assert "ndcg@10 of dev set 2 0.2500" in figure.get_suptitle()


@pytest.fixture
def japanese_font(tmp_path, monkeypatch):
    """A font that matplotlib finds under a name of FONTS; it has two letters, both empty."""
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", "first", "second"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(dict(zip(map(ord, JAPANESE), names[1:], strict=True)))
    builder.setupGlyf({name: Glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "IPAexGothic", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    monkeypatch.setattr(fontManager, "ttflist", list(fontManager.ttflist))
    fontManager.addfont(tmp_path / "font.ttf")
    fontManager._findfont_cached.cache_clear()
    yield
    fontManager._findfont_cached.cache_clear()


def test_a_font_that_is_here_draws_the_name(japanese_font, tmp_path):
    families = fonts_here()
    assert "IPAexGothic" in families
    assert drawable_names([JAPANESE, "日本"], families) == {
        "": "",
        JAPANESE: JAPANESE,
        "日本": "dev set 2",
    }
    shown = {f"{JAPANESE}_ndcg@10": JAPANESE}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(tmp_path / "a.png", log_of(*shown), report_of(shown))
    figure = figure_of(log_of(*shown), report_of(shown), families, "")
    assert f"ndcg@10 of {JAPANESE}: 0.250 → 0.290" in legends(figure)[1]


def test_what_is_drawn_depends_on_the_log_and_the_report_alone(tmp_path):
    shown = {"ndcg@10": ""}
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        draw_curves(path, log_of(*shown), report_of(shown))
    assert paths[0].read_bytes() == paths[1].read_bytes()

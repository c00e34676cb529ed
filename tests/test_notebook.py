"""What a notebook's cell shows of a run: a table of evaluations, a bar, the curves."""

import re
import sys
from types import SimpleNamespace

import parts.callbacks
from parts.callbacks import RunCallback
from parts.notebook import evaluation_table, evaluations, has_cells, show_table

import pytest
import transformers
from tqdm import tqdm


def plan_of(*shown):
    """Return a plan that shows these (dev set, metric) and measures best by the first."""
    names = {f"{dev}_{metric}" if dev else metric: dev for dev, metric in shown}
    return SimpleNamespace(shown=names, metric=next(iter(names)), greater_is_better=True)


def cells_of(table):
    """Return [texts of its cells] of each row of a table in HTML."""
    rows = re.findall("<tr>(.*?)</tr>", table)
    return [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


LOG = [
    {"step": 0, "eval_ndcg": 0.5, "eval_hidden": 9.0},
    {"step": 1, "loss": 3.0},
    {"step": 2, "loss": 1.0},
    {"step": 2, "eval_ndcg": 0.75},
    {"step": 3, "loss": 0.5},
    {"step": 1000, "eval_ndcg": 0.625},
]


def test_a_row_has_the_mean_loss_since_the_row_before_and_the_change_since_the_start():
    assert evaluations(LOG, {"ndcg": ""}) == [
        (0, None, {"ndcg": 0.5}),
        (2, 2.0, {"ndcg": 0.75}),
        (1000, 0.5, {"ndcg": 0.625}),
    ]
    assert cells_of(evaluation_table(LOG, plan_of(("", "ndcg")))) == [
        ["step", "loss", "ndcg"],
        ["0", "", "0.5000"],
        ["2", "2", "0.7500 (+0.2500) ★"],
        ["1,000", "0.5", "0.6250 (+0.1250)"],
    ]
    assert evaluation_table(LOG[1:3], plan_of(("", "ndcg"))) == ""
    late = cells_of(evaluation_table(LOG[3:], plan_of(("", "ndcg"))))  # the first one unmeasured
    assert late[1:] == [["2", "", "0.7500 ★"], ["1,000", "0.5", "0.6250"]]


def test_each_dev_set_has_a_row_and_what_was_not_measured_is_blank():
    log = [
        {"step": 0, "eval_all_loss": 4.0, "eval_<b>_loss": 2.0, "eval_<b>_f1": 0.0},
        {"step": 5, "eval_all_loss": 3.0},
    ]
    plan = plan_of(("all", "loss"), ("<b>", "loss"), ("<b>", "f1"))
    plan.greater_is_better = False
    assert cells_of(evaluation_table(log, plan)) == [
        ["step", "loss", "dev set", "dev_loss", "f1"],
        ["0", "", "all", "4.0000", ""],
        ["0", "", "&lt;b&gt;", "2.0000", "0.0000"],
        ["5", "", "all", "3.0000 (-1.0000) ★", ""],
    ]


@pytest.fixture
def shell(monkeypatch):
    """A kernel, as far as has_cells looks at it."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: object()))
    monkeypatch.setattr(transformers.utils, "is_in_notebook", lambda: True)


def test_cells_are_those_of_a_kernel_alone(shell, monkeypatch):
    assert has_cells()
    monkeypatch.setattr(transformers.utils, "is_in_notebook", lambda: False)
    assert not has_cells()
    monkeypatch.setattr(transformers.utils, "is_in_notebook", lambda: True)  # as of marimo
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not has_cells()
    monkeypatch.delitem(sys.modules, "IPython")
    assert not has_cells()


def test_a_table_is_exchanged_where_it_stands(monkeypatch):
    shown = []

    def display(text, display_id):
        shown.append(text)
        return SimpleNamespace(update=lambda text: shown.__setitem__(0, text))

    fake = SimpleNamespace(display=display, HTML=str)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=fake))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    handle = show_table(None, "one row")
    assert show_table(handle, "two rows") is handle
    assert shown == ["two rows"]


def test_a_cell_gets_one_table_and_no_lines(shell, monkeypatch, tmp_path, capsys):
    tables = []
    monkeypatch.setattr(
        parts.callbacks, "show_table", lambda handle, text: tables.append((handle, text)) or "id"
    )
    callback = RunCallback(None, plan_of(("", "ndcg")), tmp_path, {"eval_ndcg": 0.5})
    callback.training_bar = tqdm(total=9, file=open(tmp_path / "bar", "w"), delay=0)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, log_history=LOG[:1])
    callback.on_log(None, state, None, LOG[0])
    state.global_step = 2
    callback.on_log(None, state, None, {"loss": 1.5, "learning_rate": 0.1})
    state.log_history = LOG[:4]
    callback.on_log(None, state, None, LOG[3])
    assert [handle for handle, _ in tables] == [None, "id"]
    assert [len(cells_of(text)) for _, text in tables] == [2, 3]
    assert callback.training_bar.postfix == "loss 1.5"
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(transformers.utils, "is_in_notebook", lambda: False)
    callback.on_log(None, state, None, LOG[3])
    assert "step      2  ndcg  0.7500 +0.2500" in capsys.readouterr().out
    assert len(tables) == 2

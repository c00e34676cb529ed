"""Forty of the odd inputs; `python tests/odd_inputs.py` runs them all."""

import subprocess
import sys

from conftest import ROOT
from odd_harness import Row, fault, spread
from odd_inputs import ROWS

SENTENCE = "error: rows.jsonl holds no rows. Write one JSON object a line.\n"


def test_a_sample_of_odd_inputs_ends_as_it_should():
    command = [sys.executable, str(ROOT / "tests/odd_inputs.py"), "--sample", "40"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.startswith("40 rows, 0 failed")


def test_the_sample_is_of_all_scripts_and_kinds():
    kinds = {(row.script, row.name.partition(":")[0]) for row in ROWS}
    sample = {(row.script, row.name.partition(":")[0]) for row in spread(ROWS, 40)}
    assert sample == kinds
    assert len(ROWS) >= 150
    assert len({(row.script, row.name) for row in ROWS}) == len(ROWS)


def test_every_way_to_end_otherwise_is_a_fault():
    row = Row("no rows", "embed", "", 1, "holds no rows")
    assert fault(row, 1, SENTENCE) is None
    assert fault(row, 1, f"data      read\n{SENTENCE}") is None
    assert "no end" in fault(row, None, SENTENCE)
    assert "exit 0" in fault(row, 0, SENTENCE)
    assert "exit -9" in fault(row, -9, SENTENCE)
    assert "traceback" in fault(row, 1, f"Traceback (most recent call last)\n{SENTENCE}")
    assert "does not say" in fault(row, 1, SENTENCE.replace("no rows", "nothing"))
    assert "2 lines" in fault(row, 1, SENTENCE * 2)
    assert "does not say" in fault(
        row, 1, "note      holds no rows\nerror: something else went wrong\n"
    )

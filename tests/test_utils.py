"""The process is set up before any library reads how."""

import os
import subprocess
import sys

import utils
from conftest import ROOT

import pytest

NAMES = ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"]


def printed(code, environment):
    """Return what a new process prints, whose environment names no allocator but these."""
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", f"import os, sys\n{code}"]
    done = subprocess.run(
        command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "before, environment, expected",
    [
        ("sys.platform = 'linux'", {}, ["expandable_segments:True", None]),
        ("sys.platform = 'linux'", {NAMES[0]: "backend:native"}, ["backend:native", None]),
        ("sys.platform = 'linux'", {NAMES[1]: "backend:native"}, [None, "backend:native"]),
        ("sys.modules['torch'] = None", {}, [None, None]),  # a notebook's kernel has imported it
        ("sys.platform = 'win32'", {}, [None, None]),
    ],
)
def test_the_allocator_is_set_up_where_nobody_has_done_so(before, environment, expected):
    code = f"{before}\nimport utils\nprint([os.environ.get(name) for name in {NAMES}])"
    assert printed(code, environment) == str(expected)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such segments")
@pytest.mark.parametrize("script", ["train_embed_lora", "train_sft_lora"])
def test_both_scripts_set_it_up_before_anything_imports_torch(script):
    code = f"""
class Finder:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get({NAMES[0]!r}))
            sys.exit()

sys.meta_path.insert(0, Finder)
import {script}
"""
    assert printed(code, {}) == "expandable_segments:True"


def test_memory_that_runs_out_anywhere_is_a_sentence():
    told = utils.refusal(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert told.startswith("memory ran out: lower --batch_size")
    assert utils.refusal(RuntimeError("shape mismatch")) is None

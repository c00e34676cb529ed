"""Several machines: how a run is started on them, and the disk that it needs."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import utils
from conftest import ROOT
from parts import machines
from utils import InputError

import pytest


@pytest.mark.parametrize("name", utils.TASKS)
def test_several_tasks_without_torchrun_are_refused(name, monkeypatch):
    for other in ("RANK", *utils.TASKS):
        monkeypatch.delenv(other, raising=False)
    utils.refuse_many_tasks()
    monkeypatch.setenv(name, "1")
    utils.refuse_many_tasks()
    monkeypatch.setenv(name, "4")
    monkeypatch.setattr(sys, "argv", ["train_sft_lora.py", "--lr", "1e-4"])
    with pytest.raises(InputError, match=rf"4 tasks were started \({name}\)") as error:
        utils.refuse_many_tasks()
    assert str(error.value).endswith("--rdzv_endpoint HOST:29500 train_sft_lora.py --lr 1e-4")
    monkeypatch.setenv("RANK", "0")  # a process of torchrun's
    utils.refuse_many_tasks()


def test_a_script_says_so_before_it_loads_anything(tmp_path):
    script = ROOT / "train_embed_lora.py"
    done = subprocess.run(
        [sys.executable, str(script), "--train_file", "pairs.jsonl"],
        env=os.environ | {"SLURM_STEP_NUM_TASKS": "2"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: 2 tasks were started (SLURM_STEP_NUM_TASKS), each of")
    assert len(done.stderr.splitlines()) == 1


def test_a_word_is_waited_for(tmp_path):
    path = tmp_path / "new/is-shared"
    assert not machines.has_word(path, "word", patience=0)
    writer = threading.Thread(target=lambda: (time.sleep(0.3), machines.write_word(path, "word")))
    writer.start()
    assert machines.has_word(path, "word", patience=30)
    writer.join()
    assert not machines.has_word(path, "another", patience=0.3)


def as_machine(monkeypatch, *, is_first, blind, count="2"):
    """Let refuse_unshared be on the first of two machines or the second; blind: what all see."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", count)
    monkeypatch.setattr(machines, "agreed", lambda word: "word")
    monkeypatch.setattr(machines, "gather_object", lambda own: own + blind)
    return SimpleNamespace(is_main_process=is_first, is_local_main_process=True)


def test_a_folder_that_another_machine_does_not_see_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "runs/new"
    state = as_machine(monkeypatch, is_first=True, blind=["node7"])
    with pytest.raises(InputError, match="runs/new is not on a disk .* share: node7 did not see"):
        machines.refuse_unshared(folder, state, patience=0)
    assert list(tmp_path.iterdir()) == []  # nothing stays behind
    state = as_machine(monkeypatch, is_first=True, blind=[])
    machines.refuse_unshared(folder, state, patience=0)
    assert list(tmp_path.iterdir()) == []
    state = as_machine(monkeypatch, is_first=False, blind=[])
    with pytest.raises(SystemExit) as ended:
        machines.refuse_unshared(folder, state, patience=0)
    assert ended.value.code == 1
    machines.write_word(folder / "is-shared-word", "word")
    machines.refuse_unshared(folder, state, patience=0)
    state = as_machine(monkeypatch, is_first=False, blind=[], count="1")
    machines.refuse_unshared(tmp_path / "elsewhere", state, patience=0)


@pytest.mark.distributed
def test_two_agents_train_as_two_machines(embed_argv, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = embed_argv("--max_steps", 2, "--dev_size", 0, "--batch_size", 8)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "test"]
    command += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    command += [str(ROOT / "train_embed_lora.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    agents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        log = (tmp_path / f"{name}.log").open("w")
        agents.append(
            subprocess.Popen(
                command, env=environment, cwd=tmp_path / name, stdout=log, stderr=subprocess.STDOUT
            )
        )
    codes = [agent.wait(timeout=200) for agent in agents]
    logs = [(tmp_path / f"{name}.log").read_text() for name in ("one", "two")]
    assert codes == [0, 0], logs
    assert any("x 2 processes" in log for log in logs)
    assert (tmp_path / "out/final/adapter_model.safetensors").is_file()
    assert not list(Path(tmp_path / "out").glob("is-shared*"))

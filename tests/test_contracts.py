"""What keeps flags, documents and code in step, for every script."""

import importlib.metadata
import re
import shlex

import merge
import train_embed_lora
import train_sft_lora
from conftest import ROOT

import pytest

SCRIPTS = {"train_embed_lora": train_embed_lora, "train_sft_lora": train_sft_lora}
README = (ROOT / "README.md").read_text()


def source_of(script):
    return (ROOT / f"{script}.py").read_text() + (ROOT / "utils.py").read_text()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    source = source_of(script)
    declared = re.findall(r'add\("--(\w+)"', source)
    assert len(declared) > 65
    unread = [name for name in declared if not re.search(rf"\b(args|flags)\.{name}\b", source)]
    by_kind = (
        ["query_column", "positive_column"] if 'getattr(args, f"{kind}_column")' in source else []
    )
    assert unread == by_kind


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_documented_command_parses(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for continued in ("stage1", "mine", "first"):  # what later commands go on with
        (tmp_path / f"runs/{continued}/final").mkdir(parents=True)
        (tmp_path / f"runs/{continued}/final/adapter_config.json").write_text("{}")
    lines = (README + SCRIPTS[script].__doc__).replace("\\\n", " ").splitlines()
    commands = [
        line.strip().lstrip("!$ ")
        for line in lines
        if re.match(rf"\s*[!$ ]*python {script}\.py", line)
    ]
    assert len(commands) >= 8
    for command in commands:
        SCRIPTS[script].parse_args(shlex.split(command, comments=True)[2:])


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_the_readme(script):
    lines = [line for line in source_of(script).splitlines() if line.startswith("    add(")]
    declared = [name for line in lines for name in re.findall(r'"--(\w+)"', line)]
    assert len(declared) > 80
    assert [name for name in declared if f"`--{name}`" not in README] == []


def test_merge_reads_and_documents_every_flag():
    source = (ROOT / "merge.py").read_text()
    declared = re.findall(r'add\("--(\w+)"(?:, "--(\w+)")?', source)
    assert len(declared) == 9
    assert [name for name, _ in declared if not re.search(rf"\bargs\.{name}\b", source)] == []
    assert [
        name for names in declared for name in names if name and f"`--{name}`" not in README
    ] == []
    commands = re.findall(r"^\s*python (merge\.py .*)$", README + merge.__doc__, re.M)
    assert len(commands) >= 5
    for command in commands:
        merge.parse_args(shlex.split(command, comments=True)[1:])


def test_the_oldest_python_is_named_alike_and_a_notebook_keeps_its_torch():
    oldest = (
        importlib.metadata.metadata("transformers")["Requires-Python"]
        .lstrip(">=")
        .removesuffix(".0")
    )
    assert (
        f'target-version = "py{oldest.replace(".", "")}"' in (ROOT / "pyproject.toml").read_text()
    )
    for file in ("README.md", "requirements.txt", ".ci/run"):
        assert re.findall(r"Python (3\.\d+) or newer", (ROOT / file).read_text()) == [oldest], file

    def bounds(file):
        return dict(re.findall(r"^([a-z]+)([<>=]\S+)", (ROOT / file).read_text(), re.M))

    users, tests = bounds("requirements.txt"), bounds("tests/requirements.txt")
    uncapped = {name for name, bound in users.items() if "<" not in bound}
    assert uncapped == {"torch", "tensorboard", "matplotlib"}
    assert all(tests[name].startswith("<") for name in uncapped)


def test_both_trainers_have_the_same_banners_in_the_same_order():
    banners = [
        re.findall(r"^# -{10,} (.*)$", source_of(script).split('"""What both')[0], re.M)
        for script in SCRIPTS
    ]
    common = [name for name in banners[0] if name in banners[1]]
    assert common == [name for name in banners[1] if name in banners[0]]
    assert {"arguments", "data", "loss and metrics", "training", "main"} <= set(common)

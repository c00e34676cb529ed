"""README.md and docs/*.md: every command parses, every link resolves, every figure has a source."""

import os
import re
import runpy
import shlex
import sys
from unittest import mock

import contracts
import merge
import train_embed_lora
import train_sft_lora
from conftest import ROOT
from examples import ask, gguf_ollama, search, teacher_scores

import pytest

# what parses a command without running the script; the others are stopped where they parse
PARSED = {
    "train_embed_lora.py": train_embed_lora,
    "train_sft_lora.py": train_sft_lora,
    "merge.py": merge,
    "examples/ask.py": ask,
    "examples/gguf_ollama.py": gguf_ollama,
    "examples/search.py": search,
    "examples/teacher_scores.py": teacher_scores,
}
SCRIPTS = [module for name, module in PARSED.items() if "/" not in name]
PATHS = [ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PATHS}
DEFAULTS = (
    "docs/flags.md",
    "docs/flags.ja.md",
    "docs/coming-from.md",
)  # whose tables hold no figures
ADDRESS = re.compile(r"https://[\w.-]+\.[a-z]+(/[\w./~#?=&%@-]*)?")
PYTHON = r"[!$ ]*(?:\.venv/bin/)?(?:python|torchrun .*?) ([\w./]+\.py)"


def commands(text):
    """Return [(script, arguments)] of a document, in blocks and within sentences."""
    joined = text.replace("\\\n", " ")
    in_blocks = re.findall(rf"^{PYTHON}(.*)$", joined, re.M)
    inline = re.findall(rf"`{PYTHON}([^`]*)`", joined)
    return [(script, shlex.split(rest, comments=True)) for script, rest in in_blocks + inline]


def prose(text):
    """Return a document without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)


def sentences(text):
    """Return the sentences of a document; a cell of a table and an item of a list are apart."""
    found = []
    apart = re.sub(r"^(#+ .*)$", r"\1\n", prose(text), flags=re.M)
    for paragraph in re.split(r"\n\s*\n|\n(?=\s*(?:[-|#]|\d+\.) ?)", apart):
        for cell in paragraph.split(" | "):
            shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", cell)
            found += re.split(r"(?<=[.!?])\s+", " ".join(shown.split()))
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(sentence):
    return [word for word in sentence.split() if re.search(r"\w", word)]


def slugs(text):
    """Return the anchors that GitHub gives a document's headings."""
    found = []
    for heading in re.findall(r"^#+ +(.*?)\s*$", prose(text), re.M):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        repeats = sum(re.sub(r"-\d+$", "", other) == slug for other in found)
        found.append(f"{slug}-{repeats}" if repeats else slug)
    return found


def broken_links(name, text):
    """Return the links of a document that lead nowhere; of other sites' addresses the form counts."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if "://" in target:
            if not ADDRESS.fullmatch(target):
                found.append(target)
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        if not path.exists():
            found.append(target)
        elif anchor and anchor not in slugs(path.read_text("utf-8") if file else text):
            found.append(target)
    return found


def tables_without_a_command(text):
    """Return the first lines of tables of figures whose section names no command before their end."""
    found = []
    for section in re.split(r"^(?=#+ )", text, flags=re.M):
        for table in re.finditer(r"(?:^\|.*\n)+", section, re.M):
            cells = re.sub(r"`[^`]*`", "", table[0]).split("|")
            figures = [cell for cell in cells if re.search(r"\d\.\d|\d %", cell)]
            if len(figures) > 2 and not commands(section[: table.end()]):
                found.append(table[0].partition("\n")[0])
    return found


parser_of_file = runpy.run_path(str(ROOT / "docs/make_flags.py"))["parser_of"]


# ---------------------------------------------------------------- commands


@pytest.fixture
def user_files(tmp_path, monkeypatch):
    """A folder with what the documents' commands go on with."""
    monkeypatch.chdir(tmp_path)
    for continued in ("stage1", "mine", "first"):
        (tmp_path / f"runs/{continued}/final").mkdir(parents=True)
        (tmp_path / f"runs/{continued}/final/adapter_config.json").write_text("{}")
    (tmp_path / "prompts.txt").write_text("2+2?\n")


@pytest.mark.parametrize("script, least", [*zip(PARSED, (14, 12, 4, 4, 1, 2, 1), strict=True)])
def test_every_documented_command_parses(script, least, user_files):
    documents = "\n".join([*TEXTS.values(), PARSED[script].__doc__])
    found = [arguments for name, arguments in commands(documents) if name == script]
    assert len(found) >= least
    for arguments in found:
        PARSED[script].parse_args(arguments)


def test_every_documented_benchmark_parses(monkeypatch):
    # they import one another
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    found = [command for command in commands("\n".join(TEXTS.values())) if command[0] not in PARSED]
    assert len({script for script, _ in found}) >= 10
    parsers = {}
    with mock.patch.dict(os.environ):
        for script, arguments in found:
            if "argparse" not in (ROOT / script).read_text("utf-8"):
                assert arguments == [], script
                continue
            if script not in parsers:
                parsers[script] = parser_of_file(script)
            parsers[script].parse_args(arguments)


def test_every_make_and_every_file_that_is_named_is_there():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    folders = "parts|examples|benchmarks|docs|tests"
    for name, text in TEXTS.items():
        for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.M):
            assert target in targets, f"{name}: make {target}"
        for path in re.findall(rf"`((?:{folders})/[\w./]*)`", text):
            assert (ROOT / path).exists(), f"{name}: {path}"
        for path in re.findall(r"pip install (?:-q )?-r ([\w./]+)", text):
            assert (ROOT / path).is_file(), f"{name}: {path}"


# ---------------------------------------------------------------- links and figures


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_and_every_anchor_resolves(name):
    assert broken_links(name, TEXTS[name]) == []


def test_every_document_is_named_in_the_readme():
    for name in TEXTS:
        readme = "README.ja.md" if name.endswith(".ja.md") else "README.md"
        assert name == readme or f"]({name})" in TEXTS[readme], name
    assert "](README.ja.md)" in TEXTS["README.md"].split("\n\n")[1]
    assert "](README.md)" in TEXTS["README.ja.md"].split("\n\n")[1]


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in DEFAULTS])
def test_every_table_of_figures_names_its_command(name):
    assert tables_without_a_command(TEXTS[name]) == []


def test_the_address_of_the_repository_stands_once():
    [address] = re.findall(r"https://\S+", (ROOT / "docs/where.txt").read_text("utf-8"))
    assert ADDRESS.fullmatch(address)
    assert [name for name, text in TEXTS.items() if address in text] == []


# ---------------------------------------------------------------- the door


def test_the_readme_is_short_and_its_sentences_are():
    assert len(TEXTS["README.md"].splitlines()) < 230
    found = sentences(TEXTS["README.md"])
    assert len(found) > 100
    assert [sentence for sentence in found if len(words(sentence)) > 35] == []


def test_no_line_of_the_readme_is_a_help_text():
    lines = {line.strip(" -*|.#`") for line in TEXTS["README.md"].splitlines()}
    for script in SCRIPTS:
        for option in contracts.options_of(script):
            assert option.help.partition(" [")[0] not in lines, option.dest


# ---------------------------------------------------------------- the rules themselves can fail


def test_commands_are_found_wherever_they_stand():
    text = """
    python a.py --x 1 \\
      --y 2
!python b.py   # a comment
    .venv/bin/python c/d.py "e f"
torchrun --nnodes 2 g.py --h
of `python i.py --j` and python k.py
"""
    assert commands(text) == [
        ("a.py", ["--x", "1", "--y", "2"]),
        ("b.py", []),
        ("c/d.py", ["e f"]),
        ("g.py", ["--h"]),
        ("i.py", ["--j"]),
    ]


def test_anchors_are_githubs():
    text = (
        "# A, b's `c_d.py`\n## [x-y](z) é\n## a, b's c_d.py\n```sh\n# no heading\n```\n### R & D\n"
    )
    assert slugs(text) == ["a-bs-c_dpy", "x-y-é", "a-bs-c_dpy-1", "r--d"]


@pytest.mark.parametrize(
    "link", ["nowhere.md", "#nowhere", "docs/sft.md#nowhere", "https://nowhere", "http://a.b/c"]
)
def test_a_link_that_leads_nowhere_is_found(link):
    assert broken_links("README.md", f"# Here\n[to]({link}) [too](#here)\n") == [link]


def test_a_table_without_its_command_is_found():
    table = "| a | b |\n|---|---|\n| 1.5 | 2.5 |\n| 3 % | `0.1` |\n"
    assert tables_without_a_command(f"`python a.py`\n## x\n{table}") == ["| a | b |"]
    assert tables_without_a_command(f"## x\n`python a.py`\n\n{table}") == []
    assert tables_without_a_command("## x\n" + table.replace("1.5", "`--lr 1.5`")) == []


def test_sentences_end_where_paragraphs_items_and_cells_do():
    text = "# One\ntwo [three\nfour](link). Five\n- six\n- seven\n\n| eight | nine. ten |\n```\nx\n```\n"
    found = ["# One", "two three four.", "Five", "- six", "- seven", "| eight", "nine.", "ten |"]
    assert sentences(text) == found
    assert words("a - b `c d`") == ["a", "b", "`c", "d`"]

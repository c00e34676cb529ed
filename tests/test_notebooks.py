"""The notebooks of examples/ run from top to bottom on a CPU, and are what a newcomer can read."""

import ast
import json
import os
import re
from pathlib import Path

import contracts
import merge
import train_embed_lora
import train_sft_lora
from conftest import ROOT
from examples import ask, gguf_ollama

import nbformat
import pytest
import test_documents
import test_readme_ja
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

TRAINERS = {"colab_embedding": train_embed_lora, "colab_sft": train_sft_lora}
PATHS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
HUB_ID = re.compile(r"\b(?:Qwen|intfloat|sentence-transformers|cl-nagoya|BAAI)/[\w.-]+")
RESTART = ("Runtime > Restart session", "ランタイム > セッションを再起動する")
JAPANESE = re.compile(test_readme_ja.KANA_OR_KANJI)


def cells_of(name, kind):
    """Return {id: source} of a notebook's cells of a kind: "code" or "markdown"."""
    notebook = nbformat.read(PATHS[name], 4)
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == kind}


def trees_of(name):
    """Return {id: syntax tree} of a notebook's code, `!` and `%` as the calls that they are."""
    to_python = TransformerManager().transform_cell
    return {key: ast.parse(to_python(text)) for key, text in cells_of(name, "code").items()}


def nodes_of(name, kind):
    """Return the nodes of a kind in a notebook's code."""
    nodes = [node for tree in trees_of(name).values() for node in ast.walk(tree)]
    return [node for node in nodes if isinstance(node, kind)]


def bound_to(name, target):
    """Return as text what a notebook's code assigns to a name."""
    assigned = [node for node in nodes_of(name, ast.Assign) if contracts.last_name(node.targets[0])]
    return [ast.unparse(each.value) for each in assigned if each.targets[0].id == target]


def japanese_of(text):
    """Return the paragraphs and headings of a text that are in Japanese."""
    lines = [line.rpartition(" / ")[2] for line in text.splitlines()]
    return "\n".join(line if JAPANESE.search(line) else "" for line in lines)


def needs_colab(node):
    """Tell whether a node is of Colab alone: an import of google.colab, a line of the shell."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return "google" in ast.unparse(node)
    return isinstance(node, ast.Call) and contracts.last_name(node.func) == "get_ipython"


def is_guard(node):
    """Tell whether a node is `if COLAB:`, or that and more."""
    if not isinstance(node, ast.If):
        return False
    tests = node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]
    joined = not isinstance(node.test, ast.BoolOp) or isinstance(node.test.op, ast.And)
    return joined and any(getattr(test, "id", None) == "COLAB" for test in tests)


def unguarded(tree):
    """Return what of Colab's a tree does outside of `if COLAB:`, as text."""
    inside = set()
    for node in filter(is_guard, ast.walk(tree)):
        inside |= {id(each) for statement in node.body for each in ast.walk(statement)}
    found = [node for node in ast.walk(tree) if needs_colab(node) and id(node) not in inside]
    return [ast.unparse(node) for node in found]


# ---------------------------------------------------------------- as they lie there


def test_every_notebook_is_tested():
    assert set(PATHS) == set(TRAINERS)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_notebook_is_stored_without_outputs_in_a_form_that_stays(name):
    text = PATHS[name].read_text("utf-8")
    stored = json.loads(text)
    assert text == json.dumps(stored, ensure_ascii=False, indent=1) + "\n"
    nbformat.validate(stored)
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    assert stored["metadata"]["accelerator"] == "GPU"
    assert stored["metadata"]["kernelspec"]["name"] == "python3"
    for cell in stored["cells"]:
        assert re.fullmatch("[a-z]+(-[a-z]+)*", cell["id"])
        assert len(cell["source"]) <= 10, cell["id"]
        assert max(map(len, cell["source"])) <= (100 if cell["cell_type"] == "code" else 120)
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


@pytest.mark.parametrize("name", TRAINERS)
def test_headings_and_texts_are_in_english_and_japanese(name):
    texts = cells_of(name, "markdown")
    assert len(texts) > 8
    for key, text in texts.items():
        [heading] = re.findall("^#+ (.*)$", text, re.M)
        english, japanese = heading.split(" / ")
        assert english.isascii() and JAPANESE.search(japanese), key
        in_english, in_japanese = text.partition("\n")[2].split("\n\n")
        assert not JAPANESE.search(in_english) and JAPANESE.search(in_japanese), key
        for sentence in test_documents.sentences(in_english):
            assert len(test_documents.words(sentence)) <= 35, sentence


@pytest.mark.parametrize("name", TRAINERS)
def test_the_japanese_is_that_of_the_readme(name):
    japanese = "\n\n".join(map(japanese_of, cells_of(name, "markdown").values()))
    for term, (_, others) in test_readme_ja.GLOSSARY.items():
        assert re.findall(f".{{0,20}}(?:{others})", japanese) == [], term
    assert [each for each in test_readme_ja.sentences(japanese) if len(each) > 80] == []
    assert re.findall("[！-～｡-ﾟ]", japanese) == []
    kana = test_readme_ja.KANA_OR_KANJI
    side = f"{kana}[A-Za-z0-9`]|[A-Za-z0-9`]{kana}"
    assert re.findall(f".{{0,9}}(?:{side}).{{0,9}}", re.sub("`[^`]*`", "`", japanese)) == []
    ends = re.findall("([^。\n]*)。", japanese)
    assert len(ends) > 15
    assert [end for end in ends if not test_readme_ja.POLITE.search(end)] == []


@pytest.mark.parametrize("name", TRAINERS)
def test_one_switch_is_off_and_colab_is_found(name):
    assert bound_to(name, "TRIAL") == ["False"]
    assert bound_to(name, "COLAB") == ["'google.colab' in sys.modules"]
    assert bound_to(name, "ADDRESS") == ["'ADDRESS'"]
    assert [key for key, text in cells_of(name, "code").items() if HUB_ID.search(text)] == ["model"]


@pytest.mark.parametrize("name", TRAINERS)
def test_what_is_colabs_stands_behind_its_switch(name):
    trees = trees_of(name)
    assert [found for tree in trees.values() for found in unguarded(tree)] == []
    assert sum(needs_colab(node) for tree in trees.values() for node in ast.walk(tree)) > 4


def test_a_line_of_colab_outside_of_its_switch_is_found():
    guarded = "if COLAB and x:\n    import google.colab\n"
    assert unguarded(ast.parse(guarded)) == []
    assert len(unguarded(ast.parse(guarded.replace("and", "or")))) == 1
    assert len(unguarded(ast.parse(guarded + "else:\n    get_ipython().system('ls')\n"))) == 1


@pytest.mark.parametrize("name, trainer", TRAINERS.items())
def test_a_trainer_is_imported_once_where_the_restart_is_named(name, trainer):
    sources = cells_of(name, "code")
    [cell] = [
        key
        for key, text in sources.items()
        if re.search(r"import.*\btrain_|\btrain_\w+ import", text)
    ]
    assert sources[cell].splitlines()[-1] == f"from {trainer.__name__} import main"
    assert all(words in sources[cell] for words in RESTART)
    assert sum("import merge" in text for text in sources.values()) == 1


@pytest.mark.parametrize("name, trainer", TRAINERS.items())
def test_flags_are_those_of_the_scripts(name, trainer):
    texts = [node.value for node in nodes_of(name, ast.Constant) if isinstance(node.value, str)]
    used = {word for text in texts for word in text.split() if word.startswith("--")}
    options = [contracts.options_of(script) for script in (trainer, merge, ask, gguf_ollama)]
    declared = {flag for group in options for option in group for flag in option.option_strings}
    assert len(used) > 7
    assert used - {"--depth"} <= declared
    for trial in (True, False):
        scope = {"TRIAL": trial, "DATA": Path("pairs.csv"), "HOME": Path("home"), "Path": Path}
        exec(cells_of(name, "code")["model"], scope)
        arguments = [*scope["ARGUMENTS"], *scope.get("LENGTH", "").split(), "--output_dir", "out"]
        for start in ("--resume_from_checkpoint", "--overwrite"):
            trainer.parse_args([*arguments, start])


# ---------------------------------------------------------------- run


def linked_project(folder):
    """Make a folder of links to the project's files, in which runs/ is its own; return it."""
    (folder / "examples").mkdir(parents=True)
    for path in [*ROOT.iterdir(), *(ROOT / "examples").iterdir()]:
        if path.name not in ("examples", "runs", ".git"):
            (folder / path.relative_to(ROOT)).symlink_to(path)
    return folder


def run_trial(name, project, start):
    """Run a notebook with its switch on, in a kernel started in a folder; return its outputs.

    {id of a cell: the text of its streams, results and tables}
    """
    notebook = nbformat.read(project / f"examples/{name}.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("TRIAL = False", "TRIAL = True")
    resources = {"metadata": {"path": str(start)}}
    client = NotebookClient(notebook, timeout=200, kernel_name="python3", resources=resources)
    client.execute(env=os.environ | {"IPYTHONDIR": str(project / "ipython")})
    return {cell.id: shown(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"}


def shown(outputs):
    """Return the text of a cell's outputs."""
    texts = []
    for output in outputs:
        assert output.output_type != "error"
        data = output.get("data", {})
        texts.append(output.get("text") or data.get("text/html") or data.get("text/plain", ""))
    return "".join(texts)


def assert_short(name, outputs):
    """Only the log of a run, or of a merge, is longer than 60 lines."""
    for key, text in outputs.items():
        logs = re.search(r"\bmain\(", cells_of(name, "code")[key])
        assert logs or len(text.splitlines()) <= 60, key


def test_the_embedding_notebook_trains_searches_and_merges(tmp_path):
    project = linked_project(tmp_path / "project")
    outputs = run_trial("colab_embedding", project, project / "examples")
    assert_short("colab_embedding", outputs)
    home = project / "runs/lora_search/trial"
    report = json.loads((home / "run/training_summary_report.json").read_text("utf-8"))
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    assert after["ndcg@10"] > before["ndcg@10"]
    assert "example 1 query" in outputs["dry-run"] and "before," not in outputs["dry-run"]
    assert f"{after['ndcg@10']:.4f} after" in outputs["train"]
    found = outputs["search"].partition("How do I find a program on the PATH?\n")[2]
    first, *others = found.splitlines()
    assert "directories separated by 'os.pathsep'" in first and len(others) == 2
    assert outputs["search-merged"] == outputs["search"]
    assert "100.00% of the fine-tune kept" in outputs["merge"]
    assert json.loads((home / "merged/merge_report.json").read_text("utf-8"))["verified"]
    assert outputs["download"] == outputs["install"] == outputs["drive"] == ""


def test_the_sft_notebook_shows_masks_learns_and_merges(tmp_path):
    project = linked_project(tmp_path / "project")
    outputs = run_trial("colab_sft", project, project)
    assert_short("colab_sft", outputs)
    home = project / "runs/lora_json/trial"
    report = json.loads((home / "run/training_summary_report.json").read_text("utf-8"))
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    assert after["all_loss"] < before["all_loss"] - 1
    assert (before["hard_false_positive_rate"], after["hard_false_positive_rate"]) == (1, 0)
    assert {"all_f1", "hard_json_valid"} <= set(after) and "hard_f1" not in after
    assert report["data"]["dev"].keys() == {"all", "hard"}
    assert '[[{"to": ' in outputs["dry-run"] and "[[{}<|im_end|>]]" in outputs["dry-run"]
    assert "before, " not in outputs["dry-run"]
    assert "sanity    passed: exact match 100.0%" in outputs["sanity"]
    assert "hard_false_positive_rate 1.0000 before, 0.0000 after" in outputs["train"]
    assert outputs["ask"].splitlines()[2:] == ["Does Aiko like white mirrors?", "-> {}"]
    assert outputs["ask-merged"] == outputs["ask"]
    assert "100.00% of the fine-tune kept" in outputs["merge"]
    assert json.loads((home / "merged/merge_report.json").read_text("utf-8"))["verified"]
    assert outputs["gguf"] == outputs["download"] == outputs["install"] == ""

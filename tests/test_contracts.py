"""What keeps flags, documents and code in step, and the code as it is meant to be read."""

import argparse
import copy
import importlib.metadata
import io
import os
import re
import runpy
import statistics
import subprocess
import sys
import tokenize

import contracts
import merge
import train_embed_lora
import train_sft_lora
from conftest import ROOT
from density import code_files, density, over_all

import pytest

SCRIPTS = {"train_embed_lora": train_embed_lora, "train_sft_lora": train_sft_lora}
FLAG_TABLES = ROOT / "docs/flags.md"
FLAGS, PLAN = "parts/flags.py", "parts/plan.py"
SCRIPT_FILES = [f"{script}.py" for script in SCRIPTS]


def text_of(path):
    return (ROOT / path).read_text(encoding="utf-8")


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


ROOMS = names(sorted((ROOT / "parts").glob("*.py")))
CODE = names(code_files())  # scripts, merge.py, utils.py and the rooms
AROUND = names(
    path
    for folder in ("examples", "benchmarks", "docs")
    for path in sorted((ROOT / folder).glob("*.py"))
)


def module_of(path):
    return path.removesuffix(".py").replace("/", ".")


def broken(rule, paths, *more):
    """What breaks a rule in these files, a line each."""
    return "\n".join(sentence for path in paths for sentence in rule(path, text_of(path), *more))


# ---------------------------------------------------------------- flags and documents


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    declared = dict.fromkeys(option.dest for option in contracts.options_of(SCRIPTS[script]))
    assert len(declared) > 65
    read = set()
    for path in (f"{script}.py", FLAGS, PLAN):
        read |= contracts.flags_read(text_of(path))
    assert [name for name in declared if name not in read] == []


@pytest.mark.parametrize(
    "script, least", [("train_embed_lora", 65), ("train_sft_lora", 65), ("merge", 9)]
)
def test_every_flag_has_a_row_that_says_what_it_takes_and_its_default(script, least):
    [section] = re.findall(
        rf"^## {script}\.py\n(.*?)(?=^## |\Z)", FLAG_TABLES.read_text("utf-8"), re.M | re.S
    )
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:3] == "| `"]
    options = contracts.options_of({**SCRIPTS, "merge": merge}[script])
    assert len(rows) == len(options) >= least
    for option, (names_, takes, default, meaning) in zip(options, rows, strict=True):
        assert names_.split(" / ") == [f"`{name}`" for name in option.option_strings]
        assert meaning, names_
        assert (takes == "switch") == (option.nargs == 0), names_
        assert {str(choice) for choice in option.choices or ()} <= set(re.split("[,;] ?", takes))
        says_another_word = option.dest == "pooling"  # auto is what the base has
        if option.default not in (None, argparse.SUPPRESS) and not says_another_word:
            if option.nargs != 0:
                assert default.split(":")[0] == str(option.default), names_


def test_the_tables_of_flags_are_current_and_made_without_torch(tmp_path):
    for library in LIBRARIES:
        (tmp_path / f"{library}.py").write_text(f"raise AssertionError('imports {library}')\n")
    made = tmp_path / "flags.md"
    command = [sys.executable, str(ROOT / "docs/make_flags.py"), str(made)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for table in (FLAG_TABLES, FLAG_TABLES.with_suffix(".ja.md")):
        assert (tmp_path / table.name).read_text("utf-8") == table.read_text("utf-8"), (
            "run: make docs"
        )
    for key in runpy.run_path(str(ROOT / "docs/make_flags.py"))["NOTES"]:
        assert f"\n| `{key.split()[-1]}`" in made.read_text("utf-8"), "a note on no flag"
    assert "](docs/flags.md)" in (ROOT / "README.md").read_text("utf-8")


def test_merge_reads_every_flag():
    read = contracts.flags_read(text_of("merge.py"))
    options = contracts.options_of(merge)
    assert [option.dest for option in options if option.dest not in read] == []
    assert merge.CHOICES == ("auto", *merge.DTYPES)


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


# ---------------------------------------------------------------- the parsed command line


def test_nothing_writes_into_the_parsed_command_line():
    others = [path for path in CODE if path != FLAGS]
    assert broken(contracts.namespace_writes, others) == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_leaves_the_parsed_command_line_as_it_was(script, run_embed, run_sft, monkeypatch):
    module, parsed = SCRIPTS[script], []
    parse_args = module.parse_args

    def keep(argv=None):
        args = parse_args(argv)
        parsed.append((args, copy.deepcopy(vars(args))))
        return args

    monkeypatch.setattr(module, "parse_args", keep)
    run = run_embed if module is train_embed_lora else run_sft
    run("--max_steps", 1, "--max_length", 9999, "--dev_sample_limit", 4)  # lowered to the base's
    assert 9999 in [before["max_length"] for _, before in parsed]
    for args, before in parsed:
        assert vars(args) == before


def test_rooms_take_values_and_never_the_command_line():
    rooms = [path for path in ROOMS if path not in (FLAGS, PLAN)]
    assert broken(contracts.namespace_holders, [*rooms, "utils.py"]) == ""


def test_merge_hands_values_on():
    exempt = ("parse_args", "make_job", "main")
    assert broken(contracts.namespace_holders, ["merge.py"], exempt, False) == ""


def test_only_those_that_declare_flags_import_argparse():
    types = "parts/flag_types.py"
    others = [path for path in [*ROOMS, "utils.py"] if path not in (FLAGS, types)]
    reason = "flags are declared in the scripts, parts/flags.py and parts/flag_types.py"
    assert broken(contracts.forbidden_imports, others, ["argparse"], reason) == ""


# ---------------------------------------------------------------- arrows

LIBRARIES = ["torch", "transformers", "datasets", "peft", "accelerate", "safetensors"]
MODELS = ["parts.base", "parts.behaviour", "parts.adapters", "parts.step", "parts.causal"]
OF_CHATS = ["messages", "formats", "chats", "trials", "template", "pieces", "masks", "samples"]
OF_FILES = [
    "rows",
    "corpus",
    "beir",
    "splits",
    "token_cache",
    "pairs",
    "relevance",
    "chats",
    "dev_sets",
    "checkpoints",
    "report",
]
ARROWS = {
    "utils is below all": (["utils.py"], ["parts", "merge", *SCRIPTS]),
    "nobody imports a script": ([*ROOMS, "merge.py", *SCRIPT_FILES], list(SCRIPTS)),
    "only parts/run.py imports merge": (
        [path for path in CODE if path not in ("parts/run.py", "merge.py")],
        ["merge"],
    ),
    "merge.py stands alone": (["merge.py"], ["utils", "parts"]),
    "flags, plan and scores are pure": (
        [FLAGS, "parts/flag_types.py", PLAN, "parts/scores.py"],
        LIBRARIES,
    ),
    "template and masks know a tokenizer and no model": (
        [f"parts/{room}.py" for room in OF_CHATS],
        [*MODELS, "parts.preference"],
    ),
    "step knows no files": (["parts/step.py"], [f"parts.{room}" for room in OF_FILES]),
}


@pytest.mark.parametrize("reason", ARROWS)
def test_imports_go_one_way(reason):
    paths, packages = ARROWS[reason]
    there = [path for path in paths if (ROOT / path).exists()]
    assert len(there) >= 1
    assert broken(contracts.forbidden_imports, there, packages, reason) == ""


def texts_of_ours():
    paths = [path for path in CODE if path != "merge.py" and path not in SCRIPT_FILES]
    return {module_of(path): text_of(path) for path in paths}


def test_no_rooms_import_one_another_in_a_circle():
    assert contracts.circles(texts_of_ours()) == []


def test_utils_quiets_libraries_before_any_room_imports_them():
    assert contracts.unquieted(texts_of_ours()) == []


def test_flags_are_parsed_without_torch():
    code = (
        "import sys, parts.flags, parts.plan, parts.scores, utils\n"
        f"print(*sorted(sys.modules.keys() & {set(LIBRARIES)}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# ---------------------------------------------------------------- sizes


def test_a_room_fits_into_400_lines():
    assert broken(contracts.too_tall, ROOMS) == ""


def test_a_function_fits_into_40_lines():
    assert broken(contracts.long_functions, CODE) == ""


def test_a_flag_takes_one_or_two_lines():
    assert broken(contracts.tall_flags, [*SCRIPT_FILES, FLAGS]) == ""


def test_a_line_fits_into_100_columns():
    assert broken(contracts.long_lines, [*CODE, *AROUND]) == ""


def test_no_generator_is_unpacked_into_names():
    assert broken(contracts.unpacked_generators, CODE) == ""


def test_a_statement_does_one_thing():
    found = {path: density(ROOT / path) for path in CODE if text_of(path)}
    worst = max(found, key=lambda path: found[path]["nodes"])
    nodes = [each["nodes"] for each in found.values()]
    totals = over_all(list(found.values()))
    said = f"densest: {worst} with {max(nodes):.1f} nodes a statement; over all: {totals}"
    print(said)
    assert statistics.median(nodes) <= 12.5 and max(nodes) <= 14, said
    assert totals["comprehensions"] <= 7 and totals["packed"] <= 2, said
    assert not any(each["unpacked_generators"] for each in found.values())


def banners_of(path):
    """The banners of a file, from its comments: what is in a text is none."""
    tokens = tokenize.generate_tokens(io.StringIO(text_of(path)).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return [found[1] for comment in comments if (found := re.match(r"# -{10,} (.*)$", comment))]


def test_both_trainers_have_the_same_banners_in_the_same_order():
    banners = [banners_of(path) for path in SCRIPT_FILES]
    common = [name for name in banners[0] if name in banners[1]]
    assert common == [name for name in banners[1] if name in banners[0]]
    assert {"arguments", "data", "loss and metrics", "training", "main"} <= set(common)


# ---------------------------------------------------------------- the rules themselves can fail

MAIN = "def main(argv):\n    args = parse_args(argv)\n    {}\n"


@pytest.mark.parametrize(
    "line",
    [
        "args.lr = 1",
        "args.lr += 1",
        "args.lr: float = 1",
        "args.lr, other = 1, 2",
        "del args.lr",
        "args |= {'lr': 1}",
        "for args.lr in (1, 2): pass",
        "with open('x') as args.file: pass",
        "setattr(args, 'lr', 1)",
        "object.__setattr__(args, 'lr', 1)",
        "args.__setattr__('lr', 1)",
        "delattr(args, 'lr')",
        "vars(args)['lr'] = 1",
        "del vars(args)['lr']",
        "vars(args).update(lr=1)",
        "args.__dict__['lr'] = 1",
        "args.__dict__ |= {'lr': 1}",
        "other = args; other.lr = 1",
        "other, notes = parse_args(argv), []; other.lr = 1",
        "kept = vars(args); kept['lr'] = 1",
        "kept = vars(args); kept |= {'lr': 1}",
        "self.flags.lr = 1",
        "trainer.flags.lr = 1",
    ],
)
def test_a_write_into_the_command_line_is_found(line):
    found = contracts.namespace_writes("x.py", MAIN.format(line))
    assert found and found[0].startswith("x.py:3: ")


def test_what_is_no_write_into_the_command_line_is_left_alone():
    for line in (
        "lr = args.lr",
        "describe(vars(args) | {'lr': 1})",
        "trainer.args.max_steps = 3",
        "plan.lr = args.lr",
        "kept = dict(vars(args)); kept['lr'] = 1",
    ):
        assert contracts.namespace_writes("x.py", MAIN.format(line)) == []
    own = "def parse_args(argv):\n    args = parser.parse_args(argv)\n    args.lr = 1\n"
    assert contracts.namespace_writes("x.py", own) == []
    callback = "class A(TrainerCallback):\n    def {}(self, args): args.save_total_limit = None\n"
    assert contracts.namespace_writes("x.py", callback.format("on_step_end")) == []
    assert contracts.namespace_writes("x.py", callback.format("load"))


@pytest.mark.parametrize(
    "text",
    [
        "def load(args): pass",
        "def load(*, flags=None): pass",
        "def load(**args): pass",
        "def load(*flags): pass",
        "load = lambda args: 1",
        "async def load(args): pass",
        "def load(): args = 1",
        "def load(): return flags.lr",
        "class A:\n    args: object",
        "class A:\n    def f(self): return self.args.lr",
        "class A:\n    def on_log(self, args): pass",
        "class A(Trainer):\n    def __init__(self, flags): pass",
        "class A(Trainer):\n    def __init__(self, x): self.args = x",
        "class A(Trainer):\n    def f(self): return self.flags.lr",
        "class A(TrainerCallback):\n    def on_log(self, flags): pass",
        "class A(TrainerCallback):\n    def load(self, args): pass",
        "class A(TrainerCallback):\n    def f(self): return self.args.lr",
        "def load(run): return run.args.lr",
        "def load(trainer, x): trainer.args = x",
        "def load(x): return SimpleNamespace(args=x)",
        "def load(x): setattr(x, 'args', 1)",
        "def load(x): return getattr(x, 'flags')",
    ],
)
def test_a_room_that_holds_the_command_line_is_found(text):
    found = contracts.namespace_holders("x.py", text)
    assert found and re.match(r"x\.py:[12]: ", found[0])


def test_what_is_trainers_own_is_left_alone():
    text = """
class OurTrainer(StepTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.device = self.args.device

class Bar(ProgressCallback):
    def on_log(self, args, state, control, **kwargs):
        super().on_log(args, state, control, lr=args.learning_rate)

def make(trainer_class, arguments, record):
    trainer = trainer_class(args=arguments)
    Thread(target=ask, args=(record["flags"],)).start()
    return OurTrainer(args=arguments), trainer.args.seed, re.sub("a", "b", "c", flags=re.I)
"""
    assert contracts.namespace_holders("x.py", text) == []


def test_merge_may_name_a_variable_flags_and_no_parameter():
    exempt = ("make_job",)
    fine = "def make_job(args):\n    return args.x\ndef load(x):\n    flags = x\n    return flags\n"
    assert contracts.namespace_holders("x.py", fine, exempt, False) == []
    for text in ("def load(args): pass", "x = job.args", "class Job:\n    flags: dict"):
        assert contracts.namespace_holders("x.py", text, exempt, False)


@pytest.mark.parametrize(
    "text, module",
    [
        ("import torch", "torch"),
        ("import torch.nn as nn", "torch"),
        ("from torch import nn", "torch"),
        ("def f():\n    from torch.nn import functional", "torch"),
        ("from parts import base", "parts.base"),
        ("from parts.base import load", "parts.base"),
        ("import parts.base", "parts.base"),
        ("from . import base", "parts.base"),
    ],
)
def test_an_import_against_the_arrows_is_found(text, module):
    assert contracts.forbidden_imports("x.py", text, [module], "it must not")
    assert contracts.forbidden_imports("x.py", text, [f"{module}s"], "it must not") == []


def test_circles_and_unquieted_libraries_are_found():
    rooms = {
        "utils": "import os",
        "parts.a": "from parts import b",
        "parts.b": "import json\ndef f():\n    from parts.c import x",
        "parts.c": "import parts.a\nimport utils",
        "parts.d": "import torch\nimport utils",
        "parts.e": "from parts.f import x\nimport torch",
        "parts.f": "import utils",
        "parts.g": "from parts.h import x\nimport utils",
        "parts.h": "import torch",
        "parts.i": "import merge\nimport utils\nimport torch",
    }
    assert contracts.circles(rooms) == ["parts.a -> parts.b -> parts.c -> parts.a"]
    late = contracts.unquieted({name: rooms[name] for name in rooms if name[-1] not in "abc"})
    assert [sentence.split(":")[0] for sentence in late] == ["parts.d", "parts.g", "parts.h"]


def test_what_is_too_long_is_found():
    long = "def f():\n" + "    x = 1\n" * 40
    assert contracts.long_functions("x.py", long) == ["x.py:1: f has 41 lines, 40 are the limit"]
    assert contracts.long_functions("x.py", long[:-10]) == []
    decorated = "@cached\n" + long[:-10]
    assert contracts.long_functions("x.py", decorated)
    table = "# fmt: off\n" + long.replace("x = 1", 'add = p.add_argument_group("x").add', 1)
    assert contracts.long_functions("x.py", table + "# fmt: on\n") == []
    assert contracts.long_functions("x.py", table)  # it is not switched on again
    assert contracts.long_functions("x.py", "# fmt: off\n" + long + "# fmt: on\n")
    assert contracts.tall_flags("x.py", '# fmt: off\nadd("--a",\n    b=1,\n    c=2)\n# fmt: on\n')
    assert contracts.long_lines("x.py", "\n" + "x" * 101) == [
        "x.py:2: 101 columns, 100 are the limit"
    ]
    assert contracts.too_tall("x.py", "\n" * 401) and not contracts.too_tall("x.py", "\n" * 400)
    assert contracts.unpacked_generators("x.py", "a, b = (f(x) for x in y)")


def test_a_flag_that_only_gets_a_default_is_not_read():
    assert contracts.flags_read("args.lr = args.lr or 2e-4") == set()
    assert contracts.flags_read("x = args.lr, getattr(args, 'seed')") == {"lr", "seed"}
    assert contracts.flags_read("x = length_of(args, 'max_length', f('other'))") == {"max_length"}

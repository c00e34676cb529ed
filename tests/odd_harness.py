"""What runs the rows of odd_inputs.py: a fork for each of a process that has imported everything."""

import argparse
import ctypes
import json
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from conftest import ROOT, make_chats, make_rows, save_tiny_bert, save_tiny_chat, write_jsonl  # noqa: E402

import torch  # noqa: E402

torch.set_num_threads(1)
SECONDS = 30  # that a row may take
SHORT_RUN = "--max_steps 2 --checkpoint_steps 1 --dev_size 0 --lr 1e-2 --report_to none"
SCRIPTS = {"embed": "train_embed_lora.py", "sft": "train_sft_lora.py", "merge": "merge.py"}


@dataclass
class Row:
    """An odd input: the files it writes, the flags it passes, the exit code and the words it ends in.

    files: {path: content}; a list is JSON Lines, a dict changes a JSON file (None takes a key away), None takes it
    away, a function is called with the path. copies: {folder: part of the kitchen}, made first. `{k}` in the flags is
    the kitchen. before: called in the fork, returns {name: value} for the flags. check: called with folder and output
    where all else is as it should be, returns what is wrong or None. without: default flags that are not passed.
    file_bytes: no file may become larger, as on a full disk.
    """

    name: str
    script: str
    flags: str
    code: int
    says: str
    files: dict = field(default_factory=dict)
    copies: dict = field(default_factory=dict)
    without: tuple = ()
    before: object = None
    check: object = None
    file_bytes: int | None = None

    @property
    def argv(self):
        """The flags as a shell would split them."""
        return shlex.split(self.flags)

    def write(self, folder, kitchen):
        """Write the row's files."""
        for name, source in self.copies.items():
            shutil.copytree(kitchen / source, folder / name)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)


def write_file(path, content):
    """Write one file of a row."""
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        stored = json.loads(path.read_text()) if path.exists() else {}
        changed = {key: value for key, value in (stored | content).items() if value is not None}
        path.write_text(json.dumps(changed))
    elif isinstance(content, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def build_kitchen(folder):
    """Write what the rows start from: two models, training files, a finished run of each trainer, a merged model."""
    (folder / "bert").mkdir(parents=True)
    (folder / "chat").mkdir()
    save_tiny_bert(str(folder / "bert"))
    save_tiny_chat(str(folder / "chat"))
    write_jsonl(folder / "pairs.jsonl", make_rows(24))
    write_jsonl(folder / "chats.jsonl", make_chats(24))
    turns = [row["messages"] for row in make_chats(24)]
    pairs = [
        {"prompt": m[-2]["content"], "chosen": m[-1]["content"], "rejected": "no"} for m in turns
    ]
    write_jsonl(folder / "preferences.jsonl", pairs)
    for script, model, data in (("embed", "bert", "pairs"), ("sft", "chat", "chats")):
        flags = f"--model_name {folder}/{model} --train_file {folder}/{data}.jsonl {SHORT_RUN}"
        start(script, [*flags.split(), "--output_dir", str(folder / f"{script}_run")])


def start(script, flags):
    """Start a script as a shell would, in this process."""
    sys.argv = [SCRIPTS[script], *flags]
    runpy.run_path(str(ROOT / SCRIPTS[script]), run_name="__main__")


def forked(work, output, seconds):
    """Run work() in a fork that writes to the file `output`; return its exit code, or None after `seconds`."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def drop_capabilities():
    """Make root obey file permissions, as everybody does (Linux)."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


def flags_of(row, kitchen, values):
    """Return the row's flags, with the defaults that it does not name itself; `values` fill in what is in braces."""
    given = row.argv
    for name, value in {"k": kitchen, **values}.items():
        given = [flag.replace(f"{{{name}}}", str(value)) for flag in given]
    if row.script == "merge":
        defaults = {"--lora_adapter_path": f"{kitchen}/embed_run/final", "--output_path": "out"}
    else:
        model, data = ("bert", "pairs") if row.script == "embed" else ("chat", "chats")
        defaults = {
            "--train_file": f"{kitchen}/{data}.jsonl",
            "--output_dir": "out",
            "--report_to": "none",
            "--dev_size": "0",
            "--max_steps": "1",
            "--model_name": f"{kitchen}/{model}",
        }
        replaced = {
            "--init_adapter": "--model_name",
            "--dataset_name": "--train_file",
            "--eval_only": "--train_file",
            "--model_name_or_path": "--model_name",
        }
        for flag in {*row.argv, *row.without} & replaced.keys():
            defaults.pop(replaced[flag])
    added = [
        text
        for name, value in defaults.items()
        if name not in {*given, *row.without}
        for text in (name, value)
    ]
    return [*given, *added]


def run_row(row, kitchen, folder):
    """Run one row in `folder`; return (what is wrong with how it ended or None, seconds, its output)."""
    folder.mkdir(parents=True)
    row.write(folder, kitchen)

    def work():
        os.chdir(folder)
        drop_capabilities()
        if row.file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (row.file_bytes, row.file_bytes))
        values = row.before() if row.before else {}
        start(row.script, flags_of(row, kitchen, values))

    began = time.monotonic()
    output = folder.with_suffix(".txt")
    code = forked(work, output, SECONDS)
    text = output.read_text(errors="replace")
    seconds = time.monotonic() - began
    wrong = fault(row, code, text)
    if not wrong and row.check:
        wrong = row.check(folder, text)
    return wrong, seconds, text


def fault(row, code, text):
    """Return what is wrong with an exit code and an output, or None."""
    said = " ".join(text.split())
    if code is None:
        return f"no end after {SECONDS} s"
    if "Traceback" in text:
        return "a traceback"
    if code != row.code:
        return f"exit {code}, not {row.code}"
    if row.says not in said:
        return f"does not say {row.says!r}"
    if row.code:
        errors = [line for line in text.splitlines() if re.match(r"(\w+\.py: )?error\b", line)]
        if len(errors) != 1:
            return f"{len(errors)} lines of error, not one"
        if row.says not in errors[0]:
            return f"the error does not say {row.says!r}"
        if not 20 < len(errors[0]) < 700:
            return f"an error of {len(errors[0])} characters"
    return None


def spread(rows, count):
    """Return `count` rows, always the same: one of each script and kind, the others at even distances."""
    first = {}
    for row in rows:
        first.setdefault((row.script, row.name.partition(":")[0]), row)
    chosen = list(first.values())
    rest = [row for row in rows if row not in chosen]
    more = min(count - len(chosen), len(rest))
    return chosen + [rest[math.floor(i * len(rest) / more)] for i in range(more)]


def main(all_rows, description):
    """Run the rows that the command line asks for; exits 1 if one ends otherwise than it says."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sample", type=int, metavar="N", help="run N rows, always the same [all]")
    parser.add_argument(
        "--only", metavar="REGEX", help="run the rows whose name matches, and print their output"
    )
    args = parser.parse_args()
    rows = [row for row in all_rows if re.search(args.only or "", row.name)]
    rows = spread(rows, args.sample) if args.sample else rows
    began, failed, times = time.monotonic(), [], {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        if forked(lambda: build_kitchen(folder / "kitchen"), folder / "kitchen.txt", 120) != 0:
            sys.exit((folder / "kitchen.txt").read_text())
        for i, row in enumerate(rows):
            wrong, times[row.name], text = run_row(row, folder / "kitchen", folder / f"row{i}")
            if args.only:
                print(f"---- {row.script} {row.name}: {wrong or 'as it says'}\n{text}")
            if wrong:
                failed.append((row, wrong, text))
            shutil.rmtree(folder / f"row{i}", ignore_errors=True)
    for row, wrong, text in failed:
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        print(f"{row.script:6} {row.name:48} {wrong}\n       {last[:230]}")
    slowest = sorted(times, key=times.get)[-3:]
    print(
        f"{len(rows)} rows, {len(failed)} failed, {time.monotonic() - began:.0f} s; slowest: "
        + ", ".join(f"{name} {times[name]:.1f} s" for name in slowest)
    )
    sys.exit(bool(failed))

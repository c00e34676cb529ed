"""Run the three scripts on inputs that nobody would write on purpose: each ends in one sentence, or in a result.

    python tests/odd_inputs.py                    every row, and a table of those that failed
    python tests/odd_inputs.py --sample 40        as many, spread over scripts and kinds
    python tests/odd_inputs.py --only "bom"       those whose name matches a regular expression, with their output

A row names the files it writes, the flags it passes, and what it ends in. All libraries are imported once; each row is
a fork of that process, in a folder of its own, which starts the script as a shell would.
"""

import datetime
import http.server
import json
import os
import shutil
import threading
from pathlib import Path

from odd_harness import SHORT_RUN, Row, main, make_chats, make_rows

import torch
from safetensors.torch import load_file, save_file

GOOD_PAIRS = make_rows(8)
GOOD_CHATS = make_chats(8)
PAIR = {"query": "where is the apple", "pos": ["on the chair"]}


# ---------------------------------------------------------------- makers of files


def embed_data(name, code, says, content, kind="jsonl", flags="--dry_run", **more):
    """A training file of the embedding trainer."""
    return Row(
        f"pairs: {name}",
        "embed",
        f"--train_file rows.{kind} {flags}",
        code,
        says,
        {f"rows.{kind}": content},
        **more,
    )


def sft_data(name, code, says, content, kind="jsonl", flags="--dry_run", **more):
    """A training file of the SFT trainer."""
    return Row(
        f"chats: {name}",
        "sft",
        f"--train_file rows.{kind} {flags}",
        code,
        says,
        {f"rows.{kind}": content},
        **more,
    )


def embed_flags(name, code, says, flags, **more):
    """Flags of the embedding trainer."""
    return Row(f"flags: {name}", "embed", flags, code, says, **more)


def sft_flags(name, code, says, flags, **more):
    """Flags of the SFT trainer."""
    return Row(f"flags: {name}", "sft", flags, code, says, **more)


def embed_model(name, code, says, files, flags="--dry_run", **more):
    """A changed base of the embedding trainer."""
    files = {f"model/{path}": content for path, content in files.items()}
    return Row(
        f"base: {name}",
        "embed",
        f"--model_name model {flags}",
        code,
        says,
        files,
        {"model": "bert"},
        **more,
    )


def sft_model(name, code, says, files, flags="--dry_run", **more):
    """A changed base of the SFT trainer."""
    files = {f"model/{path}": content for path, content in files.items()}
    return Row(
        f"base: {name}",
        "sft",
        f"--model_name model {flags}",
        code,
        says,
        files,
        {"model": "chat"},
        **more,
    )


def merge_adapter(name, code, says, files, flags="", source="embed_run/final", **more):
    """A changed adapter."""
    files = {f"adapter/{path}": content for path, content in files.items()}
    return Row(
        f"adapter: {name}",
        "merge",
        f"--lora_adapter_path adapter {flags}",
        code,
        says,
        files,
        {"adapter": source},
        **more,
    )


def merge_base(name, code, says, files, flags="", **more):
    """A changed base under a good adapter."""
    files = {f"model/{path}": content for path, content in files.items()}
    return Row(
        f"base: {name}",
        "merge",
        f"--base_model_path model {flags}",
        code,
        says,
        files,
        {"model": "bert"},
        **more,
    )


def cut_to(size):
    """Keep the first bytes of a file."""
    return lambda path: os.truncate(path, size)


def lines(*rows):
    """JSON Lines after eight good pairs, to stand as text."""
    return "".join(json.dumps(row) + "\n" for row in [*GOOD_PAIRS, *rows])


def chat(*turns, **more):
    """Eight good chats and one of these turns (role, content)."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return [*GOOD_CHATS, {"messages": messages, **more}]


def encoded(text, encoding):
    """Text as bytes."""
    return text.encode(encoding)


def tensors(change):
    """Rewrite a safetensors file with change({name: tensor})."""

    def rewrite(path):
        found = load_file(path)
        changed = change(found)
        save_file(found if changed is None else changed, path, {"format": "pt"})

    return rewrite


def with_value(name_part, value):
    """Set the first value of the first tensor whose name has `name_part`."""

    def change(found):
        name = next(name for name in sorted(found) if name_part in name)
        found[name].view(-1)[0] = value

    return tensors(change)


def parquet(**columns):
    """Write a parquet file of these columns."""

    def write(path):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), path)

    return write


def no_permission(path):
    """Write pairs that nobody may read."""
    path.write_text(lines())
    path.chmod(0)


def broken_parquet(path):
    """Write parquet whose data pages are noise."""
    parquet(query=TEXTS, pos=ANSWERS)(path)
    data = bytearray(path.read_bytes())
    data[8:200] = bytes(range(1, 193))
    path.write_bytes(data)


def broken_footer(path):
    """Write parquet whose footer is noise."""
    parquet(query=TEXTS, pos=ANSWERS)(path)
    data = bytearray(path.read_bytes())
    data[-300:-8] = bytes(292)
    path.write_bytes(data)


def locked(path):
    """Make a folder in which nothing may be written."""
    path.mkdir()
    path.chmod(0o555)


def deep(levels):
    """Return a tool whose parameters are objects in objects."""
    inner = {"type": "string"}
    for _ in range(levels):
        inner = {"type": "object", "properties": {"x": inner}}
    return [{"type": "function", "function": {"name": "f", "parameters": inner}}]


def serve(answer):
    """Start a server in a thread that answers everything with `answer`; return {"port": its port}."""
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {"port": server.server_port}


def earlier_merge_is_there(folder, text):
    """Tell what is wrong if a merge that failed took the earlier one away, or left something behind."""
    left = sorted(path.name for path in folder.iterdir())
    return (
        None if left == ["out"] and (folder / "out/merge_report.json").exists() else f"left {left}"
    )


def first_checkpoint_is_there(folder, text):
    """Tell what is wrong if a run on a full disk lost its last complete checkpoint."""
    stored = json.loads((folder / "run/checkpoint-1/trainer_state.json").read_text())
    return None if stored["global_step"] == 1 else "checkpoint-1 is another"


RESUMED = (
    "--model_name {k}/bert --train_file {k}/pairs.jsonl --output_dir run --resume_from_checkpoint "
    + SHORT_RUN
)
TYPED = ("--max_steps", "--dev_size")
NAN, INF = float("nan"), float("inf")
DATES = [datetime.date(2026, 1, 1)] * 8
ENDPOINT = (
    "--eval_only --endpoint http://127.0.0.1:{port} --dev_file {k}/chats.jsonl --dev_sample_limit 2"
)
TEXTS = [row["query"] for row in GOOD_PAIRS]
ANSWERS = [row["pos"][0] for row in GOOD_PAIRS]
CSV = "query,pos\n" + "".join(f"{q},{p}\n" for q, p in zip(TEXTS, ANSWERS, strict=True))
LOOP = "{{% for i in range(99999) %}}{{% for j in range(99999) %}}{}{{% endfor %}}{{% endfor %}}"
DOUBLING = (
    "{% set n = namespace(x='x') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}"
)
OK_PAIRS, OK_CHATS = "rehearsal of", "rehearsal of"

# ---------------------------------------------------------------- rows

EMBED_DATA = [
    embed_data(
        "labels 0 and 1",
        0,
        "label = label",
        [{**PAIR, "pos": f"{i}", "label": i % 2} for i in range(8)]
        + [{"query": f"{i} is where", "pos": f"here {i}", "label": "1"} for i in range(8)],
    ),
    embed_data(
        "labels of three kinds", 1, "3 different numbers", [{**PAIR, "score": i} for i in range(3)]
    ),
    embed_data(
        "a label of 400 digits",
        1,
        "2 different numbers",
        [{**PAIR, "label": i} for i in (1, 10**400)],
    ),
    embed_data("a key twice", 1, 'called "pos"', '{"query": "a", "pos": "b", "pos": "c"}\n'),
    embed_data("a column twice", 1, 'called "query"', "query,pos,query\na,b,c\n", "csv"),
    embed_data(
        "a list as Python prints it", 1, "with json.dumps", "query\tpos\na\t['b', 'c']\n", "tsv"
    ),
    embed_data("two prompts in a row", 1, "2 prompts in one row", [{**PAIR, "prompt": ["a", "b"]}]),
    embed_data(
        "prompts and --query_prefix",
        1,
        "has a prompt of its own",
        [{**PAIR, "prompt": "Find: "}] * 2,
        flags="--query_prefix x",
    ),
    embed_data(
        "an id in place of a passage",
        1,
        "an id rather than a text",
        [{**PAIR, "pos": [{"docid": "7"}]}],
    ),
    embed_data("an empty file", 1, "holds no rows", ""),
    embed_data("blank lines alone", 1, "holds no rows", "\n \n\n"),
    embed_data("a byte order mark", 0, OK_PAIRS, encoded(lines(), "utf-8-sig")),
    embed_data("Windows line ends", 0, OK_PAIRS, lines().replace("\n", "\r\n")),
    embed_data("no last line end", 0, OK_PAIRS, lines().rstrip("\n")),
    embed_data("a line that is no JSON", 1, "line 9: no valid JSON", lines() + "{query: 1}\n"),
    embed_data("half a line", 1, "line 9: no valid JSON", lines() + '{"query": "a", "po'),
    embed_data("a line that is a list", 1, "line 9: a list, not a JSON object", lines(["a", "b"])),
    embed_data("a line that is a text", 1, "line 9: a str, not a JSON object", lines("a")),
    embed_data("a line that is null", 1, "line 9: a NoneType, not a JSON object", lines(None)),
    embed_data("UTF-16", 1, "but UTF-16. Save it as UTF-8", encoded(lines(), "utf-16")),
    embed_data("a NUL inside a text", 0, OK_PAIRS, lines({"query": "a\0b", "pos": ["c\0d"]})),
    embed_data(
        "half an emoji", 0, OK_PAIRS, lines() + '{"query": "\\ud83d", "pos": ["x \\ude00"]}\n'
    ),
    embed_data("an array", 0, OK_PAIRS, json.dumps(GOOD_PAIRS), "json"),
    embed_data("an array of lists", 1, "row 1: a list, not a JSON object", '[["a", "b"]]', "json"),
    embed_data("an empty array", 1, "holds no rows", "[]", "json"),
    embed_data("a known ending in capitals", 0, OK_PAIRS, lines(), "JSONL"),
    embed_data("an unknown ending", 1, "is none of .jsonl", lines(), "txt"),
    embed_data("a spreadsheet", 1, "is none of .jsonl", b"PK\x03\x04", "xlsx"),
    embed_data("CSV", 0, OK_PAIRS, CSV, "csv"),
    embed_data("CSV with semicolons", 0, OK_PAIRS, CSV.replace(",", ";"), "csv"),
    embed_data("CSV of one line", 1, "holds no rows", "query,pos\n", "csv"),
    embed_data("CSV with a short row", 1, "not the 2 columns", CSV + "alone\n", "csv"),
    embed_data("CSV with a long row", 1, "not the 2 columns", CSV + "a,b,c\n", "csv"),
    embed_data("CSV with an open quote", 1, "unexpected end of data", CSV + '"a,b\n', "csv"),
    embed_data("CSV with a text after a quote", 1, "Double the quotes", CSV + '"a"b,c\n', "csv"),
    embed_data("CSV with line ends in a cell", 0, OK_PAIRS, CSV + '"a\nb","c\n\nd"\n', "csv"),
    embed_data("TSV", 0, OK_PAIRS, CSV.replace(",", "\t"), "tsv"),
    embed_data("parquet", 0, OK_PAIRS, parquet(query=TEXTS, pos=ANSWERS), "parquet"),
    embed_data(
        "parquet with empty cells",
        0,
        OK_PAIRS,
        parquet(query=[*TEXTS, None], pos=[*ANSWERS, None]),
        "parquet",
    ),
    embed_data("no parquet", 1, "is no parquet file", lines(), "parquet"),
    embed_data("parquet of no bytes", 1, "is no parquet file", b"", "parquet"),
    embed_data(
        "numbers as queries", 1, "an id rather than a text", lines({"query": 7, "pos": ["a"]})
    ),
    embed_data("true as a document", 1, "is the bool True", lines({"query": "a", "pos": [True]})),
    embed_data(
        "digits alone",
        1,
        "ids rather than texts",
        [{"query": str(i), "pos": "a b"} for i in range(9)],
    ),
    embed_data(
        "two queries in a row",
        1,
        "2 queries in one row",
        lines({"query": ["a", "b"], "pos": ["c"]}),
    ),
    embed_data("no query at all", 1, "no query (fields:", [{"pos": ["a"]}] * 3),
    embed_data(
        "a column that may be two",
        1,
        "2 columns could be the positive",
        [{"query": "a", "pos": "b", "answer": "c"}],
    ),
    embed_data(
        "empty texts",
        0,
        "2 rows with an empty",
        lines({"query": " ", "pos": ["a"]}, {"query": "\t", "pos": "b"}),
    ),
    embed_data(
        "texts of nothing that is seen",
        0,
        "2 rows with an empty",
        lines({"query": "\u200b", "pos": ["a"]}, {"query": "\ufeff \0", "pos": ["b"]}),
    ),
    embed_data(
        "no positive in any row", 1, "Add rows", [{"query": f"a {i}", "pos": []} for i in range(9)]
    ),
    embed_data("one row many times", 1, "Add rows", [PAIR] * 20),
    embed_data(
        "the same query with many answers",
        1,
        "nothing to tell apart",
        [{"query": "a", "pos": [f"b {i}"]} for i in range(9)],
    ),
    embed_data(
        "the same answer to many queries",
        1,
        "nothing to tell apart",
        [{"query": f"a {i}", "pos": ["b"]} for i in range(9)],
    ),
    embed_data(
        "a megabyte in a text",
        0,
        OK_PAIRS,
        lines({"query": "apple " * 170000, "pos": ["chair " * 170000]}),
    ),
    embed_data(
        "emoji, Arabic, no-width space",
        0,
        OK_PAIRS,
        lines({"query": "👩‍👩‍👧 ሀ مرحبا", "pos": ["\u200b x \u202e y"]}),
    ),
    embed_data("a folder of that name", 1, "Is a directory", Path.mkdir),
    embed_data("links in a circle", 1, "symbolic links", lambda path: path.symlink_to(path)),
    embed_data("no permission to read", 1, "Permission denied", no_permission),
    embed_data(
        "20,000 brackets", 1, "line 9: no valid JSON", lines() + "[" * 20000 + "]" * 20000 + "\n"
    ),
    embed_data(
        "20,000 objects in objects",
        1,
        "line 9: no valid JSON",
        lines() + '{"query":' * 20000 + "\n",
    ),
    embed_data(
        "an integer of 5,000 digits",
        1,
        "line 9: no valid JSON",
        lines() + f'{{"query": {"7" * 5000}}}\n',
    ),
    embed_data("a parquet page that is broken", 1, "is no parquet file", broken_parquet, "parquet"),
    embed_data(
        "a parquet footer that is broken", 1, "is no parquet file", broken_footer, "parquet"
    ),
    embed_data(
        "parquet with dates",
        1,
        "is the date 2026-01-01, not a text",
        parquet(query=DATES, pos=ANSWERS),
        "parquet",
    ),
    embed_data(
        "parquet with bytes", 1, "is the bytes", parquet(query=[b"a"] * 8, pos=ANSWERS), "parquet"
    ),
    embed_data(
        "Shift_JIS", 0, "is read as Shift_JIS", encoded(CSV + "本はどこ,棚の上\n", "cp932"), "csv"
    ),
    embed_data(
        "GB18030", 1, "is not UTF-8", encoded(CSV + "书在哪里,在架子上\n", "gb18030"), "csv"
    ),
    embed_data("CSV with tabs", 0, OK_PAIRS, CSV.replace(",", "\t"), "csv"),
    embed_data("TSV with commas", 0, OK_PAIRS, CSV, "tsv"),
    embed_data(
        "objects over several lines",
        1,
        "over several lines",
        "\n".join(json.dumps(row, indent=1) for row in GOOD_PAIRS),
    ),
    embed_data(
        "an array over several lines", 1, "over several lines", json.dumps(GOOD_PAIRS, indent=1)
    ),
    embed_data("an array on one line", 1, "a list, not a JSON object", json.dumps(GOOD_PAIRS)),
    embed_data(
        "one row with negatives", 0, OK_PAIRS, [{"query": "a", "pos": ["b"], "neg": ["c", "d"]}]
    ),
    embed_data("one row without negatives", 1, "in-batch negatives need two", [PAIR]),
    embed_data(
        "keys of 10,000 letters", 0, OK_PAIRS, lines({"query": "a", "pos": ["b"], "x" * 10000: 1})
    ),
]

EMBED_FLAGS = [
    embed_flags(
        "an unknown one", 2, "unrecognized arguments: --learning_ratio", "--learning_ratio 1"
    ),
    embed_flags("a shortened one", 2, "unrecognized arguments", "--batch 8"),
    embed_flags("no data", 2, "no training data", "", without=("--train_file",)),
    embed_flags("batch 0", 2, "outside [1", "--batch_size 0"),
    embed_flags("batch of a half", 2, "invalid int value", "--batch_size 0.5"),
    embed_flags("lr nan", 2, "nan is outside", "--lr nan"),
    embed_flags("lr inf", 2, "inf is outside", "--lr inf"),
    embed_flags("lr 0", 2, "outside (0", "--lr 0"),
    embed_flags("epochs inf", 2, "inf is outside", "--epochs inf"),
    embed_flags("negative seed", 2, "outside [0", "--seed -1"),
    embed_flags("dev_size 1", 2, "outside [0", "--dev_size 1"),
    embed_flags("dims above the model's", 1, "exceeds the model's 64", "--matryoshka_dims 1000"),
    embed_flags(
        "no layer of that name", 1, "Linear layers here", "--target_modules nothing --dry_run"
    ),
    embed_flags("an unknown metric", 1, "is not measured", "--metric_for_best f1 --dev_size 0.3"),
    embed_flags(
        "a training file that is not there", 1, "is not there", "--train_file nowhere.jsonl"
    ),
    embed_flags("a glob that fits nothing", 1, "is not there", "--train_file 'no*.jsonl'"),
    embed_flags("a dev file that is not there", 1, "is not there", "--dev_file nowhere.jsonl"),
    embed_flags(
        "an output that is a file", 1, "is a file", "--output_dir here", files={"here": "x"}
    ),
    embed_flags(
        "an output that is not empty", 1, "is not empty", "--output_dir here", files={"here/x": "x"}
    ),
    embed_flags("a column that is not there", 1, "no column nothing", "--query_column nothing"),
    embed_flags("a tracker that is not installed", 1, "is not installed", "--report_to wandb"),
    embed_flags(
        "resume without a folder",
        2,
        "needs the run's --output_dir",
        "--resume_from_checkpoint",
        without=("--output_dir",),
    ),
    embed_flags(
        "resume and overwrite", 2, "--overwrite deletes", "--resume_from_checkpoint --overwrite"
    ),
    embed_flags("resume of nothing", 0, "starting at step 0", "--resume_from_checkpoint --dry_run"),
    embed_flags(
        "resume of a folder that is not there",
        1,
        "no complete checkpoint",
        "--resume_from_checkpoint none",
    ),
    embed_flags(
        "a BEIR folder without judgements",
        1,
        "no qrels/*.tsv",
        "--dev_file beir",
        files={
            "beir/corpus.jsonl": [{"_id": "1", "text": "a"}],
            "beir/queries.jsonl": [{"_id": "2", "text": "b"}],
        },
    ),
    embed_flags(
        "a judgement of no document",
        1,
        "is in no file of",
        "--dev_file beir",
        files={
            "beir/corpus.jsonl": [{"_id": "1", "text": "a"}],
            "beir/queries.jsonl": [{"_id": "2", "text": "b"}],
            "beir/qrels/test.tsv": "query-id\tcorpus-id\tscore\n2\t9\t1\n",
        },
    ),
    embed_flags(
        "a judgement that is no number",
        1,
        "a score that is no number",
        "--dev_file beir",
        files={
            "beir/corpus.jsonl": [{"_id": "1", "text": "a"}],
            "beir/queries.jsonl": [{"_id": "2", "text": "b"}],
            "beir/qrels/test.tsv": "2\t1\thigh\n",
        },
    ),
    embed_flags(
        "judgements without a line of names",
        0,
        "dev: 1 queries over 1 documents",
        "--dev_file beir --dry_run",
        files={
            "beir/corpus.jsonl": [{"_id": "1", "text": "a"}],
            "beir/queries.jsonl": [{"_id": "2", "text": "b"}],
            "beir/qrels/test.tsv": "2\t1\t1.0\n",
        },
    ),
    embed_flags(
        "a line break that the shell leaves as two characters",
        0,
        r"the prefix 'Instruct: a\nQuery: ' holds a backslash and an n, which is no line break",
        r"--query_prefix 'Instruct: a\nQuery: ' --dry_run",
    ),
    embed_data(
        "a line break that a table leaves as two characters",
        0,
        r"the prefix 'Say:\n' holds a backslash and an n",
        "query,pos,prompt\n" + "".join(f"a {i},b {i},Say:\\n\n" for i in range(8)),
        "csv",
    ),
    embed_flags(
        "a corpus with an _id twice",
        1,
        "corpus.jsonl, line 2: the _id 1 stood before another text",
        "--dev_file beir",
        files={
            "beir/corpus.jsonl": [{"_id": "1", "text": "a"}, {"_id": 1, "text": "c"}],
            "beir/queries.jsonl": [{"_id": "2", "text": "b"}],
            "beir/qrels/test.tsv": "2\t1\t1\n",
        },
    ),
    embed_flags(
        "two dev files as one",
        1,
        "--dev_file dev*.jsonl stands for 2 files (dev1.jsonl, dev2.jsonl)",
        "--dev_file 'dev*.jsonl'",
        files={"dev1.jsonl": GOOD_PAIRS, "dev2.jsonl": GOOD_PAIRS},
    ),
    embed_flags(
        "a dev file without rows",
        1,
        "holds no rows",
        "--dev_file dev.jsonl",
        files={"dev.jsonl": ""},
    ),
    embed_flags(
        "a data set that is nowhere", 1, "no connection to the hub", "--dataset_name nobody/nothing"
    ),
    embed_flags(
        "a step larger than the data",
        0,
        "the step is shrunk",
        "--gradient_accumulation 1000 --dry_run",
    ),
    embed_flags(
        "batches larger than the data", 0, "the step is shrunk", "--batch_size 100000 --dry_run"
    ),
    embed_flags(
        "a length above the positions", 0, "lowered to 128", "--max_length 100000 --dry_run"
    ),
    embed_flags("the shortest length", 0, OK_PAIRS, "--max_length 4 --dry_run"),
    embed_flags("a seed of 2^32", 2, "outside [0, 4294967295]", "--seed 4294967296"),
    embed_flags("the largest seed", 0, "final, read back from disk", "--seed 4294967295"),
    embed_flags("dropout 1", 2, "outside [0", "--lora_dropout 1"),
    embed_flags(
        "an output in a file", 1, "here is a file", "--output_dir here/out", files={"here": "x"}
    ),
    embed_flags("an output of 300 letters", 1, "File name too long", f"--output_dir {'x' * 300}"),
    embed_flags(
        "an output of 5,000 letters", 1, "File name too long", f"--output_dir {'x/' * 2500}"
    ),
    embed_flags(
        "an output that may not be written",
        1,
        "may not be written",
        "--output_dir here",
        files={"here": locked},
    ),
    embed_flags(
        "an output that may not be made",
        1,
        "may not be written",
        "--output_dir here/a/b",
        files={"here": locked},
    ),
    embed_flags("an output in /proc", 1, "/proc", "--output_dir /proc/out"),
    embed_flags(
        "an output that is a link in a circle",
        1,
        "symbolic links",
        "--output_dir here",
        files={"here": lambda path: path.symlink_to(path)},
    ),
    embed_flags(
        "a disk that is full at the first checkpoint", 1, "cannot be written", "", file_bytes=20000
    ),
    Row(
        "resume: a disk that is full",
        "embed",
        f"{RESUMED}",
        1,
        "cannot be written",
        {
            "run/checkpoint-2": shutil.rmtree,
            "run/final": shutil.rmtree,
            "run/training_summary_report.json": None,
        },
        {"run": "embed_run"},
        without=TYPED,
        file_bytes=20000,
        check=first_checkpoint_is_there,
    ),
    *(
        Row(
            f"resume: {name}",
            "embed",
            RESUMED,
            code,
            says,
            {
                "run/training_summary_report.json": None,
                "run/final": shutil.rmtree,
                f"run/{path}": content,
            },
            {"run": "embed_run"},
            without=TYPED,
        )
        for name, code, says, path, content in (
            ("after the last step", 0, "proof", "x", "x"),
            (
                "weights cut off",
                0,
                "is not complete: it lacks",
                "checkpoint-2/adapter_model.safetensors",
                cut_to(5000),
            ),
            (
                "no weights",
                0,
                "is not complete: it lacks",
                "checkpoint-2/adapter_model.safetensors",
                None,
            ),
            ("no optimizer", 0, "is not complete: it lacks", "checkpoint-2/optimizer.pt", None),
            ("half a state", 0, "proof", "checkpoint-2/trainer_state.json", '{"log_history": ['),
            ("a checkpoint without a number", 0, "proof", "checkpoint-x/trainer_state.json", "{}"),
            (
                "a training_config that is no JSON",
                1,
                "training_config.json",
                "training_config.json",
                "{",
            ),
        )
    ),
    *(
        Row(
            f"resume after step 1: {name}",
            "embed",
            RESUMED,
            code,
            says,
            {
                "run/checkpoint-2": shutil.rmtree,
                "run/training_summary_report.json": None,
                "run/final": shutil.rmtree,
                f"run/{path}": content,
            },
            {"run": "embed_run"},
            without=TYPED,
        )
        for name, code, says, path, content in (
            ("as it is", 0, "proof", "x", "x"),
            (
                "weights cut off",
                0,
                "is not complete: it lacks",
                "checkpoint-1/adapter_model.safetensors",
                cut_to(5000),
            ),
            (
                "an optimizer that is text",
                0,
                "is not complete: it lacks",
                "checkpoint-1/optimizer.pt",
                "hello",
            ),
            (
                "a random state that is text",
                0,
                "is not complete: it lacks",
                "checkpoint-1/rng_state.pth",
                "hello",
            ),
        )
    ),
    embed_flags("a dev set called ../x", 1, "letters, digits", "--dev_file ../x={k}/pairs.jsonl"),
    embed_flags("a dev set called a b", 1, "letters, digits", "--dev_file 'a b={k}/pairs.jsonl'"),
    embed_flags(
        "a dev set called a.b-c_1",
        0,
        "a.b-c_1: 8 queries",
        "--dev_file a.b-c_1=dev.jsonl --dry_run",
        files={"dev.jsonl": [{"query": f"new {i}", "pos": [f"old {i}"]} for i in range(8)]},
    ),
    embed_flags(
        "one dev file twice",
        1,
        "given twice",
        "--dev_file {k}/pairs.jsonl --dev_file {k}/pairs.jsonl",
    ),
    embed_flags(
        "two dev files without names",
        1,
        "NAME=PATH",
        "--dev_file {k}/pairs.jsonl --dev_file dev.jsonl",
        files={"dev.jsonl": [PAIR]},
    ),
    embed_flags(
        "a dev file of the training rows",
        1,
        "The dev sets took the others",
        "--dev_file {k}/pairs.jsonl",
    ),
    embed_flags(
        "a dev share that leaves one row", 1, "in-batch negatives need two", "--dev_size 0.99"
    ),
]

EMBED_BASE = [
    embed_flags(
        "a base that is nowhere",
        1,
        "no connection to the hub",
        "--model_name nobody/nothing",
    ),
    embed_flags("a base without a name", 1, "neither a folder here nor", "--model_name ''"),
    embed_model("a config that is no JSON", 1, "not a valid JSON", {"config.json": "{"}),
    embed_model("no config", 1, "neither a folder here nor a hub model", {"config.json": None}),
    embed_model(
        "an unknown architecture",
        1,
        "known model",
        {"config.json": {"model_type": "perceptron9000"}},
    ),
    embed_model(
        "code of its own",
        1,
        "--trust_remote_code",
        {"config.json": {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}},
    ),
    embed_model("an encoder-decoder", 1, "encoder-decoder", {"config.json": {"model_type": "t5"}}),
    embed_model("no weights", 1, "cannot be loaded", {"model.safetensors": None}),
    embed_model(
        "weights of other sizes", 1, "would be random", {"config.json": {"hidden_size": 32}}
    ),
    embed_model(
        "a layer behind the pooling",
        1,
        "has a Dense layer",
        {"modules.json": '[{"idx": 0, "name": "0", "path": "", "type": "st.Dense"}]'},
    ),
    embed_model("weights cut off", 1, "cannot be loaded", {"model.safetensors": cut_to(100000)}),
    embed_model(
        "weights cut off in the header", 1, "cannot be loaded", {"model.safetensors": cut_to(500)}
    ),
    embed_model("weights of no bytes", 1, "cannot be loaded", {"model.safetensors": b""}),
    embed_model(
        "weights that are text",
        1,
        "cannot be loaded",
        {"model.safetensors": "version https://git-lfs\n" * 5},
    ),
    embed_model(
        "a pickle that is none",
        1,
        "cannot be loaded",
        {"model.safetensors": None, "pytorch_model.bin": "hello"},
    ),
    embed_model(
        "a pickle of no bytes",
        1,
        "cannot be loaded",
        {"model.safetensors": None, "pytorch_model.bin": b""},
    ),
    embed_model(
        "a pickle of a list",
        1,
        "cannot be loaded",
        {"model.safetensors": None, "pytorch_model.bin": b"\x80\x02]q\x00."},
    ),
    embed_model(
        "an index that is no JSON",
        1,
        "cannot be loaded",
        {"model.safetensors": None, "model.safetensors.index.json": "{"},
    ),
    embed_model(
        "an index without a map",
        1,
        "cannot be loaded",
        {"model.safetensors": None, "model.safetensors.index.json": "{}"},
    ),
    embed_model("a size that is a text", 1, "config", {"config.json": {"hidden_size": "many"}}),
    embed_model(
        "a negative size", 1, "cannot be loaded", {"config.json": {"intermediate_size": -1}}
    ),
    embed_model(
        "heads that do not divide",
        1,
        "cannot be loaded",
        {"config.json": {"num_attention_heads": 7}},
    ),
    embed_model("no layers", 1, "", {"config.json": {"num_hidden_layers": 0}}),
    embed_model(
        "an unknown activation", 1, "cannot be loaded", {"config.json": {"hidden_act": "swooosh"}}
    ),
    embed_model("a config that is a list", 1, "config", {"config.json": "[]"}),
    embed_model(
        "no permission to read the weights",
        1,
        "cannot be loaded",
        {"model.safetensors": lambda path: path.chmod(0)},
    ),
    embed_model(
        "NaN in the weights",
        1,
        "holds NaN or infinity",
        {"model.safetensors": with_value("query.weight", NAN)},
    ),
    embed_model(
        "infinity in the weights",
        1,
        "holds NaN or infinity",
        {"model.safetensors": with_value("word_emb", INF)},
    ),
    embed_model(
        "prompts that are a list",
        1,
        "are no texts with names",
        {"config_sentence_transformers.json": '{"prompts": ["query: "]}'},
    ),
    embed_model(
        "a prompt that is a number",
        1,
        "are no texts with names",
        {"config_sentence_transformers.json": '{"prompts": {"query": 7}}'},
    ),
    embed_model(
        "two ways to pool",
        1,
        "pools by mean + cls, which is not known here",
        {
            "modules.json": '[{"path": "1_Pooling", "type": "st.Pooling"}]',
            "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}',
        },
    ),
    embed_model(
        "two ways to pool, as they are written now",
        1,
        "pools by cls + max, which is not known here",
        {
            "modules.json": '[{"path": "1_Pooling", "type": "st.Pooling"}]',
            "1_Pooling/config.json": '{"pooling_mode": ["cls", "max"]}',
        },
    ),
    embed_model(
        "a prompt that is not pooled",
        0,
        "leaves the tokens of a prompt out",
        {
            "modules.json": '[{"path": "1_Pooling", "type": "st.Pooling"}]',
            "1_Pooling/config.json": '{"pooling_mode": "lasttoken", "include_prompt": false}',
        },
    ),
    embed_model(
        "texts that are made lower case",
        0,
        "write yours in lower case",
        {"sentence_bert_config.json": '{"do_lower_case": true}'},
    ),
    embed_model("modules.json that is no JSON", 1, "modules.json", {"modules.json": "{"}),
    embed_model("modules.json that is an object", 1, "modules.json", {"modules.json": "{}"}),
    embed_model(
        "modules.json without types", 1, "modules.json", {"modules.json": '[{"path": ""}]'}
    ),
    embed_flags("an adapter as the base", 1, "--init_adapter", "--model_name {k}/embed_run/final"),
    embed_flags("a run's folder as the base", 1, "neither a folder", "--model_name {k}/embed_run"),
    embed_model("a tokenizer that is no JSON", 1, "no tokenizer", {"tokenizer.json": "{"}),
]

SFT_DATA = [
    sft_data("an empty file", 1, "holds no rows", ""),
    sft_data("text alone", 1, "does not say which part is the response", [{"text": "a"}]),
    sft_data("no known format", 1, "none of the known formats", [{"a": "b"}]),
    sft_data(
        "a preference without the flag",
        1,
        "For chosen/rejected pass --pref_loss",
        [{"chosen": "b", "rejected": "c"}],
    ),
    sft_data(
        "a number as content",
        1,
        "the content of a user turn is a int",
        chat(("user", 5), ("assistant", "a")),
    ),
    sft_data(
        "an object as an answer",
        1,
        "Write JSON answers as text",
        chat(("user", "a"), ("assistant", {"b": 1})),
    ),
    sft_data(
        "an image",
        1,
        "images cannot be trained on",
        chat(("user", [{"type": "image", "image": "x.png"}]), ("assistant", "a")),
    ),
    sft_data(
        "messages that are a number", 1, "messages is the int 7", [*GOOD_CHATS, {"messages": 7}]
    ),
    sft_data(
        "messages that are an object",
        1,
        "messages is the dict",
        [*GOOD_CHATS, {"messages": {"role": "user"}}],
    ),
    sft_data(
        "a conversation of texts", 1, "conversations is the list", [{"conversations": ["a", "b"]}]
    ),
    sft_data(
        "a history of threes",
        1,
        "history is no list of",
        [{"instruction": "a", "output": "b", "history": [["a", "b", "c"]]}],
    ),
    sft_data(
        "tools that are no JSON",
        1,
        "tools: no valid JSON",
        chat(("user", "a"), ("assistant", "b"), tools="[{"),
    ),
    sft_data(
        "answers without a question", 0, "rows with an empty prompt", chat(("assistant", "b"))
    ),
    sft_data(
        "questions without an answer", 0, "rows without an assistant turn", chat(("user", "b"))
    ),
    sft_data(
        "an empty answer",
        0,
        "rows with an empty response",
        chat(("user", "b"), ("assistant", " \n")),
    ),
    sft_data(
        "a special token in a text",
        0,
        "holds the special token <|im_end|>",
        chat(("user", "b<|im_end|>"), ("assistant", "c")),
    ),
    sft_data(
        "nothing but questions",
        1,
        "no row is left to train on",
        [{"messages": [{"role": "user", "content": "a"}]}],
    ),
    sft_data("no messages in a row", 1, "no row is left to train on", [{"messages": []}] * 5),
    sft_data(
        "all too long", 1, "were cut away by --max_length 8", GOOD_CHATS, flags="--max_length 8"
    ),
    sft_data(
        "one too long, as an error",
        1,
        "longer than --max_length",
        chat(("user", "apple " * 3000), ("assistant", "a")),
        flags="--overlong error",
    ),
    sft_data(
        "prompts that can be shortened",
        0,
        "shortened 1 prompts",
        chat(("user", "apple " * 3000), ("assistant", "a")),
        flags="--overlong truncate_prompt --dry_run",
    ),
    sft_data("a hundred turns", 0, OK_CHATS, chat(*[("user", "a"), ("assistant", "b")] * 50)),
    sft_data(
        "an answer of emoji", 0, OK_CHATS, chat(("user", "👩‍👩‍👧"), ("assistant", "🏴‍☠️ مرحبا"))
    ),
    sft_data(
        "half an emoji",
        0,
        OK_CHATS,
        "".join(
            map(
                lambda row: json.dumps(row) + "\n",
                chat(("user", "\ud83d"), ("assistant", "\ude00 a")),
            )
        ),
    ),
    sft_data("a line that is no JSON", 1, "line 1: no valid JSON", "nothing\n"),
    sft_data(
        "tools 500 deep",
        0,
        "dropped 1 rows with tools or arguments",
        chat(("user", "a"), ("assistant", "b"), tools=deep(250)),
    ),
    sft_data(
        "tools 500 deep, as text",
        0,
        "dropped 1 rows with tools or arguments",
        chat(("user", "a"), ("assistant", "b"), tools=json.dumps(deep(240))),
    ),
    sft_data(
        "tools 20,000 deep, as text",
        1,
        "no valid JSON",
        chat(("user", "a"), ("assistant", "b"), tools="[" * 20000),
    ),
    sft_data(
        "an integer of 5,000 digits", 1, "line 1: no valid JSON", f'{{"messages": {"7" * 5000}}}\n'
    ),
    sft_data("a folder of that name", 1, "Is a directory", Path.mkdir),
    sft_data("no permission to read", 1, "Permission denied", no_permission),
    sft_data(
        "Shift_JIS without kana",
        1,
        "is not UTF-8",
        encoded('{"prompt": "本", "completion": "棚"}', "cp932"),
    ),
    sft_data(
        "objects over several lines", 1, "over several lines", json.dumps(GOOD_CHATS[0], indent=1)
    ),
    sft_data(
        "rejected without chosen",
        1,
        'no "chosen"',
        [{"prompt": "a", "rejected": "b"}],
        flags="--pref_loss orpo",
    ),
    sft_data(
        "pairs without a prompt",
        1,
        "no prompt beside",
        [{"chosen": "a", "rejected": "b"}],
        flags="--pref_loss orpo",
    ),
    sft_data(
        "pairs of equal answers",
        1,
        "no row is left",
        [{"prompt": "a", "chosen": "b", "rejected": "b"}],
        flags="--pref_loss orpo",
    ),
]

SFT_FLAGS = [
    sft_flags("a regular expression that is none", 2, "--drop_regex (", "--drop_regex '('"),
    sft_flags(
        "a regular expression for everything",
        1,
        "no row is left",
        "--drop_regex ''" + " --drop_regex .",
    ),
    sft_flags("overfit and evaluate", 2, "pass one", "--sanity_overfit 2 --eval_only"),
    sft_flags(
        "evaluate nothing", 2, "needs rows to evaluate on", "--eval_only", without=("--train_file",)
    ),
    sft_flags(
        "an endpoint without evaluation", 2, "add --eval_only", "--endpoint http://localhost:1"
    ),
    sft_flags(
        "a server that is not there",
        1,
        "gives no answer",
        "--eval_only --endpoint http://127.0.0.1:9 --dev_file {k}/chats.jsonl --dev_sample_limit 2",
    ),
    sft_flags("beta without a loss", 2, "need --pref_loss", "--pref_beta 1"),
    sft_flags("an unknown loss", 2, "invalid choice", "--pref_loss dpo2"),
    sft_flags("a template that is not there", 1, "cannot be read", "--chat_template nowhere.jinja"),
    sft_flags(
        "a template that is no text",
        1,
        "cannot be read",
        "--chat_template t",
        files={"t": b"\xff\xfe\x00"},
    ),
    sft_flags(
        "a template that is no Jinja",
        1,
        "cannot render a simple conversation",
        "--chat_template t",
        files={"t": "{% for %}"},
    ),
    sft_flags(
        "a template that says nothing",
        1,
        "cannot render a simple conversation",
        "--chat_template t",
        files={"t": "hello"},
    ),
    sft_flags(
        "a template that refuses all",
        1,
        "cannot render a simple conversation",
        "--chat_template t",
        files={"t": "{{ raise_exception('never') }}"},
    ),
    *(
        sft_flags(f"a template {name}", 1, says, "--chat_template t", files={"t": template})
        for name, says, template in (
            ("that divides by zero", "division by zero", "{{ 1 / 0 }}"),
            (
                "of a billion turns",
                "Range too big",
                "{% for i in range(1000000000) %}x{% endfor %}",
            ),
            (
                "of a broken range",
                "cannot render a simple conversation",
                "{% for i in range(1e9) %}x{% endfor %}",
            ),
            ("without an end", "takes more than 10 s", LOOP.format("{% set a = j %}")),
            ("that calls itself", "recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
            ("that fills the memory", "MemoryError", DOUBLING),
            (
                "of twenty loops in loops",
                "nested blocks",
                "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
            ),
            ("that asks for the 99th turn", "has no element 99", "{{ messages[99].content.x }}"),
            (
                "that cuts by a text",
                "cannot render a simple conversation",
                "{{ messages[0]['content'][:'a'] }}",
            ),
        )
    ),
    *(
        sft_flags(
            f"a server that answers {name}",
            1,
            says,
            ENDPOINT,
            before=lambda answer=answer: serve(answer),
        )
        for name, says, answer in (
            (
                "a number",
                "answers with",
                {"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]},
            ),
            ("an error", "no such model", {"error": {"message": "no such model"}}),
            ("an error in words", "no such model", {"error": "no such model"}),
            ("a list", "answers with", []),
            ("a choice that is a text", "answers with", {"choices": ["yes"]}),
            ("no choice", "answers with", {"choices": []}),
            ("null", "answers with", None),
            ("no JSON", "answers with", b"<html>"),
            ("nothing", "answers with", b""),
            (
                "half an emoji",
                "half a character",
                {"choices": [{"message": {"content": "\ud83d"}}]},
            ),
            ("a message that is null", "answers with", {"choices": [{"message": None}]}),
        )
    ),
    *(
        sft_flags(
            f"a server that answers {name}",
            0,
            "stop_rate",
            ENDPOINT,
            before=lambda answer=answer: serve(answer),
        )
        for name, answer in (
            (
                "null as content",
                {"choices": [{"message": {"content": None}, "finish_reason": "length"}]},
            ),
            ("40,000 brackets", {"choices": [{"message": {"content": "[" * 40000}}]}),
        )
    ),
    sft_flags(
        "a disk that is full at the first checkpoint", 1, "cannot be written", "", file_bytes=20000
    ),
    sft_flags(
        "an output that may not be written",
        1,
        "may not be written",
        "--output_dir here",
        files={"here": locked},
    ),
    sft_flags(
        "an adapter's config that is no JSON",
        2,
        "no valid JSON",
        "--init_adapter broken",
        copies={"broken": "sft_run/final"},
        files={"broken/adapter_config.json": "{"},
    ),
    sft_flags(
        "an adapter's config that is a list",
        2,
        "adapter_config.json",
        "--init_adapter broken",
        copies={"broken": "sft_run/final"},
        files={"broken/adapter_config.json": "[]"},
    ),
    *(
        sft_flags(
            f"an adapter {name}",
            1,
            says,
            "--init_adapter broken --dry_run",
            copies={"broken": "sft_run/final"},
            files={"broken/adapter_model.safetensors": content},
        )
        for name, says, content in (
            ("of no bytes", "cannot be loaded", b""),
            ("cut off", "cannot be loaded", cut_to(20000)),
            ("that is text", "cannot be loaded", "hello " * 20),
            ("without weights", "", None),
            ("with NaN", "holds NaN or infinity", with_value("lora_B", NAN)),
        )
    ),
    sft_flags(
        "an encoder as the base", 1, "neither a chat template nor an EOS", "--model_name {k}/bert"
    ),
    sft_flags(
        "preferences",
        0,
        OK_CHATS,
        "--pref_loss sigmoid --train_file {k}/preferences.jsonl --dry_run",
    ),
    sft_flags(
        "continue with other ranks",
        2,
        "drop the flag",
        "--init_adapter {k}/sft_run/final --lora_r 3",
    ),
    sft_flags(
        "continue an adapter of the other trainer",
        1,
        "neither a chat template nor an EOS",
        "--init_adapter {k}/embed_run/final",
    ),
    sft_flags("continue", 0, OK_CHATS, "--init_adapter {k}/sft_run/final --dry_run"),
    sft_flags(
        "continue what is no adapter", 2, "has no adapter_config.json", "--init_adapter {k}/chat"
    ),
]

SFT_BASE = [
    sft_model("no weights", 1, "cannot be loaded", {"model.safetensors": None}),
    sft_model("no chat template", 0, "has no chat template", {"chat_template.jinja": None}),
    sft_model("a config that is no JSON", 1, "not a valid JSON", {"config.json": "{"}),
    sft_model(
        "a generation_config that is no JSON",
        1,
        "is no valid JSON",
        {"generation_config.json": "{"},
    ),
]

MERGE = [
    Row("merge: plain", "merge", "", 0, "verified"),
    Row(
        "merge: the file in the folder",
        "merge",
        "--lora_adapter_path {k}/embed_run/final/adapter_model.safetensors",
        0,
        "verified",
    ),
    Row(
        "merge: no adapter there",
        "merge",
        "--lora_adapter_path nowhere",
        1,
        "has no adapter_config.json",
    ),
    Row(
        "merge: a model, not an adapter",
        "merge",
        "--lora_adapter_path {k}/bert",
        1,
        "has no adapter_config.json",
    ),
    Row(
        "merge: no flags",
        "merge",
        "",
        2,
        "required",
        without=("--lora_adapter_path", "--output_path"),
    ),
    Row("merge: no such device", "merge", "--device tpu9", 2, "--device tpu9"),
    Row("merge: an output that is a file", "merge", "", 1, "is a file", {"out": "x"}),
    Row("merge: an output that is not empty", "merge", "", 1, "is not empty", {"out/x": "x"}),
    Row(
        "merge: onto an earlier merge",
        "merge",
        "",
        1,
        "holds a merge already",
        {"out/merge_report.json": "{}"},
    ),
    Row(
        "merge: over an earlier merge",
        "merge",
        "--overwrite",
        0,
        "verified",
        {"out/merge_report.json": "{}"},
    ),
    Row("merge: onto the base", "merge", "--output_path {k}/bert", 1, "is not empty"),
    Row(
        "merge: a base that is nowhere",
        "merge",
        "--base_model_path nobody/nothing",
        1,
        "is no folder here",
    ),
    Row("merge: another base", "merge", "--base_model_path {k}/chat", 1, "fit nothing in the base"),
    Row("merge: float16", "merge", "--training_precision float16", 0, "float16"),
    merge_adapter("a config that is no JSON", 1, "no valid JSON", {"adapter_config.json": "{"}),
    merge_adapter("no weights", 1, "does not exist", {"adapter_model.safetensors": None}),
    merge_adapter("weights cut off", 1, "is cut off", {"adapter_model.safetensors": cut_to(5000)}),
    merge_adapter("weights of no bytes", 1, "is cut off", {"adapter_model.safetensors": b""}),
    merge_adapter(
        "weights that are text",
        1,
        "is cut off",
        {"adapter_model.safetensors": "hello, hello, hello"},
    ),
    merge_adapter("IA3", 1, "peft_type IA3", {"adapter_config.json": {"peft_type": "IA3"}}),
    merge_adapter(
        "PiSSA",
        1,
        "init_lora_weights pissa",
        {"adapter_config.json": {"init_lora_weights": "pissa"}},
    ),
    merge_adapter(
        "NaN", 1, "not finite", {"adapter_model.safetensors": with_value("lora_B", float("nan"))}
    ),
    merge_adapter(
        "infinity",
        1,
        "not finite",
        {"adapter_model.safetensors": with_value("lora_A", float("inf"))},
    ),
    merge_adapter(
        "A without B",
        1,
        "do not belong together",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {
                    name: tensor
                    for name, tensor in found.items()
                    if "layer.1.attention.self.query.lora_B" not in name
                }
            )
        },
    ),
    merge_adapter(
        "a tensor of another layer",
        1,
        "fit nothing in the base",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {
                    name.replace("layer.1.", "layer.9."): tensor for name, tensor in found.items()
                }
            )
        },
    ),
    merge_adapter(
        "another rank than its B",
        1,
        "do not belong together",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {
                    name: tensor[:4].clone() if "lora_A" in name else tensor
                    for name, tensor in found.items()
                }
            )
        },
    ),
    merge_adapter(
        "no tensor at all", 1, "holds 0 tensors", {"adapter_model.safetensors": tensors(dict.clear)}
    ),
    merge_adapter(
        "a huge value",
        1,
        "is not base + adapter",
        {"adapter_model.safetensors": with_value("lora_B", 3e38)},
    ),
    merge_adapter(
        "a config that is a list",
        1,
        "adapter_config.json holds a list",
        {"adapter_config.json": "[]"},
    ),
    merge_adapter(
        "a config without alpha", 1, "lora_alpha", {"adapter_config.json": {"lora_alpha": None}}
    ),
    merge_adapter(
        "an alpha that is a text", 1, "lora_alpha", {"adapter_config.json": {"lora_alpha": "many"}}
    ),
    merge_adapter(
        "an alpha pattern that is no expression",
        1,
        "alpha_pattern",
        {"adapter_config.json": {"alpha_pattern": {"(": 3}}},
    ),
    merge_adapter(
        "an alpha pattern that is a list",
        1,
        "alpha_pattern",
        {"adapter_config.json": {"alpha_pattern": ["query"]}},
    ),
    merge_adapter(
        "a config that is 20,000 deep", 1, "no valid JSON", {"adapter_config.json": "[" * 20000}
    ),
    merge_adapter(
        "a config in UTF-16", 1, "no valid JSON", {"adapter_config.json": encoded("{}", "utf-16")}
    ),
    merge_adapter(
        "a base that is a number", 1, "", {"adapter_config.json": {"base_model_name_or_path": 7}}
    ),
    merge_adapter(
        "no base",
        1,
        "--base_model_path",
        {"adapter_config.json": {"base_model_name_or_path": None}},
    ),
    merge_adapter(
        "a training_config that is no JSON", 1, "no valid JSON", {"training_config.json": "{"}
    ),
    merge_adapter(
        "a training_config that is a list", 1, "holds a list", {"training_config.json": "[]"}
    ),
    merge_adapter("flags that are a list", 1, "", {"training_config.json": {"flags": ["a"]}}),
    merge_adapter(
        "weights that may not be read",
        1,
        "cannot be read",
        {"adapter_model.safetensors": lambda p: p.chmod(0)},
    ),
    merge_adapter(
        "a config that may not be read",
        1,
        "cannot be read",
        {"adapter_config.json": lambda p: p.chmod(0)},
    ),
    merge_adapter(
        "a header of 2^63 bytes", 1, "is cut off", {"adapter_model.safetensors": b"\xff" * 64}
    ),
    merge_adapter(
        "a header that is a list",
        1,
        "no safetensors file",
        {"adapter_model.safetensors": b"\x02\0\0\0\0\0\0\0[]"},
    ),
    merge_adapter(
        "a header without shapes",
        1,
        "no safetensors file",
        {"adapter_model.safetensors": b'\x08\0\0\0\0\0\0\0{"a":{}}'},
    ),
    merge_adapter(
        "weights in integers",
        1,
        "",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {name: tensor.to(torch.int32) for name, tensor in found.items()}
            )
        },
    ),
    merge_adapter(
        "weights in float16",
        0,
        "verified",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {name: tensor.half() for name, tensor in found.items()}
            )
        },
    ),
    merge_adapter(
        "weights in float64",
        0,
        "verified",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {name: tensor.double() for name, tensor in found.items()}
            )
        },
    ),
    merge_adapter(
        "weights of zeros",
        1,
        "it was not trained",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {name: tensor * 0 for name, tensor in found.items()}
            )
        },
    ),
    merge_adapter(
        "tensors of one dimension",
        1,
        "do not belong together",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {name: tensor.flatten() for name, tensor in found.items()}
            )
        },
    ),
    merge_adapter(
        "an empty tensor",
        1,
        "",
        {
            "adapter_model.safetensors": tensors(
                lambda found: {name: tensor[:0] for name, tensor in found.items()}
            )
        },
    ),
    merge_adapter("a tokenizer that is no JSON", 0, "", {"tokenizer.json": "{"}),
    merge_adapter("modules.json that is an object", 1, "modules.json", {"modules.json": "{}"}),
    merge_adapter("modules.json without paths", 0, "verified", {"modules.json": "[{}]"}),
    Row("merge: an output in a file", "merge", "--output_path here/out", 1, "here", {"here": "x"}),
    Row(
        "merge: an output of 300 letters",
        "merge",
        f"--output_path {'x' * 300}",
        1,
        "File name too long",
    ),
    Row(
        "merge: an output that may not be made",
        "merge",
        "--output_path here/out",
        1,
        "Permission denied",
        {"here": locked},
    ),
    Row(
        "merge: an output that is a link in a circle",
        "merge",
        "",
        1,
        "symbolic link to itself",
        {"out": lambda path: path.symlink_to(path)},
    ),
    Row("merge: an output without a name", "merge", "--output_path ''", 0, "verified"),
    Row("merge: the root as output", "merge", "--output_path /", 1, "cannot be used"),
    Row(
        "merge: an output inside the adapter",
        "merge",
        "--lora_adapter_path adapter --output_path adapter/merged",
        0,
        "verified",
        copies={"adapter": "embed_run/final"},
    ),
    Row("merge: a disk that is full", "merge", "", 1, "could not be written", file_bytes=100000),
    Row(
        "merge: a disk that is full, over an earlier merge",
        "merge",
        "--overwrite",
        1,
        "could not be written",
        {"out/merge_report.json": "{}"},
        file_bytes=100000,
        check=earlier_merge_is_there,
    ),
    Row(
        "merge: 5 links to the adapter",
        "merge",
        "--lora_adapter_path a",
        0,
        "verified",
        {"a": lambda path: path.symlink_to("b"), "b": lambda path: path.symlink_to("adapter")},
        copies={"adapter": "embed_run/final"},
    ),
    Row(
        "merge: a checkpoint of the run",
        "merge",
        "--lora_adapter_path {k}/embed_run/checkpoint-1",
        0,
        "verified",
    ),
    Row(
        "merge: the run's folder",
        "merge",
        "--lora_adapter_path {k}/embed_run",
        1,
        "has no adapter_config.json",
    ),
    Row("merge: SFT", "merge", "--lora_adapter_path {k}/sft_run/final", 0, "verified"),
    Row(
        "merge: names of the outside world",
        "merge",
        "--lora_adapter_path 'ein Ordner/アダプタ' --output_path 'a b/ü'",
        0,
        "verified",
        copies={"ein Ordner/アダプタ": "embed_run/final"},
    ),
    merge_base("a config that is no JSON", 1, "no valid JSON", {"config.json": "{"}),
    merge_base("no config", 1, "has no config.json", {"config.json": None}),
    merge_base("no weights", 1, "lacks model.safetensors", {"model.safetensors": None}),
    merge_base("weights cut off", 1, "is cut off", {"model.safetensors": cut_to(100000)}),
    merge_base("weights of no bytes", 1, "is cut off", {"model.safetensors": b""}),
    merge_base(
        "quantised", 1, "is quantised", {"config.json": {"quantization_config": {"bits": 4}}}
    ),
    merge_base(
        "an index that is no JSON",
        1,
        "no valid JSON",
        {"model.safetensors": None, "model.safetensors.index.json": "{"},
    ),
    merge_base(
        "an index of files that are not there",
        1,
        "lacks gone.safetensors",
        {
            "model.safetensors.index.json": {"weight_map": {"a": "gone.safetensors"}},
            "model.safetensors": None,
        },
    ),
    merge_base(
        "other weights",
        1,
        "is not the base that",
        {"model.safetensors": with_value("query.weight", 1.0)},
    ),
]

ROWS = [*EMBED_DATA, *EMBED_FLAGS, *EMBED_BASE, *SFT_DATA, *SFT_FLAGS, *SFT_BASE, *MERGE]

if __name__ == "__main__":
    main(ROWS, __doc__)

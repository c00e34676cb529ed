"""Write training pairs from the docstrings of Python's own standard library.

The summary line is the query, the rest of the docstring its positive. All positives stand in
documents.jsonl beside the pairs, too.

python examples/stdlib_pairs.py runs/demo/pairs.jsonl
"""

import ast
import json
import sys
import sysconfig
from pathlib import Path

SKIPPED = frozenset(
    "test tests site-packages dist-packages idlelib lib2to3 idle_test turtledemo ensurepip".split()
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(folder):
    """Yield the docstring of every module, class and function below `folder`."""
    for path in sorted(folder.rglob("*.py")):
        if not SKIPPED.isdisjoint(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, DOCUMENTED):
                yield ast.get_docstring(node) or ""


def on_one_line(text):
    """Return a text with single blanks for all its white space."""
    return " ".join(text.split())


def make_pairs(texts):
    """Return {summary: body} of docstrings; every summary and every body once."""
    pairs = {}
    bodies = set()
    for text in texts:
        summary, _, body = text.partition("\n\n")
        summary = on_one_line(summary)
        body = on_one_line(body)
        says_enough = 20 <= len(summary) <= 120 and len(body) >= 80
        if says_enough and summary not in pairs and body not in bodies:
            pairs[summary] = body[:1000]
            bodies.add(body)
    return pairs


def write_lines(path, rows):
    """Write one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def main(target):
    """Write one {"query": summary, "pos": [body]} a line, and one {"text": body}."""
    target = Path(target)
    pairs = make_pairs(docstrings(Path(sysconfig.get_path("stdlib"))))
    write_lines(target, [{"query": query, "pos": [body]} for query, body in pairs.items()])
    write_lines(target.with_name("documents.jsonl"), [{"text": body} for body in pairs.values()])
    print(f"{len(pairs)} pairs in {target}")


if __name__ == "__main__":
    main(sys.argv[1])

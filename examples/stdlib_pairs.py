"""Write training pairs from the docstrings of Python's standard library: summary line -> the rest.

python examples/stdlib_pairs.py runs/demo/pairs.jsonl
"""

import ast
import json
import sys
import sysconfig
from pathlib import Path

SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idlelib",
    "lib2to3",
    "idle_test",
    "turtledemo",
    "ensurepip",
}


def docstrings(folder):
    """Yield the docstring of every module, class and function below `folder`."""
    for path in sorted(folder.rglob("*.py")):
        if SKIPPED.isdisjoint(path.relative_to(folder).parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(
                    node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                ):
                    yield ast.get_docstring(node) or ""


def main(target):
    """Write one {"query": summary, "pos": [body]} a line; every summary and every body once."""
    pairs, bodies = {}, set()
    for text in docstrings(Path(sysconfig.get_path("stdlib"))):
        summary, body = (" ".join(part.split()) for part in text.partition("\n\n")[::2])
        if (
            20 <= len(summary) <= 120
            and len(body) >= 80
            and summary not in pairs
            and body not in bodies
        ):
            pairs[summary] = body[:1000]
            bodies.add(body)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"query": query, "pos": [body]}, ensure_ascii=False)
        for query, body in pairs.items()
    ]
    Path(target).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} pairs in {target}")


if __name__ == "__main__":
    main(sys.argv[1])

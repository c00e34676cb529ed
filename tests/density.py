"""How dense the code is, in syntax nodes a statement: python tests/density.py [FILE ...]

Nodes a line would be no measure, since a formatter alone halves it.
"""

import ast
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def code_files():
    """Return the scripts, merge.py, utils.py and the rooms."""
    scripts = [
        ROOT / f"{name}.py" for name in ("train_embed_lora", "train_sft_lora", "merge", "utils")
    ]
    return [*scripts, *sorted((ROOT / "parts").glob("*.py"))]


def assigns(node, kind):
    """Tell whether a node assigns a `kind` of expression to several names at once."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, kind):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def density(path):
    """Return what is counted in one file, the counts of comprehensions and packs per 100 statements."""
    nodes = list(ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))))
    statements = sum(isinstance(node, ast.stmt) for node in nodes)
    hundreds = max(1, statements) / 100
    return {
        "statements": statements,
        "nodes": len(nodes) / max(1, statements),
        "comprehensions": sum(isinstance(node, COMPREHENSIONS) for node in nodes) / hundreds,
        "packed": sum(assigns(node, ast.Tuple) for node in nodes) / hundreds,
        "unpacked_generators": sum(assigns(node, ast.GeneratorExp) for node in nodes),
    }


def over_all(found):
    """Return the comprehensions and packed assignments per 100 statements of several files together."""
    statements = sum(each["statements"] for each in found)
    totals = {}
    for name in ("comprehensions", "packed"):
        totals[name] = sum(each[name] * each["statements"] for each in found) / statements
    return totals


def main(paths):
    """Print a line for each file, and the figures of all."""
    found = [density(path) for path in paths]
    for path, each in zip(paths, found, strict=True):
        print("  ".join(f"{value:6.1f} {name}" for name, value in each.items()), f" {path}")
    median = statistics.median(each["nodes"] for each in found)
    print(f"median {median:.1f} nodes a statement;", over_all(found))


if __name__ == "__main__":
    main(sys.argv[1:] or code_files())

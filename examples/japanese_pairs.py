"""Write Japanese training pairs from the translations in Home Assistant's wheel (Apache-2.0).

What a setting, a service or a dialogue is called is the query, what it says of itself its positive.
Every tenth of the components is held out. All positives stand in documents.jsonl, too.

python examples/japanese_pairs.py homeassistant-2026.2.3-py3-none-any.whl runs/demo-ja
"""

import json
import re
import sys
import zipfile
from pathlib import Path

TRANSLATION = re.compile(r"homeassistant/components/(\w+)/translations/ja\.json")
HIRAGANA = re.compile("[ぁ-ん]")
JAPANESE = re.compile("[ぁ-んァ-ヶ一-龠]")
UNFILLED = re.compile(r"\{|\[%key")  # a value or another text would stand there


def translations(wheel):
    """Yield (component, its translation) of a wheel, in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            match = TRANSLATION.fullmatch(name)
            if match:
                yield match[1], json.loads(archive.read(name))


def texts_in(node, key):
    """Return {key: text} of a dict below a node of a translation, {} if there is none."""
    found = node.get(key)
    if not isinstance(found, dict):
        return {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def described(node, names):
    """Yield (names from the outside in, description) of all that a node of a translation describes.

    names: those of the nodes around it.
    """
    name = node.get("name") or node.get("title")
    if isinstance(name, str):
        names = [*names, name]
        if isinstance(node.get("description"), str):
            yield names, node["description"]
    labels = texts_in(node, "data")  # of a dialogue's fields
    for key, text in texts_in(node, "data_description").items():
        if key in labels:
            yield [*names, labels[key]], text
    for key, child in node.items():
        if isinstance(child, dict) and key not in ("data", "data_description"):
            yield from described(child, names)


def make_pairs(components):
    """Return [(component, query, description)]; every query and every description once."""
    pairs = []
    seen = set()
    for component, translation in components:
        for names, text in described(translation, []):
            query = " ".join(dict.fromkeys(names))  # a name is often that of what is around it
            text = " ".join(text.split())
            is_japanese = JAPANESE.search(names[-1]) and HIRAGANA.search(text)
            is_whole = not UNFILLED.search(query + text)
            is_new = seen.isdisjoint((query, text))
            if is_japanese and is_whole and is_new and 15 <= len(text) <= 200:
                pairs.append((component, query, text))
                seen |= {query, text}
    return pairs


def held_out(pairs):
    """Return the components whose pairs are not trained on: their texts are alike."""
    components = list(dict.fromkeys(component for component, _, _ in pairs))
    return set(components[::10])


def write_lines(path, rows):
    """Write one JSON object a line."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def main(wheel, target):
    """Write train.jsonl and dev.jsonl, {"query", "pos"} a line, and documents.jsonl, {"text"}."""
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    pairs = make_pairs(translations(wheel))
    out = held_out(pairs)
    rows = {"train": [], "dev": []}
    for component, query, text in pairs:
        rows["dev" if component in out else "train"].append({"query": query, "pos": [text]})
    for name, found in rows.items():
        write_lines(target / f"{name}.jsonl", found)
    write_lines(target / "documents.jsonl", [{"text": text} for _, _, text in pairs])
    print(f"{len(rows['train'])} pairs, {len(rows['dev'])} held out, in {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])

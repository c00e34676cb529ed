"""Write docs/flags.md and flags.ja.md from the parsers of the scripts, without their slow imports.

python docs/make_flags.py              # what `make docs` does
python docs/make_flags.py FILE.md      # elsewhere: FILE.md and FILE.ja.md

The Japanese stands in docs/flags.ja.json: of each flag beside the English text it was made from.
"""

import argparse
import json
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_embed_lora.py", "train_sft_lora.py", "merge.py")
TOP = """\
# Flags

日本語: [flags.ja.md](flags.ja.md)

What `--help` prints, as tables. `make docs` writes this file: to change it, change the flag, in its
script or in `parts/flags.py`, or the notes in `docs/make_flags.py`.

- A flag with several names means the same by each. Names are written out in full: `--batch` is no
  `--batch_size`.
- *takes*: a switch takes no value. One of a list of words is read in any case. An interval includes
  an end at a square bracket, and excludes one at a round bracket.
- *default*: what holds where the flag is left out. Where nothing stands, it is off, or not set.
"""
TOP_JA = """\
# フラグ一覧

English: [flags.md](flags.md)

`--help` の内容を表にしたものです。このファイルは `make docs` が `docs/flags.ja.json` から作ります。

- 名前が複数あるフラグは、どの名前でも同じ意味です。
  名前は省略できません。`--batch` は `--batch_size` になりません。
- *値*: スイッチは値を取りません。
  単語の一覧から選ぶ値は、大文字と小文字を区別しません。
  範囲は、角括弧の側では端を含み、丸括弧の側では端を含みません。
- *既定値*: フラグを省いたときの値です。空欄は、無効または未設定を表します。
"""
COLUMNS = ("flag", "takes", "default", "meaning")
COLUMNS_JA = ("フラグ", "値", "既定値", "意味")
PROSE = re.compile(r"[A-Za-z] (?:[A-Za-z]|[>≥])")  # no number, no list of words to choose from
# what a flag takes, by its metavar in --help; the other metavars are text
METAVARS = {"DIR": "path", "FILE": "path", "[NAME=]PATH": "`[NAME=]PATH`", "URL": "URL"}
KINDS = {"int": "integer", "float": "number", "margin": "number"}  # names of argparse types
# facts for which --help has no room: of a flag in every script, or in one
NOTES = {
    "--lora_dropout": "lists of parameters that say [0, 1] include 1, at which nothing is learnt",
    "--merge_adapter": "refused at the start where it could not",
    "--resume_from_checkpoint": "last is the newest checkpoint that is whole",
    "--false_negative_margin": "of a cosine p that is p + |p| (1.05 - 1)",
    "train_sft_lora.py --metric_for_best": (
        "the lowest loss of the first dev set, with --pref_loss the highest accuracy"
    ),
    "merge.py --verify": "read the written bytes back; full: compare outputs too",
}


class Declared(Exception):
    """A script has declared its flags; the argument is its parser."""


def parser_of(script):
    """Return the parser of a script, which is started and stopped where it reads its flags."""

    def stop(parser, *_):
        raise Declared(parser)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except Declared as declared:
            return declared.args[0]
    raise AssertionError(f"{script} reads no flags")


def in_markdown(text):
    """Return a text of --help as it stands in a cell of a table, with flags as code."""
    escaped = re.sub(r"([|<])", r"\\\1", text)
    return re.sub(r"(?<!\S)(--\w[\w-]*)", r"`\1`", escaped)


def interval_in_words(interval):
    """Return "≥ 1" for [1, inf), "> 0" for (0, inf), "in " and the interval for others."""
    half_open = re.fullmatch(r"([\[(])(\S+), inf\)", interval)
    if not half_open:
        return f"in {interval}"
    return f"{'≥' if half_open[1] == '[' else '>'} {half_open[2]}"


def value_of(option):
    """Return in words what a flag takes where it is given one value."""
    if option.choices:
        return ", ".join(map(str, option.choices))
    if option.type:
        return f"{KINDS[option.type.__name__]} {interval_in_words(option.type.interval)}"
    return METAVARS.get(option.metavar, "text")


def taken_by(option):
    """Return in words what a flag takes."""
    if option.nargs == 0:
        return "switch"
    value = value_of(option)
    if option.nargs == "+":
        return f"{value}; one or more"
    if option.nargs == "?":
        return f"{value}; alone: {option.const}"
    return value


def row_of(script, option):
    """Return the cells of a flag: names, what it takes, default, meaning."""
    names = " / ".join(f"`{name}`" for name in option.option_strings)
    meaning, default = re.fullmatch(r"(.*?) ?(?:\[([^\[\]]*)\])?", option.help).groups()
    if option.required:
        default = "required"
    name = option.option_strings[0]
    notes = [NOTES[key] for key in (name, f"{script} {name}") if key in NOTES]
    said = "; ".join(filter(None, [meaning, *notes]))
    return [names, taken_by(option), in_markdown(default or ""), in_markdown(said)]


def groups_of(script):
    """Return {title: rows} of a script, as --help groups its flags."""
    groups = {}
    for group in parser_of(script)._action_groups:
        options = [option for option in group._group_actions if option.dest != "help"]
        if options:
            groups[group.title] = [row_of(script, option) for option in options]
    return groups


def tables_of(groups, columns):
    """Return the tables of a script; a heading would say nothing above a single one."""
    lines = []
    for title, rows in groups.items():
        if len(groups) > 1:
            lines += [f"### {title}", ""]
        lines += [f"| {' | '.join(columns)} |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(cells)} |" for cells in rows]
        lines.append("")
    return "\n".join(lines)


def differing(groups, others):
    """Return the names of the flags that two scripts have, with rows that differ."""
    known = {cells[0].split()[0]: cells for rows in others.values() for cells in rows}
    own = {cells[0].split()[0]: cells for rows in groups.values() for cells in rows}
    return [name for name in own if name in known and own[name] != known[name]]


def document(scripts):
    """Return docs/flags.md of {script: groups}."""
    blocks = [TOP]
    for script, groups in scripts.items():
        blocks.append(f"## {script}\n")
        if script == "train_sft_lora.py":
            names = ", ".join(differing(groups, scripts["train_embed_lora.py"]))
            blocks.append(f"Of the flags of train_embed_lora.py these differ here: {names}.\n")
        blocks.append(tables_of(groups, COLUMNS))
    return "\n".join(blocks)


# ---------------------------------------------------------------- in Japanese


def key_of(script, cells, flags):
    """Return under which name the Japanese of a flag stands: of one script, or of all."""
    name = cells[0].split("`")[1]
    own = f"{script} {name}"
    return own if own in flags else name


def stale_texts(scripts, japanese):
    """Return what of {script: groups} has no Japanese, or that of another English text."""
    words, flags = japanese["words"], japanese["flags"]
    found = []
    known = set()
    for script, groups in scripts.items():
        for cells in (cells for rows in groups.values() for cells in rows):
            key = key_of(script, cells, flags)
            known.add(key)
            english, _ = flags.get(key, ("", ""))
            if english != cells[3]:
                found.append(f"{script} {key}: {cells[3]}")
            found += [cell for cell in cells[1:3] if PROSE.search(cell) and cell not in words]
    return found + [f"{key}: no flag" for key in flags if key not in known]


def row_in_japanese(script, cells, japanese):
    """Return the cells of a flag with the Japanese texts of docs/flags.ja.json."""
    words, flags = japanese["words"], japanese["flags"]
    names, takes, default, _ = cells
    is_choice = default in re.split("[,;] ?", takes)  # is typed as it stands
    said = default if is_choice else words.get(default, default)
    return [names, words.get(takes, takes), said, flags[key_of(script, cells, flags)][1]]


def document_ja(scripts, japanese):
    """Return docs/flags.ja.md of {script: groups} in English."""
    blocks = [TOP_JA]
    for script, groups in scripts.items():
        blocks.append(f"## {script}\n")
        if script == "train_sft_lora.py":
            names = ", ".join(differing(scripts[script], scripts["train_embed_lora.py"]))
            blocks.append(f"train_embed_lora.py と異なるフラグは次のとおりです: {names}\n")
        translated = {}
        for title, rows in groups.items():
            said = japanese["words"].get(title, title)
            translated[said] = [row_in_japanese(script, cells, japanese) for cells in rows]
        blocks.append(tables_of(translated, COLUMNS_JA))
    return "\n".join(blocks)


def main():
    """Write both documents to the file that is named, else to their place; 1: Japanese is stale."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "docs/flags.md")
    sys.path.insert(0, str(ROOT))  # of the scripts' own imports
    scripts = {script: groups_of(script) for script in SCRIPTS}
    path.write_text(document(scripts), encoding="utf-8")
    japanese = json.loads((ROOT / "docs/flags.ja.json").read_text("utf-8"))
    if stale := stale_texts(scripts, japanese):
        sys.exit(
            "docs/flags.ja.json has no Japanese text of these, or that of another English text. "
            "Write both there, then run this again:\n" + "\n".join(stale)
        )
    path.with_suffix(".ja.md").write_text(document_ja(scripts, japanese), encoding="utf-8")


if __name__ == "__main__":
    main()

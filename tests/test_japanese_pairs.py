"""examples/japanese_pairs.py: which texts of a wheel become pairs, and which are held out."""

import json
import runpy
import zipfile

from conftest import ROOT

made = runpy.run_path(str(ROOT / "examples/japanese_pairs.py"))
LONG = "これは設定の意味を説明する長めの文です"

TRANSLATION = {
    "title": "目覚まし",
    "config": {
        "step": {
            "user": {
                "title": "接続の設定",
                "description": f"{LONG}。\n\n二行目。",
                "data": {"host": "ホスト", "round": "精度", "name": "Name"},
                "data_description": {
                    "host": f"{LONG}1",
                    "round": "短い説明です。",
                    "name": f"{LONG}2",  # its label is English
                    "gone": f"{LONG}3",  # without a label
                },
            }
        }
    },
    "services": {
        "set": {
            "name": "設定する",
            "description": f"{LONG} {{value}} 4",
            "fields": {
                "name": {"name": "名前", "description": f"{LONG}5"},
                "copy": {"name": "目覚まし", "description": f"{LONG}6"},  # as what is around it
            },
        },
        "again": {"name": "別の名前", "description": f"{LONG}1"},
        "english": {"name": "英語", "description": "An English text that is long enough."},
        "linked": {"name": "参照", "description": f"[%key:component::{LONG}%]"},
        "broken": {"name": ["設定"], "description": f"{LONG}7", "data_description": "説明"},
    },
}


def test_names_from_the_outside_in_are_the_query_and_a_description_its_positive():
    pairs = made["make_pairs"]([("alarm", TRANSLATION), ("copy", TRANSLATION)])
    assert pairs == [
        ("alarm", "目覚まし 接続の設定", f"{LONG}。 二行目。"),
        ("alarm", "目覚まし 接続の設定 ホスト", f"{LONG}1"),
        ("alarm", "目覚まし 設定する 名前", f"{LONG}5"),
        ("alarm", "目覚まし 設定する", f"{LONG}6"),
    ]


def test_every_tenth_component_is_held_out_whole(tmp_path, capsys):
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for place in range(20):
            rows = {
                f"s{row}": {"name": f"設定{place}の{row}", "description": f"{LONG}{place}の{row}"}
                for row in range(2)
            }
            path = f"homeassistant/components/c{place:02}/translations/ja.json"
            archive.writestr(path, json.dumps({"services": rows}, ensure_ascii=False))
        archive.writestr("homeassistant/components/c00/translations/en.json", "no JSON")
    made["main"](wheel, tmp_path / "out" / "deep")
    assert capsys.readouterr().out.startswith("36 pairs, 4 held out, in ")
    found = {}
    for path in (tmp_path / "out/deep").iterdir():
        lines = path.read_text("utf-8").splitlines()
        found[path.name] = [json.loads(line) for line in lines]
    assert [row["query"] for row in found["dev.jsonl"]] == [
        f"設定{place}の{row}" for place in (0, 10) for row in range(2)
    ]
    train = found["train.jsonl"]
    assert train[0] == {"query": "設定1の0", "pos": [f"{LONG}1の0"]} and len(train) == 36
    positives = [row["pos"][0] for row in train + found["dev.jsonl"]]
    assert sorted(positives) == sorted(row["text"] for row in found["documents.jsonl"])

"""report.html: one page that loads nothing, and whose texts are texts."""

import json
import re
import shlex
from html.parser import HTMLParser
from types import SimpleNamespace

import utils
from conftest import back_to, make_rows, write_jsonl
from parts import examples
from parts.checkpoints import delete_run
from parts.page import MEANINGS, STYLE, page
from parts.report import command_of
from parts.scores import SHOWN

import pytest

HOSTILE = "</script><b onload='x()'>\"&lt;是 \x00\ud800</style></title>-->"
READ = HOSTILE.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")  # as the page has it
VOID = {"meta", "img"}
WRITTEN = set(
    "html head title style body h1 h2 h3 h4 section div p ul ol li table tr th td".split()
)
WRITTEN |= {"details", "summary", "pre", "code", "span"} | VOID


class Reader(HTMLParser):
    """Collects the tags, attributes and texts of a page; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def handle_comment(self, data):
        raise AssertionError("a comment that was not written")


def example_of(text):
    found = [{"text": text, "note": text, "is_right": is_right} for is_right in (True, False, None)]
    return {"asked": text, "expected": [text], "note": text, "found": found}


def report_of(text):
    """What a page is made of, `text` wherever the data, or a user, can put one."""
    plan = {"has_dev": True, "lr": 2e-4, "metric": text, "shown": {text: ""}, "watched": []}
    report = {
        "flags": {"model_name": text, "output_dir": text, "epochs": None, "train_file": [text]},
        "settled": {"query_prefix": text},
        "plan": plan | {"notes": [text]},
        "metrics": {"before": {text: 0.25, "other": 1.0}, "after": {text: 0.5, "other": 1.0}},
        "warnings": [text],
        "proof": {"relative_error": 1e-8, "relative_change": 0.125},
        "data": {"train_rows": 12345, "dropped": {text: 1}, "dev": {text: {"queries": 3}}},
        "versions": {"torch": text},
        "command": ["python", text, "--flag", text],
        "seconds_aside": {"evaluation": 1.5},
        "best_step": None,
        "steps": 7,
    }
    for name in ("resumed_after", "seconds", "tokens_per_second", "padded_per_real_token"):
        report[name] = 0
    for name in ("peak_gib", "precision", "processes", "first_loss"):
        report[name] = None
    report |= {"data_fingerprint": text, "base_fingerprint": text, "device": text}
    return report


def page_of(text):
    """A page on which `text` stands wherever the data, or a user, can put one."""
    return page(report_of(text), b"\x89PNG", [(example_of(text), example_of(text))])


def test_no_text_becomes_a_tag_and_none_is_lost():
    hostile, tame = Reader(page_of(HOSTILE)), Reader(page_of("tame"))
    assert hostile.tags == tame.tags and set(tame.tags) == WRITTEN
    assert {name for _, name, _ in hostile.attributes} == {name for _, name, _ in tame.attributes}
    counts = [
        sum(text in part or shlex.quote(text) in part for part in reader.texts)
        for reader, text in ((hostile, READ), (tame, "tame"))
    ]
    assert counts[0] == counts[1] > 25
    assert page_of(HOSTILE).encode("utf-8")  # no half of a surrogate pair is left


def check_loads_nothing(text):
    """Check that a page names nothing that a browser would fetch, or run."""
    reader = Reader(text)
    assert set(reader.tags) <= WRITTEN
    for tag, name, value in reader.attributes:
        assert name in {
            "class",
            "lang",
            "dir",
            "scope",
            "name",
            "charset",
            "content",
            "http-equiv",
            "alt",
            "src",
        }, name
        assert name != "src" or (tag == "img" and value.startswith("data:image/png;base64,"))
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert ("meta", "content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in (
        reader.attributes
    )
    return reader


def test_a_page_says_what_changed():
    reader = check_loads_nothing(page_of("ndcg@10"))
    text = " ".join(reader.texts)
    assert "ndcg@10 0.2500 0.5000 +0.2500" in text and "other 1.0000 1.0000 +0.0000" in text
    assert "relative error 1e-08" in text and "changed these outputs by 12.5%" in text
    assert "dev set ndcg@10: queries 3" in text and "train_rows 12,345" in text
    assert text.count("✓ right") == 2 and "after step 7" in text
    assert "running mean" in text and "the last" not in text.split("Curves")[1].split("Examples")[0]


def words_of(report, pairs=()):
    """The texts of a page, a space between two of them."""
    return " ".join(check_loads_nothing(page(report, b"\x89PNG", list(pairs))).texts)


def test_a_page_begins_with_what_was_trained_and_what_final_holds():
    report = report_of("x") | {"command": ["python", "train.py"], "device": "CPU", "seconds": 3725}
    text = words_of(report)
    assert "Report of x" in text
    assert "train.py trained x with 12,345 rows: 7 steps on CPU, 1 h 2 min 5 s" in text
    assert "final/ holds the last state;" in text and "Resumed" not in text
    assert "No dev set" not in text and "Measured on dev sets" in text
    report |= {"best_step": 1000, "resumed_after": 2000, "seconds": 0.2}
    report["flags"]["sanity_overfit"] = 100
    report["plan"]["metric"] = "f1"
    text = words_of(report)
    assert "state after step 1,000, the best by f1;" in text
    assert "0 s with" in text and "Resumed after step 2,000;" in text
    assert "Measured on the rows that were trained on" in text
    report["plan"]["has_dev"] = False
    assert "No dev set was measured." in words_of(report)


def test_every_metric_that_is_shown_is_explained():
    assert {*SHOWN, "exact_match", "ndcg@10", "recall@10"} == set(MEANINGS)
    report = report_of("x")
    report["plan"]["shown"] = {"日_loss": "日", "二_loss": "二", "日_accuracy": "日", "own": "日"}
    report["metrics"] = {"before": dict.fromkeys(report["plan"]["shown"], 1.0)}
    report["metrics"]["after"] = report["metrics"]["before"]
    text = words_of(report)
    assert text.count("lower is better") == 1 == text.count(f"loss: {MEANINGS['loss']}; lower")
    assert f"accuracy: {MEANINGS['accuracy']} " in text and "own:" not in text
    assert text.index("日_loss 1.0000") < text.index("二_loss 1.0000")
    assert "f1:" not in text  # was not measured


def test_a_command_is_torn_at_no_flag():
    command = ["python", "train.py", "--a", "b c", "-1", "--d=e", "--no-f"]
    reader = check_loads_nothing(page(report_of("x") | {"command": command}, b"\x89PNG", []))
    first = reader.texts.index("python train.py")
    flags = ["python train.py", " ", "--a 'b c' -1", " ", "--d=e", " ", "--no-f"]
    assert reader.texts[first : first + len(flags)] == flags
    assert shlex.split("".join(flags)) == command
    assert reader.tags.count("span") == 4


def test_an_answer_has_no_place_and_an_empty_one_is_said_to_be():
    answered = example_of("x") | {"found": [{"text": "yes", "note": "", "is_right": None}]}
    silent = example_of("x") | {"found": [{"text": " \n", "note": "cut", "is_right": None}]}
    reader = check_loads_nothing(page(report_of("x"), b"\x89PNG", [(silent, answered)]))
    text = " ".join(reader.texts)
    assert "ol" not in reader.tags and "(nothing) cut" in text and "yes" in text
    assert "how each is answered" in text and "finds first" not in text
    nothing = example_of("x") | {"found": []}
    for example in (example_of("x"), nothing):
        reader = check_loads_nothing(page(report_of("x"), b"\x89PNG", [(example, example)]))
        assert "ol" in reader.tags
        assert reader.attributes.count(("li", "class", "right")) == (2 if example["found"] else 0)


def test_a_long_word_is_wrapped_wherever_it_stands():
    body = re.search(r"body \{(.*?)\}", STYLE, re.S)[1]
    assert "overflow-wrap: anywhere" in body  # all else inherits it


def read_page(folder):
    return check_loads_nothing((folder / "report.html").read_text(encoding="utf-8"))


def count_examples(reader):
    return reader.attributes.count(("section", "class", "example"))


def test_an_embedding_run_shows_three_queries_before_and_after_and_resumed(run_embed, tmp_path):
    rows = [row | {"query": f"{row['query']} </script><b>é是"} for row in make_rows(96)]
    data, out = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "out"
    flags = ["--max_steps", 4, "--eval_every", 2, "--lr", 1e-2]
    report = run_embed(*flags, data=data)
    reader, kept = read_page(out), utils.read_json(out / examples.FILE)
    assert count_examples(reader) == 3 and list(kept) == ["0", "2", "4"]
    after = kept[str(report["best_step"])]
    assert kept["0"] != after
    positives = {row["query"]: row["pos"] for row in rows}
    for before, now in zip(kept["0"], after, strict=True):
        assert before["asked"] == now["asked"] in reader.texts
        for example in (before, now):
            assert example["note"] in reader.texts and len(example["found"]) == 3
            cosines = [float(found["note"].split()[1]) for found in example["found"]]
            assert cosines == sorted(cosines, reverse=True)
            for found in example["found"]:
                assert found["text"] in reader.texts
                assert found["is_right"] == (found["text"] in positives[example["asked"]])
            hits = [found["is_right"] for found in example["found"]]
            place = int(re.search(r"(?:place|first) (\d+) of", example["note"])[1])
            assert (place <= 3) == any(hits) and (place > 3 or hits.index(True) == place - 1)
    assert "--max_steps 4" in "".join(reader.texts)
    # a resumed run, here and in another folder, has what its beginning has shown
    kept["0"][0]["found"][0]["text"] = "as it began"
    utils.write_json(out / examples.FILE, kept)
    back_to(out, 2)
    (out / "report.html").unlink()
    run_embed(
        *flags, "--resume_from_checkpoint", out / "checkpoint-2", data=data, out=tmp_path / "new"
    )
    run_embed(*flags, "--resume_from_checkpoint", data=data)
    for folder in (out, tmp_path / "new"):
        resumed = read_page(folder)
        assert count_examples(resumed) == 3 and "as it began" in resumed.texts
        assert "--resume_from_checkpoint" not in "".join(resumed.texts).split("all flags")[0]
        assert utils.read_json(folder / examples.FILE)["0"] == kept["0"]  # for the next resumption


def test_an_sft_run_shows_answers_where_some_are_generated(run_sft, tmp_path):
    flags = ["--max_steps", 2, "--eval_every", 2, "--eval_generate", 4, "--max_new_tokens", 4]
    run_sft(*flags, "--save_best", 0)
    reader, kept = read_page(tmp_path / "out"), utils.read_json(tmp_path / "out" / examples.FILE)
    assert count_examples(reader) == 3 and list(kept) == ["0", "2"]
    for step, shown in kept.items():
        lines = (tmp_path / f"out/predictions-dev-{step}.jsonl").read_text().splitlines()
        written = [json.loads(line) for line in lines[:3]]
        assert [each["asked"] for each in shown] == [
            line["messages"][-1]["content"] for line in written
        ]
        assert [each["found"][0]["text"] for each in shown] == [
            line["prediction"] for line in written
        ]
        assert [each["expected"] for each in shown] == [[line["reference"]] for line in written]
    run_sft("--max_steps", 1, "--overwrite")
    assert count_examples(read_page(tmp_path / "out")) == 0
    assert not (tmp_path / "out" / examples.FILE).exists()  # the old run's is gone
    delete_run(tmp_path / "out")
    assert not (tmp_path / "out/report.html").exists()


def test_without_a_dev_set_a_page_has_no_examples(run_embed, tmp_path):
    run_embed("--max_steps", 1, "--eval_strategy", "no")
    reader = read_page(tmp_path / "out")
    assert count_examples(reader) == 0 and not {"Examples", "Before and after"} & set(reader.texts)
    run_embed("--max_steps", 1, "--overwrite", "--dry_run")
    assert (tmp_path / "out/report.html").exists()


def test_a_start_from_step_0_forgets_what_an_earlier_one_kept(tmp_path):
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=9))
    trainer.is_world_process_zero = lambda: True
    shown = [example_of("x")]
    measure = examples.showing(lambda trainer: {"loss": 1.0}, lambda trainer: shown, tmp_path / "a")
    assert measure(trainer) == {"loss": 1.0}
    assert examples.before_and_after(tmp_path / "a", 9) == []  # its beginning is not known
    for step in (0, 3):
        trainer.state.global_step = step
        measure(trainer)
    assert list(utils.read_json(tmp_path / "a" / examples.FILE)) == ["0", "3"]
    assert examples.before_and_after(tmp_path / "a", 3) == [(shown[0], shown[0])]
    trainer.is_world_process_zero = lambda: False
    trainer.state.global_step = 5
    measure(trainer)
    assert examples.before_and_after(tmp_path / "a", 5) == []  # one process writes


def test_examples_are_drawn_by_the_seed():
    assert (
        examples.draw(range(100), 7) == examples.draw(range(100), 7) != examples.draw(range(100), 8)
    )
    assert sorted(examples.draw("ab", 0)) == ["a", "b"]
    assert len(examples.shortened("x" * 9999)) < 700 and examples.shortened("\ud800") == "?"


@pytest.mark.parametrize(
    "resume",
    [
        ["--resume_from_checkpoint"],
        ["--resume_from_checkpoint", "a/b"],
        ["--resume_from_checkpoint=a/b"],
        [],
    ],
)
def test_a_command_is_that_of_the_beginning(resume, monkeypatch):
    argv = ["--output_dir", "a b", *resume, "--train_file", "a/b", "c"]
    whole = ["python", "x.py", "--output_dir", "a b", "--train_file", "a/b", "c"]
    assert command_of("x.py", argv) == whole
    monkeypatch.setattr("sys.argv", ["x.py", *argv])
    assert command_of("x.py", None) == whole
    assert argv[:2] + resume == argv[: 2 + len(resume)]  # and leaves the list as it is

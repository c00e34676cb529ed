"""What is held out; with a limit no more rows of a hub data set are read than are needed."""

from conftest import write_jsonl
from parts import chats, dev_sets
from parts.pairs import Columns, Example, by_query
from parts.rows import HubSet
from parts.splits import Sizes, Source, hold_out
from utils import InputError

import datasets
import pytest

TRAINERS = [dev_sets, chats]


def read_data(trainer, source, overfit=None, **sizes):
    """Return what a trainer's room makes of a source."""
    defaults = {"seed": 42, "share": 0.1 if trainer is dev_sets else 0.2}
    sizes = Sizes(**defaults | sizes, whole=overfit is not None)
    if trainer is dev_sets:
        return dev_sets.read_data(source, sizes, Columns(), None, max_negs=1)
    return chats.read_data(source, sizes, None, None, False, overfit, True)


@pytest.fixture
def hub(tmp_path):
    """Make a data set folder as on the hub; returns its rows, which both trainers can read."""

    def make(count, is_good=lambda i: True):
        rows = [
            {"query": f"what is {i}?", "response": f"it is {i}" if is_good(i) else ""}
            for i in range(count)
        ]
        write_jsonl(tmp_path / "train.jsonl", rows)
        return rows

    return make


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Call read_data of a trainer on the folder: what it returns, and how many rows it has read."""

    def run(trainer, dev_file=None, **sizes):
        looked_at, read_examples = [], trainer.read_examples

        def counted(rows, **more):
            looked_at.append(len(rows))
            return read_examples(rows, **more)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "read_examples", counted)
            source = Source(hub=HubSet(str(tmp_path)), dev_files=dev_file and [dev_file])
            return *read_data(trainer, source, **sizes), looked_at

    return run


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("asked, held", [({}, None), ({"dev_size": 0.3}, 30), ({"dev": 70}, 70)])
def test_no_more_rows_are_read_than_the_limit_needs(trainer, asked, held, hub, read):
    hub(3000)
    held = held or (10 if trainer is dev_sets else 20)  # a tenth or a fifth of the 100
    examples, _, counts, looked_at = read(trainer, train=100, **asked)
    assert looked_at == [2 * (100 + held) + 1000]
    assert len(examples) == counts["train_rows"] == 100
    sizes = counts["dev"]["dev"]
    assert (sizes["queries"] if trainer is dev_sets else sizes) == held
    assert read(trainer, train=100, **asked)[0] == examples
    assert read(trainer, train=100, **asked, seed=7)[0] != examples


def test_drawn_rows_come_from_everywhere_and_keep_their_numbers(hub, read):
    rows = hub(3000)
    examples = read(chats, train=100)[0]
    numbers = [int(example.where.rpartition("row ")[2]) for example in examples]
    assert [example.answer for example in examples] == [
        rows[number - 1]["response"] for number in numbers
    ]
    assert min(numbers) < 300 and max(numbers) > 2700


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_rest_is_read_where_too_few_rows_are_left(trainer, hub, read, capsys):
    hub(3000, is_good=lambda i: i % 10 == 0)
    examples, _, counts, looked_at = read(trainer, train=200, dev_size=0)
    assert looked_at == [1400, 3000]
    assert len(examples) == 200
    assert sum(counts["dropped"].values()) == 2700
    assert "rows, drawn with --seed, leave" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_limit_above_what_is_there_reads_all_once(trainer, hub, read):
    hub(300)
    examples, _, counts, looked_at = read(trainer, train=500, dev_size=0.1)
    assert looked_at[0] == 300
    assert len(examples) == 270
    assert len(looked_at) == 1


def test_a_data_set_of_sounds_is_refused_in_a_sentence(tmp_path):
    sound = {"bytes": b"RIFF", "path": None}
    data = datasets.Dataset.from_dict({"query": ["what?"], "response": ["a cat"], "audio": [sound]})
    data.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "train.parquet")
    source = Source(hub=HubSet(str(tmp_path)))
    with pytest.raises(InputError, match="holds more than text|is not empty, and only text"):
        read_data(chats, source)


def test_sanity_overfit_takes_its_rows_from_all(hub, read):
    hub(3000)
    assert read(chats, train=100, overfit=20)[3] == [3000]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_dev_set_takes_nothing_from_the_limit(trainer, hub, read, tmp_path):
    hub(3000)
    dev = write_jsonl(
        tmp_path.parent / "dev.jsonl", [{"query": "what is what?", "response": "it is that"}]
    )
    assert read(trainer, dev, train=100)[3][0] == 1200


@pytest.mark.parametrize("trainer", TRAINERS)
def test_of_files_too_the_dev_share_is_one_of_the_limit(trainer, hub, tmp_path):
    hub(400)
    source = Source([str(tmp_path / "train.jsonl")])
    examples, _, counts = read_data(trainer, source, train=50, dev_size=0.2)
    size = counts["dev"]["dev"]
    assert len(examples) == 50
    assert (size["queries"] if trainer is dev_sets else size) == 10


def test_flags_say_how_many_are_held_out_or_a_share_of_at_most_so_many_units():
    examples = [Example(f"q{i // 3}", [f"p{i}"], []) for i in range(60)]
    for sizes, most, rows in (
        ({}, 2, 6),
        ({"dev_size": 0.5}, 2, 30),
        ({"dev": 9}, 2, 9),
        ({}, 9, 12),
    ):
        held = hold_out(examples, by_query, Sizes(42, 0.2, **sizes), "query", most=most)[1]
        assert len(held[""]) == rows, sizes


def test_both_queries_of_a_mirrored_pair_count_towards_the_most_that_are_held_out():
    examples = [Example(f"{i}", [f"p{i}"], []) for i in range(40)]
    sizes = Sizes(42, 0.5)
    held = hold_out(examples, lambda e: int(e.query) // 2, sizes, "query", 4, lambda e: e.query)[1]
    assert len(held[""]) == 4

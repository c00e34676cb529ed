"""What is held out; with a limit no more rows of a hub data set are read than are needed."""

import train_embed_lora
import train_sft_lora
from conftest import write_jsonl
from parts import chats, dev_sets
from parts.pairs import Example, by_query
from parts.splits import Sizes, hold_out
from utils import InputError

import datasets
import pytest

TRAINERS = [train_embed_lora, train_sft_lora]
READS = {
    train_embed_lora: dev_sets,
    train_sft_lora: chats,
}  # where a trainer's rows become examples


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
    """Call read_rows of a trainer on the folder: what it returns, and how many rows it has read."""

    def run(trainer, *flags):
        looked_at, read_examples = [], READS[trainer].read_examples

        def counted(rows, **more):
            looked_at.append(len(rows))
            return read_examples(rows, **more)

        with monkeypatch.context() as patch:
            patch.setattr(READS[trainer], "read_examples", counted)
            args = trainer.parse_args(["--dataset_name", str(tmp_path), *map(str, flags)])
            return *trainer.read_rows(args), looked_at

    return run


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "flags, held", [([], None), (["--dev_size", 0.3], 30), (["--dev_sample_limit", 70], 70)]
)
def test_no_more_rows_are_read_than_the_limit_needs(trainer, flags, held, hub, read):
    hub(3000)
    held = held or (10 if trainer is train_embed_lora else 20)  # a tenth or a fifth of the 100
    examples, _, counts, looked_at = read(trainer, "--train_sample_limit", 100, *flags)
    assert looked_at == [2 * (100 + held) + 1000]
    assert len(examples) == counts["train_rows"] == 100
    sizes = counts["dev"]["dev"]
    assert (sizes["queries"] if trainer is train_embed_lora else sizes) == held
    assert read(trainer, "--train_sample_limit", 100, *flags)[0] == examples
    assert read(trainer, "--train_sample_limit", 100, *flags, "--seed", 7)[0] != examples


def test_drawn_rows_come_from_everywhere_and_keep_their_numbers(hub, read):
    rows = hub(3000)
    examples = read(train_sft_lora, "--train_sample_limit", 100)[0]
    numbers = [int(example.where.rpartition("row ")[2]) for example in examples]
    assert [example.answer for example in examples] == [
        rows[number - 1]["response"] for number in numbers
    ]
    assert min(numbers) < 300 and max(numbers) > 2700


@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_rest_is_read_where_too_few_rows_are_left(trainer, hub, read, capsys):
    hub(3000, is_good=lambda i: i % 10 == 0)
    examples, _, counts, looked_at = read(trainer, "--train_sample_limit", 200, "--dev_size", 0)
    assert looked_at == [1400, 3000]
    assert len(examples) == 200
    assert sum(counts["dropped"].values()) == 2700
    assert "rows, drawn with --seed, leave" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_limit_above_what_is_there_reads_all_once(trainer, hub, read):
    hub(300)
    examples, _, counts, looked_at = read(trainer, "--train_sample_limit", 500, "--dev_size", 0.1)
    assert looked_at[0] == 300
    assert len(examples) == 270
    assert len(looked_at) == 1


def test_a_data_set_of_sounds_is_refused_in_a_sentence(tmp_path):
    sound = {"bytes": b"RIFF", "path": None}
    data = datasets.Dataset.from_dict({"query": ["what?"], "response": ["a cat"], "audio": [sound]})
    data.cast_column("audio", datasets.Audio()).to_parquet(tmp_path / "train.parquet")
    args = train_sft_lora.parse_args(["--dataset_name", str(tmp_path)])
    with pytest.raises(InputError, match="holds more than text|is not empty, and only text"):
        train_sft_lora.read_rows(args)


def test_sanity_overfit_takes_its_rows_from_all(hub, read):
    hub(3000)
    assert read(train_sft_lora, "--train_sample_limit", 100, "--sanity_overfit", 20)[3] == [3000]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_dev_set_takes_nothing_from_the_limit(trainer, hub, read, tmp_path):
    hub(3000)
    dev = write_jsonl(
        tmp_path.parent / "dev.jsonl", [{"query": "what is what?", "response": "it is that"}]
    )
    assert read(trainer, "--train_sample_limit", 100, "--dev_file", dev)[3][0] == 1200


@pytest.mark.parametrize("trainer", TRAINERS)
def test_of_files_too_the_dev_share_is_one_of_the_limit(trainer, hub, tmp_path):
    hub(400)
    file = ["--train_file", str(tmp_path / "train.jsonl")]
    flags = [*file, "--train_sample_limit", "50", "--dev_size", "0.2"]
    examples, _, counts = trainer.read_rows(trainer.parse_args(flags))
    size = counts["dev"]["dev"]
    assert len(examples) == 50
    assert (size["queries"] if trainer is train_embed_lora else size) == 10


def test_a_tenth_of_at_most_1000_queries_is_held_out_unless_a_flag_says_how_many(tmp_path):
    rows = [{"query": f"q{i}", "pos": [f"p{i}"]} for i in range(10400)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    for flags, queries in (([], 1000), (["--dev_size", "0.1"], 1040)):
        args = train_embed_lora.parse_args(["--train_file", path, *flags])
        examples, dev_sets, counts = train_embed_lora.read_rows(args)
        assert len(dev_sets[""].queries) == counts["dev"]["dev"]["queries"] == queries, flags
        assert len(examples) == 10400 - queries


def test_sft_still_holds_a_fifth_out(tmp_path):
    rows = [{"prompt": f"{i}?", "response": f"answer {i}"} for i in range(6000)]
    args = train_sft_lora.parse_args(["--train_file", write_jsonl(tmp_path / "rows.jsonl", rows)])
    assert train_sft_lora.read_rows(args)[2]["dev"] == {"dev": 1200}


def test_nothing_is_held_out_for_evaluations_that_never_come(hub, read):
    hub(300)
    for trainer in TRAINERS:
        examples, dev_sets, _, _ = read(trainer, "--eval_strategy", "no")
        assert len(examples) == 300 and not dev_sets


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

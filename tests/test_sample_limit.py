"""--train_sample_limit: of a data set on the hub no more rows are read than are needed."""

import train_embed_lora
import train_sft_lora
import utils
from conftest import write_jsonl

import datasets
import pytest

TRAINERS = [train_embed_lora, train_sft_lora]


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
    """Call read_data of a trainer on the folder; returns (what it gives, how many rows it has looked at)."""

    def run(trainer, *flags, source=("--dataset_name",)):
        looked_at, read_examples = [], trainer.read_examples

        def counted(rows, args):
            looked_at.append(len(rows))
            return read_examples(rows, args)

        with monkeypatch.context() as patch:
            patch.setattr(trainer, "read_examples", counted)
            args = trainer.parse_args([*source, str(tmp_path), *map(str, flags)])
            return *trainer.read_data(args), looked_at

    return run


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "flags, held", [([], None), (["--dev_size", 0.3], 30), (["--dev_sample_limit", 70], 70)]
)
def test_no_more_rows_are_read_than_the_limit_needs(trainer, flags, held, hub, read):
    hub(3000)
    held = held or (10 if trainer is train_embed_lora else 20)  # a tenth or a fifth of the 100
    examples, dev_sets, counts, looked_at = read(trainer, "--train_sample_limit", 100, *flags)
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
    with pytest.raises(utils.InputError, match="holds more than text|is not empty, and only text"):
        train_sft_lora.read_data(args)


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
    examples, _, counts = trainer.read_data(
        trainer.parse_args([*file, "--train_sample_limit", "50", "--dev_size", "0.2"])
    )
    size = counts["dev"]["dev"]
    assert len(examples) == 50
    assert (size["queries"] if trainer is train_embed_lora else size) == 10

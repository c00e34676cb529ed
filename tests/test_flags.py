"""Wrong flags end in a sentence and exit code 2; the names of other trainers are understood."""

import argparse
import os
import resource
import subprocess
import sys

import contracts
import merge
import train_embed_lora
import train_sft_lora
from conftest import ROOT
from parts.flag_types import above_zero, count, integer, margin, real, share

import pytest

# of each, importing fails where a script must answer without it
SLOW = ("torch", "transformers", "datasets", "peft", "accelerate", "safetensors", "numpy", "tqdm")


def run_without_libraries(folder, *words):
    """Run Python where no library can be imported: (its end, seconds of a processor)."""
    for library in SLOW:
        (folder / f"{library}.py").write_text(f"raise AssertionError('imports {library}')\n")
    environment = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "102"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("script", ["train_embed_lora.py", "train_sft_lora.py", "merge.py"])
def test_help_and_a_wrong_flag_are_answered_at_once(script, tmp_path):
    done, seconds = run_without_libraries(tmp_path, script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds < 1  # of this process alone: others may keep the machine busy
    assert "Shapes:" not in done.stdout  # which are for readers of the code
    for line in done.stdout.splitlines():
        assert len(line) <= 100 or line.startswith("  --"), line  # names of a flag, not its meaning
        assert "     --" not in line.strip(), line  # a command that goes on in the next line
    for wrong in (["--bacth_size", "4"], ["--train_file", "x", "--lr", "7"]):
        done, seconds = run_without_libraries(tmp_path, script, *wrong)
        assert done.returncode == 2 and done.stdout == "" and seconds < 1
        assert f"{script}: error: " in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "script, second", [(train_embed_lora, "embedding"), (train_sft_lora, "SFT")]
)
def test_help_begins_with_what_most_runs_need(script, second):
    groups = [group for group in contracts.parser_of(script)._action_groups if group._group_actions]
    assert [group.title for group in groups[:3]] == ["options", "what most runs need", second]
    first = [option.dest for option in groups[1]._group_actions]
    assert first[:5] == ["train_file", "dev_file", "model_name", "output_dir", "dry_run"]
    assert {"epochs", "lr", "batch_size", "load_in_4bit", "resume_from_checkpoint"} < set(first)
    assert len(first) <= 12  # or nobody reads them


BROKEN_FLAGS = {
    "--bacth_size 4": "unrecognized arguments: --bacth_size 4",
    "--batch 4": "unrecognized arguments: --batch 4",
    "--batch_size 0": "argument --batch_size/--per_device_train_batch_size: 0 is outside [1, inf)",
    "--batch_size two": "--per_device_train_batch_size: invalid int value: 'two'",
    "--lr 1": "argument --lr/--learning_rate: 1 is outside (0, 1)",
    "--lr nan": "argument --lr/--learning_rate: nan is outside",
    "--epochs 0": "argument --epochs/--num_train_epochs: 0 is outside (0, inf)",
    "--warmup_ratio 1": "1 is outside [0, 1)",
    "--lora_dropout 1.5": "argument --lora_dropout: 1.5 is outside [0, 1)",
    "--logging_steps -2": "-2 is outside [-1, inf)",
    "--fp16 --bf16": "--fp16, --bf16, --mixed_precision: pass one",
    "--load_in_8bit --load_in_4bit": "8 and 4 bits are both asked for",
    "--finetune_type full --load_in_8bit": "--finetune_type full: no quantisation",
    "--save_best 1 --eval_strategy no": (
        "--save_best and --early_stopping_patience need an evaluation"
    ),
    "--early_stopping_patience 3 --dev_size 0": "need an evaluation",
    "--checkpoint_strategy no --save_best 1": "need checkpoints: drop --checkpoint_strategy no",
    "--early_stopping_patience 3 --save_best 0": "keeps the best state: drop --save_best 0",
    "--resume_from_checkpoint --output_dir x --overwrite": (
        "--overwrite deletes what --resume_from_checkpoint needs"
    ),
    "--dataset_name x": "--train_file and --dataset_name both name training data",
    "--init_adapter nowhere": "--init_adapter nowhere has no adapter_config.json",
    "--false_negative_margin 1.05y": "1.05y is neither a difference of cosines from 0 to 2 (0.05)",
    "--false_negative_margin x": "x is neither a difference",
    "--false_negative_margin 0x": "0x is neither a difference",
    "--false_negative_margin 11x": "11x is neither a difference",
    "--false_negative_margin nanx": "nanx is neither a difference",
    "--false_negative_margin 2.5": "nor a multiple of the positive's up to 10 (1.05x)",
    "--false_negative_margin -0.1": "-0.1 is neither a difference",
    "--false_negative_margin inf": "inf is neither a difference",
    "--temperature 0": "argument --temperature: 0 is outside (0",
}


@pytest.mark.parametrize("flags", BROKEN_FLAGS)
def test_broken_flags_exit_2_with_a_sentence(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        train_embed_lora.main(["--train_file", "x.jsonl", *flags.split()])
    assert stop.value.code == 2
    assert BROKEN_FLAGS[flags] in capsys.readouterr().err


ALIASES = {
    "--lora_rank 3": ("lora_r", 3),
    "--quantization_bit 8 --finetune_type QLoRA": ("bits", 8),
    "--per_device_train_batch_size 5": ("batch_size", 5),
    "--max_sequence_length 99": ("max_length", 99),
    "--lr_warmup_steps 7": ("warmup_steps", 7),
    "--lr_warmup_ratio 0.2": ("warmup_ratio", 0.2),
    "--log_with wandb": ("report_to", "wandb"),
    "--flash_attention_v2": ("attn_implementation", "flash_attention_2"),
    "--disable_gradient_checkpointing": ("gradient_checkpointing", "off"),
    "--no-gradient_checkpointing": ("gradient_checkpointing", "off"),
    "--gradient_checkpointing Auto": ("gradient_checkpointing", "auto"),
    "--gradient_checkpointing --lora_r 3": ("gradient_checkpointing", "on"),
    "--mixed_precision Bf16": ("mixed_precision", "bf16"),
    "--report_to None": ("report_to", "none"),
    "--optimizer AdamW": ("optimizer", "adamw"),
    "--lr_scheduler_type Cosine": ("lr_scheduler", "cosine"),
    "--finetune_type LoRA": ("finetune_type", "lora"),
    "--training_type Full": ("finetune_type", "full"),
    "--eval_strategy Epoch": ("eval_strategy", "epoch"),
    "--save_on_epoch_end 3": ("save_on_epoch_end", 3),
}


@pytest.mark.parametrize("script", [train_embed_lora, train_sft_lora])
@pytest.mark.parametrize("flags", ALIASES)
def test_names_and_values_of_other_trainers_are_understood(flags, script):
    name, value = ALIASES[flags]
    args = script.parse_args(
        ["--train_file", "x.jsonl", "--gradient_checkpointing", *flags.split()]
    )
    assert getattr(args, name) == value


def test_a_switch_of_another_trainer_changes_nothing_where_it_is_not_given():
    args = train_sft_lora.parse_args(["--train_file", "x.jsonl"])
    assert (args.attn_implementation, args.gradient_checkpointing) == ("auto", "auto")


def test_no_data_and_resume_without_a_folder_exit_2(capsys):
    for flags, sentence in (
        ([], "no training data"),
        (["--train_file", "x", "--resume_from_checkpoint"], "needs the run's --output_dir"),
    ):
        with pytest.raises(SystemExit) as stop:
            train_embed_lora.main(flags)
        assert stop.value.code == 2
        assert sentence in capsys.readouterr().err


def test_init_adapter_with_a_contradicting_rank_exits_2(run_embed, tmp_path, capsys):
    run_embed("--max_steps", 2, "--lora_r", 4, out=tmp_path / "one")
    with pytest.raises(SystemExit) as stop:
        run_embed("--init_adapter", tmp_path / "one/final", "--lora_r", 8)
    assert stop.value.code == 2
    assert "was trained with lora_r 4, not 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--endpoint", "http://x"], "add --eval_only"),
        (["--sanity_overfit", "5", "--eval_only"], "pass one"),
        (["--sanity_overfit", "5", "--dev_file", "x"], "measures the rows it trains on"),
        (
            ["--sanity_overfit", "5", "--early_stopping_patience", "2"],
            "measures the rows it trains on",
        ),
        (["--drop_regex", "("], "--drop_regex"),
        (["--max_length", "4"], "outside"),
        (["--overlong", "cut"], "invalid choice"),
        (["--eval_generate", "-1"], "outside"),
    ],
)
def test_flags_that_do_not_go_together_exit_2(flags, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        train_sft_lora.parse_args(["--train_file", "x", *flags])
    assert exit.value.code == 2 and sentence in capsys.readouterr().err


def test_eval_only_needs_rows(capsys):
    with pytest.raises(SystemExit):
        train_sft_lora.parse_args(["--eval_only"])
    assert "needs rows to evaluate on" in capsys.readouterr().err


def test_a_margin_is_a_number_or_a_multiple_as_text():
    for asked, value in (("0.05", 0.05), ("2", 2.0), ("1.050X", "1.05x"), (".95x", "0.95x")):
        flags = ["--train_file", "x.jsonl", "--false_negative_margin", asked]
        assert train_embed_lora.parse_args(flags).false_negative_margin == value


@pytest.mark.parametrize(
    "kind, interval, inside, outside",
    [
        (count, "[1, inf)", "1", "0"),
        (integer(-1), "[-1, inf)", "-1", "-2"),
        (share, "[0, 1)", "0", "1"),
        (above_zero, "(0, inf)", "1e-9", "0"),
        (above_zero, "(0, inf)", "1e9", "inf"),
        (real(0, 10, {0}), "(0, 10]", "10", "0"),
        (margin, "[0, 2], or a multiple in (0, 10] as 1.05x", "2", "2.01"),
        (margin, "[0, 2], or a multiple in (0, 10] as 1.05x", "10x", "10.01x"),
    ],
)
def test_a_number_is_refused_outside_of_the_interval_that_is_shown(kind, interval, inside, outside):
    assert kind.interval == interval
    kind(inside)
    with pytest.raises(argparse.ArgumentTypeError):
        kind(outside)


def test_merge_refuses_a_device_that_torch_does_not_know(capsys):
    with pytest.raises(SystemExit) as stop:
        merge.parse_args("--lora_adapter_path a --output_path b --device nowhere".split())
    assert stop.value.code == 2
    assert "error: --device nowhere: Expected one of cpu" in capsys.readouterr().err

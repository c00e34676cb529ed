"""A frozen base in parts: gradients, passes and runs are those of a base that is whole."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import train_embed_lora
import train_sft_lora
from conftest import (
    ROOT,
    TOPICS,
    back_to,
    gradient,
    make_chats,
    make_pairs,
    make_rows,
    rehearsed_trainer,
    relative,
    same,
    weights_of,
    write_jsonl,
)
from parts import base, cutting, rehearsal, shards
from parts.base import Origin
from utils import InputError

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    MPNetConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHATS = make_chats(60)
SCRIPTS = {"train_embed_lora": train_embed_lora, "train_sft_lora": train_sft_lora}


def torchrun(count, script, *argv, check=True, timeout=400):
    """Run a script on `count` processes; return what is done."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(count), str(ROOT / script), *map(str, argv)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    trouble = [line for line in done.stderr.splitlines() if "W1" not in line][:60]
    assert not check or done.returncode == 0, "\n".join([done.stdout[-1500:], *trouble])
    return done


@pytest.fixture
def cases(tmp_path, tiny_bert, tiny_chat):
    """All kinds of steps, of 16 rows: [{"name", "module", "flags", "rows": of all}]."""
    chats = sorted(make_chats(60), key=lambda row: len(str(row)))
    pairs = sorted(make_pairs(60), key=lambda row: len(str(row)))
    rows = sorted(make_rows(96), key=lambda row: len(str(row)))
    long = " and the ".join(TOPICS)
    chats[-1]["messages"][0]["content"] += long
    pairs[-1]["prompt"] += long
    rows[-1]["pos"][0] += long
    for row in rows[:8]:
        row["pos"] = rows[0]["pos"][:1]  # a step has it once: these have fewer sequences
    chats = write_jsonl(tmp_path / "chats.jsonl", chats)
    pairs = write_jsonl(tmp_path / "pref.jsonl", pairs)
    rows = write_jsonl(tmp_path / "rows.jsonl", rows)
    sft = f"--model_name {tiny_chat} --dev_size 0 --batch_size 2 --gradient_accumulation 2 "
    embed = f"--model_name {tiny_bert} --dev_size 0 --train_file {rows} --max_negs 1 "
    flags = {
        "sft": f"{sft} --train_file {chats}",
        "sigmoid": f"{sft} --train_file {pairs} --pref_loss sigmoid",
        "kto_pair": f"{sft} --train_file {pairs} --pref_loss kto_pair --pref_ftx 0.1",
        "plain": f"{embed} --batch_size 16",
        "cached": f"{embed} --batch_size 2 --gradient_accumulation 4",
        "apart": f"{embed} --batch_size 1 --gradient_accumulation 8 --no-negatives_cross_device",
    }
    made = []
    for name, each in flags.items():
        module = "train_embed_lora" if each.startswith(embed) else "train_sft_lora"
        made.append({"name": name, "module": module, "flags": f"{each} --report_to none".split()})
    return made


def shared_out(rows, count):
    """Return the rows of each of `count` processes."""
    size = len(rows) // count
    return [rows[size * rank : size * (rank + 1)] for rank in range(count)]


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_are_those_of_one_process(cases, tmp_path, count):
    # the longest and the shortest for the first process: it would cut them into fewer pieces
    rows = [-1, *range(7), *range(20, 28)]
    for case in cases:
        case["rows"] = shared_out(rows, count)
        case["flags"] += ["--zero_stage", "3"]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    torchrun(count, "tests/sharded.py", tmp_path)
    split = filled = 0
    for case in cases:
        left = [torch.load(tmp_path / f"{case['name']}-{rank}.pt") for rank in range(count)]
        prepared = SCRIPTS[case["module"]].prepare(
            [*case["flags"], "--output_dir", str(tmp_path / "one"), "--overwrite"]
        )
        trainer = rehearsed_trainer(prepared)
        expected, trained = expected_gradient(trainer, case, count)
        for rank, each in enumerate(left):
            assert relative(each["gradient"], expected) < 1e-5, case["name"]
            assert each["trained"] == trained
            assert each["shares"]
            for rows_in_all, local in each["shares"]:
                parts = [*map(len, torch.arange(rows_in_all).chunk(count)), *[0] * count]
                assert local == parts[rank]
        assert len({each["passes"] for each in left}) == 1
        of_bert = case["module"] == "train_embed_lora"
        layers = "encoder.layer." if of_bert else "model.layers."
        gathered = left[0]["gathered"]
        block = gathered[f"{layers}0"]
        assert {f"{layers}0", f"{layers}1"} < gathered.keys()
        embedding = (
            640 * 64 + (128 + 4) * 64
        )  # of words; of positions and types, and a norm, Bert's
        assert max(gathered.values()) <= block + embedding
        split += len({each["alone"] for each in left}) > 1
        filled += len({each["sequences"] for each in left}) > 1
    # the control: by itself a process would have made another number of passes, and hung
    assert split >= 2 and filled >= 3


def expected_gradient(trainer, case, count):
    """Return the gradient that one process has for the rows of all, and how many numbers it has."""
    groups = [case["rows"]] if case["name"] != "apart" else [[rows] for rows in case["rows"]]
    found = []
    for group in groups:  # where processes keep their negatives to themselves, the mean
        rows = [trainer.train_dataset[i] for of_rank in group for i in of_rank]
        found.append(gradient(trainer, trainer.data_collator(rows))[1])
    return sum(found) / len(found), len(found[0])


# ---------------------------------------------------------------- whole runs

SFT = "--batch_size 2 --gradient_accumulation 2 --max_steps 4 --eval_every 2 --eval_generate 3"
SFT += " --max_new_tokens 8 --lr 1e-3 --lora_dropout 0.1 --zero_stage 3"


def test_a_run_resumes_to_the_same_weights(sft_argv, tmp_path):
    argv = sft_argv(*SFT.split())
    done = torchrun(2, "train_sft_lora.py", *argv)
    assert "base      each process holds 0.00 of its 0.00 GB" in done.stdout
    assert "gives the trained outputs" in done.stdout
    settled = json.loads((tmp_path / "out/training_config.json").read_text())["settled"]
    assert settled["zero_stage"] == 3
    whole = weights_of(tmp_path / "out")
    back_to(tmp_path / "out", 2)
    done = torchrun(2, "train_sft_lora.py", *argv, "--resume_from_checkpoint")
    assert "step      4" in done.stdout and "step      0" not in done.stdout
    assert same(whole, weights_of(tmp_path / "out"))


EMBED = "--batch_size 4 --gradient_accumulation 2 --max_steps 4 --eval_every 2 --lr 1e-3"
RUNS = {
    "sft": ("train_sft_lora", SFT),
    "kto_pair": (
        "train_sft_lora",
        f"{SFT} --pref_loss kto_pair --eval_generate 0 --lora_dropout 0",
    ),
    "embed": ("train_embed_lora", f"{EMBED} --matryoshka_dims 16 32 --mine_negatives 2"),
}


def flags_of(name, sft_argv, embed_argv, tmp_path):
    """Return (script, command line but for its end) of one of RUNS."""
    module, flags = RUNS[name]
    if module == "train_embed_lora":
        return f"{module}.py", embed_argv(*flags.split())
    data = write_jsonl(tmp_path / "rows.jsonl", make_pairs(60) if name == "kto_pair" else CHATS)
    return f"{module}.py", sft_argv(*flags.split(), data=data)


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_of_a_whole_base(name, sft_argv, embed_argv, tmp_path):
    script, argv = flags_of(name, sft_argv, embed_argv, tmp_path)
    found = {}
    for stage in (0, 3):
        out = tmp_path / f"out{stage}"
        more = ["--output_dir", out, "--zero_stage", stage, "--lora_dropout", 0]
        torchrun(2, script, *argv, *more)
        predictions = sorted(out.glob("predictions-*.jsonl"))
        texts = [path.read_text() for path in predictions]
        mined = [path.read_text() for path in out.glob("mined*.jsonl")]
        metrics = json.loads((out / "training_summary_report.json").read_text())["metrics"]
        found[stage] = weights_of(out), texts, len(mined), metrics["after"]
    whole, parts = found[0], found[3]
    for key, weight in whole[0].items():
        assert relative(parts[0][key], weight) < 1e-4, key
    assert whole[1:3] == parts[1:3]
    for key, value in whole[3].items():
        assert parts[3][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_a_dev_set_of_one_row_early_stopping_and_merging(name, sft_argv, embed_argv, tmp_path):
    script, argv = flags_of(name, sft_argv, embed_argv, tmp_path)
    more = "--dev_sample_limit 1 --max_steps 20 --eval_every 1 --early_stopping_patience 1"
    more += " --lr 1e-9 --merge_adapter"
    done = torchrun(2, script, *argv, *more.split(), check=False)
    # so small a rate changes nothing that can be told: the run may be refused for it, by all alike
    assert (done.returncode == 0) == (tmp_path / "out/merged/merge_report.json").exists()
    assert (done.returncode == 0) or "changes nothing" in done.stderr
    assert "step      2" in done.stdout and "step     20" not in done.stdout


@pytest.mark.distributed
def test_an_adapter_is_measured_and_compared(sft_argv, tmp_path):
    argv = sft_argv(*SFT.split(), "--output_dir", tmp_path / "first", "--merge_adapter")
    torchrun(2, "train_sft_lora.py", *argv)
    assert json.loads((tmp_path / "first/merged/merge_report.json").read_text())["verified"]
    dev = write_jsonl(tmp_path / "dev.jsonl", CHATS[:5])
    measured = []
    for stage in (0, 3):
        flags = f"--eval_only --dev_file {dev} --eval_generate 5 --max_new_tokens 8"
        flags += f" --init_adapter {tmp_path}/first/final --zero_stage {stage}"
        argv = sft_argv(*flags.split(), data=None, out=tmp_path / f"measured{stage}")
        torchrun(2, "train_sft_lora.py", *argv)
        report = json.loads((tmp_path / f"measured{stage}/evaluation_report.json").read_text())
        measured.append(report["metrics"])
    assert measured[0] == pytest.approx(measured[1], rel=1e-4)


@pytest.mark.distributed
def test_an_optimizer_in_parts_trains_the_same_and_resumes(run_sft, sft_argv, tmp_path):
    flags = "--finetune_type full --batch_size 2 --gradient_accumulation 2 --max_steps 6"
    flags += " --eval_every 3 --lr 1e-3 --zero_stage"
    found = []
    for stage in (0, 1):
        argv = sft_argv(*flags.split(), stage, out=tmp_path / f"out{stage}")
        torchrun(2, "train_sft_lora.py", *argv)
        report = json.loads((tmp_path / f"out{stage}/training_summary_report.json").read_text())
        assert report["settled"]["zero_stage"] == stage
        found.append(load_file(tmp_path / f"out{stage}/final/model.safetensors"))
    for name, weight in found[0].items():
        assert relative(found[1][name], weight) < 1e-6
    state = torch.load(tmp_path / "out1/checkpoint-3/optimizer.pt", weights_only=False)["state"]
    assert len(state) == len(found[0])  # of all weights, though each process has half of them
    back_to(tmp_path / "out1", 3)
    torchrun(2, "train_sft_lora.py", *argv, "--resume_from_checkpoint")
    assert same(found[1], load_file(tmp_path / "out1/final/model.safetensors"))


# ---------------------------------------------------------------- what goes wrong in one process

IN_ONE = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, train_sft_lora, utils
from parts.step import StepTrainer

attempt = StepTrainer.attempt_step

def attempt_step(trainer, model, step):
    if os.environ["RANK"] == "1" and trainer.state.global_step == 3 and model is not trainer.model:
        {event}
    return attempt(trainer, model, step)

StepTrainer.attempt_step = attempt_step
utils.run(train_sft_lora.main)
"""
EVENTS = {
    "memory": 'raise torch.OutOfMemoryError("CUDA out of memory.")',
    "kill": "os.kill(os.getpid(), signal.SIGKILL)",
    "term": "os.kill(os.getpid(), signal.SIGTERM)",
}


@pytest.mark.distributed
@pytest.mark.parametrize("event", EVENTS)
def test_what_happens_to_one_process_ends_all_and_can_be_resumed(event, sft_argv, tmp_path):
    argv = sft_argv(*SFT.split(), "--max_steps", 6)
    torchrun(2, "train_sft_lora.py", *argv, "--output_dir", tmp_path / "whole")
    script = tmp_path / "in_one.py"
    script.write_text(IN_ONE.format(root=str(ROOT), event=EVENTS[event]))
    done = torchrun(2, script, *argv, check=False, timeout=120)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    if event == "memory":
        assert len(said) == 1 and "out of memory in process 1" in said[0]
        assert "--gradient_checkpointing" in said[0] or "--batch_size 1" in said[0]
    checkpoints = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert "checkpoint-2" in checkpoints
    torchrun(2, "train_sft_lora.py", *argv, "--resume_from_checkpoint")
    assert same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "out"))


def test_a_trial_that_runs_out_of_memory_ends_the_run_too(embed_trainer, monkeypatch):
    trainer = embed_trainer("--batch_size", 8)
    trainer.in_parts = True

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer, "attempt_step", run_out)
    memory = SimpleNamespace(peak_of=lambda attempt: attempt())
    with pytest.raises(InputError, match="process 0, .*pass --gradient_checkpointing, --no-grow"):
        rehearsal.measured_pass(trainer, [0, 1], memory)
    trainer.recomputes = True
    with pytest.raises(InputError, match="pass --batch_size 4, --no-grow"):
        trainer.until_it_fits(run_out)


# ---------------------------------------------------------------- what is refused, and noted


def test_contradictions_are_refused_before_anything_is_read(sft_argv, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for flags, said in (
        ("--zero_stage 3 --load_in_4bit", "statistics of a quantised base"),
        ("--zero_stage 3 --finetune_type qlora", "statistics of a quantised base"),
        ("--zero_stage 2 --finetune_type full", "of --zero_stage it takes 1"),
        ("--zero_stage 1 --finetune_type full --optimizer adamw_8bit", "cannot share out"),
        ("--zero_stage 4", "invalid choice"),
    ):
        with pytest.raises(SystemExit) as ended:
            train_sft_lora.parse_args(sft_argv(*flags.split(), data="nowhere.jsonl"))
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    for flags in ("--zero_stage 2 --load_in_4bit", "--zero_stage 3"):
        train_sft_lora.parse_args(sft_argv(*flags.split()))
    monkeypatch.setenv("WORLD_SIZE", "1")
    train_sft_lora.parse_args(sft_argv("--zero_stage", 3, "--load_in_4bit"))


def test_one_process_is_noted_and_trains_the_whole(run_embed, capsys):
    report = run_embed("--zero_stage", 3, "--max_steps", 1, "--dev_size", 0)
    assert report["settled"]["zero_stage"] == 0
    note = "--zero_stage 3: there is one process, which holds the whole model"
    assert f"note      {note}" in capsys.readouterr().out
    assert note in report["plan"]["notes"]


def test_stages_of_optimizers_say_what_they_would_have_saved(monkeypatch, capsys):
    monkeypatch.setattr(shards, "PartialState", lambda: SimpleNamespace(num_processes=4))
    base = torch.nn.Sequential(torch.nn.Linear(10_000, 10_000, bias=False))
    model = PeftModel(base, LoraConfig(r=200, target_modules=["0"]))
    shards.note_savings(1, model)  # 4 M numbers: 32 MB of moments, 16 of gradients
    assert "it would have saved 0.02 GB a process" in capsys.readouterr().out
    shards.note_savings(2, model)
    said = capsys.readouterr().out
    assert "it would have saved 0.04 GB a process" in said and "3 saves 0.30" in said
    for stage in (0, 3):
        shards.note_savings(stage, model)
    shards.note_savings(1, base)  # all of it is trained, and stage 1 does what it says
    assert capsys.readouterr().out == ""


def test_old_libraries_are_refused_in_one_sentence(monkeypatch):
    assert shards.settled_stage(3, 2) == 3 and shards.settled_stage(2, 2) == 0
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    with pytest.raises(InputError, match="needs torch 2.8, and this is 2.7.1"):
        shards.settled_stage(3, 2)
    shards.settled_stage(2, 2)
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    shards.settled_stage(3, 2)
    monkeypatch.setattr(shards, "PRIVATE", ("_no_split_modules", "_gone"))
    with pytest.raises(InputError, match="does not know this version of transformers .no _gone"):
        shards.settled_stage(3, 2)


@pytest.mark.parametrize(
    "config, auto_class, blocks",
    [
        (Qwen3Config(num_hidden_layers=3), AutoModelForCausalLM, "model.layers.*"),
        (Qwen3Config(num_hidden_layers=3), AutoModel, "layers.*"),
        (BertConfig(num_hidden_layers=3), AutoModel, "encoder.layer.*"),
        (GPT2Config(n_layer=3), AutoModelForCausalLM, "transformer.h.*"),
        (MPNetConfig(num_hidden_layers=3), AutoModel, None),
    ],
)
def test_every_block_that_repeats_is_gathered_by_itself(config, auto_class, blocks):
    with torch.device("meta"):
        model = auto_class.from_config(config)
    repeated = [pattern for pattern in shards.plan_of(model) if "*" in pattern]
    assert repeated == ([blocks] if blocks else [])


def test_a_base_whose_blocks_nobody_names_is_refused():
    options = {"config": MPNetConfig(num_hidden_layers=3), "trust_remote_code": False}
    with pytest.raises(InputError, match="nor MPNetModel says which of its blocks repeat"):
        shards.load_in_parts(AutoModel, "nowhere", options)


def test_absent_weights_are_refused_where_graphs_end_in_copies(monkeypatch):
    monkeypatch.setattr(base, "is_in_parts", lambda model: True)
    with pytest.raises(InputError, match="1 weights are not in its files .pooler.weight"):
        base.check_loaded(None, {"pooler.weight": ""}, None, Origin("nowhere"))
    base.check_loaded(None, {}, None, Origin("nowhere"))


def test_pieces_are_split_as_often_as_asked():
    lengths = [9, 8, 3, 3, 3, 3, 1]
    pieces = [[0, 1], [2, 3, 4, 5], [6]]
    assert cutting.split(pieces, lengths, 3) == pieces
    assert cutting.split(pieces, lengths, 4) == [[0], [1], [2, 3, 4, 5], [6]]
    assert cutting.split(pieces, lengths, 5) == [[0], [1], [2, 3], [4, 5], [6]]
    assert cutting.split(pieces, lengths, 7) == [[0], [1], [2], [3], [4], [5], [6]]
    assert pieces == [[0, 1], [2, 3, 4, 5], [6]]


# ---------------------------------------------------------------- memory

SAMPLED = """
import os, sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
import train_sft_lora, utils
from parts import base

def private():
    text = Path("/proc/self/status").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024

load = base.load
seen = []

def sample():
    while True:
        seen.append(private())
        time.sleep(0.005)

def load_and_sample(*args, **kwargs):
    seen.append(private())
    threading.Thread(target=sample, daemon=True).start()
    return load(*args, **kwargs)

train_sft_lora.load = load_and_sample
train_sft_lora.main()
Path({folder!r}, f"bytes{{os.environ['RANK']}}").write_text(str(max(seen) - seen[0]))
utils.leave_process_group()
"""


@pytest.mark.distributed
def test_private_memory_falls_with_the_base_in_parts(tiny_chat, chats, tmp_path):
    config = Qwen3Config(
        vocab_size=1000,
        hidden_size=1024,
        num_hidden_layers=20,
        num_attention_heads=16,
        head_dim=64,
        num_key_value_heads=8,
        intermediate_size=3072,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    whole = 4 * sum(p.numel() for p in model.parameters())
    assert 1e9 < whole < 1.1e9
    # bfloat16 files are read into memory of the process' own; float32 ones would only be mapped
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_chat).save_pretrained(tmp_path / "base")
    script = tmp_path / "sampled.py"
    script.write_text(SAMPLED.format(root=str(ROOT), folder=str(tmp_path)))
    taken = {}
    for stage in (0, 3):
        flags = f"--model_name {tmp_path}/base --train_file {chats} --output_dir {tmp_path}/out"
        flags += " --dev_size 0 --batch_size 1 --gradient_accumulation 1 --max_steps 1 --lora_r 2"
        flags += " --train_sample_limit 2 --lr 1e-3 --checkpoint_strategy no --overwrite"
        flags += f" --report_to none --zero_stage {stage}"
        torchrun(2, script, *flags.split())
        taken[stage] = [int((tmp_path / f"bytes{rank}").read_text()) for rank in (0, 1)]
    print(f"of {whole:,} bytes: {taken}")
    for rank in (0, 1):
        assert taken[0][rank] - taken[3][rank] >= 0.4 * whole


# ---------------------------------------------------------------- other people's code

QUANTISED = """
import torch, sys
from accelerate import PartialState
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.distributed import DistributedConfig

PartialState(cpu=True)
how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
ids = torch.arange(5, 25)[None]
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=how)
    whole = model(ids).logits
    parts = DistributedConfig(fsdp_size=2)
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], quantization_config=how, distributed_config=parts
    )
    assert torch.allclose(model(ids).logits, whole, rtol=1e-3), "the outputs differ"
"""


@pytest.mark.distributed
def test_transformers_still_loses_the_statistics_of_quantised_weights(tiny_chat, tmp_path):
    script = tmp_path / "quantised.py"
    script.write_text(QUANTISED)
    done = torchrun(2, script, tiny_chat, check=False)
    # once this passes, --zero_stage 3 may go with --load_in_4bit
    assert done.returncode != 0
    assert "the outputs differ" in done.stderr or "quant" in done.stderr, done.stderr[-2000:]

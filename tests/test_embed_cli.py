"""The command lines people run, from flags to files."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import train_embed_lora
import utils
from conftest import ROOT, TOPICS, assert_holds_no_memory, make_rows, write_jsonl
from parts import base, callbacks, run
from parts.checkpoints import find_checkpoint

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file


@pytest.fixture
def hub_folder(tmp_path):
    """A data set folder as on the hub: configuration `triplet`, split `train` alone."""
    folder = tmp_path / "msmarco"
    (folder / "triplet").mkdir(parents=True)
    rows = [
        {"query": f"q {a} {i}", "positive": f"the {a} {i}", "negative": f"no {a} {i}"}
        for a in TOPICS
        for i in range(45)
    ]
    write_jsonl(folder / "triplet/train.jsonl", rows)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: triplet\n  data_files:\n  - split: train\n    path: triplet/train.jsonl\n---\n"
    )
    return str(folder)


def test_colab_command(hub_folder, tiny_bert, tmp_path, capsys):
    report = train_embed_lora.main(
        shlex.split(
            f"--output_dir {tmp_path}/nv8bit_t4_mini_eval --dataset_name {hub_folder} --model_name {tiny_bert} "
            "--dataset_subset triplet --dataset_split train --dataset_dev_split dev --train_sample_limit 500 "
            "--dev_sample_limit 50 --batch_size 2 --gradient_accumulation 8 --max_length 192 --max_negs 0 --lora_r 4 "
            '--epochs 1 --lr 2e-5 --eval_every 200 --fp16 --query_prefix "<|query|> " --doc_prefix "<|document|> " '
            "--load_in_8bit"
        )
    )
    said = capsys.readouterr().out
    assert report["plan"]["negatives_per_query"] == 15
    assert report["plan"]["total_steps"] == report["steps"] == 31
    assert report["data"]["train_rows"] == 500
    assert report["data"]["dev"]["dev"]["queries"] == 50
    assert "no split 'dev' (there are: train)" in said
    assert "float32, no GPU for --fp16" in said
    assert "8-bit base" in said
    prompts = utils.read_json(
        f"{tmp_path}/nv8bit_t4_mini_eval/final/config_sentence_transformers.json"
    )["prompts"]
    assert prompts == {"query": "<|query|> ", "document": "<|document|> "}
    assert "lowered to 128" in said  # --max_length 192 on a model of 128 positions
    steps = [
        entry["step"]
        for entry in utils.read_json(f"{tmp_path}/nv8bit_t4_mini_eval/detailed_training_logs.json")
        if "eval_ndcg@10" in entry
    ]
    assert steps == [0, 31]


def test_embedrag_qlora_command(tiny_qwen, tmp_path, pairs):
    report = train_embed_lora.main(
        shlex.split(
            f"--model_name_or_path {tiny_qwen} --finetune_type qlora --quantization_bits 4 --train_dataset {pairs} "
            f"--output_dir {tmp_path}/out --batch_size 1 --lr 1e-4 --epochs 3 --neg_nums 2 --temperature 0.02 "
            "--query_max_len 128 --passage_max_len 1000 --save_on_epoch_end 1 --warmup_proportion 0.05"
        )
    )
    assert report["plan"]["step_rows"] == 32  # a batch of one has not one document to contrast
    assert report["flags"]["bits"] == 4
    steps = report["plan"]["steps_per_epoch"]
    found = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert found == sorted(f"checkpoint-{steps * i}" for i in (1, 2, 3))


def test_recommended_command(hub_folder, tiny_bert, tmp_path, capsys):
    with open(f"{hub_folder}/triplet/train.jsonl", "a") as file:
        file.writelines(
            json.dumps({"query": f"more {i}", "positive": f"yes {i}", "negative": f"no {i}"}) + "\n"
            for i in range(3000)
        )
    report = train_embed_lora.main(
        shlex.split(
            f"--output_dir {tmp_path}/rec --dataset_name {hub_folder} --dataset_subset triplet --dataset_split train "
            f"--model_name {tiny_bert} --dataset_dev_split dev --train_sample_limit 3000 --dev_sample_limit 300 "
            "--batch_size 32 --gradient_accumulation 2 --epochs 5 --lr 2e-5 --eval_every 200 --lora_r 16 "
            "--lora_alpha 32 --lora_dropout 0.05 --max_length 512 --max_negs 1 --fp16 --dry_run"
        )
    )
    said = capsys.readouterr().out
    assert report["plan"]["total_steps"] == 230  # 46 whole steps of 64 in 3000 rows
    assert "--eval_every 200 evaluates once in 230 steps" in said
    assert "--eval_every 20 gives two or three an epoch" in said
    assert "--lr 2e-05 is low for LoRA" in said
    assert not list(Path(f"{tmp_path}/rec").glob("*"))


def test_two_gpus_without_a_launcher_restart_on_two_processes(tiny_bert, tmp_path, pairs):
    command = shlex.split(
        f"train_embed_lora.py --model_name_or_path {tiny_bert} --finetune_type full --train_dataset {pairs} "
        f"--output_dir {tmp_path}/out --batch_size 1 --lr 1e-5 --epochs 3 --neg_nums 1 --temperature 0.02 "
        "--query_max_len 128 --passage_max_len 1000 --save_on_epoch_end 1 --warmup_proportion 0.05 --report_to none"
    )
    start = (
        f"import sys, runpy, torch; torch.cuda.device_count = lambda: 2; sys.argv = {command!r}; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", start],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "torch.distributed.run --standalone --nproc_per_node 2 train_embed_lora.py" in done.stdout
    )
    assert "x 2 processes" in done.stdout
    assert done.stdout.count("proof ") == 1  # one process speaks
    report = utils.read_json(tmp_path / "out/training_summary_report.json")
    assert report["plan"]["examples_per_step"] == 2 * report["plan"]["step_rows"]
    assert (tmp_path / "out/final/model.safetensors").exists()


def test_command_line_script(tiny_bert, pairs, tmp_path):
    flags = f"--model_name {tiny_bert} --train_file {pairs} --output_dir {tmp_path}/out --max_steps 2 --report_to none"
    done = subprocess.run(
        [sys.executable, "train_embed_lora.py", *shlex.split(flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "result    ndcg@10" in done.stdout
    done = subprocess.run(
        [sys.executable, "train_embed_lora.py", *shlex.split(flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"error: --output_dir {tmp_path}/out is not empty"
    )
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- what a run leaves behind


def check_final(folder, tokenizer_folder, queries, documents, trainer_vectors):
    """Compare SentenceTransformer and PeftModel on the saved folder with the trainer's vectors."""
    import torch.nn.functional as F
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel, AutoTokenizer

    st = SentenceTransformer(str(folder), device="cpu")
    st_vectors = np.concatenate(
        [st.encode(queries, prompt_name="query"), st.encode(documents, prompt_name="document")]
    )
    assert np.abs(st_vectors - trainer_vectors).max() < 1e-5
    model = PeftModel.from_pretrained(
        AutoModel.from_pretrained(tokenizer_folder), str(folder)
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    prompts = utils.read_json(folder / "config_sentence_transformers.json")["prompts"]
    pooling = utils.read_json(folder / "1_Pooling/config.json")
    for i, text in enumerate(
        [prompts["query"] + q for q in queries] + [prompts["document"] + d for d in documents]
    ):
        ids = tokenizer(text, truncation=True, max_length=st.max_seq_length, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**ids).last_hidden_state[0]
        vector = hidden[-1] if pooling["pooling_mode_lasttoken"] else hidden.mean(0)
        assert (F.normalize(vector, dim=0) - torch.tensor(trainer_vectors[i])).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_final_folder_loads_everywhere_with_the_same_embeddings(
    kind, embed_trainer, run_embed, tiny_bert, tiny_qwen, tmp_path, monkeypatch
):
    model = {"encoder": tiny_bert, "decoder": tiny_qwen}[kind]
    flags = [
        "--query_prefix",
        "search: ",
        "--doc_prefix",
        "text: ",
        "--max_steps",
        4,
        "--lr",
        "1e-2",
        "--max_length",
        40,
    ]
    flags += ["--append_eos"] if kind == "decoder" else []
    caught, prove = [], train_embed_lora.prove
    monkeypatch.setattr(
        train_embed_lora,
        "prove",
        lambda prepared, *rest: caught.append(prepared.trainer) or prove(prepared, *rest),
    )
    run_embed(*flags, model=model)
    trainer = caught[0]
    queries, documents = (
        ["where is apple 3", "a b c"],
        ["the lamp " * 30, "short"],
    )  # the first is cut at 40 tokens
    tokenizer = trainer.processing_class
    ids = [
        tokenizer(text, truncation=True, max_length=40)["input_ids"]
        for text in ["search: " + q for q in queries] + ["text: " + d for d in documents]
    ]
    assert len({row[-1] for row in ids}) == 1  # the end token survives truncation
    assert trainer.pooling == {"encoder": "mean", "decoder": "last"}[kind]
    check_final(tmp_path / "out/final", model, queries, documents, trainer.embed(ids).numpy())


def test_real_model_gets_better_and_loads_in_sentence_transformers(minilm, tmp_path, monkeypatch):
    rows = [
        {
            "anchor": f"which page explains {a} and {b}?",
            "positive": f"Manual of the {a}: care for your {b}.",
        }
        for a in TOPICS
        for b in TOPICS
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    caught, prove = [], train_embed_lora.prove
    monkeypatch.setattr(
        train_embed_lora,
        "prove",
        lambda prepared, *rest: caught.append(prepared.trainer) or prove(prepared, *rest),
    )
    report = train_embed_lora.main(
        [
            "--model_name",
            minilm,
            "--train_file",
            data,
            "--output_dir",
            f"{tmp_path}/out",
            "--max_steps",
            "10",
            "--lr",
            "1e-3",
            "--dev_size",
            "0.3",
            "--report_to",
            "none",
        ]
    )
    assert report["metrics"]["after"]["ndcg@10"] > report["metrics"]["before"]["ndcg@10"]
    assert "pooler.dense" in " ".join(report["plan"]["notes"])
    queries, documents = ["which page explains apple?"], ["Manual of the apple."]
    tokenizer = caught[0].processing_class
    vectors = (
        caught[0].embed([tokenizer(text)["input_ids"] for text in queries + documents]).numpy()
    )
    check_final(tmp_path / "out/final", minilm, queries, documents, vectors)


def test_files_of_a_run(run_embed, tmp_path):
    pytest.importorskip("tensorboard")
    report = run_embed(
        "--epochs", 2, "--batch_size", 8, "--gradient_accumulation", 1, "--report_to", "tensorboard"
    )
    out = tmp_path / "out"
    names = {
        "final",
        "detailed_training_logs.json",
        "training_losses.json",
        "training_summary_report.json",
        "training_curves.png",
        "training_config.json",
        "runs",
    }
    assert names <= {path.name for path in out.iterdir()}
    final = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "modules.json",
        "training_config.json",
        "config_sentence_transformers.json",
        "sentence_bert_config.json",
    }
    assert final <= {path.name for path in (out / "final").iterdir()}
    assert (out / "final/adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (
        report
        == json.loads(json.dumps(report))
        == utils.read_json(out / "training_summary_report.json")
    )
    log = utils.read_json(out / "detailed_training_logs.json")
    assert log[0]["step"] == 0 and log[0]["eval_ndcg@10"] == report["metrics"]["before"]["ndcg@10"]
    best = max(
        (entry for entry in log[1:] if "eval_ndcg@10" in entry),
        key=lambda entry: entry["eval_ndcg@10"],
    )
    assert report["metrics"]["after"]["ndcg@10"] == best["eval_ndcg@10"]
    assert [entry["epoch"] for entry in utils.read_json(out / "training_losses.json")] == [1, 2]
    assert (out / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((out / "runs").rglob("events*"))
    assert report["proof"]["relative_error"] < 1e-6 < report["proof"]["relative_change"]


def test_the_log_has_every_step_and_the_console_has_every_few(run_embed, tmp_path, capsys):
    run_embed("--max_steps", 7, "--logging_steps", 3, "--eval_every", 2)
    log = utils.read_json(tmp_path / "out/detailed_training_logs.json")
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert list(losses) == [1, 2, 3, 4, 5, 6, 7]
    said = capsys.readouterr().out.splitlines()
    lines = [line.split() for line in said if line.startswith("step") and " loss" in line]
    assert [int(line[1]) for line in lines] == [3, 6]
    shown = [float(line[line.index("loss") + 1]) for line in lines]
    means = [sum(losses[step] for step in steps) / 3 for steps in ([1, 2, 3], [4, 5, 6])]
    assert shown == pytest.approx(means, rel=1e-3)  # four digits are printed
    assert all(re.fullmatch(r"\d\d:\d\d", line[-2]) and line[-1] == "left" for line in lines)


def step_lines(said):
    """The lines of steps and evaluations, without the time that is left."""
    lines = [line for line in said.splitlines() if line.startswith("step")]
    return [re.sub(r" +[\d:]+ left$", "", line) for line in lines]


def test_a_resumed_run_shows_and_stores_what_the_whole_run_does(
    run_embed, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        callbacks, "worsening", lambda log, metric, greater_is_better: f"{len(log)} entries"
    )
    dev = write_jsonl(tmp_path / "dev.jsonl", make_rows(12))
    flags = ["--max_steps", 6, "--logging_steps", 4, "--checkpoint_steps", 3, "--save_best", 0]
    flags += [
        "--eval_every",
        1,
        "--dev_file",
        f"a={dev}",
        "--dev_file",
        f"質問={dev}",
        "--lr",
        1e-2,
    ]
    warnings = run_embed(*flags)["warnings"]
    whole = utils.read_json(tmp_path / "out/detailed_training_logs.json")
    curves = (tmp_path / "out/training_curves.png").read_bytes()
    shown = step_lines(capsys.readouterr().out)
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    (tmp_path / "out/training_summary_report.json").unlink()
    report = run_embed(*flags, "--resume_from_checkpoint")
    assert utils.read_json(tmp_path / "out/detailed_training_logs.json") == whole
    assert report["warnings"] == warnings
    said = capsys.readouterr().out
    assert re.search(r"^ +3 steps after step 3 in", said, re.M)
    again = step_lines(said)
    assert 6 < len(again) < len(shown) and again == shown[-len(again) :]
    assert any(re.search(r" [+-]0\.\d{4}", line) for line in again)  # since before training
    assert (tmp_path / "out/training_curves.png").read_bytes() == curves


def test_without_log_lines_every_step_is_stored_all_the_same(run_embed, tmp_path, capsys):
    run_embed("--max_steps", 3, "--logging_steps", 0)
    log = utils.read_json(tmp_path / "out/detailed_training_logs.json")
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3]
    assert not re.search(r"^step.* loss ", capsys.readouterr().out, re.M)


def test_a_log_file_gets_lines_and_no_bars(run_embed, capfd):
    run_embed("--max_steps", 2, "--logging_steps", 1)
    said = capfd.readouterr()
    assert "\r" not in said.out + said.err
    assert not said.err.strip()


def test_a_notebook_shows_one_bar(run_embed, monkeypatch, capfd):
    import transformers

    class SecondTable(transformers.TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            raise AssertionError("transformers' own table is shown too")

    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", SecondTable)
    monkeypatch.setattr(transformers.utils, "is_in_notebook", lambda: True)
    run_embed("--max_steps", 2)
    assert capfd.readouterr().err.count("2/2") >= 1


def test_a_run_without_dev_set_counts_its_rows_alone(run_embed, capsys):
    run_embed("--dev_size", 0, "--dry_run")
    assert "rows to train on\n" in capsys.readouterr().out


def test_flags_of_a_run_hold_bits_only_where_the_base_is_quantised(run_embed):
    assert "bits" not in run_embed("--dry_run")["flags"]
    assert run_embed("--dry_run", "--load_in_8bit")["flags"]["bits"] == 8


def test_final_is_the_best_state_not_the_last(run_embed, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.2, 0.1, 0.1])
    monkeypatch.setattr(
        train_embed_lora,
        "retrieval_metrics",
        lambda *_: {"ndcg@10": next(scores), "recall@10": 0.5},
    )
    report = run_embed(
        "--max_steps", 5, "--eval_every", 1, "--logging_steps", -1, "--save_total_limit", 6
    )
    assert report["best_step"] == 2

    out = tmp_path / "out"
    final, best, last = (
        load_file(out / f"{name}/adapter_model.safetensors")
        for name in ("final", "checkpoint-2", "checkpoint-5")
    )
    assert all(torch.equal(final[key], best[key]) for key in final)
    assert any(not torch.equal(final[key], last[key]) for key in final)


def test_early_stopping(run_embed, monkeypatch):
    scores = iter([0.1, 0.9, *[0.3] * 10])
    monkeypatch.setattr(
        train_embed_lora,
        "retrieval_metrics",
        lambda *_: {"ndcg@10": next(scores), "recall@10": 0.5},
    )
    report = run_embed("--max_steps", 10, "--eval_every", 1, "--early_stopping_patience", 2)
    assert report["steps"] == 3 and report["best_step"] == 1


def test_a_run_killed_after_early_stopping_trains_no_further(run_embed, monkeypatch, tmp_path):
    flags = ["--max_steps", 10, "--eval_every", 1, "--early_stopping_patience", 2]
    scores = iter([0.1, 0.9, 0.3, 0.3])
    monkeypatch.setattr(
        train_embed_lora,
        "retrieval_metrics",
        lambda *_: {"ndcg@10": next(scores), "recall@10": 0.5},
    )
    first = run_embed(*flags)
    shutil.rmtree(tmp_path / "out/final")
    (tmp_path / "out/training_summary_report.json").unlink()
    again = run_embed(*flags, "--resume_from_checkpoint")
    assert first["steps"] == again["steps"] == 3
    assert first["metrics"] == again["metrics"] and first["best_step"] == again["best_step"] == 1


def test_early_stopping_counts_on_after_a_kill(run_embed, monkeypatch, tmp_path):
    flags = ["--max_steps", 10, "--eval_every", 1, "--early_stopping_patience", 3]
    scores, handler = (
        iter([0.1, 0.9, 0.3, KeyboardInterrupt, 0.3, 0.3]),
        signal.getsignal(signal.SIGINT),
    )

    def score(*_):
        if (value := next(scores)) is KeyboardInterrupt:
            raise KeyboardInterrupt  # in the evaluation after step 3: the last checkpoint is that of step 2
        return {"ndcg@10": value, "recall@10": 0.5}

    monkeypatch.setattr(train_embed_lora, "retrieval_metrics", score)
    with pytest.raises(KeyboardInterrupt):
        run_embed(*flags)
    assert signal.getsignal(signal.SIGINT) is handler  # a notebook's interrupt works again
    assert run_embed(*flags, "--resume_from_checkpoint")["steps"] == 4


def test_overwrite_deletes_the_old_run_only_once_the_new_one_is_sure(run_embed, tmp_path):
    run_embed("--max_steps", 2)
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(utils.InputError, match="is not there"):
        run_embed("--overwrite", data="nowhere.jsonl")
    assert (tmp_path / "out/final/adapter_model.safetensors").exists()
    run_embed("--overwrite", "--max_steps", 3)
    assert not (tmp_path / "out/checkpoint-2").exists() and (tmp_path / "out/notes.txt").exists()


def test_dry_run_checks_and_leaves_nothing(run_embed, tmp_path, capsys):
    report = run_embed("--dry_run")
    said = capsys.readouterr().out
    assert "rehearsal" in said and "example 3" in said
    assert "metrics" not in report
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_refused_before_its_first_step_leaves_no_folder(
    run_embed, tmp_path, monkeypatch
):
    def refuse(*_):
        raise utils.InputError("refused")

    monkeypatch.setattr(train_embed_lora, "rehearse", refuse)
    with pytest.raises(utils.InputError, match="refused"):
        run_embed(out=tmp_path / "runs/out")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--finetune_type", "full", "--optimizer", "sgd"],
        ["--gradient_checkpointing", "--gradient_accumulation", 4],
        ["--load_in_4bit"],
        ["--load_in_8bit"],
        ["--matryoshka_dims", 64, 8],
        ["--false_negative_margin", 0.1],
        ["--lr_scheduler", "constant", "--use_rslora"],
        ["--pooling", "cls"],
        ["--model_dropout", "--gradient_accumulation", 2],
        ["--attn_implementation", "eager"],
        ["--target_modules", "query,value"],
        ["--eval_strategy", "no"],
        ["--checkpoint_strategy", "no"],
        ["--eval_every", 0, "--full_determinism"],
        ["--num_workers", 1],
        ["--attn_implementation", "flash_attention_2"],
        ["--max_grad_norm", 0, "--logging_steps", 0],
    ],
)
def test_flags_run_to_the_end(run_embed, flags):
    report = run_embed("--batch_size", 8, "--max_steps", 3, "--lr", "1e-3", *flags)
    assert report["steps"] == 3
    assert report["proof"]["relative_change"] > 0
    assert ("ndcg@10_dim8" in report["metrics"]["after"]) == ("--matryoshka_dims" in flags)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "flags", [[], ["--load_in_4bit"], ["--load_in_8bit"], ["--finetune_type", "full"]]
)
def test_half_precision_bases_keep_float32_adapters(run_embed, monkeypatch, tmp_path, flags):
    monkeypatch.setattr(train_embed_lora, "choose_precision", lambda asked: ("bf16", "bf16"))
    caught, train = [], run.train
    monkeypatch.setattr(
        run, "train", lambda prepared: caught.append(prepared.trainer) or train(prepared)
    )
    report = run_embed("--batch_size", 8, "--max_steps", 3, "--lr", "1e-3", *flags)
    assert report["proof"]["relative_change"] > 0
    trained = {p.dtype for p in caught[0].model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in caught[0].model.parameters() if not p.requires_grad and p.ndim == 2}
    assert trained == {torch.float32}
    assert torch.float32 not in frozen or flags == ["--finetune_type", "full"]
    assert any("half precision" in note for note in report["plan"]["notes"])


def test_init_adapter_goes_on_where_stage_one_ended(run_embed, tmp_path):
    run_embed(
        "--max_steps",
        4,
        "--lora_r",
        4,
        "--pooling",
        "cls",
        "--query_prefix",
        "Q: ",
        out=tmp_path / "one",
    )
    report = run_embed(
        "--max_steps",
        2,
        "--lora_dropout",
        0.1,
        "--init_adapter",
        tmp_path / "one/final",
        "--eval_every",
        1,
    )
    assert report["flags"]["lora_r"] == 4
    assert report["settled"]["pooling"] == "cls" and report["settled"]["query_prefix"] == "Q: "
    assert utils.read_json(tmp_path / "out/final/adapter_config.json")["lora_dropout"] == 0.1


def test_a_relative_model_folder_is_stored_absolute(run_embed, tiny_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny_bert).parent)
    run_embed("--max_steps", 2, model=Path(tiny_bert).name)
    stored = utils.read_json(tmp_path / "out/final/adapter_config.json")["base_model_name_or_path"]
    assert os.path.samefile(stored, tiny_bert) and os.path.isabs(stored)


def test_a_prompt_that_all_rows_share_is_saved(run_embed, tmp_path, capsys):
    data = write_jsonl(
        tmp_path / "bge.jsonl", [{**row, "prompt": "Find it: "} for row in make_rows(40)]
    )
    run_embed("--max_steps", 2, data=data)
    assert (
        utils.read_json(tmp_path / "out/final/config_sentence_transformers.json")["prompts"][
            "query"
        ]
        == "Find it: "
    )
    data = write_jsonl(
        tmp_path / "mixed.jsonl",
        [{**row, "prompt": f"Find {i % 2}: "} for i, row in enumerate(make_rows(40))],
    )
    run_embed("--dry_run", "--overwrite", data=data)
    assert "the rows carry 2 query prefixes and final/ stores one" in capsys.readouterr().out


def test_several_named_dev_sets(run_embed, tmp_path, capsys):
    for name, rows in (("a", make_rows(120)[100:]), ("b", make_rows(140)[125:])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    files = ["--dev_file", f"first={tmp_path}/a.jsonl", "--dev_file", f"second={tmp_path}/b.jsonl"]
    files += ["--dev_sample_limit", 10]
    report = run_embed("--max_steps", 2, *files)
    assert report["plan"]["metric"] == "first_ndcg@10" and report["plan"]["save_best"]
    assert {"first_recall@10", "second_recall@10"} <= set(report["metrics"]["after"])
    assert report["data"]["dev"]["second"]["queries"] == 10
    report = run_embed(
        "--max_steps", 2, *files, "--metric_for_best", "second_mrr@10", "--overwrite"
    )
    assert report["plan"]["metric"] == "second_mrr@10"
    assert {"second_mrr@10", "first_ndcg@10", "second_recall@10"} <= set(report["plan"]["shown"])
    assert "result    second_recall@10" in capsys.readouterr().out


def test_trainers_name_of_a_metric_means_ours(run_embed):
    plan = run_embed("--dry_run", "--metric_for_best_model", "eval_recall@10")["plan"]
    assert plan["metric"] == "recall@10"


def test_a_base_that_cannot_be_quantised_is_loaded_without_and_said_so(run_embed, monkeypatch):
    def fail(**kwargs):
        raise ImportError("no bitsandbytes here")

    monkeypatch.setattr(base, "BitsAndBytesConfig", fail)
    report = run_embed("--max_steps", 2, "--load_in_4bit")
    assert utils.recorded_flags(report).get("bits") is None
    assert (
        "4-bit loading failed, so the base is not quantised: no bitsandbytes here"
        in report["plan"]["notes"]
    )


def test_the_plan_matches_what_ran(run_embed, tmp_path):
    report = run_embed(
        "--batch_size",
        4,
        "--gradient_accumulation",
        3,
        "--epochs",
        1.5,
        "--eval_every",
        4,
        "--logging_steps",
        3,
    )
    plan, log = report["plan"], utils.read_json(tmp_path / "out/detailed_training_logs.json")
    assert plan["steps_per_epoch"] == report["data"]["train_rows"] // 12
    assert report["steps"] == plan["total_steps"] == -(-3 * plan["steps_per_epoch"] // 2)
    evaluated = [entry["step"] for entry in log if "eval_ndcg@10" in entry]
    assert evaluated == sorted({0, *range(4, plan["total_steps"], 4), plan["total_steps"]})
    assert max(entry["learning_rate"] for entry in log if "loss" in entry) <= report["flags"]["lr"]


def test_rows_fewer_than_a_step_shrink_it(run_embed, tmp_path, capsys):
    data = write_jsonl(tmp_path / "few.jsonl", make_rows(5))
    report = run_embed("--dev_size", 0, "--epochs", 3, data=data)
    assert report["plan"]["step_rows"] == 5 and report["steps"] == 3
    assert "the step is shrunk" in capsys.readouterr().out


def test_fp16_gradients_that_never_fit_end_in_a_message(run_embed, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    with pytest.raises(utils.InputError, match="overflowed in 20 steps"):
        run_embed("--epochs", 40)


# ---------------------------------------------------------------- notebooks


def test_a_run_holds_no_memory_once_it_is_over(run_embed, monkeypatch):
    assert_holds_no_memory(train_embed_lora, run_embed, monkeypatch)


@pytest.mark.parametrize("number", [None, 15])
def test_the_process_group_is_left(monkeypatch, number, capsys):
    """An interpreter that ends beside gloo's threads aborts now and then."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    monkeypatch.setattr(sys, "argv", ["train_embed_lora.py"])

    def main():
        if number:
            raise utils.Stopped("stopped after step 3", number)

    with pytest.raises(SystemExit, match="143") if number else contextlib.nullcontext():
        utils.run(main)
    assert not torch.distributed.is_initialized()
    assert ("stopped after step 3" in capsys.readouterr().out) == bool(number)


def test_an_interrupt_outside_of_the_steps_is_said(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_embed_lora.py"])

    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        utils.run(main)
    said = capsys.readouterr().err
    assert said.startswith("interrupted: where this run has left a checkpoint,")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="130"):
        utils.run(main)
    assert not capsys.readouterr().err  # one of the processes is enough


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_stopped_run_is_told_to_resume_without_overwrite(
    overwrite, embed_argv, tmp_path, monkeypatch
):
    def fit(trainer, callback, checkpoint):
        callback.signal = signal.SIGINT

    monkeypatch.setattr(run, "fit", fit)
    flags = ["--eval_strategy", "no"] + ["--overwrite"] * overwrite
    end = "--resume_from_checkpoint" + " in place of --overwrite" * overwrite
    with pytest.raises(utils.Stopped, match=f"the same command and {end}$"):
        train_embed_lora.main(embed_argv(*flags))


def test_pasted_into_a_notebook_cell_it_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json"])
    utils.check_command(lambda: pytest.fail("parsed"))
    utils.run(lambda: pytest.fail("started"))
    assert "Now call main(" in capsys.readouterr().out


# ---------------------------------------------------------------- stop and resume


def start(flags):
    return subprocess.Popen(
        [sys.executable, "train_embed_lora.py", *flags],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_says_how_to_resume(number, tiny_bert, pairs, tmp_path):
    flags = [
        "--model_name",
        tiny_bert,
        "--train_file",
        pairs,
        "--output_dir",
        f"{tmp_path}/out",
        "--report_to",
        "none",
        "--epochs",
        "4000",
        "--checkpoint_steps",
        "100000",
        "--eval_strategy",
        "no",
        "--logging_steps",
        "-1",
    ]
    process, lines = start(flags), []
    for line in process.stdout:
        lines.append(line)
        if "loss" in line and "step" in line:
            break
    process.send_signal(number)
    said = "".join(lines) + process.communicate(timeout=120)[0]
    assert process.returncode == 128 + number, said[-2000:]
    where = f"in {tmp_path / 'out'}. Go on with the same command and --resume_from_checkpoint"
    assert where in said  # without --output_dir its name has the time
    assert find_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out/final").exists()


def test_a_finished_run_is_left_as_it_is(run_embed, tmp_path, capsys):
    report = run_embed("--max_steps", 2)
    again = run_embed("--max_steps", 2, "--resume_from_checkpoint")
    assert again == report
    assert "is finished" in capsys.readouterr().out
    dry = run_embed("--dry_run", out=tmp_path / "dry")
    for each in (report, again, dry):  # as a cell shows them
        assert len(repr(each)) < 1000 < len(repr(dict(each)))


def test_resume_refuses_other_flags_and_other_data(run_embed, tmp_path, pairs):
    run_embed("--max_steps", 2)
    with pytest.raises(utils.InputError, match="lr was 0.0002 and is 0.01"):
        run_embed("--max_steps", 2, "--lr", 0.01, "--resume_from_checkpoint")
    write_jsonl(Path(pairs), make_rows(95))
    with pytest.raises(utils.InputError, match="data_fingerprint was .* and is"):
        run_embed("--max_steps", 2, "--resume_from_checkpoint")


def test_resume_refuses_another_base_in_the_same_folder(run_embed, tiny_bert, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_bert, folder)
    flags = ["--max_steps", 2, "--checkpoint_steps", 1, "--save_best", 0]
    run_embed(*flags, model=str(folder))
    shutil.rmtree(tmp_path / "out/checkpoint-2")
    (tmp_path / "out/training_summary_report.json").unlink()
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: 2 * weight for name, weight in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(
        utils.InputError, match="the weights of .*base are not those that it was trained with"
    ):
        run_embed(*flags, "--resume_from_checkpoint", model=str(folder))


def test_resume_without_a_checkpoint_starts_at_step_0_and_says_so(run_embed, capsys):
    report = run_embed("--max_steps", 2, "--resume_from_checkpoint")
    assert report["steps"] == 2
    assert "no complete checkpoint: starting at step 0" in capsys.readouterr().out


def test_kill_and_resume_three_times(tiny_bert, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "tests/kill_and_resume.py",
            "train_embed_lora.py",
            tiny_bert,
            str(tmp_path),
            "3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3 kills, same weights, same log" in done.stdout

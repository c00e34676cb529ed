"""The command lines people run, from flags to files."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import train_sft_lora
import utils
from conftest import ROOT, assert_holds_no_memory, make_chats, write_jsonl
from parts import answers, run

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SANITY = (
    "--sanity_overfit 12 --finetune_type full --lr 1e-2 --max_steps 100 --max_new_tokens 30".split()
)


@pytest.fixture
def stages(tmp_path):
    """Files of a two-stage task: training rows, and the dev sets `all` and `pos`, whose answers are never empty."""
    rows = [row for row in make_chats(200) if len(row["messages"]) == 3]
    full = [row for row in rows if json.loads(row["messages"][2]["content"])["things"]]
    parts = {"stage1": rows[:80], "stage2": rows[80:120], "all": rows[120:140], "pos": full[-15:]}
    return SimpleNamespace(
        **{name: write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in parts.items()}
    )


def test_two_stage_commands(stages, tiny_chat, tmp_path, capsys):
    common = f"--dev_file all={stages.all} --dev_file pos={stages.pos} --max_new_tokens 16 --report_to none"
    first = train_sft_lora.main(
        shlex.split(
            f"--model_name {tiny_chat} --train_file {stages.stage1} --max_length 4096 "
            "--lora_r 64 --lora_alpha 128 --lora_dropout 0 "
            "--target_modules q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj --bf16 --batch_size 2 "
            "--gradient_accumulation 32 --epochs 3 --lr 2e-4 --lr_scheduler cosine --eval_generate 200 "
            f"--output_dir {tmp_path}/stage1 {common}"
        )
    )
    said = capsys.readouterr().out
    assert (
        first["plan"]["examples_per_step"] == 64 and first["steps"] == 6
    )  # 80 rows: the incomplete step is kept
    assert "float32, no GPU for --bf16" in said
    assert first["plan"]["metric"] == "all_loss" and not first["plan"]["greater_is_better"]
    names = {
        f"{name}_{key}"
        for name in ("all", "pos")
        for key in ("loss", "f1", "recall", "stop_rate", "f1.things")
    }
    assert names | {"all_false_positive_rate", "pos_empty_rate"} <= set(first["metrics"]["after"])
    assert "pos_false_positive_rate" not in first["metrics"]["after"]  # it has no empty reference
    measured = re.findall(r"^step +(\d+)  all_loss ", said, re.M)
    assert len(measured) > 1
    for name in ("all_false_positive_rate", "all_json_valid", "pos_recall"):
        assert f"result    {name} " in said
        assert re.findall(rf"^step +(\d+)  .*{name} ", said, re.M) == measured
    second = train_sft_lora.main(
        shlex.split(
            f"--init_adapter {tmp_path}/stage1/final --train_file {stages.stage2} --epochs 0.25 --lr 1e-4 "
            f"--eval_every 50 --metric_for_best pos_f1 --eval_generate 200 --output_dir {tmp_path}/stage2 {common}"
        )
    )
    assert second["plan"]["metric"] == "pos_f1" and second["plan"]["greater_is_better"]
    assert second["flags"]["lora_r"] == 64 and second["flags"]["model_name"] == tiny_chat
    assert second["steps"] == second["plan"]["total_steps"] == 1
    before = second["metrics"]["before"]["all_loss"]
    assert before == pytest.approx(
        first["metrics"]["after"]["all_loss"], rel=1e-5
    )  # it goes on where stage 1 ended


def test_sanity_overfit_passes(run_sft, capsys):
    report = run_sft(*SANITY)
    assert report["metrics"]["after"]["exact_match"] >= 0.9
    assert "sanity    passed: exact match" in capsys.readouterr().out


def test_sanity_overfit_with_shifted_labels_fails(run_sft, monkeypatch):
    collate = train_sft_lora.collate

    def shifted(
        samples,
    ):  # as if the model's forward did not shift: each token is to predict itself
        step = collate(samples)
        step["supervised"] = [
            torch.tensor([*mask[1:], False]).numpy() for mask in step["supervised"]
        ]
        return step

    monkeypatch.setattr(train_sft_lora, "collate", shifted)
    with pytest.raises(
        utils.InputError,
        match="sanity overfit failed on 12 samples: exact match .* labels are shifted",
    ):
        run_sft(*SANITY)


def test_sanity_overfit_judges_long_answers_by_tokens(run_sft, tmp_path, capsys):
    rows = [
        {"prompt": f"count {i}", "completion": " ".join(f"{i} and {j}" for j in range(40))}
        for i in range(4)
    ]
    report = run_sft(*SANITY, "--max_steps", 250, data=write_jsonl(tmp_path / "long.jsonl", rows))
    assert "exact_match" not in report["metrics"]["after"]
    assert "sanity    passed: token accuracy" in capsys.readouterr().out


def test_command_line_script(tiny_chat, chats, tmp_path):
    flags = f"--model_name {tiny_chat} --train_file {chats} --output_dir {tmp_path}/out --max_steps 2 --report_to none"
    command = [sys.executable, "train_sft_lora.py", *shlex.split(flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "result    loss" in done.stdout
    assert '[[{"things": [' in done.stdout and "<|im_end|>]]" in done.stdout  # brackets in a file
    done = subprocess.run(
        [*command, "--sanity_overfit", "5", "--overwrite"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: sanity overfit failed on")


# ---------------------------------------------------------------- what a run leaves behind


def test_files_of_a_run(run_sft, tmp_path, tiny_chat):
    report = run_sft(
        "--max_steps", 4, "--eval_every", 2, "--eval_generate", 3, "--max_new_tokens", 8
    )
    out = tmp_path / "out"
    names = {
        "final",
        "detailed_training_logs.json",
        "training_losses.json",
        "training_summary_report.json",
    }
    names |= {
        "training_curves.png",
        "training_config.json",
        "predictions-dev-0.jsonl",
        "predictions-dev-4.jsonl",
    }
    assert names <= {path.name for path in out.iterdir()}
    final = {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    final |= {"chat_template.jinja", "generation_config.json", "training_config.json"}
    assert final <= {path.name for path in (out / "final").iterdir()}
    assert (out / "final/adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (
        report
        == json.loads(json.dumps(report))
        == utils.read_json(out / "training_summary_report.json")
    )
    lines = [
        json.loads(line) for line in (out / "predictions-dev-4.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 3 and set(lines[0]) == {
        "messages",
        "reference",
        "prediction",
        "stopped",
        "where",
    }
    assert lines[0]["messages"][-1]["role"] == "user"
    log = utils.read_json(out / "detailed_training_logs.json")
    assert log[0]["step"] == 0 and log[0]["eval_loss"] == report["metrics"]["before"]["loss"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [0, 2, 4]


def test_tool_definitions_that_the_template_leaves_out_are_noted(run_sft, tmp_path, capsys):
    rows = [
        row | {"tools": [{"type": "function", "function": {"name": "add"}}] * (i < 7)}
        for i, row in enumerate(make_chats(30))
    ]
    run_sft(
        "--dry_run",
        "--dev_file",
        write_jsonl(tmp_path / "dev.jsonl", make_chats(40)[30:]),
        data=write_jsonl(tmp_path / "tools.jsonl", rows),
    )
    assert "leaves out the tool definitions of 7 rows" in capsys.readouterr().out


def test_the_preflight_says_what_rewritten_history_costs(run_sft, tmp_path, capsys):
    template = tmp_path / "qwen3.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think></think>' if m.role != 'user' and loop.last }}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>"
        "{% endif %}"
    )
    turns = [{"role": ("user", "assistant")[i % 2], "content": "door"} for i in range(10)]
    rows = [{"messages": [{"role": "user", "content": f"row {i}"}, *turns[1:]]} for i in range(30)]
    data, note = (
        write_jsonl(tmp_path / "long.jsonl", rows),
        "the tokens of the conversations. --train_turns last",
    )
    run_sft("--dry_run", "--chat_template", template, data=data)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        3.0 <= float(said.split(f" times {note}")[0].split()[-1]) < 3.4
    )  # and the marks of thinking
    run_sft("--dry_run", "--chat_template", template, "--train_turns", "last", data=data)
    assert note not in " ".join(capsys.readouterr().out.split())


def test_stop_tokens_are_written_for_whoever_serves_the_model(run_sft, tmp_path, tiny_chat):
    AutoModelForCausalLM.from_pretrained(tiny_chat).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it
    tokenizer.save_pretrained(tmp_path / "base")
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    config = utils.read_json(tmp_path / "base/generation_config.json")
    utils.write_json(
        tmp_path / "base/generation_config.json", config | {"eos_token_id": ids[0], "top_k": 7}
    )
    report = run_sft("--max_steps", 2, model=str(tmp_path / "base"))
    stored = utils.read_json(tmp_path / "out/final/generation_config.json")
    assert stored["eos_token_id"] == ids and stored["top_k"] == 7
    assert any("it looks like a base model" in note for note in report["plan"]["notes"])


def test_final_folder_gives_the_trained_logits(run_sft, tmp_path, tiny_chat, monkeypatch):
    caught, prove = [], train_sft_lora.prove
    monkeypatch.setattr(
        train_sft_lora,
        "prove",
        lambda prepared, *rest: caught.append(prepared.trainer) or prove(prepared, *rest),
    )
    report = run_sft("--max_steps", 4, "--lr", "1e-2")
    assert report["proof"]["relative_error"] < 1e-6 < report["proof"]["relative_change"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_chat), str(tmp_path / "out/final")
    ).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    live = caught[0].model.eval()
    assert (model(ids).logits - live(ids).logits).abs().max() < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/final")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_chat).chat_template


def test_plain_template_is_saved_with_the_tokenizer(run_sft, tmp_path, tiny_chat):
    AutoModelForCausalLM.from_pretrained(tiny_chat).save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink(missing_ok=True)
    report = run_sft("--max_steps", 2, model=str(tmp_path / "base"))
    assert any("no chat template: a plain one" in note for note in report["plan"]["notes"])
    saved = AutoTokenizer.from_pretrained(tmp_path / "out/final")
    text = saved.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "### User:\nx\n\n### Assistant:\n"


@pytest.mark.parametrize(
    "flags",
    [
        ["--finetune_type", "full", "--optimizer", "sgd"],
        ["--load_in_4bit"],
        ["--load_in_8bit", "--no-gradient_checkpointing"],
        ["--lr_scheduler", "constant", "--use_rslora"],
        ["--model_dropout", "--lora_dropout", 0.1],
        ["--target_modules", "q_proj,lm_head"],
        ["--eval_strategy", "no"],
        ["--eval_every", 0, "--full_determinism"],
        ["--num_workers", 1],
        ["--train_turns", "last", "--overlong", "truncate_prompt", "--max_length", 60],
        ["--enable_thinking", "true", "--system_prompt", "Be brief."],
    ],
)
def test_flags_run_to_the_end(run_sft, flags):
    report = run_sft(
        "--batch_size", 4, "--gradient_accumulation", 2, "--max_steps", 3, "--lr", "1e-3", *flags
    )
    assert report["steps"] == 3
    assert report["proof"]["relative_change"] > 0
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("flags", [[], ["--load_in_4bit"], ["--finetune_type", "full"]])
def test_half_precision_bases_keep_float32_adapters(run_sft, monkeypatch, flags):
    monkeypatch.setattr(train_sft_lora, "choose_precision", lambda asked: ("bf16", "bf16"))
    caught, train = [], run.train
    monkeypatch.setattr(
        run, "train", lambda prepared: caught.append(prepared.trainer) or train(prepared)
    )
    report = run_sft(
        "--max_steps", 3, "--lr", "1e-3", "--eval_generate", 2, "--max_new_tokens", 4, *flags
    )
    assert report["proof"]["relative_change"] > 0
    assert {p.dtype for p in caught[0].model.parameters() if p.requires_grad} == {torch.float32}


def test_a_dropped_dropout_in_stage_two_is_written_into_the_layers(run_sft, tmp_path):
    run_sft("--max_steps", 2, "--lora_dropout", 0.05, "--lora_r", 4, out=tmp_path / "one")
    run_sft(
        "--max_steps",
        2,
        "--lora_dropout",
        0,
        "--init_adapter",
        tmp_path / "one/final",
        model=None or "",
    )
    assert utils.read_json(tmp_path / "out/final/adapter_config.json")["lora_dropout"] == 0


def fixed_metrics(monkeypatch, give):
    """Replace the metrics of generated answers, but not what the plan learns of their names."""
    scored = answers.generation_metrics

    def metrics(references, predictions, stopped):
        return scored(references, predictions, stopped) if references is predictions else give()

    monkeypatch.setattr(answers, "generation_metrics", metrics)


def test_final_is_the_best_state_by_the_metric_asked_for(run_sft, tmp_path, monkeypatch):
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.2])
    fixed_metrics(monkeypatch, lambda: {"stop_rate": 1.0, "f1": 0.5, "exact_match": next(scores)})
    flags = ["--max_steps", 4, "--eval_every", 1, "--eval_generate", 2, "--save_total_limit", 6]
    report = run_sft(*flags, "--metric_for_best", "exact_match", "--max_new_tokens", 2)
    assert report["best_step"] == 2 and report["metrics"]["after"]["exact_match"] == 0.9
    final, best = (
        load_file(tmp_path / f"out/{name}/adapter_model.safetensors")
        for name in ("final", "checkpoint-2")
    )
    assert all(torch.equal(final[key], best[key]) for key in final)


def test_warnings_in_words(run_sft, monkeypatch, tmp_path):
    recalls = iter([0.5, 0.9, 0.8, 0.6, 0.5])

    fixed_metrics(
        monkeypatch,
        lambda: {"stop_rate": 0.4, "exact_match": 0.1, "f1": 0.5, "recall": next(recalls)},
    )
    flags = [
        "--max_steps",
        4,
        "--eval_every",
        1,
        "--eval_generate",
        2,
        "--max_new_tokens",
        2,
        "--logging_steps",
        -1,
    ]
    said = " ".join(run_sft(*flags, "--lr", "1e-2", "--save_best", 0)["warnings"])
    assert "while recall worsened from 0.9000 to 0.6000: overfitting" in said
    assert "60% of the generated answers (stop_rate) do not stop in --max_new_tokens 2" in said


def test_a_loss_that_vanishes_without_a_dev_set_is_warned_about(run_sft, tmp_path):
    data = write_jsonl(tmp_path / "few.jsonl", make_chats(8))
    flags = ["--finetune_type", "full", "--lr", "1e-2", "--epochs", 60, "--dev_size", 0]
    report = run_sft(*flags, data=data)
    assert any("no dev set to tell learning from" in text for text in report["warnings"])
    assert any("more than 3 usually learn" in note for note in report["plan"]["notes"])


# ---------------------------------------------------------------- evaluation alone


def test_eval_only_gives_the_live_model_s_numbers(run_sft, tmp_path, stages, tiny_chat):
    flags = [
        "--dev_file",
        f"all={stages.all}",
        "--dev_file",
        f"pos={stages.pos}",
        "--eval_generate",
        10,
    ]
    flags += ["--max_new_tokens", 16]
    report = run_sft(
        "--max_steps", 30, "--lr", "1e-2", "--save_best", 0, *flags, data=stages.stage1
    )
    live = report["metrics"]["after"]
    adapter = tmp_path / "out/final"
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_chat), str(adapter)
    ).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        (tmp_path / "merged" / name).write_bytes((adapter / name).read_bytes())
    predictions = (tmp_path / f"out/predictions-all-{report['steps']}.jsonl").read_text()
    for name, model in (("adapter", adapter), ("merged", tmp_path / "merged"), ("base", tiny_chat)):
        found = run_sft(
            "--eval_only", *flags, model=str(model), out=tmp_path / f"eval_{name}", data=None
        )["metrics"]
        expected = report["metrics"]["before"] if name == "base" else live
        assert found == pytest.approx(expected, rel=1e-4), name
        if name != "base":
            assert (tmp_path / f"eval_{name}/predictions-all-0.jsonl").read_text() == predictions
        assert utils.read_json(tmp_path / f"eval_{name}/evaluation_report.json")["metrics"] == found


def test_rows_to_train_on_stay_those_beside_the_dev_sets(sft_argv, tmp_path, chats):
    prepared = train_sft_lora.prepare(sft_argv("--eval_only", "--dry_run"))
    rows = prepared.record["data"]
    assert len(prepared.trainer.train_dataset) > rows["dev"]["dev"]  # else few fit on many GPUs
    flags = ["--eval_only", "--dry_run", "--dev_file", chats]
    alone = train_sft_lora.prepare(sft_argv(*flags, data=None, out=tmp_path / "alone"))
    assert len(alone.trainer.train_dataset) >= alone.record["data"]["dev"]["dev"] == 60


def test_of_several_processes_one_writes_the_evaluation(tmp_path):
    trainer = SimpleNamespace(
        before_training=lambda: None,
        measure=lambda trainer: {"loss": 1.0},
        is_world_process_zero=lambda: False,
    )
    prepared = SimpleNamespace(
        trainer=trainer, dry_run=False, record={"flags": {}}, output_dir=tmp_path / "out"
    )
    assert train_sft_lora.evaluate(prepared) == {"flags": {}, "metrics": {"loss": 1.0}}
    assert not (tmp_path / "out").exists()


def test_thinking_that_was_asked_for_needs_no_record_of_a_run(run_sft, tiny_chat, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_chat, base)
    (base / "training_config.json").write_text("{")
    with pytest.raises(utils.InputError, match="training_config.json is no valid JSON"):
        run_sft("--dry_run", model=str(base))
    record = run_sft("--dry_run", "--enable_thinking", "true", model=str(base))
    assert record["settled"]["enable_thinking"] == "true"


class Server:
    """An OpenAI-compatible chat endpoint that answers from a function of the request."""

    def __init__(self, answer):
        requests = self.requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append((self.path, body))
                content, reason, code = answer(body)
                choice = {
                    "message": {"role": "assistant", "content": content},
                    "finish_reason": reason,
                }
                data = json.dumps({"choices": [choice]}).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def test_endpoint_is_asked_and_scored(run_sft, stages, tmp_path):
    rows = {
        json.dumps(row["messages"][:2]): row["messages"][2]["content"]
        for row in map(json.loads, open(stages.all))
    }

    def answer(body):
        if "and the" in body["messages"][-1]["content"]:
            return "<think>\nhm\n</think>\n\n" + rows[json.dumps(body["messages"])], "stop", 200
        return '{"things": ["wrong', "length", 200

    server = Server(answer)
    flags = [
        "--eval_only",
        "--endpoint",
        server.url,
        "--endpoint_model",
        "mine",
        "--max_new_tokens",
        40,
    ]
    report = run_sft(*flags, "--dev_file", f"all={stages.all}", data=None)
    path, body = server.requests[0]
    assert path == "/v1/chat/completions" and len(server.requests) == 20
    assert body["model"] == "mine" and body["temperature"] == 0 and body["max_tokens"] == 40
    right = sum("and the" in key for key in rows) / 20
    assert (
        report["metrics"]["all_exact_match"]
        == report["metrics"]["all_stop_rate"]
        == pytest.approx(right)
    )
    assert "all_loss" not in report["metrics"]
    assert utils.read_json(tmp_path / "out/evaluation_report.json") == report
    assert len(repr(report)) < 1000 < len(repr(dict(report)))
    lines = [
        json.loads(line)
        for line in (tmp_path / "out/predictions-all-0.jsonl").read_text().splitlines()
    ]
    assert sum(line["stopped"] for line in lines) == right * 20


def test_endpoint_that_refuses_is_quoted(run_sft, stages):
    server = Server(lambda body: ("", "stop", 404))
    with pytest.raises(utils.InputError, match="/v1/chat/completions answers 404"):
        run_sft(
            "--eval_only", "--endpoint", f"{server.url}/v1", "--dev_file", stages.all, data=None
        )


# ---------------------------------------------------------------- stop and resume


def test_a_finished_run_is_left_as_it_is(run_sft, capsys):
    report = run_sft("--max_steps", 2)
    assert run_sft("--max_steps", 2, "--resume_from_checkpoint") == report
    with pytest.raises(utils.InputError, match="max_length was 256 and is 200"):
        run_sft("--max_steps", 2, "--max_length", 200, "--resume_from_checkpoint")


def test_kill_and_resume_three_times(tiny_chat, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "tests/kill_and_resume.py",
            "train_sft_lora.py",
            tiny_chat,
            str(tmp_path),
            "3",
        ],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_dev_set_may_be_called_eval(run_sft, stages):
    report = run_sft("--max_steps", 2, "--dev_file", f"eval={stages.all}")
    assert report["plan"]["metric"] == "eval_loss" and "eval_loss" in report["metrics"]["after"]


def test_towers_that_text_does_not_pass_get_no_adapter(run_sft, tmp_path, tiny_chat, monkeypatch):
    class WithTower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = torch.nn.Sequential(torch.nn.Linear(8, 8))

    load_base = train_sft_lora.load

    def load(*positional, **named):
        loaded = load_base(*positional, **named)
        loaded.model.model.vision = WithTower()
        return loaded

    monkeypatch.setattr(train_sft_lora, "load", load)
    report = run_sft("--max_steps", 2)
    assert (
        "not trained, because the outputs do not depend on it: model.vision.tower.0"
        in report["plan"]["notes"]
    )


def test_running_out_of_memory_in_an_evaluation_leaves_the_steps_alone(sft_trainer, monkeypatch):
    trainer, failed = sft_trainer("--batch_size", 8), []
    scores = trainer.score_tokens

    def fail_once(*args):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return scores(*args)

    expected = trainer.score(trainer.train_dataset)
    monkeypatch.setattr(trainer, "score_tokens", fail_once)
    assert trainer.score(trainer.train_dataset) == pytest.approx(expected)
    assert failed and trainer.halvings == 0


def test_a_run_holds_no_memory_once_it_is_over(run_sft, monkeypatch):
    assert_holds_no_memory(train_sft_lora, run_sft, monkeypatch)

"""How a generated answer is read: in evaluations, predictions and examples/ask.py."""

import json
import shutil
from pathlib import Path

import utils
from conftest import chat_tokenizer, make_chats, randomise_adapters, write_jsonl
from examples import ask
from families import FAMILIES, FRAMED
from parts import causal
from parts.answers import DevSet, choose_asked, draw_rows, measure, write_predictions
from parts.chats import Example
from parts.scores import answer_of

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

# ---------------------------------------------------------------- a base whose answers have a frame


@pytest.fixture
def harmony(tmp_path, tiny_chat):
    """The tiny model under gpt-oss' template."""
    folder = tmp_path / "harmony"
    texts = [turn["content"] for row in make_chats(100) for turn in row["messages"]]
    template, eos, special, _ = FRAMED["gpt-oss"]
    chat_tokenizer(template, eos, None, special.split(), texts).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(tiny_chat).save_pretrained(folder)
    utils.write_json(folder / "generation_config.json", {})
    return str(folder)


def test_perfect_answers_in_a_frame_are_counted(run_sft, harmony, tmp_path, monkeypatch):
    def perfect(model, prompts, stop_ids, max_new_tokens):
        tokenizer = AutoTokenizer.from_pretrained(harmony)
        found = []
        for prompt in prompts:
            gold = expected[
                tokenizer.decode(prompt).rpartition("user<|message|>")[2].partition("<|end|>")[0]
            ]
            found.append((tokenizer(f"<|channel|>final<|message|>{gold}")["input_ids"], True))
        return found

    rows = [row for row in make_chats(40) if len(row["messages"]) == 3]
    expected = {row["messages"][1]["content"]: row["messages"][2]["content"] for row in rows}
    monkeypatch.setattr(causal, "generate_greedily", perfect)
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = run_sft(
        "--eval_only", "--dev_file", data, "--eval_generate", 9, model=harmony, data=None
    )["metrics"]
    assert found["exact_match"] == found["f1"] == found["json_valid"] == 1
    lines = [
        json.loads(line)
        for line in (tmp_path / "out/predictions-dev-0.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 9 and all(line["prediction"] == line["reference"] for line in lines)


# ---------------------------------------------------------------- dev sets


def example_of(question, answer, **more):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | more]
    return Example(f"rows.jsonl, {question}", turns)


def test_a_dev_set_is_measured_by_its_samples_and_by_answers_to_its_rows():
    def answer(name, prompts, examples):
        assert name == "b" and prompts == [[5], None]
        return [("<think>hm</think>yes", True), ("yes", False)]

    kept = []
    rows = [example_of("1?", "yes"), example_of("2?", "no")]
    dev_sets = {"a": DevSet([1, 2], []), "b": DevSet([3], [([5], rows[0]), (None, rows[1])])}
    found = measure(
        dev_sets, lambda samples: {"loss": sum(samples)}, answer, lambda *x: kept.append(x)
    )
    assert found == {"a_loss": 3, "b_loss": 3, "b_stop_rate": 0.5, "b_exact_match": 0.5}
    assert kept == [("b", rows, [("<think>hm</think>yes", True), ("yes", False)])]


def test_without_a_score_answers_alone_are_measured():
    dev_sets = {"": DevSet([], [(None, example_of("1?", "yes"))])}
    found = measure(dev_sets, None, lambda *_: [("yes", True)], lambda *_: None)
    assert found == {"stop_rate": 1, "exact_match": 1}


def test_rows_to_answer_are_drawn_alike_and_have_words_to_compare_with():
    rows = [example_of(f"{i}?", f"answer {i}") for i in range(20)]
    calls, unlearnt = example_of("call?", ""), example_of("old?", "no", weight=0)
    drawn = draw_rows("dev", [*rows, calls, unlearnt], 100, 7)
    assert sorted(row.where for row in drawn) == sorted(row.where for row in rows)
    assert draw_rows("dev", rows, 5, 7) == draw_rows("dev", rows, 5, 7)
    assert draw_rows("dev", rows, 5, 7) != draw_rows("other", rows, 5, 7)
    with pytest.raises(utils.InputError, match="dev set dev: no row has an answer in words"):
        choose_asked("", [calls, unlearnt], count=5, seed=7)


def test_predictions_are_written_whole(tmp_path):
    rows = [example_of("1?", "yes"), example_of("2?", "no")]
    write_predictions(tmp_path / "out", "dev-0", rows, [("<think>hm</think>是", True), ("", False)])
    (file,) = (tmp_path / "out").iterdir()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["prediction"] for line in lines] == ["是", ""]
    assert lines[1] == {
        "messages": [{"role": "user", "content": "2?"}],
        "reference": "no",
        "prediction": "",
        "stopped": False,
        "where": "rows.jsonl, 2?",
    }


# ---------------------------------------------------------------- examples/ask.py


def ask_and_catch(monkeypatch, model, *flags):
    """Return (the answers of examples/ask.py, the prompts that the model got, in words)."""
    prompts, generate = [], ask.generate_greedily

    def catch(model, asked, *rest):
        prompts.extend(asked)
        return generate(model, asked, *rest)

    monkeypatch.setattr(ask, "generate_greedily", catch)
    answers = ask.main([str(model), *flags, "--max_new_tokens", "5"])
    tokenizer = ask.read_run(model)[0].tokenizer
    return answers, [tokenizer.decode(ids) for ids in prompts]


def test_ask_answers_as_the_evaluation_does(sft_trainer, tiny_chat, tmp_path, monkeypatch, capsys):
    (tmp_path / "more.txt").write_text("two\n\nthree\n")
    answers, prompts = ask_and_catch(
        monkeypatch, tiny_chat, "one", "--samples", str(tmp_path / "more.txt")
    )
    question = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [question.format(text) for text in ("one", "two", "three")]
    trainer = sft_trainer("--max_new_tokens", 5)
    with trainer.model.disable_adapter():
        expected = trainer.generate([trainer.chat.ids(prompt) for prompt in prompts])
    assert answers == [answer_of(text) for text, _ in expected]
    said = capsys.readouterr().out
    assert f"three\n-> {answers[2]}\n" in said
    assert said.count("no stop token within 5 tokens") == sum(
        not stopped for _, stopped in expected
    )


@pytest.mark.parametrize(
    "thinking, opening", [("true", ""), ("false", "<think>\n\n</think>\n\n"), (None, None)]
)
def test_ask_reads_what_the_run_was_trained_with(
    tiny_chat, tmp_path, monkeypatch, thinking, opening
):
    folder = tmp_path / "merged"
    shutil.copytree(tiny_chat, folder)
    (folder / "chat_template.jinja").write_text(FAMILIES["qwen3"][0][0])
    if thinking:
        flags = {"enable_thinking": thinking, "system_prompt": "Be brief."}
        utils.write_json(folder / "training_config.json", {"flags": flags})
    _, (prompt,) = ask_and_catch(monkeypatch, folder, "one")
    system = "<|im_start|>system\nBe brief.<|im_end|>\n" if thinking else ""
    end = "<think>\n\n</think>\n\n" if opening is None else opening  # as without a setting
    assert prompt == f"{system}<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n{end}"
    _, prompts = ask_and_catch(monkeypatch, folder, "one", "--system", "")
    assert "system" not in prompts[-1]


@pytest.mark.parametrize(
    "run, thinks",
    [
        ({"flags": {"enable_thinking": "true"}}, True),  # an older run's: settled in place
        ({"flags": {"enable_thinking": "auto"}, "settled": {"enable_thinking": "true"}}, True),
        ({"flags": {"enable_thinking": "auto"}, "settled": {"enable_thinking": "false"}}, False),
        ({}, False),
    ],
)
def test_ask_reads_what_was_settled_of_a_flag(tiny_chat, tmp_path, run, thinks):
    folder = shutil.copytree(tiny_chat, tmp_path / "merged")
    if run:
        run["flags"]["system_prompt"] = "Be brief."
        utils.write_json(folder / "training_config.json", run)
    chat, system = ask.read_run(str(folder))
    assert chat.thinking is thinks and system == ("Be brief." if run else None)


def test_ask_finds_base_and_settings_of_an_adapter(tiny_chat, tmp_path, monkeypatch):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_chat), LoraConfig(task_type="CAUSAL_LM")
    )
    randomise_adapters(model)
    model.save_pretrained(tmp_path)  # without a tokenizer, as others leave it
    utils.write_json(tmp_path / "training_config.json", {"flags": {"enable_thinking": "true"}})
    utils.write_json(tmp_path / "generation_config.json", {"eos_token_id": [0, 2]})
    chat, _ = ask.read_run(tmp_path)
    assert chat.thinking and chat.stop_ids == [0, 2]
    (answer,), _ = ask_and_catch(monkeypatch, tmp_path, "one")
    (base,), _ = ask_and_catch(monkeypatch, tiny_chat, "one")
    assert answer != base


def test_ask_needs_a_question(tiny_chat, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    for flags in (
        [],
        ["--samples", str(tmp_path / "empty.txt")],
        ["--samples", str(tmp_path / "nowhere.txt")],
    ):
        with pytest.raises(SystemExit):
            ask.main([tiny_chat, *flags])
    assert "there is nothing to ask" in capsys.readouterr().err
    (tmp_path / "latin.txt").write_bytes("où?".encode("latin-1"))
    (tmp_path / "bom.txt").write_bytes("\ufeffWhere?\n".encode())
    with pytest.raises(SystemExit):
        ask.main([tiny_chat, "--samples", str(tmp_path / "latin.txt")])
    assert "is no UTF-8" in capsys.readouterr().err
    assert ask.parse_args([tiny_chat, "--samples", str(tmp_path / "bom.txt")]).questions == [
        "Where?"
    ]
    with pytest.raises(utils.InputError, match="cannot be loaded"):
        (tmp_path / "model.safetensors").write_bytes(b"\xff" * 99)
        (tmp_path / "config.json").write_text((Path(tiny_chat) / "config.json").read_text())
        ask.load_model(tmp_path)
    with pytest.raises(utils.InputError, match="special token"):
        ask.main([tiny_chat, "what is <|im_end|>?"])

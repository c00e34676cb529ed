"""How a generated answer is read: in evaluations, predictions, --sanity_overfit and examples/ask.py."""

import json
import shutil
from pathlib import Path

import utils
from conftest import CHATML, chat_tokenizer, make_chats, randomise_adapters, write_jsonl
from examples import ask
from parts import causal
from parts.answers import DevSet, choose_asked, draw_rows, measure, write_predictions
from parts.chats import Example
from parts.scores import answer_of
from train_sft_lora import Chat, decode_answer

import pytest
from peft import LoraConfig, get_peft_model
from test_sft_masks import FAMILIES, make_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = '{"a": "all , is \'t", "b": [1]}'
HARMONY = (  # gpt-oss: an answer stands in a channel of its own, behind that of the thoughts
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
RECIPIENT = (  # functionary: words, no special tokens, say to whom
    "{% for m in messages %}<|h|>{{ m.role }}<|e|>{% if m.role == 'assistant' %}>>>all\n{% endif %}"
    "{{ m.content }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|h|>assistant<|e|>>>>{% endif %}"
)
SEED = (  # Seed-OSS: thoughts between special tokens
    "{% for m in messages %}<bos>{{ m.role }}\n"
    "{% if m.reasoning_content %}<s:think>{{ m.reasoning_content }}</s:think>\n{% endif %}"
    "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
PARTS = (  # Kimi K3: the tag that ends an answer ends the thinking, too
    "{% for m in messages %}<open>{{ m.role }}<sep>{% if m.role == 'assistant' %}<open>think<sep>{{ m.thinking or '' }}"
    "<close>think<sep><open>response<sep>{{ m.content }}<close>response<sep>{% else %}{{ m.content }}<close>{% endif %}"
    "<eom>{% endfor %}{% if add_generation_prompt %}<open>assistant<sep><open>think<sep>{% endif %}"
)
COMMAND = (  # Command A: an answer has a beginning and an end
    "{% for m in messages %}<turn>{{ m.role }}{% if m.role == 'assistant' %}<text>{{ m.content }}</text><eot>"
    "{% else %}{{ m.content }}<eot>{% endif %}{% endfor %}{% if add_generation_prompt %}<turn>assistant{% endif %}"
)
FRAMED = {  # template, EOS, other special tokens, [(generated before the stop token, its answer)]
    "gpt-oss": (HARMONY, "<|return|>", "<|start|> <|channel|> <|message|> <|end|>", [
        (f"<|channel|>final<|message|>{TEXT}", TEXT),
        (f"<|channel|>analysis<|message|>final? {{}}<|end|><|start|>assistant<|channel|>final<|message|>{TEXT}", TEXT),
        ("<|channel|>final<|message|>1<|end|><|start|>assistant<|channel|>final<|message|>2", "2"),  # the last one
        ('<|channel|>analysis<|message|>{"a": 1}', '<|channel|>analysis<|message|>{"a": 1}')]),  # no answer yet
    "functionary": (RECIPIENT, "<|eot|>", "<|h|> <|e|>", [
        (f"all\n{TEXT}", TEXT),
        ("all\nall is all\nwell", "all is all\nwell"),
        ("allow all\nof it", "allow all\nof it")]),
    "seed-oss": (SEED, "<eos>", "<bos> <s:think> </s:think>", [
        (TEXT, TEXT), (f"<s:think>hm</s:think>\n{TEXT}", TEXT), (f"<s:think>{TEXT}", f"<s:think>{TEXT}")]),
    "kimi k3": (PARTS, "<eom>", "<open> <close> <sep>", [
        (f"<close>think<sep><open>response<sep>{TEXT}<close>response<sep>", TEXT),
        (f"hm<close>think<sep><open>response<sep>{TEXT}<close>response<sep>", TEXT),
        (f"<close>think<sep><open>response<sep>{TEXT}", TEXT)]),  # cut off
    "command a": (COMMAND, "<eot>", "<turn> <text> </text>", [(f"<text>{TEXT}</text>", TEXT)]),
    "special </think>": (FAMILIES["qwen3"][0][0], "<|im_end|>", "<|im_start|> <think> </think>", [
        (TEXT, TEXT), (f"<think>\nhm\n</think>\n\n{TEXT}", TEXT), (f"hm</think>{TEXT}", TEXT)]),
}  # fmt: skip


def framed_chat(name, thinking=True):
    template, eos, special, _ = FRAMED[name]
    return Chat(chat_tokenizer(template, eos, None, special.split()), thinking, [eos])


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("name", FRAMED)
def test_an_answer_is_what_stands_in_the_frame(name, thinking):
    chat = framed_chat(name, thinking)
    for generated, answer in FRAMED[name][3]:
        assert answer_of(decode_answer(chat.tokenizer, chat.ids(generated), chat.frame)) == answer
    question = {"role": "user", "content": "What?"}
    _, ids = chat.turn([question, {"role": "assistant", "content": TEXT}], 1)
    end = min(t for t, token in enumerate(ids) if token in chat.stop_ids)
    assert end >= len(ids) - 2  # phi's and Command A's second token is not needed
    assert answer_of(decode_answer(chat.tokenizer, ids[:end], chat.frame)) == TEXT


@pytest.mark.parametrize("name", FAMILIES)
def test_plain_templates_have_no_frame(name):
    chat = make_chat(*FAMILIES[name][0])
    assert chat.frame is None
    assert decode_answer(chat.tokenizer, chat.ids(TEXT), None) == TEXT


def test_blanks_before_punctuation_are_kept():
    tokenizer = chat_tokenizer(CHATML, "<|im_end|>", None, ["<|im_start|>"])
    tokenizer.clean_up_tokenization_spaces = True  # Llama 3 has it in its file
    tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) != TEXT
    assert decode_answer(tokenizer, tokenizer(TEXT)["input_ids"], None) == TEXT


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

"""The six preference losses, their masks, their step and their reference."""

import json
import math
import shutil
from types import SimpleNamespace

import utils
from conftest import (
    chat_tokenizer,
    gradient,
    gradients_of_two_processes,
    make_pairs,
    relative,
    write_jsonl,
)
from parts.chats import read_pair
from parts.flags import PREFERENCE_LOSSES as LOSSES
from parts.preference import (
    WITHOUT_REFERENCE,
    Preference,
    collate_pairs,
    gains,
    preference_losses,
)
from parts.samples import first_answer

import pytest
import torch
import torch.nn.functional as F
from transformers import MistralConfig, MistralForCausalLM


@pytest.fixture
def pairs(tmp_path):
    return write_jsonl(tmp_path / "pref.jsonl", make_pairs(60))


@pytest.fixture
def trainer_of(sft_trainer, pairs):
    """Return the trainer of a preference run, adapters no longer zero, its reference the base's."""
    return lambda *flags, **kwargs: sft_trainer(
        "--pref_loss", "sigmoid", *flags, data=pairs, **kwargs
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# chosen -6 in 4 tokens, rejected -5 in 2; reference -8 and -4
LOGPS, REFERENCE, LENGTHS = (
    torch.tensor([[-6.0, -5.0]]),
    torch.tensor([[-8.0, -4.0]]),
    torch.tensor([[4.0, 2.0]]),
)
BY_HAND = {  # gains +2 and -1, margin 3; per token 0.5 and -0.5, means -1.5 and -2.5
    "sigmoid": -math.log(sigmoid(0.5 * 3)),
    "hinge": 0.0,
    "ipo": (1.0 - 1 / (2 * 0.5)) ** 2,
    "kto_pair": ((1 - sigmoid(0.5 * (2 - 0.25))) + (1 - sigmoid(0.5 * (0.75 - -1)))) / 2,
    "orpo": 1.5
    - 0.5
    * math.log(
        sigmoid((-1.5 + 2.5) - (math.log(1 - math.exp(-1.5)) - math.log(1 - math.exp(-2.5))))
    ),
    "simpo": -math.log(sigmoid(0.5 * (-1.5 + 2.5) - 0.4)),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_equals_the_number_worked_by_hand(loss):
    plain = Preference(loss, beta=0.5, simpo_gamma=0.4)
    found = preference_losses(plain, LOGPS, REFERENCE, LENGTHS, kl=(0.75, 0.25))
    assert found.shape == (1,) and found.item() == pytest.approx(BY_HAND[loss], abs=1e-6)
    beside_sft = Preference(loss, beta=0.5, ftx=0.3, simpo_gamma=0.4)
    found = preference_losses(beside_sft, LOGPS, REFERENCE, LENGTHS, kl=(0.75, 0.25))
    assert found.item() == pytest.approx(BY_HAND[loss] + 0.3 * 1.5, abs=1e-6)


def test_hinge_and_smoothing_by_hand():
    hinge = preference_losses(Preference("hinge", beta=0.2), LOGPS, REFERENCE, LENGTHS)
    assert hinge.item() == pytest.approx(1 - 0.6, abs=1e-6)
    smoothed = Preference("sigmoid", beta=0.5, label_smoothing=0.1)
    found = preference_losses(smoothed, LOGPS, REFERENCE, LENGTHS)
    expected = -0.9 * math.log(sigmoid(1.5)) - 0.1 * math.log(sigmoid(-1.5))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_losses_equal_trls():
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(0)
    logps, reference = -5 * torch.rand(2, 6, 2, generator=generator) - 1
    lengths = torch.randint(1, 9, (6, 2), generator=generator)
    means = (logps / lengths).unbind(1)
    like = SimpleNamespace(
        beta=0.3, simpo_gamma=0.7, label_smoothing=0.0, loss_type="simpo", alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    found = preference_losses(Preference("orpo", 0.3), logps, reference, lengths)
    assert torch.allclose(
        found, -means[0] - ORPOTrainer.odds_ratio_loss(like, *means)[0], atol=1e-6
    )
    found = preference_losses(Preference("simpo", 0.3, simpo_gamma=0.7), logps, reference, lengths)
    assert torch.allclose(found, CPOTrainer.cpo_loss(like, *means)[0], atol=1e-6)
    for loss in ("sigmoid", "hinge", "ipo"):
        found = preference_losses(Preference(loss, 0.3), logps, reference, lengths)
        assert torch.allclose(
            found.mean(), trl_dpo_loss(loss, logps, reference, lengths), atol=1e-6
        )


def trl_dpo_loss(loss, logps, reference, lengths):
    """TRL's DPO loss on log-probabilities, through a model that returns them as single tokens'."""
    from unittest.mock import MagicMock

    from trl import DPOTrainer

    mask = torch.cat(
        [(torch.arange(10) >= 10 - side[:, None]).long() for side in lengths.unbind(1)]
    )  # (2 P, 10)
    spread = torch.cat(logps.unbind(1))[:, None] * mask[:, 1:] / mask[:, 1:].sum(1, keepdim=True)
    trainer = MagicMock(
        beta=0.3, loss_types=[loss], loss_weights=[1.0], f_divergence_type="reverse_kl",
        ld_alpha=None, use_weighting=False, precompute_ref_logps=True, aux_loss_enabled=False,
    )  # fmt: skip
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    model = MagicMock(
        return_value=MagicMock(
            log_probs=spread, mean_logits=spread, entropy=spread, is_top1=mask[:, 1:] > 0
        )
    )
    inputs = {
        "input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask,
        "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1],
    }  # fmt: skip
    return DPOTrainer._compute_loss(trainer, model, inputs, False)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "kto_pair"])
def test_a_model_equal_to_its_reference_gains_nothing(loss):
    assert not gains(loss, LOGPS, LOGPS, LENGTHS).any()


def test_gradients_of_the_six_differ(trainer_of):
    found = []
    for loss in LOSSES:
        trainer = trainer_of("--pref_loss", loss, "--pref_beta", 0.5)
        found.append(gradient(trainer, trainer.data_collator(trainer.train_dataset[:8]))[1])
    directions = F.normalize(torch.stack(found), dim=1)
    similar = directions @ directions.T - 2 * torch.eye(len(LOSSES))
    assert similar.max() < 0.999
    assert all(each.norm() > 0 for each in found)


def naive_loss(trainer, rows):
    """Full logits of each side, log-softmax, sums by hand; the reference without the adapter."""

    def logps():
        found = []
        for row in rows:
            for side in row["sides"]:
                ids = torch.tensor(side["input_ids"]).long()
                scores = trainer.model(input_ids=ids[None]).logits[0].log_softmax(1)
                each = scores[:-1].gather(1, ids[1:, None])[:, 0]
                found.append(each[torch.tensor(side["supervised"])[1:]].sum())
        return torch.stack(found).view(-1, 2)

    lengths = torch.tensor(
        [[int(side["supervised"].sum()) for side in row["sides"]] for row in rows]
    )
    with torch.no_grad(), trainer.model.disable_adapter():
        reference = logps()
    found, preference = logps(), trainer.preference
    kl = gains(preference.kind, found, reference, lengths).detach().mean(0).clamp(min=0)
    return preference_losses(preference, found, reference, lengths, kl).mean()


def naive_gradient(trainer, rows):
    trainer.model.zero_grad()
    loss = naive_loss(trainer, rows)
    loss.backward()
    return loss.detach(), torch.cat(
        [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("batch_size", [8, 2, 1])
@pytest.mark.parametrize("loss", ["sigmoid", "kto_pair", "orpo"])
def test_step_equals_the_naive_computation(trainer_of, loss, batch_size, shares):
    cut = ["--batch_size", batch_size, "--gradient_accumulation", 8 // batch_size]
    trainer = trainer_of("--pref_loss", loss, *cut)
    assert trainer.shares
    rows = trainer.train_dataset[:8]
    step = collate_pairs(shares, rows)
    assert len(trainer.cut_step(step)[0]) >= 8 // batch_size
    loss, expected = naive_gradient(trainer, rows)
    found_loss, found = gradient(trainer, step)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5
    if shares:
        shared, apart = (collate_pairs(each, rows)["sequences"] for each in (True, False))
        assert sum(map(len, shared)) < 0.8 * sum(map(len, apart))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_prompts_are_shared_under_either_attention(trainer_of, attention):
    assert trainer_of("--attn_implementation", attention).shares


@pytest.fixture
def windowed(tmp_path):
    """Save a tiny Mistral whose attention sees `window` tokens; return its folder."""

    def save(window):
        template = (
            "{% for m in messages %}<|u|>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<|u|>{% endif %}"
        )
        chat_tokenizer(template, "</s>", special=["<|u|>"]).save_pretrained(tmp_path / "window")
        shape = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        config = MistralConfig(
            vocab_size=640, intermediate_size=128, sliding_window=window, **shape
        )
        MistralForCausalLM(config).save_pretrained(tmp_path / "window")
        return str(tmp_path / "window")

    return save


def test_prompts_are_not_shared_where_that_would_change_the_outputs(trainer_of, windowed):
    trainer = trainer_of(model=windowed(8))
    assert not trainer.shares
    rows = trainer.train_dataset[:8]
    loss, expected = naive_gradient(trainer, rows)
    found_loss, found = gradient(trainer, trainer.data_collator(rows))
    assert (
        found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        and relative(found, expected) < 1e-5
    )


def test_a_window_is_held_against_the_longest_side_of_all_sets(sft_trainer, windowed, tmp_path):
    model = windowed(60)
    short = [
        {"prompt": f"{i}?", "chosen": "the lamp " * 15, "rejected": "no lamp " * 10}
        for i in range(8)
    ]
    long = [{"prompt": f"{i}??", "chosen": "the lamp " * 60, "rejected": "no"} for i in range(2)]
    dev_short, dev_long = (
        [row | {"prompt": "dev " + row["prompt"]} for row in rows] for rows in (short, long)
    )
    for name, train, dev in (
        ("short", short, dev_short),
        ("train", short + long, dev_short),
        ("dev", short, dev_long),
    ):
        files = [
            write_jsonl(tmp_path / f"{name}{side}.jsonl", rows)
            for side, rows in (("t", train), ("d", dev))
        ]
        flags = ["--pref_loss", "sigmoid", "--dev_file", files[1]]
        assert sft_trainer(*flags, data=files[0], model=model).shares == (name == "short"), name


def test_kto_counts_no_negative_kl(trainer_of):
    trainer = trainer_of("--pref_loss", "kto_pair", "--pref_beta", 0.5)
    rows = [
        row | {"reference": [x + 5 for x in row["reference"]]} for row in trainer.train_dataset[:8]
    ]
    step = trainer.data_collator(rows)
    [inputs] = trainer.inputs_of(step, [range(8)])
    logps, lengths = trainer.pair_logps(trainer.model, inputs), inputs["lengths"]
    reference = torch.tensor(step["reference"])
    assert (gains("kto_pair", logps, reference, lengths).mean(0) < 0).all()
    expected = preference_losses(trainer.preference, logps, reference, lengths).mean()
    assert gradient(trainer, step)[0].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "kto_pair"])
@pytest.mark.parametrize("step, real", [(0, 8), (7, 4)])
def test_two_processes_give_the_gradient_of_one(
    trainer_of, tmp_path, tiny_chat, pairs, loss, step, real
):
    trainer = trainer_of("--dev_size", 0, "--pref_loss", loss)
    assert len(trainer.train_dataset) == 60
    _, expected = naive_gradient(trainer, trainer.train_dataset[8 * step : 8 * step + real])
    line = f"--model_name {tiny_chat} --train_file {pairs} --batch_size 2 "
    line += f"--gradient_accumulation 2 --dev_size 0 --pref_loss {loss}"
    for found in gradients_of_two_processes(tmp_path, "train_sft_lora", line, 8 * step, 4, step):
        assert relative(found, expected) < 1e-5


def test_the_step_is_the_same_after_running_out_of_memory(trainer_of, monkeypatch):
    trainer = trainer_of("--batch_size", 8)
    rows = trainer.train_dataset[:8]
    loss, expected = naive_gradient(trainer, rows)
    backward, calls = trainer.accelerator.backward, []

    def fail_once(loss):
        backward(loss)
        calls.append(loss)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer.accelerator, "backward", fail_once)
    found_loss, found = gradient(trainer, trainer.data_collator(rows))
    assert trainer.halvings == 1 and found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5


# ---------------------------------------------------------------- reference


def test_reference_is_the_base_computed_once(trainer_of):
    trainer = trainer_of()
    calls, logps = [], trainer.pair_logps
    trainer.pair_logps = lambda *args: calls.append(1) or logps(*args)
    step = trainer.data_collator(trainer.train_dataset[:4])
    inputs = trainer.inputs_of(step, [range(4)])
    with trainer.model.disable_adapter(), torch.no_grad():
        base = logps(trainer.model, *inputs)
    assert torch.allclose(torch.tensor(step["reference"]), base, atol=1e-4)
    gradient(trainer, step)
    assert len(calls) == len(trainer.cut_step(step)[0])  # no second pass


def test_a_continued_adapter_is_its_own_reference(run_sft, trainer_of, tmp_path):
    run_sft("--max_steps", 3, "--lr", 1e-2, out=tmp_path / "first")
    trainer = trainer_of("--init_adapter", tmp_path / "first/final", model="")
    step = trainer.data_collator(trainer.train_dataset[:4])
    inputs = trainer.inputs_of(step, [range(4)])
    with trainer.model.disable_adapter(), torch.no_grad():
        base = trainer.pair_logps(trainer.model, *inputs)
    assert not torch.allclose(torch.tensor(step["reference"]), base, atol=1e-3)
    stored = utils.read_json(tmp_path / "first/final/adapter_config.json")
    trainer.model.load_adapter(tmp_path / "first/final", "again")
    trainer.model.set_adapter("again")
    with torch.no_grad():
        again = trainer.pair_logps(trainer.model, *inputs)
    assert stored and torch.allclose(torch.tensor(step["reference"]), again, atol=1e-4)


# ---------------------------------------------------------------- rows

CHAT = [{"role": "user", "content": "where is the lamp?"}]
GOOD, BAD = (
    {"role": "assistant", "content": "behind the door"},
    {"role": "assistant", "content": "no"},
)
FORMS = {
    "texts": {"prompt": "where is the lamp?", "chosen": "behind the door", "rejected": "no"},
    "question": {"question": "where is the lamp?", "chosen": "behind the door", "rejected": "no"},
    "lists": {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]},
    "messages": {"messages": CHAT, "chosen": GOOD, "rejected": BAD},
    "whole": {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]},
    "whole and prompt": {"prompt": "where is the lamp?", "chosen": [*CHAT, GOOD],
                         "rejected": [*CHAT, BAD]},
    "sharegpt": {"conversations": [{"from": "human", "value": "where is the lamp?"}],
                 "chosen": {"from": "gpt", "value": "behind the door"},
                 "rejected": {"from": "gpt", "value": "no"}},
    "json": {"conversations": json.dumps([{"from": "human", "value": "where is the lamp?"}]),
             "chosen": {"from": "gpt", "value": "behind the door"},
             "rejected": {"from": "gpt", "value": "no"}},
    "alpaca": {"instruction": "where is the lamp?", "input": "", "chosen": "behind the door",
               "rejected": "no"},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pair_is_read(form):
    example = read_pair("x", FORMS[form], None)
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("user", "where is the lamp?"), ("assistant", "behind the door")]  # fmt: skip
    assert (example.rejected["role"], example.rejected["content"]) == ("assistant", "no")


def test_system_text_and_json_cells_are_read():
    row = {"system_prompt": "SYS", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}
    assert read_pair("x", row, None).messages[0] == {
        "role": "system",
        "content": "SYS",
    }
    row = {
        "prompt": "where is the lamp?",
        "chosen": json.dumps([GOOD]),
        "rejected": json.dumps(BAD),
    }
    example = read_pair("x", row, None)
    assert (example.messages[-1]["content"], example.rejected["content"]) == (
        "behind the door",
        "no",
    )


def test_calls_empty_cells_and_labels_beside_pairs_are_read_as_beside_answers():
    row = {"messages": "[]", "prompt": "where is the lamp?", "tools": "[]", "label": False}
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {}}'}
    example = read_pair("x", {**row, "chosen": call, "rejected": "no"}, None)
    assert example.messages[0]["content"] == "where is the lamp?" and example.tools is None
    assert example.messages[1]["tool_calls"][0]["function"]["name"] == "look"
    row = {
        "instruction": "",
        "input": "where is the lamp?",
        "chosen": "behind the door",
        "rejected": "no",
    }
    assert read_pair("x", row, None).messages[0]["content"] == "where is the lamp?"
    with pytest.raises(utils.InputError, match='"images" is not empty'):
        read_pair("x", {**row, "images": ["a.png"]}, None)


def test_length_accuracy_counts_ties_as_halves(trainer_of):
    trainer = trainer_of()

    def side(*ids):
        return {"input_ids": ids, "supervised": torch.arange(len(ids)).bool().numpy()}

    short, long, other = side(5, 6), side(5, 6, 7), side(5, 9)
    pairs = [
        {"sides": sides}
        for sides in ([long, short], [long, short], [long, short], [short, long], [short, other])
    ]
    pairs = [pair | {"reference": [0.0, 0.0]} for pair in pairs]
    assert trainer.score(pairs)["length_accuracy"] == pytest.approx((3 + 0.5) / 5)
    assert trainer.score(pairs[4:])["length_accuracy"] == 0.5


def test_pairs_that_teach_nothing_are_dropped_and_counted(run_sft, tmp_path, capsys):
    rows = make_pairs(30)
    rows += [
        {"prompt": "a?", "chosen": "same", "rejected": "same"},
        {"prompt": "b?", "chosen": "x", "rejected": ""},
    ]
    rows += [{"prompt": "c?", "chosen": "x", "rejected": "lamp " * 400}, rows[0]]
    rows += [{"chosen": [*CHAT, GOOD], "rejected": [{"role": "user", "content": "why?"}, BAD]}]
    rows += [{"messages": [*CHAT, GOOD], "chosen": "yes", "rejected": "no"}]
    rows += [{"prompt": "d?", "chosen": GOOD | {"weight": 0}, "rejected": BAD}]
    run_sft("--pref_loss", "sigmoid", "--dry_run", data=write_jsonl(tmp_path / "rows.jsonl", rows))
    out = capsys.readouterr().out
    for reason in (
        "equal",
        "without a rejected",
        "do not fit into --max_length",
        "duplicate",
        "more than the last answer",
        "ends in an answer",
        "weight 0",
    ):
        assert sum(reason in line and "dropped" in line for line in out.splitlines()) == 1, reason


@pytest.mark.parametrize("row, sentence", [
    ({"prompt": "a?", "completion": "b"}, 'line 1: no "chosen"'),
    ({"chosen": "a", "rejected": "b"}, 'line 1: no prompt beside "chosen"'),
    ({"prompt": "a?", "chosen": 3, "rejected": "b"}, "line 1: chosen is the int 3"),
])  # fmt: skip
def test_rows_that_are_no_pairs_are_named(run_sft, tmp_path, row, sentence):
    with pytest.raises(utils.InputError, match=sentence):
        run_sft("--pref_loss", "sigmoid", data=write_jsonl(tmp_path / "rows.jsonl", [row]))


def test_pairs_without_pref_loss_are_told_what_to_pass(run_sft, pairs):
    with pytest.raises(utils.InputError, match="For chosen/rejected pass --pref_loss"):
        run_sft(data=pairs)


def test_both_sides_are_shortened_alike(trainer_of):
    trainer = trainer_of("--max_length", 40, "--overlong", "truncate_prompt")
    for pair in trainer.train_dataset:
        chosen, rejected = pair["sides"]
        first = first_answer(chosen)
        assert first == first_answer(rejected)
        assert list(chosen["input_ids"][:first]) == list(rejected["input_ids"][:first])
        assert max(len(chosen["input_ids"]), len(rejected["input_ids"])) <= 40


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_learns_to_prefer(run_sft, pairs, tmp_path, loss):
    beta = 2.5 if loss == "simpo" else 0.1
    report = run_sft(
        "--pref_loss", loss, "--pref_beta", beta, "--max_steps", 12, "--lr", 1e-2, data=pairs
    )
    before, after = report["metrics"]["before"], report["metrics"]["after"]
    assert after["accuracy"] > 0.9 and after["margin"] > before["margin"]
    assert 0.5 <= after["length_accuracy"] < 0.8
    assert report["plan"]["metric"] == "accuracy"
    logged = [
        entry
        for entry in json.loads((tmp_path / "out/detailed_training_logs.json").read_text())
        if "loss" in entry
    ]
    names = {
        f"{name}_{side}" for name in ("reward", "logp", "tokens") for side in ("chosen", "rejected")
    }
    assert {"accuracy", "margin", *names} <= set(logged[-1])
    assert logged[-1]["accuracy"] > 0.9 and logged[-1]["tokens_chosen"] > 1
    if loss not in WITHOUT_REFERENCE:
        assert (before["accuracy"], before["margin"]) == (0.5, 0.0)


def test_the_first_log_line_is_that_of_step_one(run_sft, pairs, tmp_path):
    run_sft(
        "--pref_loss",
        "sigmoid",
        "--max_steps",
        2,
        "--logging_steps",
        1,
        "--dev_size",
        0,
        data=pairs,
    )
    log = json.loads((tmp_path / "out/detailed_training_logs.json").read_text())
    first = next(entry for entry in log if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2)) and (first["accuracy"], first["margin"]) == (
        0.5,
        0.0,
    )
    assert first["tokens_chosen"] > 0


def test_a_resumed_run_ends_with_the_same_weights(run_sft, pairs, tmp_path):
    line = [
        "--pref_loss",
        "kto_pair",
        "--max_steps",
        4,
        "--lr",
        1e-2,
        "--checkpoint_steps",
        2,
        "--save_best",
        0,
    ]
    whole = run_sft(*line, data=pairs)
    weights = (tmp_path / "out/final/adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    (tmp_path / "out/training_summary_report.json").unlink()
    again = run_sft(*line, "--resume_from_checkpoint", data=pairs)
    assert (tmp_path / "out/final/adapter_model.safetensors").read_bytes() == weights
    assert again["metrics"] == whole["metrics"]


def test_answers_are_generated_beside_preferences(run_sft, tmp_path, tiny_chat):
    model = tmp_path / "folds"
    shutil.copytree(tiny_chat, model)
    template = ("{% for m in messages %}"
                "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
                "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
    (model / "chat_template.jinja").write_text(template)
    files = [write_jsonl(tmp_path / f"{name}.jsonl", make_pairs(60)[part])
             for name, part in (("train", slice(40)), ("dev", slice(40, 60)))]  # fmt: skip
    flags = [
        "--pref_loss",
        "sigmoid",
        "--dev_file",
        f"a={files[1]}",
        "--max_steps",
        1,
        "--eval_generate",
        3,
    ]
    report = run_sft(
        *flags,
        "--system_prompt",
        "Be brief.",
        "--max_new_tokens",
        4,
        data=files[0],
        model=str(model),
    )
    assert {"a_accuracy", "a_margin", "a_exact_match"} <= set(report["metrics"]["after"])


def test_a_trained_adapter_is_measured_against_its_base(run_sft, pairs, tmp_path):
    report = run_sft(
        "--pref_loss", "sigmoid", "--max_steps", 6, "--lr", 1e-2, "--save_best", 0, data=pairs
    )
    line = ["--pref_loss", "sigmoid", "--eval_only", "--dev_file", pairs]
    found = run_sft(*line, model=str(tmp_path / "out/final"), data=None, out=tmp_path / "again")[
        "metrics"
    ]
    assert (
        found["margin"] == pytest.approx(report["metrics"]["after"]["margin"], rel=0.2)
        and found["accuracy"] > 0.9
    )
    with pytest.raises(utils.InputError, match="compares an adapter with its base"):
        run_sft(*line, data=None, out=tmp_path / "base")


@pytest.mark.parametrize("wrong, sentence", [
    ("--pref_beta 0.2", "need --pref_loss"),
    ("--pref_loss hinge --dpo_label_smoothing 0.1",
     "--dpo_label_smoothing is for --pref_loss sigmoid"),
    ("--pref_loss sigmoid --simpo_gamma 0.1", "--simpo_gamma is for --pref_loss simpo"),
    ("--pref_loss sigmoid --sanity_overfit 5", "drop --sanity_overfit"),
    ("--pref_loss sigmoid --lora_dropout 0.1", "drop --lora_dropout"),
    ("--pref_loss sigmoid --train_turns last", "--train_turns"),
    ("--pref_loss dpo", "invalid choice"),
])  # fmt: skip
def test_wrong_combinations_are_refused_in_one_sentence(run_sft, capsys, wrong, sentence):
    with pytest.raises(SystemExit):
        run_sft(*wrong.split())
    assert sentence in capsys.readouterr().err


def test_a_flat_simpo_is_warned_of(run_sft, pairs, capsys):
    run_sft("--pref_loss", "simpo", "--dry_run", data=pairs)
    assert "simpo is nearly flat at --pref_beta 0.1" in capsys.readouterr().out

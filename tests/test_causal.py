"""A step's loss and gradient are those of plain full logits, whatever it is cut into."""

import train_sft_lora
import utils
from conftest import gradient, gradients_of_two_processes, randomise_adapters, relative
from parts import causal

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM


def naive_gradient(trainer, rows):
    """One padded pass with an attention mask, all logits, stock labels, one backward pass."""
    width = max(len(row["input_ids"]) for row in rows)
    input_ids, labels = torch.zeros(2, len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), labels - 100
    for i, row in enumerate(rows):
        ids, length = torch.tensor(row["input_ids"]).long(), len(row["input_ids"])
        input_ids[i, :length], mask[i, :length] = ids, 1
        labels[i, :length] = torch.where(torch.tensor(row["supervised"]), ids, -100)
    logits = trainer.model(input_ids=input_ids, attention_mask=mask).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    trainer.model.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat(
        [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad]
    )


@pytest.mark.parametrize(
    "checkpointing", ["--gradient_checkpointing", "--no-gradient_checkpointing"]
)
@pytest.mark.parametrize("batch_size", [8, 2, 1])
def test_step_equals_the_full_logits_computation(sft_trainer, batch_size, checkpointing):
    flags = ["--batch_size", batch_size, "--gradient_accumulation", 8 // batch_size, checkpointing]
    trainer = sft_trainer(*flags)
    assert trainer.args.per_device_train_batch_size == 8
    rows = trainer.train_dataset[:8]
    loss, expected = naive_gradient(trainer, rows)
    step = trainer.data_collator(rows)
    assert len(trainer.cut_step(step)[0]) >= 8 // batch_size
    found_loss, found = gradient(trainer, step)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5
    mean_of_means = torch.stack(
        [naive_gradient(trainer, rows[i : i + 1])[0] for i in range(8)]
    ).mean()
    assert (
        abs(mean_of_means - loss) > 1e-4
    )  # the rows differ in length, so that a mean of means would be seen


@pytest.mark.parametrize(
    "flags", [[], ["--target_modules", "q_proj,lm_head"], ["--finetune_type", "full"]]
)
def test_logits_in_chunks_change_nothing(sft_trainer, flags, monkeypatch):
    trainer = sft_trainer("--batch_size", 8, *flags)
    rows = trainer.train_dataset[:8]
    loss, expected = naive_gradient(trainer, rows)
    sizes, losses = [], causal.token_losses
    monkeypatch.setattr(causal, "LOGITS_AT_ONCE", 7 * 640)
    monkeypatch.setattr(
        train_sft_lora, "token_losses", lambda x, y: sizes.append(len(y)) or losses(x, y)
    )
    found_loss, found = gradient(trainer, trainer.data_collator(rows))
    assert trainer.plain_head and max(sizes) == 7
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5


class Seen(TorchDispatchMode):
    """A block that keeps the names of all operations within, those of backward passes too."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_the_likeliest_token_is_looked_for_in_evaluations_alone(sft_trainer):
    trainer = sft_trainer("--batch_size", 4)
    rows = trainer.train_dataset[:8]
    with Seen() as of_step:
        gradient(trainer, trainer.data_collator(rows))
    with Seen() as of_evaluation:
        trainer.score(rows)
    assert "argmax" not in of_step.names and "_log_softmax" in of_step.names
    assert "argmax" in of_evaluation.names


def test_a_head_with_softcapping_is_left_to_the_model(
    sft_trainer, tiny_chat, tmp_path, monkeypatch
):
    monkeypatch.setattr(causal, "LOGITS_AT_ONCE", 7 * 640)
    AutoTokenizer.from_pretrained(tiny_chat).save_pretrained(tmp_path / "gemma")
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=640, head_dim=16, intermediate_size=128, final_logit_softcapping=2.0, **shape
    )
    Gemma2ForCausalLM(config).save_pretrained(tmp_path / "gemma")
    trainer = sft_trainer("--attn_implementation", "eager", model=str(tmp_path / "gemma"))
    rows = trainer.train_dataset[:8]
    loss, expected = naive_gradient(trainer, rows)
    found_loss, found = gradient(trainer, trainer.data_collator(rows))
    assert not trainer.plain_head
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5


def test_step_is_the_same_after_running_out_of_memory(sft_trainer, monkeypatch, capsys):
    trainer = sft_trainer("--batch_size", 8)
    rows = trainer.train_dataset[:8]
    loss, expected = naive_gradient(trainer, rows)
    backward, calls = trainer.accelerator.backward, []

    def fail_twice(loss):
        backward(loss)
        calls.append(loss)
        if len(calls) in (2, 4):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer.accelerator, "backward", fail_twice)
    found_loss, found = gradient(trainer, trainer.data_collator(rows))
    assert trainer.halvings == 2 and "pieces 1/4 the size" in capsys.readouterr().out
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("step, real", [(0, 8), (7, 4)])
def test_two_processes_give_the_gradient_of_one(
    sft_trainer, tmp_path, tiny_chat, chats, step, real
):
    trainer = sft_trainer("--dev_size", 0)
    total = len(trainer.train_dataset)
    assert (
        total == 60
    )  # 7 steps of 8 rows and one of 4, which is filled up with rows that carry no loss
    _, expected = naive_gradient(trainer, trainer.train_dataset[8 * step : 8 * step + real])
    flags = f"--model_name {tiny_chat} --train_file {chats} --batch_size 2 "
    flags += "--gradient_accumulation 2 --dev_size 0"
    for found in gradients_of_two_processes(tmp_path, "train_sft_lora", flags, 8 * step, 4, step):
        assert relative(found, expected) < 1e-5


def test_dev_loss_is_a_mean_over_tokens(sft_trainer):
    trainer = sft_trainer("--batch_size", 3)
    rows = trainer.train_dataset[:20]
    trainer.model.eval()
    loss, _ = naive_gradient(trainer, rows)
    found = trainer.score(rows)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    hits = count = 0
    for row in rows:
        ids, mask = torch.tensor(row["input_ids"]).long(), torch.tensor(row["supervised"])
        best = trainer.model(input_ids=ids[None]).logits[0, :-1].argmax(1)
        hits, count = hits + (best == ids[1:])[mask[1:]].sum().item(), count + mask.sum().item()
    assert found["token_accuracy"] == pytest.approx(hits / count)


def test_generation_in_a_batch_is_that_of_a_row_alone(sft_trainer, monkeypatch):
    trainer = sft_trainer("--max_new_tokens", 12)
    randomise_adapters(trainer.model)
    prompts = [
        list(row["input_ids"][: row["supervised"].argmax()]) for row in trainer.train_dataset[:9]
    ]
    together = trainer.generate(prompts)
    monkeypatch.setattr(causal, "GENERATED_AT_ONCE", 1)
    assert trainer.generate(prompts) == together
    chat, found = trainer.chat, []
    for prompt in prompts:  # greedy, by hand, without a cache
        ids = list(prompt)
        while len(ids) < len(prompt) + 12:
            logits = trainer.model(input_ids=torch.tensor([ids]).long()).logits[0, -1]
            if (token := logits.argmax().item()) in chat.stop_ids:
                break
            ids.append(token)
        stopped = len(ids) < len(prompt) + 12
        found.append((chat.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), stopped))
    assert found == together


def test_a_base_repetition_penalty_does_not_bend_the_evaluation(sft_trainer, tiny_chat, tmp_path):
    import shutil

    shutil.copytree(tiny_chat, tmp_path / "model")
    config = utils.read_json(tmp_path / "model/generation_config.json")
    sampling = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 0.6, "max_length": 20}
    utils.write_json(tmp_path / "model/generation_config.json", config | sampling)
    plain, bent = (
        sft_trainer("--max_new_tokens", 16, model=str(m)) for m in (tiny_chat, tmp_path / "model")
    )
    prompts = [list(row["input_ids"][:20]) for row in plain.train_dataset[:4]]
    assert plain.generate(prompts) == bent.generate(prompts)

"""Several processes: one that runs out of memory starts the step again with all the others."""

from pathlib import Path
from types import SimpleNamespace

from conftest import gradient, gradients_of_two_processes, make_pairs, relative, write_jsonl
from parts import processes

import pytest
import torch


def halvings_of(folder):
    return [int((Path(folder) / f"halvings{rank}").read_text()) for rank in (0, 1)]


# forward passes of the second process: in the first piece; in a later one; again in the attempt
# after that; while an early piece of an embedding step is embedded again for its backward pass
@pytest.mark.parametrize("fails, halved", [([1], 1), ([2, 4], 2), ([9], 1)])
def test_who_runs_out_of_memory_halves_and_all_repeat_the_embedding_step(
    embed_trainer, tmp_path, tiny_bert, pairs, fails, halved
):
    trainer = embed_trainer("--max_negs", 2)
    _, expected = gradient(
        trainer, trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    )
    flags = (
        f"--model_name {tiny_bert} --train_file {pairs} --max_negs 2 --report_to none "
        "--batch_size 2 --gradient_accumulation 4"
    )
    found = gradients_of_two_processes(tmp_path, "train_embed_lora", flags, 0, 8, 0, fails)
    for each in found:
        assert relative(each, expected) < 1e-4
    assert halvings_of(tmp_path) == [0, halved]


@pytest.mark.parametrize("loss", ["", "--pref_loss kto_pair"])
def test_who_runs_out_of_memory_halves_and_all_repeat_the_causal_step(
    sft_trainer, tmp_path, tiny_chat, chats, loss
):
    data = write_jsonl(tmp_path / "pref.jsonl", make_pairs(60)) if loss else chats
    trainer = sft_trainer("--dev_size", 0, *loss.split(), data=data)
    _, expected = gradient(trainer, trainer.data_collator(trainer.train_dataset[:8]))
    flags = f"--model_name {tiny_chat} --train_file {data} --batch_size 2 {loss} "
    flags += "--gradient_accumulation 2 --dev_size 0"
    found = gradients_of_two_processes(tmp_path, "train_sft_lora", flags, 0, 4, 0, [2, 5])
    for each in found:
        assert relative(each, expected) < 1e-5
    assert halvings_of(tmp_path) == [0, 2]


def test_means_of_gradients_take_all_groups_and_none_for_zero(monkeypatch):
    monkeypatch.setattr(processes, "FLAT_NUMBERS", 5)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((2,), (3,), (7,), (1, 2))]
    for i, weight in enumerate(weights[:3]):
        weight.grad = torch.full_like(weight, i + 1.0)
    sent = []

    def reduce(flat, kind):
        sent.append(len(flat))
        return flat / 2  # the other process has zeros

    processes.average_gradients(SimpleNamespace(num_processes=2, reduce=reduce), weights)
    assert sent == [5, 7, 2]
    assert [weight.grad.unique().tolist() for weight in weights] == [[0.5], [1.0], [1.5], [0.0]]
    assert weights[3].grad.shape == (1, 2)

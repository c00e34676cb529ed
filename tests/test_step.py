"""A step is cut, tried again where memory runs out, and stops the run where it went wrong."""

import re

from conftest import gradient, relative
from parts import cutting
from utils import InputError

import pytest
import torch


def test_cut_sorts_and_respects_the_budget():
    lengths = [5, 50, 7, 6, 49, 200]
    pieces = cutting.cut(lengths, 100)
    assert pieces == [[5], [1, 4], [2, 3, 0]]


@pytest.fixture
def some_rows(embed_trainer):
    """Return a trainer and 32 of its rows."""
    trainer = embed_trainer("--max_negs", 2)
    return trainer, [trainer.train_dataset[i] for i in range(32)]


def test_an_evaluation_remembers_what_did_not_fit_the_one_before(
    embed_trainer, monkeypatch, capsys
):
    trainer = embed_trainer("--batch_size", 8)
    texts = [trainer.data_collator.texts[i] for i in range(40)]
    expected, encode = trainer.embed(texts), trainer.encode

    def small_memory(model, inputs):
        if inputs["input_ids"].numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(model, inputs)

    monkeypatch.setattr(trainer, "encode", small_memory)
    for _ in range(3):
        assert relative(trainer.embed(texts), expected) < 1e-5
    sizes = re.findall(r"ran out.* pieces (\S+) the size", capsys.readouterr().out)
    assert sizes and len(sizes) == len(set(sizes))  # each is said once
    assert trainer.halvings == 0


def test_memory_that_never_suffices_ends_in_a_message(some_rows, monkeypatch):
    trainer, rows = some_rows

    def fail(loss):
        raise RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        )

    monkeypatch.setattr(trainer.accelerator, "backward", fail)
    with pytest.raises(InputError, match="out of memory: lower --max_length"):
        gradient(trainer, trainer.data_collator(rows))


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(some_rows, monkeypatch):
    trainer, rows = some_rows
    monkeypatch.setattr(
        trainer, "run_step", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    )
    with pytest.raises(RuntimeError, match="shape mismatch"):
        gradient(trainer, trainer.data_collator(rows))


def test_a_step_that_no_data_loader_made_is_moved_to_the_device(some_rows, monkeypatch):
    trainer, rows = some_rows  # as in the rehearsal
    step, moved = trainer.data_collator(rows), []
    monkeypatch.setattr(trainer, "_prepare_input", lambda value: moved.append(value) or value)
    gradient(trainer, step)
    assert moved == [step]


def test_a_loss_that_is_not_finite_stops_the_run(some_rows):
    trainer, rows = some_rows
    next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss is nan"):
        gradient(trainer, trainer.data_collator(rows))

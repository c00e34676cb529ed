"""A step is queued as a whole: nothing in it asks the device, or copies so that the CPU waits.

No GPU is needed to see that. On the "meta" device tensors have shapes and no numbers: whatever
waits for a number (.item(), `if tensor`) or for a shape that depends on numbers (nonzero, a mask as
an index) raises there. What else waits is a copy from the CPU's memory; those are counted.
Not covered: the optimizer, clipping, kernels that wait by themselves, several processes; and what
transformers asks once in each forward pass without a mask of four dimensions, which is answered
here: whether any row is padded (encoders), or holds several texts (decoders).
"""

from conftest import make_pairs, write_jsonl
from parts import causal, run
from parts import step as step_room
from parts.cutting import moved
from parts.figures import Figures
from parts.preference import collate_pairs
from train_embed_lora import count_early

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils


class Copies(TorchDispatchMode):
    """A block that counts the copies from the CPU to the "meta" device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        sources = [value for value in args if isinstance(value, torch.Tensor)]
        if (
            func.overloadpacket.__name__ in ("_to_copy", "copy_")
            and sources[-1].device.type == "cpu"
        ):
            self.count += out.device.type == "meta"
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """Return move(trainer), which leaves a trainer and its model on the "meta" device."""
    tensor = torch.tensor

    def of_numbers(data, *args, device=None, **kwargs):
        # a copy, which torch hides from who counts them
        assert device is None or torch.device(device).type == "cpu", "torch.tensor(..., device=)"
        return tensor(data, *args, **kwargs)

    def figures_of(step, numbers, names_of):
        # what is copied back; test_figures.py has when it is read
        assert numbers.device.type == "meta" and numbers.ndim == 1
        return Figures(step, torch.zeros(numbers.shape), names_of)

    def move(trainer):
        trainer.model.to("meta")
        monkeypatch.setitem(vars(trainer.args), "_setup_devices", torch.device("meta"))
        assert trainer.args.device.type == "meta"
        monkeypatch.setattr(torch, "tensor", of_numbers)
        monkeypatch.setattr(step_room, "Figures", figures_of)
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda *_: None)
        monkeypatch.setattr(masking_utils, "_ignore_bidirectional_mask_sdpa", lambda *_: False)
        return trainer

    return move


def copies_of_step(trainer, step):
    """Return how many copies to the device a whole step makes, which is not the first."""
    trainer.state.global_step = 1
    with Copies() as copies:
        trainer.training_step(trainer.model, step)
    return copies.count


@pytest.mark.parametrize("flags", [[], ["--no-gradient_checkpointing"]])
def test_a_step_of_sft_is_one_copy(sft_trainer, on_meta, flags):
    trainer = on_meta(sft_trainer("--batch_size", 2, *flags))
    step = trainer.data_collator(trainer.train_dataset[:8])
    assert len(trainer.cut_step(step)[0]) > 3
    assert copies_of_step(trainer, step) == 1


def test_logits_in_chunks_are_queued_too(sft_trainer, on_meta, monkeypatch):
    monkeypatch.setattr(causal, "LOGITS_AT_ONCE", 7 * 640)
    trainer = on_meta(sft_trainer())
    assert copies_of_step(trainer, trainer.data_collator(trainer.train_dataset[:8])) == 1


@pytest.mark.parametrize("loss", ["sigmoid", "kto_pair", "simpo"])
@pytest.mark.parametrize("shares", [True, False])
def test_a_step_of_preferences_is_one_copy_and_one_of_the_reference(
    sft_trainer, on_meta, tmp_path, loss, shares
):
    data = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(20))
    trainer = on_meta(sft_trainer("--pref_loss", loss, "--batch_size", 2, data=data))
    step = collate_pairs(shares, trainer.train_dataset[:8])
    assert len(trainer.cut_step(step)[0]) > 3
    assert copies_of_step(trainer, step) == (1 if loss == "simpo" else 2)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_step_of_embeddings_is_one_copy_and_one_of_their_order(embed_trainer, on_meta, pooling):
    trainer = on_meta(embed_trainer("--batch_size", 2, "--pooling", pooling))
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    # the step's own index tensors, which the data loader has copied
    step = {
        name: getattr(value, "to", lambda _, v=value: v)("meta") for name, value in step.items()
    }
    pieces, tokens_at_once = trainer.cut_step(step)
    assert 0 < count_early(pieces, step, tokens_at_once) < len(pieces)
    assert copies_of_step(trainer, step) == 2


def test_a_copy_to_a_gpu_is_pinned_and_waits_for_nothing(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda flat: seen.append("pinned") or flat)

    def to(flat, device, non_blocking=False):
        seen.append((device.type, non_blocking))
        return flat

    monkeypatch.setattr(torch.Tensor, "to", to)
    tensors = [torch.arange(6).view(2, 3), torch.arange(0), torch.tensor(7)]
    found = moved(tensors, torch.device("cuda"))
    assert seen == ["pinned", ("cuda", True)]
    assert [each.tolist() for each in found] == [each.tolist() for each in tensors]
    found = moved(tensors, torch.device("cpu"))
    assert seen[2:] == [("cpu", False)]


def test_the_data_loader_copies_a_steps_indices_without_waiting(embed_trainer, monkeypatch):
    assert not embed_trainer().accelerator.non_blocking  # for a CPU no memory is pinned
    training_arguments = run.training_arguments

    def pinned(*args, **kwargs):
        arguments = training_arguments(*args, **kwargs)
        arguments.dataloader_pin_memory = True  # as where there is a GPU
        return arguments

    monkeypatch.setattr(run, "training_arguments", pinned)
    assert embed_trainer().accelerator.non_blocking

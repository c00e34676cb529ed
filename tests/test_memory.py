"""How many tokens fit is worked out from two passes; pieces grow into it, and shrink again."""

import re
import shutil
from types import SimpleNamespace

import train_embed_lora
import train_sft_lora
from conftest import gradient, randomise_adapters, relative
from parts import memory, rehearsal, step
from parts.rehearsal import rehearse
from utils import InputError, read_json, write_json

import pytest
import torch
from transformers import Qwen3ForCausalLM


@pytest.mark.parametrize(
    "budget, small, large, tokens",
    [
        (1000, (10, 150), (30, 250), 180),  # 100 fixed, 5 a token
        (1000, (10, 100), (10, 100), 100),  # one size says nothing of what is fixed
        (1000, (10, 150), (30, 150), 200),  # nor do two that took as much
        (1000, (10, 50), (30, 250), 119),  # grows faster than linearly: nothing fixed, 8.33 a token
        (90, (10, 150), (30, 250), 0),
    ],
)
def test_tokens_that_fit_by_hand(budget, small, large, tokens):
    assert memory.tokens_that_fit(budget, small, large) == tokens


def test_what_the_optimizer_is_yet_to_make_is_counted_by_hand():
    assert memory.bytes_to_come("adamw_torch_fused", 10, 1) == 80
    assert memory.bytes_to_come("adamw_torch", 10, 1) == 120
    assert memory.bytes_to_come("adamw_torch", 10, 2) == 160
    assert memory.bytes_to_come("adamw_bnb_8bit", 10, 1) == 60
    assert memory.bytes_to_come("sgd", 10, 4) == 80


def test_what_is_yet_to_come_is_held_and_let_go(monkeypatch):
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **how: sizes.append(args[0]) or empty(0))
    with memory.held(123, "cpu"):
        assert sizes == [123]


def test_an_optimizer_that_does_not_fit_is_told_before_training(embed_argv, monkeypatch):
    prepared = train_embed_lora.prepare(embed_argv())
    monkeypatch.setattr(memory, "OPTIMIZER_BYTES", {prepared.trainer.args.optim.value: 10**12})
    with pytest.raises(InputError, match="out of memory: the optimizer takes .* GiB beside"):
        rehearse(prepared.trainer, prepared.plan, prepared.row_tokens, prepared.seed)


def test_memory_that_runs_out_in_the_optimizer_is_told_in_a_sentence(run_embed, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    with pytest.raises(InputError, match="out of memory beside the passes, as in the optimizer's"):
        run_embed("--max_steps", 1, "--eval_strategy", "no")


# ---------------------------------------------------------------- pieces that grow

FIXED = 1000  # bytes of a pass in the memory below
PER_TOKEN = 10
RECOMPUTED = 1  # bytes a token with gradient checkpointing


class SmallMemory:
    """A GPU's memory by arithmetic, in which the graphs of a trainer's passes are counted."""

    def __init__(self, trainer, size):
        self.trainer = trainer
        self.size = size
        self.tokens = 0  # whose graphs are held
        self.peak = 0
        self.passes = 0  # forward, with a graph
        trainer.model.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        backward = trainer.accelerator.backward

        def backward_and_free(loss):
            backward(loss)
            self.tokens = 0

        trainer.accelerator.backward = backward_and_free

    def before_forward(self, model, args, inputs):
        if not torch.is_grad_enabled():
            return
        self.passes += 1
        self.tokens += inputs["input_ids"].numel()
        taken = FIXED + self.tokens * (RECOMPUTED if self.trainer.recomputes else PER_TOKEN)
        if taken > self.size:
            self.tokens = 0
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.peak = max(self.peak, taken)

    def free(self):
        return self.size

    def peak_of(self, attempt):
        self.peak = 0
        attempt()
        return self.peak


@pytest.fixture
def small_memory(monkeypatch):
    """Return install(size): trainers rehearsed behind it have so many bytes; it lists them."""
    made = []

    def install(size):
        def make(trainer):
            made.append(SmallMemory(trainer, size))
            return made[-1]

        monkeypatch.setattr(rehearsal, "gpu_memory", make)
        return made

    return install


def rehearsed(prepared, stored=None):
    """Return the trainer of a run behind its rehearsal, and what that has settled."""
    trainer = prepared.trainer
    settled = rehearse(trainer, prepared.plan, prepared.row_tokens, prepared.seed, stored)
    randomise_adapters(trainer.model)
    return trainer, settled


@pytest.fixture
def sft_run(sft_argv):
    """Return make(flags, stored): a rehearsed trainer of steps of 16 rows, what was settled."""
    flags = ["--batch_size", 2, "--gradient_accumulation", 8, "--overwrite"]

    def make(*more, stored=None):
        return rehearsed(train_sft_lora.prepare(sft_argv(*flags, *more)), stored)

    return make


@pytest.fixture
def embed_run(embed_argv):
    """Return make(flags): a rehearsed trainer of steps of 16 rows, and what was settled."""
    flags = ["--batch_size", 2, "--gradient_accumulation", 8, "--overwrite"]
    return lambda *more: rehearsed(train_embed_lora.prepare(embed_argv(*flags, *more)))


def step_gradient(trainer):
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    return gradient(trainer, step)[1]


def test_pieces_of_sft_fill_the_budget(sft_run, small_memory, monkeypatch, capsys):
    monkeypatch.setitem(step.PIECE_TOKENS, "cpu", 10000)
    expected = step_gradient(sft_run()[0])
    made = small_memory(9000)
    trainer, settled = sft_run()
    # 70 % of 9000 bytes, of which 1000 are fixed, at 10 a token
    assert settled == {"gradient_checkpointing": "off", "piece_tokens": 530, "halvings": 0}
    assert re.search(r"free: 530 tokens at once \(\d+ at --batch_size\)", capsys.readouterr().out)
    memory = made[-1]
    before = memory.passes
    memory.peak = 0
    assert relative(step_gradient(trainer), expected) < 1e-5
    assert memory.passes - before < 8  # the pieces of --batch_size
    assert FIXED + PER_TOKEN * 400 < memory.peak <= FIXED + PER_TOKEN * 530


def test_a_forward_pass_of_sft_holds_no_more_than_the_device_is_fast_with(sft_run, small_memory):
    small_memory(9000)
    assert sft_run()[1]["piece_tokens"] == step.PIECE_TOKENS["cpu"] == 448


def test_graphs_of_an_embedding_step_are_kept_until_memory_is_full(embed_run, small_memory):
    plain, _ = embed_run()
    expected = step_gradient(plain)
    made = small_memory(10**6)
    trainer, settled = embed_run()
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    pieces, _ = trainer.cut_step(step)
    assert settled["piece_tokens"] > 448 and len(pieces) > 1  # the device's, in a forward pass
    before = made[-1].passes
    assert relative(step_gradient(trainer), expected) < 1e-5
    assert made[-1].passes - before == len(pieces)  # none a second time


def test_pieces_stay_as_they_are_where_that_is_asked_for(sft_run, embed_run, small_memory):
    small_memory(10**6)
    assert sft_run("--no-grow_pieces")[1]["piece_tokens"] is None
    assert embed_run("--no-grow_pieces")[1]["piece_tokens"] is None


def test_activations_are_recomputed_where_they_do_not_fit(sft_run, embed_run, small_memory):
    small_memory(2000)  # 40 tokens, in 70 %: no two rows
    _, settled = sft_run()
    assert settled == {"gradient_checkpointing": "on", "piece_tokens": 400, "halvings": 0}
    assert sft_run("--gradient_checkpointing", "on")[1] == settled
    # what was asked for stays; the rehearsal has made its pieces small enough
    _, settled = sft_run("--gradient_checkpointing", "off")
    assert settled["gradient_checkpointing"] == "off" and settled["piece_tokens"] is None


def test_a_grown_piece_that_does_not_fit_is_halved_before_the_first_step(
    sft_run, small_memory, monkeypatch, capsys
):
    small_memory(9000)
    monkeypatch.setattr(rehearsal, "tokens_that_fit", lambda *_: 1000)  # an estimate that is wrong
    monkeypatch.setitem(step.PIECE_TOKENS, "cpu", 10000)
    trainer, settled = sft_run()
    assert settled == {"gradient_checkpointing": "off", "piece_tokens": 1000, "halvings": 1}
    assert "pieces 1/2 the size" in capsys.readouterr().out


def test_memory_that_runs_out_first_recomputes_then_halves(sft_run, small_memory, capsys):
    expected = step_gradient(sft_run()[0])
    made = small_memory(9000)
    trainer, _ = sft_run()
    capsys.readouterr()
    made[-1].size = FIXED + 300  # somebody else has taken memory
    assert relative(step_gradient(trainer), expected) < 1e-5
    told = capsys.readouterr().out
    assert told.index("with gradient checkpointing") < told.index("pieces 1/2 the size")
    assert trainer.settled() == {
        "gradient_checkpointing": "on",
        "piece_tokens": 448,
        "halvings": 1,
    }


def test_an_evaluation_that_runs_out_does_not_slow_the_steps(sft_run, small_memory, monkeypatch):
    small_memory(9000)
    trainer, settled = sft_run()
    tries = []

    def fail_once():
        tries.append(1)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.evaluated(fail_once)
    assert len(tries) == 2 and trainer.settled() == settled


def test_a_resumed_run_takes_the_size_over(sft_argv, small_memory, tmp_path, capsys):
    flags = ["--batch_size", 2, "--gradient_accumulation", 4, "--max_steps", 4, "--save_steps", 2]
    flags += ["--eval_strategy", "no"]
    made = small_memory(9000)
    train_sft_lora.main(sft_argv(*flags))
    settled = read_json(tmp_path / "out/training_config.json")["settled"]
    assert settled["piece_tokens"] == 448 and settled["gradient_checkpointing"] == "off"
    last = read_json(tmp_path / "out/checkpoint-4/trainer_state.json")
    # as after an error of memory in step 4
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "out" / name)
    (tmp_path / "out/training_summary_report.json").unlink()
    path = tmp_path / "out/checkpoint-2/trainer_state.json"
    state = read_json(path)
    cut = state["stateful_callbacks"]["StepTrainer"]
    assert cut == {"gradient_checkpointing": "off", "piece_tokens": 448, "halvings": 0}
    cut |= {"piece_tokens": 300, "halvings": 1}
    write_json(path, state)
    capsys.readouterr()
    train_sft_lora.main(sft_argv(*flags, "--resume_from_checkpoint"))
    assert "GiB free" not in capsys.readouterr().out  # not measured anew
    resumed = read_json(tmp_path / "out/checkpoint-4/trainer_state.json")
    assert resumed["stateful_callbacks"]["StepTrainer"] == cut
    losses = [[e["loss"] for e in log["log_history"] if "loss" in e] for log in (last, resumed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert made[-1].peak <= FIXED + PER_TOKEN * 150


def test_a_resumed_run_halves_what_no_longer_fits_and_says_so(sft_run, small_memory, capsys):
    small_memory(3000)
    stored = {"gradient_checkpointing": "off", "piece_tokens": 448, "halvings": 0}
    _, settled = sft_run(stored=stored)
    assert settled == stored | {"halvings": 1}
    assert "pieces 1/2 the size" in capsys.readouterr().out


def test_a_model_that_cannot_recompute_is_told_where_it_was_asked_to(sft_argv, monkeypatch):
    for asked in ("auto", "on"):
        prepared = train_sft_lora.prepare(sft_argv("--gradient_checkpointing", asked))
        base = type(prepared.trainer.model.get_base_model())
        monkeypatch.setattr(base, "supports_gradient_checkpointing", False)
        if asked == "auto":
            assert rehearsed(prepared)[1]["gradient_checkpointing"] == "off"
        else:
            with pytest.raises(InputError, match="Qwen3ForCausalLM does not support gradient"):
                rehearsed(prepared)


def test_a_model_that_cannot_recompute_halves_at_once(sft_run, small_memory, monkeypatch, capsys):
    monkeypatch.setattr(Qwen3ForCausalLM, "supports_gradient_checkpointing", False)
    made = small_memory(9000)
    trainer, settled = sft_run()
    made[-1].size = FIXED + 2000
    tries = []
    run_step = trainer.run_step

    def counted(*args):
        tries.append(1)
        assert len(tries) < 9, "the same again and again"
        return run_step(*args)

    monkeypatch.setattr(trainer, "run_step", counted)
    assert step_gradient(trainer).isfinite().all()
    assert trainer.settled() == settled | {"halvings": len(tries) - 1}
    assert len(tries) > 1 and "with gradient checkpointing" not in capsys.readouterr().out


def test_what_is_asked_for_beats_what_was_settled(sft_run):
    stored = {"gradient_checkpointing": "off", "piece_tokens": 448, "halvings": 0}
    flags = ["--gradient_checkpointing", "on", "--no-grow_pieces"]
    _, settled = sft_run(*flags, stored=stored)
    assert settled == {"gradient_checkpointing": "on", "piece_tokens": None, "halvings": 0}


# ---------------------------------------------------------------- a GPU's memory, by its numbers


@pytest.fixture
def gpu_numbers(monkeypatch):
    """A GPU of 1000 bytes: 600 free, 250 reserved by this process, 150 of those in tensors."""
    numbers = {"memory_allocated": 150, "memory_reserved": 250, "max_memory_allocated": 420}
    numbers |= {"mem_get_info": (600, 1000), "get_per_process_memory_fraction": 1.0}
    numbers |= {"reset_peak_memory_stats": None}
    for name in numbers:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: numbers[name])
    return numbers


def test_free_memory_is_what_the_gpu_and_the_allocator_have_to_give(gpu_numbers):
    assert memory.GpuMemory("cuda:0").free() == 600 + 100
    gpu_numbers["get_per_process_memory_fraction"] = 0.5  # another program has asked for the rest
    assert memory.GpuMemory("cuda:0").free() == 500 - 150


def test_a_pass_is_charged_with_what_it_took_above_what_was_there(gpu_numbers):
    calls = []
    assert memory.GpuMemory("cuda:0").peak_of(lambda: calls.append(1)) == 420 - 150
    assert calls == [1]


def test_a_gpu_is_asked_for_its_memory():
    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cuda")))
    assert memory.gpu_memory(trainer).device == torch.device("cuda")
    trainer.args.device = torch.device("cpu")
    assert memory.gpu_memory(trainer) is None


def test_a_size_that_a_gpu_had_room_for_is_no_size_for_a_cpu(sft_run):
    stored = {"gradient_checkpointing": "off", "piece_tokens": 10**6, "halvings": 2}
    _, settled = sft_run(stored=stored)
    assert settled["piece_tokens"] is None and settled["halvings"] == 0
    stored = {"gradient_checkpointing": "off", "piece_tokens": None, "halvings": 2}
    assert sft_run(stored=stored)[1]["halvings"] == 2


def test_a_model_without_a_layer_that_can_recompute_does_without(sft_argv, monkeypatch):
    prepared = train_sft_lora.prepare(sft_argv())

    def refuse(*_, **__):
        raise ValueError("does not seem to support activation checkpointing")

    base = type(prepared.trainer.model.get_base_model())
    monkeypatch.setattr(base, "activation_checkpointing_enable", refuse)
    assert rehearsed(prepared)[1]["gradient_checkpointing"] == "off"

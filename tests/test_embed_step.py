"""A step's gradient is that of the uncut step, whatever it is cut into."""

import math
import re

import train_embed_lora
import utils
from conftest import gradient, gradients_of_two_processes, make_rows, relative, write_jsonl

import pytest
import torch
import torch.nn.functional as F


def naive_gradient(trainer, rows, temperature=0.05):
    """One padded forward pass of every text of the step, a loop over queries for the loss, one backward pass."""
    model, texts = trainer.model, trainer.data_collator.texts
    documents = list(
        dict.fromkeys(
            document for _, positive, negatives, _ in rows for document in (positive, *negatives)
        )
    )
    ids = [texts[row[0]] for row in rows] + [texts[i] for i, _ in documents]
    width = max(map(len, ids))
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    vectors = F.normalize((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    query_emb, doc_emb = vectors[: len(rows)], vectors[len(rows) :]
    losses = []
    for i, (_, positive, _, known) in enumerate(rows):
        kept = [
            j
            for j, document in enumerate(documents)
            if document == positive or document[1] not in known
        ]
        scores = (doc_emb[kept] @ query_emb[i]) / temperature
        losses.append(torch.logsumexp(scores, 0) - scores[kept.index(documents.index(positive))])
    loss = torch.stack(losses).mean()
    model.zero_grad()
    loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.fixture
def reference(embed_trainer):
    """Return a step of 32 rows with its naive loss and gradient."""
    trainer = embed_trainer("--max_negs", 2)
    rows = [trainer.train_dataset[i] for i in range(32)]
    return trainer, rows, *naive_gradient(trainer, rows)


@pytest.mark.parametrize("batch_size", [32, 8, 2, 1])
@pytest.mark.parametrize("piece_tokens", [100, 10000])
def test_gradient_does_not_depend_on_the_cut(reference, batch_size, piece_tokens):
    trainer, rows, loss, expected = reference
    trainer.batch_size, trainer.device_tokens = batch_size, piece_tokens
    step = trainer.data_collator(rows)
    pieces, tokens_at_once = trainer.cut_step(step)
    padded = sum(len(piece) * len(step["sequences"][piece[0]]) for piece in pieces)
    assert tokens_at_once == pytest.approx(
        padded * batch_size / 32
    )  # all for one plain pass, else gradient caching
    found_loss, found = gradient(trainer, step)
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert relative(found, expected) < 1e-4


def test_gradient_of_a_decoder_without_mask_equals_the_padded_one(embed_trainer, tiny_qwen):
    trainer = embed_trainer("--pooling", "last", "--append_eos", model=tiny_qwen)
    assert trainer.causal
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    trainer.batch_size = 16
    _, expected = gradient(trainer, step)
    trainer.causal, trainer.batch_size, trainer.device_tokens = (
        False,
        4,
        10000,
    )  # with a mask, in other pieces
    _, found = gradient(trainer, step)
    assert relative(found, expected) < 1e-4


def test_cached_gradient_replays_the_dropout_of_the_direct_one(embed_trainer):
    trainer = embed_trainer("--lora_dropout", 0.3)
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    trainer.batch_size = 4
    pieces, _ = trainer.cut_step(step)
    assert len(pieces) > 3
    gradients = []
    for tokens_at_once in (10**6, 1):
        torch.manual_seed(7)
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.run_step(trainer.model, step, pieces, tokens_at_once)
        gradients.append(
            torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
        )
    assert relative(*gradients) < 1e-5
    torch.manual_seed(8)
    trainer.model.zero_grad()
    trainer.run_step(trainer.model, step, pieces, 10**6)
    other = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    assert relative(other, gradients[0]) > 1e-2  # the dropout was there to be replayed


@pytest.mark.parametrize("slope, scale", [(1.0, 32768), (8.0, 4096), (60000.0, 1), (70000.0, None)])
def test_the_loss_scale_falls_until_half_precision_gradients_are_finite(slope, scale):
    weight = torch.ones(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu")

    def attempt():  # the gradient of weight, slope x scale, passes through float16, which ends at 65504
        scaler.scale((weight.half().float() * slope).sum()).backward()

    assert scaler.get_scale() == 65536
    assert utils.finite_gradients(attempt, [weight], scaler) == (scale is not None)
    if scale:
        assert scaler.get_scale() == scale and weight.grad.tolist() == [slope * scale] * 3


def test_without_a_loss_scaler_a_gradient_is_finite_or_not():
    weight = torch.ones(2, requires_grad=True)
    assert utils.finite_gradients(lambda: weight.sum().backward(), [weight], None)
    assert not utils.finite_gradients(lambda: (weight * math.inf).sum().backward(), [weight], None)


def test_training_begins_at_the_scale_of_the_rehearsal(run_embed, tmp_path, monkeypatch, capsys):
    rehearse, scales = utils.preflight, []

    def rehearse_scaled(args, trainer, *rest):
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.register_hook(lambda grad: grad.half().float())  # infinite from 65520 on
        rehearse(args, trainer, *rest)
        scales.append(trainer.accelerator.scaler.get_scale())

    monkeypatch.setattr(utils, "preflight", rehearse_scaled)
    data = write_jsonl(
        tmp_path / "eight.jsonl", make_rows(8)
    )  # one step, all of which is rehearsed
    run_embed(
        "--max_steps",
        1,
        "--batch_size",
        8,
        "--eval_strategy",
        "no",
        "--max_grad_norm",
        0,
        data=data,
    )
    assert 1 < scales[0] < 2.0**40
    assert f"finite gradients at a loss scale of {scales[0]:g}" in capsys.readouterr().out
    assert (
        torch.load(tmp_path / "out/checkpoint-1/scaler.pt")["scale"] == scales[0]
    )  # no step was skipped


@pytest.mark.parametrize("batch_size", [32, 4])
def test_gradient_is_the_same_after_running_out_of_memory_in_a_backward_pass(
    reference, batch_size, monkeypatch, capsys
):
    trainer, rows, _, expected = reference
    trainer.batch_size = batch_size
    backward, calls = trainer.accelerator.backward, []

    def fail_twice(loss):
        backward(loss)
        calls.append(loss)
        if len(calls) in (1, 3):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(trainer.accelerator, "backward", fail_twice)
    _, found = gradient(trainer, trainer.data_collator(rows))
    assert trainer.halvings == 2
    assert relative(found, expected) < 1e-4
    assert "pieces 1/4 the size" in capsys.readouterr().out


def test_an_evaluation_remembers_what_did_not_fit_the_one_before(
    embed_trainer, monkeypatch, capsys
):
    trainer = embed_trainer("--batch_size", 8)
    texts = [trainer.data_collator.texts[i] for i in range(40)]
    expected, encode = trainer.embed(texts), trainer.encode

    def small_memory(model, step, piece):
        if len(piece) * len(step["sequences"][piece[0]]) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(model, step, piece)

    monkeypatch.setattr(trainer, "encode", small_memory)
    for _ in range(3):
        assert relative(trainer.embed(texts), expected) < 1e-5
    sizes = re.findall(r"ran out.* pieces (\S+) the size", capsys.readouterr().out)
    assert sizes and len(sizes) == len(set(sizes))  # each is said once
    assert trainer.halvings == 0


def test_memory_that_never_suffices_ends_in_a_message(reference, monkeypatch):
    trainer, rows, _, _ = reference

    def fail(loss):
        raise RuntimeError(
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
        )

    monkeypatch.setattr(trainer.accelerator, "backward", fail)
    with pytest.raises(utils.InputError, match="out of memory: lower --max_length"):
        gradient(trainer, trainer.data_collator(rows))


def test_other_runtime_errors_are_not_taken_for_lack_of_memory(reference, monkeypatch):
    trainer, rows, _, _ = reference
    monkeypatch.setattr(
        trainer, "run_step", lambda *_: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    )
    with pytest.raises(RuntimeError, match="shape mismatch"):
        gradient(trainer, trainer.data_collator(rows))


def test_a_step_that_no_data_loader_made_is_moved_to_the_device(reference, monkeypatch):
    trainer, rows, _, _ = reference  # as in the rehearsal
    step, moved = trainer.data_collator(rows), []
    monkeypatch.setattr(trainer, "_prepare_input", lambda value: moved.append(value) or value)
    gradient(trainer, step)
    assert moved == [step]


def test_a_loss_that_is_not_finite_stops_the_run(reference):
    trainer, rows, _, _ = reference
    next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(float("nan"))
    with pytest.raises(utils.InputError, match="the loss is nan"):
        gradient(trainer, trainer.data_collator(rows))


@pytest.mark.parametrize("cross_device, batch_size", [(True, 4), (True, 16), (False, 4)])
def test_two_processes_give_the_gradient_of_one(
    reference, tmp_path, tiny_bert, pairs, cross_device, batch_size
):
    trainer, rows, _, expected = reference
    if not cross_device:  # each process contrasts its own half
        halves = [naive_gradient(trainer, half)[1] for half in (rows[:16], rows[16:])]
        expected = (halves[0] + halves[1]) / 2
    flags = (
        f"--model_name {tiny_bert} --train_file {pairs} --max_negs 2 --batch_size {batch_size} --report_to none "
        f"--gradient_accumulation {16 // batch_size} --{'' if cross_device else 'no-'}negatives_cross_device"
    )
    for found in gradients_of_two_processes(tmp_path, "train_embed_lora", flags, 0, 16, 0):
        assert relative(found, expected) < 1e-4


def test_cut_sorts_and_respects_the_budget():
    lengths = [5, 50, 7, 6, 49, 200]
    pieces = utils.cut(lengths, 100)
    assert pieces == [[5], [1, 4], [2, 3, 0]]


def test_positives_and_negatives_depend_on_seed_epoch_and_row_alone(tmp_path):
    examples = [
        train_embed_lora.Example(f"q{i}", [f"p{i}a", f"p{i}b"], [f"n{i}{j}" for j in range(5)])
        for i in range(20)
    ]
    flags = ["--train_file", "x", "--max_negs", "2"]

    def draws(seed, epoch):
        args = train_embed_lora.parse_args([*flags, "--seed", str(seed)])
        args.query_prefix = args.doc_prefix = ""
        train_set = train_embed_lora.TrainSet(examples, train_embed_lora.Texts(), args)
        train_set.epoch = epoch
        return [train_set[i][1:3] for i in reversed(range(20))]

    assert draws(1, 0) == draws(1, 0)
    assert draws(1, 0) != draws(1, 1)
    assert draws(1, 0) != draws(2, 0)
    assert all(len(set(negatives)) == 2 for _, negatives in draws(1, 0))

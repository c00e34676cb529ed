"""A step's gradient is that of the uncut step, whatever it is cut into."""

from conftest import gradient, gradients_of_two_processes, relative
from parts.pairs import Example
from parts.texts import TextRules, Texts
from train_embed_lora import TrainSet

import pytest
import torch
import torch.nn.functional as F


def naive_gradient(trainer, rows, temperature=0.05, ratio=None, in_batch=True, distill=None):
    """One padded forward pass of a step's texts, a loop over queries for the loss, one backward.

    ratio: other rows' documents above p + |p| (ratio - 1) are left out. distill: weight of the KL
    divergence, and the teacher's temperature.
    """
    model, texts = trainer.model, trainer.data_collator.texts
    documents = list(dict.fromkeys(document for row in rows for document in row.documents))
    ids = [texts[row.query] for row in rows] + [texts[i] for i, _ in documents]
    width = max(map(len, ids))
    input_ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    hidden = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
    vectors = F.normalize((hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    query_emb, doc_emb = vectors[: len(rows)], vectors[len(rows) :]
    losses = []
    divergences = []
    for i, row in enumerate(rows):
        positive = row.documents[0]
        cosines = doc_emb @ query_emb[i]
        p = cosines[documents.index(positive)]
        limit = 2 if ratio is None else p + p.abs() * (ratio - 1)
        kept = [
            j
            for j, document in enumerate(documents)
            if (document == positive or document[1] not in row.known)
            and (document[1] in row.spared or cosines[j] <= limit)
            and (document in row.documents or in_batch)
        ]
        scores = (doc_emb[kept] @ query_emb[i]) / temperature
        losses.append(torch.logsumexp(scores, 0) - scores[kept.index(documents.index(positive))])
        scored = [
            (score, cosines[documents.index(document)])
            for score, document in zip(row.scores, row.documents, strict=True)
            if score == score
        ]
        if distill and len(scored) > 1:
            wanted = torch.tensor([score / distill[1] for score, _ in scored]).softmax(0)
            given = torch.stack([cosine / temperature for _, cosine in scored]).softmax(0)
            divergences.append((wanted * (wanted / given).log()).sum())
    loss = torch.stack(losses).mean()
    if divergences:
        loss = loss + distill[0] * torch.stack(divergences).mean()
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
    # all for one plain pass, else gradient caching
    assert tokens_at_once == pytest.approx(padded * batch_size / 32)
    found_loss, found = gradient(trainer, step)
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-5)
    assert relative(found, expected) < 1e-4


def test_gradient_of_a_decoder_without_mask_equals_the_padded_one(embed_trainer, tiny_qwen):
    trainer = embed_trainer("--pooling", "last", "--append_eos", model=tiny_qwen)
    assert trainer.causal
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    trainer.batch_size = 16
    _, expected = gradient(trainer, step)
    trainer.causal = False  # with a mask, in other pieces
    trainer.batch_size, trainer.device_tokens = 4, 10000
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


@pytest.mark.parametrize("cross_device, batch_size", [(True, 4), (True, 16), (False, 4)])
def test_two_processes_give_the_gradient_of_one(
    reference, tmp_path, tiny_bert, pairs, cross_device, batch_size
):
    trainer, rows, _, expected = reference
    if not cross_device:  # each process contrasts its own half
        halves = [naive_gradient(trainer, half)[1] for half in (rows[:16], rows[16:])]
        expected = (halves[0] + halves[1]) / 2
    switch = "--negatives_cross_device" if cross_device else "--no-negatives_cross_device"
    flags = (
        f"--model_name {tiny_bert} --train_file {pairs} --max_negs 2 --report_to none "
        f"--batch_size {batch_size} --gradient_accumulation {16 // batch_size} {switch}"
    )
    for found in gradients_of_two_processes(tmp_path, "train_embed_lora", flags, 0, 16, 0):
        assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("narrow_first", [True, False])
def test_margin_spares_own_negatives_in_two_processes(
    embed_trainer, tmp_path, tiny_bert, pairs, narrow_first
):
    trainer = embed_trainer("--max_negs", 2, "--false_negative_margin", "0.95x")
    train_set = trainer.train_dataset
    widths = [len(train_set[i].documents) - 1 for i in range(len(train_set))]
    wanted = [0, 0, 2, 2] if narrow_first else [2, 2, 0, 0]  # rows of one process show less
    first = next(i for i in range(len(widths)) if widths[i : i + 4] == wanted)
    rows = [train_set[i] for i in range(first, first + 4)]
    _, expected = naive_gradient(trainer, rows, ratio=0.95)
    _, unmasked = naive_gradient(trainer, rows)
    assert relative(expected, unmasked) > 1e-2
    _, found = gradient(trainer, trainer.data_collator(rows))
    assert relative(found, expected) < 1e-4
    flags = (
        f"--model_name {tiny_bert} --train_file {pairs} --max_negs 2 --report_to none "
        "--batch_size 2 --gradient_accumulation 1 --false_negative_margin 0.95x"
    )
    for found in gradients_of_two_processes(tmp_path, "train_embed_lora", flags, first, 2, 0):
        assert relative(found, expected) < 1e-4


def test_positives_and_negatives_depend_on_seed_epoch_and_row_alone():
    examples = [
        Example(f"q{i}", [f"p{i}a", f"p{i}b"], [f"n{i}{j}" for j in range(5)]) for i in range(20)
    ]
    rules = TextRules(query_prefix="", doc_prefix="", query_max_len=512, passage_max_len=512)

    def draws(seed, epoch):
        train_set = TrainSet(examples, Texts(), rules, max_negs=2, seed=seed)
        train_set.epoch = epoch
        return [train_set[i].documents for i in reversed(range(20))]

    assert draws(1, 0) == draws(1, 0)
    assert draws(1, 0) != draws(1, 1)
    assert draws(1, 0) != draws(2, 0)
    assert all(len(set(documents)) == 3 for documents in draws(1, 0))


def test_rows_of_one_query_share_what_is_known_of_it():
    examples = [Example("Who?", [f"p{i}"], []) for i in range(3)] + [Example("other", ["p0"], [])]
    rules = TextRules(query_prefix="", doc_prefix="", query_max_len=512, passage_max_len=512)
    rows = TrainSet(examples, Texts(), rules, max_negs=0, seed=1).rows
    assert len(rows[0].listed) == 3 and len(rows[0].known) == 4
    assert rows[2].listed is rows[0].listed and rows[2].known is rows[0].known
    assert len(rows[3].known) == 2

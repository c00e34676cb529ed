"""Loss, masks and pooling of the embedding trainer against hand-worked numbers."""

import math
from functools import partial

import train_embed_lora
from conftest import relative
from parts.rows import text_id
from train_embed_lora import LossInBlocks, contrastive_loss, excluded_columns, first_places, pool

import pytest
import torch
import torch.nn.functional as F


def test_loss_equals_a_hand_worked_number():
    query_emb = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    doc_emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    target, excluded = (
        torch.tensor([0, 1]),
        torch.tensor([[False, False, False], [False, False, True]]),
    )
    # query 0: cosines 1, 0.6, 0; query 1: 0, 0.8, the third excluded; temperature 0.5
    first = math.log(math.exp(2) + math.exp(1.2) + 1) - 2
    second = math.log(1 + math.exp(1.6)) - 1.6
    assert contrastive_loss(query_emb, doc_emb, target, excluded, 0.5).item() == pytest.approx(
        (first + second) / 2
    )
    # a margin of 0.1 leaves nothing above query 1's positive (0.8); one of -1 leaves query 0 its positive alone
    loss = contrastive_loss(query_emb, doc_emb, target, excluded, 0.5, margin=0.1)
    assert loss.item() == pytest.approx((first + second) / 2)
    target = torch.tensor(
        [1, 1]
    )  # query 0: document 0 at 1.0 exceeds the positive's 0.6 by more than 0.3
    loss = contrastive_loss(query_emb, doc_emb, target, excluded, 0.5, margin=0.3)
    assert loss.item() == pytest.approx((math.log(math.exp(1.2) + 1) - 1.2 + second) / 2)


def test_matryoshka_loss_is_the_mean_over_the_prefixes():
    torch.manual_seed(0)
    query_emb, doc_emb = (
        F.normalize(torch.randn(4, 8), dim=1),
        F.normalize(torch.randn(6, 8), dim=1),
    )
    target, excluded = torch.arange(4), torch.zeros(4, 6, dtype=torch.bool)
    each = []
    for dim in (8, 3):
        cosines = F.cosine_similarity(query_emb[:, None, :dim], doc_emb[None, :, :dim], dim=2)
        each.append(F.cross_entropy(cosines / 0.05, target))
    for dims in ([8, 3], [3], [3, 3]):  # the full size is one of them, named or not
        loss = contrastive_loss(query_emb, doc_emb, target, excluded, 0.05, dims=dims)
        assert loss.item() == pytest.approx(sum(each).item() / 2, rel=1e-5)


def random_step(queries, documents, dimension=48):
    """Return the arguments of a loss in blocks: vectors, ids, targets, known ones with a sibling."""
    generator = torch.Generator().manual_seed(queries)
    vectors = [
        F.normalize(torch.randn(count, dimension, generator=generator), dim=1).requires_grad_()
        for count in (queries, documents)
    ]
    document_ids = torch.randperm(documents, generator=generator) + 1
    target = torch.randint(documents, (queries,), generator=generator)
    sibling = document_ids[torch.randint(documents, (queries,), generator=generator)]
    known = torch.stack([document_ids[target], sibling, torch.zeros_like(sibling)], 1)
    return *vectors, document_ids, target, known


def loss_and_gradient(loss, query_emb, doc_emb):
    found = torch.autograd.grad(loss, [query_emb, doc_emb])
    return loss.detach(), torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("scores_at_once", [1, 37, 3 * 90, 7 * 90, 32 * 90, 33 * 90, 2**20])
@pytest.mark.parametrize("settings", [{}, {"margin": 0.05}, {"dims": [8, 16]}])
def test_loss_in_blocks_is_the_plain_one(scores_at_once, settings, monkeypatch):
    monkeypatch.setattr(train_embed_lora, "SCORES_AT_ONCE", scores_at_once)
    query_emb, doc_emb, document_ids, target, known = random_step(33, 90)
    excluded = excluded_columns(document_ids, target, known)
    assert excluded.any()
    plain = contrastive_loss(query_emb, doc_emb, target, excluded, 0.05, **settings)
    loss, expected = loss_and_gradient(plain, query_emb, doc_emb)
    blocks = []

    def loss_of_block(queries, *rest):
        blocks.append(len(queries))
        return contrastive_loss(queries, *rest, temperature=0.05, **settings)

    whole = LossInBlocks.apply(query_emb, doc_emb, document_ids, target, known, loss_of_block)
    assert sum(blocks) == 33 and max(blocks) == min(33, max(1, scores_at_once // 90))
    found_loss, found = loss_and_gradient(3 * whole, query_emb, doc_emb)
    assert found_loss.item() == pytest.approx(3 * loss.item(), rel=1e-6)
    assert relative(found, 3 * expected) < 1e-6


def test_loss_in_blocks_equals_a_hand_worked_number(monkeypatch):
    monkeypatch.setattr(train_embed_lora, "SCORES_AT_ONCE", 3)  # a block has one query
    query_emb = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    doc_emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    # query 0: cosines 1, 0.6, 0; query 1: 0, 0.8, the third is known to be no negative of it
    known = torch.tensor([[5, 0], [6, 7]])
    loss = partial(contrastive_loss, temperature=0.5)
    found = LossInBlocks.apply(
        query_emb, doc_emb, torch.tensor([5, 6, 7]), torch.tensor([0, 1]), known, loss
    )
    first = math.log(math.exp(2) + math.exp(1.2) + 1) - 2
    second = math.log(1 + math.exp(1.6)) - 1.6
    assert found.item() == pytest.approx((first + second) / 2)


def test_a_text_that_several_processes_have_is_one_document():
    first, column = first_places(torch.tensor([7, 3, 7, 9, 3, 3]))
    assert first[column].tolist() == [0, 1, 0, 3, 1, 1]
    assert len(first) == 3


def test_matryoshka_leaves_no_part_of_the_vector_without_gradient(embed_trainer):
    trainer = embed_trainer("--matryoshka_dims", 8, 16, "--dev_size", 0)
    step = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    vectors = F.normalize(torch.randn(len(step["sequences"]), 64), dim=1).requires_grad_()
    trainer.loss(vectors, step).backward()
    assert (vectors.grad.abs().amax(0) > 0).all()


def test_mask_spares_the_target_and_covers_siblings_and_the_query_itself():
    a, b, c, query = (text_id(text) for text in ("A text", "another", "third", "the query"))
    ids = torch.tensor(
        [a, b, c, query, text_id("a  TEXT")]
    )  # the last is the first in other case and spacing
    mask = excluded_columns(ids, torch.tensor([0, 2]), torch.tensor([[a, b, query], [c, query, 0]]))
    assert mask.tolist() == [[False, True, False, True, True], [False, False, False, True, False]]


def test_pooling_counts_real_tokens_only():
    hidden = torch.tensor(
        [[[1.0, 0.0], [0.0, 3.0], [9.0, 9.0]], [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]]]
    )
    lengths = torch.tensor([2, 3])
    assert torch.allclose(pool(hidden, lengths, "cls"), torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    assert torch.allclose(pool(hidden, lengths, "last"), torch.tensor([[0.0, 1.0], [0.6, 0.8]]))
    assert torch.allclose(
        pool(hidden, lengths, "mean"), F.normalize(torch.tensor([[0.5, 1.5], [2.0, 8 / 3]]), dim=1)
    )
    assert pool(hidden.half(), lengths, "mean").dtype == torch.float32

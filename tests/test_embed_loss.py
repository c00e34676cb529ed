"""Loss, masks and pooling of the embedding trainer against hand-worked numbers."""

import math

from parts.rows import text_id
from train_embed_lora import contrastive_loss, excluded_columns, pool

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

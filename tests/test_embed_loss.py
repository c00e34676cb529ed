"""Loss, masks and pooling of the embedding trainer against hand-worked numbers."""

import math
from functools import partial

import train_embed_lora
from conftest import relative
from parts import flags
from parts.rows import text_id
from train_embed_lora import (
    Collator,
    LossInBlocks,
    contrastive_loss,
    excluded_columns,
    first_places,
    margin_of,
    pool,
    text_indices,
)

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
    assert contrastive_loss(
        query_emb, doc_emb, target[:, None], excluded, 0.5
    ).item() == pytest.approx((first + second) / 2)
    # a margin of 0.1 leaves nothing above query 1's positive (0.8); one of -1 leaves query 0 its positive alone
    loss = contrastive_loss(query_emb, doc_emb, target[:, None], excluded, 0.5, margin=(0.1, 0))
    assert loss.item() == pytest.approx((first + second) / 2)
    target = torch.tensor(
        [1, 1]
    )  # query 0: document 0 at 1.0 exceeds the positive's 0.6 by more than 0.3
    loss = contrastive_loss(query_emb, doc_emb, target[:, None], excluded, 0.5, margin=(0.3, 0))
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
        loss = contrastive_loss(query_emb, doc_emb, target[:, None], excluded, 0.05, dims=dims)
        assert loss.item() == pytest.approx(sum(each).item() / 2, rel=1e-5)


def random_step(queries, documents, dimension=48):
    """Return the arguments of a loss in blocks: vectors, ids, own columns, known ones and a sibling."""
    generator = torch.Generator().manual_seed(queries)
    vectors = [
        F.normalize(torch.randn(count, dimension, generator=generator), dim=1).requires_grad_()
        for count in (queries, documents)
    ]
    document_ids = torch.randperm(documents, generator=generator) + 1
    own = torch.randint(documents, (queries, 4), generator=generator)
    target = own[:, 0]
    sibling = document_ids[torch.randint(documents, (queries,), generator=generator)]
    known = torch.stack([document_ids[target], sibling, torch.zeros_like(sibling)], 1)
    return *vectors, document_ids, own, known


def loss_and_gradient(loss, query_emb, doc_emb):
    found = torch.autograd.grad(loss, [query_emb, doc_emb])
    return loss.detach(), torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("scores_at_once", [1, 37, 3 * 90, 7 * 90, 32 * 90, 33 * 90, 2**20])
@pytest.mark.parametrize("settings", [{}, {"margin": (0.05, 0)}, {"dims": [8, 16]}])
def test_loss_in_blocks_is_the_plain_one(scores_at_once, settings, monkeypatch):
    monkeypatch.setattr(train_embed_lora, "SCORES_AT_ONCE", scores_at_once)
    query_emb, doc_emb, document_ids, own, known = random_step(33, 90)
    excluded = excluded_columns(document_ids, own[:, 0], known)
    assert excluded.any()
    plain = contrastive_loss(query_emb, doc_emb, own, excluded, 0.05, **settings)
    loss, expected = loss_and_gradient(plain, query_emb, doc_emb)
    blocks = []

    def loss_of_block(queries, *rest):
        blocks.append(len(queries))
        return contrastive_loss(queries, *rest, temperature=0.05, **settings)

    whole = LossInBlocks.apply(query_emb, doc_emb, document_ids, own, known, loss_of_block)
    assert sum(blocks) == 33 and max(blocks) == min(33, max(1, scores_at_once // 90))
    found_loss, found = loss_and_gradient(3 * whole, query_emb, doc_emb)
    assert found_loss.item() == pytest.approx(3 * loss.item(), rel=1e-6)
    assert relative(found, 3 * expected) < 1e-6


# (text index, hash) of documents; query 0's negatives are the positives of 1 and 2, and 13's text in
# other spelling is a document of its own
DOCUMENTS = [(10 + i, 100 + i) for i in range(9)] + [(19, 103)]
ROWS = [
    (0, DOCUMENTS[0], [DOCUMENTS[1], DOCUMENTS[2]], [90, 100]),
    (1, DOCUMENTS[1], [DOCUMENTS[3]], [91, 101]),
    (2, DOCUMENTS[2], [], [92, 102, 108]),  # 108 is right for it, too
    (3, DOCUMENTS[4], [DOCUMENTS[5], DOCUMENTS[3], DOCUMENTS[6]], [93, 104]),
    (4, DOCUMENTS[7], [DOCUMENTS[8]], [94, 107]),
    (5, DOCUMENTS[8], [DOCUMENTS[9]], [95, 108]),
]


def naive_margin_loss(query_emb, doc_emb, documents, limit):
    """Return the loss of ROWS by a loop, and how many documents it masked and spared."""
    losses, masked, spared = [], 0, 0
    # as the loss does: without it the vectors' gradient would have a part along them
    query_emb, doc_emb = F.normalize(query_emb, dim=1), F.normalize(doc_emb, dim=1)
    for query, (_, positive, negatives, known) in zip(query_emb, ROWS, strict=True):
        p = query @ doc_emb[documents.index(positive)]
        logits = [p]
        for document, vector in zip(documents, doc_emb, strict=True):
            score = query @ vector
            if document == positive or document[1] in known:
                continue
            if score <= limit(p) or document in negatives:
                logits.append(score)
                spared += bool(score > limit(p))
            else:
                masked += 1
        losses.append(torch.logsumexp(torch.stack(logits) / 0.05, 0) - p / 0.05)
    return torch.stack(losses).mean(), masked, spared


@pytest.mark.parametrize("scores_at_once", [1, 20, 2**20])
@pytest.mark.parametrize("asked", ["0.05", "0", "2", "1.05x", "1.5x", "0.9x", "1x"])
def test_margin_masks_other_rows_documents_alone(asked, scores_at_once, monkeypatch):
    monkeypatch.setattr(train_embed_lora, "SCORES_AT_ONCE", scores_at_once)
    texts = {i: [i] for row in ROWS for i in text_indices(row)}
    step = Collator(texts)(ROWS)
    documents = list(
        zip(step["texts"].tolist(), (step["document_ids"]).tolist(), strict=True)
    )  # in the order of columns
    torch.manual_seed(3)
    query_emb = F.normalize(torch.randn(6, 8), dim=1).requires_grad_()
    doc_emb = F.normalize(torch.randn(len(documents), 8), dim=1).requires_grad_()

    def limit(p):
        return p + abs(p) * (float(asked[:-1]) - 1) if "x" in asked else p + float(asked)

    naive, masked, spared = naive_margin_loss(query_emb, doc_emb, documents, limit)
    assert (masked > 3 and spared > 2) or asked == "2"
    loss, expected = loss_and_gradient(naive, query_emb, doc_emb)
    settings = {"temperature": 0.05, "margin": margin_of(flags.margin(asked))}
    columns = step["document_ids"], step["own"], step["known"]
    found = LossInBlocks.apply(query_emb, doc_emb, *columns, partial(contrastive_loss, **settings))
    found_loss, found = loss_and_gradient(found, query_emb, doc_emb)
    assert found_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert relative(found, expected) < 1e-5


def test_own_columns_are_a_rows_documents_and_its_positive_again():
    step = Collator({i: [i] for row in ROWS for i in text_indices(row)})(ROWS)
    indices = step["texts"][step["own"]].tolist()
    assert indices == [
        [10, 11, 12, 10],
        [11, 13, 11, 11],
        [12, 12, 12, 12],
        [14, 15, 13, 16],
        [17, 18, 17, 17],
        [18, 19, 18, 18],
    ]


def test_a_margin_that_hides_what_is_still_wrong_is_noted(capsys):
    for asked in ("0.95x", "1x", "0"):
        margin_of(flags.margin(asked))
        said = capsys.readouterr().out
        assert "hides what ranks above a positive: the queries that are still wrong" in said
    for asked in ("1.05x", "0.05"):
        margin_of(flags.margin(asked))
    assert margin_of(None) is None
    assert capsys.readouterr().out == ""


def test_loss_in_blocks_equals_a_hand_worked_number(monkeypatch):
    monkeypatch.setattr(train_embed_lora, "SCORES_AT_ONCE", 3)  # a block has one query
    query_emb = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    doc_emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    # query 0: cosines 1, 0.6, 0; query 1: 0, 0.8, the third is known to be no negative of it
    known = torch.tensor([[5, 0], [6, 7]])
    loss = partial(contrastive_loss, temperature=0.5)
    found = LossInBlocks.apply(
        query_emb, doc_emb, torch.tensor([5, 6, 7]), torch.tensor([[0], [1]]), known, loss
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

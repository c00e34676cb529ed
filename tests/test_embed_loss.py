"""Loss, masks and pooling of the embedding trainer against hand-worked numbers."""

import math

import train_embed_lora
from conftest import relative
from parts.flag_types import margin
from parts.relevance import LARGEST, is_score
from parts.rows import text_id
from train_embed_lora import (
    Collator,
    LossInBlocks,
    LossRules,
    Shown,
    contrastive_losses,
    distillation_losses,
    excluded_columns,
    first_places,
    losses_of_queries,
    margin_of,
    pool,
    text_indices,
)

import pytest
import torch
import torch.nn.functional as F

NO_TEACHER = torch.full((2, 1), math.nan)


def test_loss_equals_a_hand_worked_number():
    scores = torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, 1.0]])
    excluded = torch.tensor([[False, False, False], [False, False, True]])
    found = contrastive_losses(scores, torch.tensor([0, 1]), excluded, 0.5)
    first = math.log(math.exp(2) + math.exp(1.2) + 1) - 2
    second = math.log(1 + math.exp(1.6)) - 1.6
    assert found.tolist() == pytest.approx([first, second])


@pytest.mark.parametrize("margin, kept", [(None, True), ((0.1, 0), False), ((0.5, 0), True)])
def test_a_margin_leaves_out_what_is_above_the_positive(margin, kept):
    query_emb = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    doc_emb = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    # query 0's positive is document 1 at 0.6, below document 0 at 1.0
    own = torch.tensor([[1], [1]])
    columns = [own, torch.tensor([[6], [6]]), torch.tensor([[6], [6]]), NO_TEACHER]
    found, _ = losses_of_queries(
        query_emb, doc_emb, *columns, torch.tensor([5, 6, 7]), LossRules(0.5, margin)
    )
    others = [1, math.exp(1.2), math.exp(2) if kept else 0]
    assert found[0].item() == pytest.approx(math.log(sum(others)) - 1.2)


def test_kl_equals_a_hand_worked_number_and_is_zero_for_equal_orders():
    scores = torch.tensor([[0.8, 0.5, 0.2], [0.1, 0.1, 0.1], [0.9, 0.3, 0.0], [0.9, 0.3, 0.0]])
    nan = math.nan
    teacher = torch.tensor([[2.0, 4.0, nan], [7.0, 7.0, 7.0], [nan, 3.0, nan], [nan, nan, nan]])
    scores.requires_grad_()
    found = distillation_losses(scores, teacher, temperature=0.1, teacher_temperature=2)
    t = 1 / (1 + math.exp(1))  # the teacher's share of the first of two: scores 1 and 2
    s = 1 / (1 + math.exp(-3))  # the student's: 8 and 5
    kl = t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))
    assert found.tolist() == pytest.approx([kl, 0, 0, 0], abs=1e-6)
    found.sum().backward()
    # of KL: student minus teacher, over the temperature; nothing for who has no order
    first = (s - t) / 0.1
    expected = torch.tensor([[first, -first, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert torch.allclose(scores.grad, expected, atol=1e-5)


def test_the_largest_scores_at_the_smallest_temperature_are_a_label():
    scores = torch.tensor([[0.5, 0.4, 0.3]]).repeat(3, 1).requires_grad_()
    largest = 0.99 * LARGEST
    assert is_score(largest) and not is_score(LARGEST)
    teacher = torch.tensor(
        [[largest, -largest, math.nan], [-largest, largest, 0], [7, 7, math.nan]]
    )
    found = distillation_losses(scores, teacher, temperature=1, teacher_temperature=1e-6)
    of_two = math.log(1 + math.exp(-0.1))  # -log of the share of the first, ahead by 0.1
    of_three = math.log(math.exp(0.1) + 1 + math.exp(-0.1))
    even = math.log(1 + math.exp(0.1)) - 0.1 / 2 - math.log(2)
    assert found.tolist() == pytest.approx([of_two, of_three, even], abs=1e-5)
    found.sum().backward()
    assert scores.grad.isfinite().all()


def test_matryoshka_loss_is_the_mean_over_the_prefixes():
    torch.manual_seed(0)
    query_emb, doc_emb = (
        F.normalize(torch.randn(4, 8), dim=1),
        F.normalize(torch.randn(6, 8), dim=1),
    )
    target, ids = torch.arange(4), torch.arange(1, 7)
    each = []
    for dim in (8, 3):
        cosines = F.cosine_similarity(query_emb[:, None, :dim], doc_emb[None, :, :dim], dim=2)
        each.append(F.cross_entropy(cosines / 0.05, target))
    for dims in ([8, 3], [3], [3, 3]):  # the full size is one of them, named or not
        columns = [target[:, None], ids[:4, None], ids[:4, None], NO_TEACHER[:1].expand(4, 1)]
        found, _ = losses_of_queries(query_emb, doc_emb, *columns, ids, LossRules(0.05, dims=dims))
        assert found.mean().item() == pytest.approx(sum(each).item() / 2, rel=1e-5)


def random_step(queries, documents, dimension=48):
    """Return the arguments of a loss in blocks: two vectors, document ids, columns of queries."""
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
    teacher = torch.randn(queries, 4, generator=generator)
    teacher[::3, 2:] = math.nan
    return *vectors, document_ids, [own, known, document_ids[own], teacher]


def loss_and_gradient(loss, query_emb, doc_emb):
    found = torch.autograd.grad(loss, [query_emb, doc_emb])
    return loss.detach(), torch.cat([each.flatten() for each in found])


@pytest.mark.parametrize("scores_at_once", [1, 37, 3 * 90, 7 * 90, 32 * 90, 33 * 90, 2**20])
@pytest.mark.parametrize(
    "settings",
    [{}, {"margin": (0.05, 0)}, {"dims": [8, 16]}, {"in_batch": False}, {"distill_weight": 2}],
)
def test_loss_in_blocks_is_the_plain_one(scores_at_once, settings, monkeypatch):
    monkeypatch.setattr(train_embed_lora, "SCORES_AT_ONCE", scores_at_once)
    query_emb, doc_emb, document_ids, columns = random_step(33, 90)
    assert excluded_columns(document_ids, *columns[:2]).any()
    rules = LossRules(0.05, **settings)
    losses = losses_of_queries(query_emb, doc_emb, *columns, document_ids, rules)
    assert (losses[1] > 0).all() == ("distill_weight" in settings)
    plain = sum(of_each.sum() for of_each in losses)
    loss, expected = loss_and_gradient(plain, query_emb, doc_emb)
    blocks = []

    def loss_of_block(queries, *rest):
        blocks.append(len(queries))
        losses = losses_of_queries(queries, *rest, document_ids, rules)
        return sum(of_each.sum() for of_each in losses)

    whole = LossInBlocks.apply(query_emb, doc_emb, loss_of_block, *columns)
    assert sum(blocks) == 33 and max(blocks) == min(33, max(1, scores_at_once // 90))
    found_loss, found = loss_and_gradient(3 * whole, query_emb, doc_emb)
    assert found_loss.item() == pytest.approx(3 * loss.item(), rel=1e-6)
    assert relative(found, 3 * expected) < 1e-6


# (text index, hash) of documents; query 0's negatives are the positives of 1 and 2, and 13's text in
# other spelling is a document of its own
DOCUMENTS = [(10 + i, 100 + i) for i in range(9)] + [(19, 103)]


def shown(query, documents, known, not_drawn=()):
    """Return a row that shows documents of DOCUMENTS, by place; others of its own are not drawn."""
    drawn = [DOCUMENTS[i] for i in documents]
    spared = [DOCUMENTS[i][1] for i in (*documents, *not_drawn)]
    return Shown(query, drawn, known, spared, [math.nan] * len(drawn))


ROWS = [
    shown(0, [0, 1, 2], [90, 100]),
    shown(1, [1, 3], [91, 101], not_drawn=[5, 7]),
    shown(2, [2], [92, 102, 108]),  # 108 is right for it, too
    shown(3, [4, 5, 3, 6], [93, 104]),
    shown(4, [7, 8], [94, 107], not_drawn=[0, 1, 2]),
    shown(5, [8, 9], [95, 108]),
]


def naive_margin_loss(query_emb, doc_emb, documents, limit):
    """Return the loss of ROWS by a loop, and how many documents it masked and spared."""
    losses, masked, spared = [], 0, 0
    # as the loss does: without it the vectors' gradient would have a part along them
    query_emb, doc_emb = F.normalize(query_emb, dim=1), F.normalize(doc_emb, dim=1)
    for query, row in zip(query_emb, ROWS, strict=True):
        positive = row.documents[0]
        p = query @ doc_emb[documents.index(positive)]
        logits = [p]
        for document, vector in zip(documents, doc_emb, strict=True):
            score = query @ vector
            if document == positive or document[1] in row.known:
                continue
            if score <= limit(p) or document[1] in row.spared:
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
    rules = LossRules(0.05, margin_of(margin(asked)))
    columns = [step[name] for name in ("own", "known", "spared", "teacher")]

    def mean(*block):
        return losses_of_queries(*block, step["document_ids"], rules)[0].sum() / len(ROWS)

    found = LossInBlocks.apply(query_emb, doc_emb, mean, *columns)
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
        margin_of(margin(asked))
        said = capsys.readouterr().out
        assert "hides what ranks above a positive: the queries that are still wrong" in said
    for asked in ("1.05x", "0.05"):
        margin_of(margin(asked))
    assert margin_of(None) is None
    assert capsys.readouterr().out == ""


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
    own, known = torch.tensor([[0, 2], [2, 2]]), torch.tensor([[a, b, query], [c, query, 0]])
    mask = excluded_columns(ids, own, known)
    assert mask.tolist() == [[False, True, False, True, True], [False, False, False, True, False]]
    alone = excluded_columns(ids, own, known, in_batch=False)
    assert alone.tolist() == [[False, True, False, True, True], [True, True, False, True, True]]


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

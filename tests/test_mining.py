"""Mined negatives are those of a naive loop, whatever the block; files bring them back."""

import math
import random

from parts.mining import hard_negatives

import pytest
import torch


def naive_negatives(query_emb, doc_emb, positives, known, margin, count):
    """One query and one document after the other: [(column, score)] of each query."""
    found = []
    for query, own, excluded in zip(query_emb, positives, known, strict=True):
        scores = [float(sum(q * d for q, d in zip(query, row, strict=True))) for row in doc_emb]
        lowest = min(scores[column] for column in own)
        limit = lowest - abs(lowest) * (1 - margin)
        allowed = []
        for column, score in enumerate(scores):
            if column not in excluded and score <= limit:
                allowed.append((column, score))
        allowed.sort(key=lambda pair: (-pair[1], pair[0]))
        found.append(allowed[:count])
    return found


def as_pairs(mined):
    """Return [(column, score)] of each query, without the places where nothing was found."""
    found = []
    for columns, scores in zip(mined.columns.tolist(), mined.scores.tolist(), strict=True):
        pairs = list(zip(columns, scores, strict=True))
        assert all((column == -1) == (score == -math.inf) for column, score in pairs)
        found.append([pair for pair in pairs if pair[0] >= 0])
        assert pairs[: len(found[-1])] == found[-1]  # what was not found stands behind
    return found


def random_case(seed, documents):
    """Integer-valued vectors, so that ties are exact and many; some documents stand there twice."""
    rng = random.Random(seed)
    doc_emb = torch.tensor([[rng.randint(-2, 2) for _ in range(3)] for _ in range(documents)])
    half = documents // 2
    doc_emb[half : 2 * half] = doc_emb[:half].clone()
    query_emb = torch.tensor([[rng.randint(-2, 2) for _ in range(3)] for _ in range(11)])
    positives = [rng.sample(range(documents), rng.randint(1, 3)) for _ in query_emb]
    known = [own + rng.sample(range(documents), 2) for own in positives]
    return query_emb.float(), doc_emb.float(), positives, known


@pytest.mark.parametrize("margin", [1.0, 0.95, 0.5, 1.5])
@pytest.mark.parametrize("chunk", [1, 100, 2**25])
@pytest.mark.parametrize("documents", [5, 40])
def test_mined_negatives_are_those_of_a_naive_loop(margin, chunk, documents):
    fewer = 0
    for seed in range(20):
        case = random_case(seed, documents)
        expected = naive_negatives(*case, margin, 7)
        mined = hard_negatives(*case, margin, 7, chunk)
        assert as_pairs(mined) == expected
        fewer += sum(len(row) < 7 for row in expected)
        query_emb, doc_emb, positives, _ = case
        for row, own in enumerate(positives):
            assert mined.positive_scores[row] == (doc_emb[own] @ query_emb[row]).tolist()
    assert fewer  # some queries found fewer than asked for


def test_a_document_at_the_threshold_stays_and_one_above_is_left_out():
    query_emb = torch.tensor([[1.0, 0.0]])
    doc_emb = torch.tensor([[0.8, 0.6], [0.4, 0.0], [0.5, 0.0], [0.3, 0.0]])
    mined = hard_negatives(query_emb, doc_emb, [[0]], [[0]], 0.5, 3)
    assert mined.columns.tolist() == [[1, 3, -1]]  # 0.4 is half of 0.8
    assert mined.scores[0].tolist() == pytest.approx([0.4, 0.3, -math.inf])


def test_documents_like_a_positive_stay_at_a_margin_of_one():
    generator = torch.Generator().manual_seed(0)
    doc_emb = torch.nn.functional.normalize(torch.randn(500, 384, generator=generator), dim=1)
    query_emb = torch.nn.functional.normalize(doc_emb[:50] + 0.05 * doc_emb[50:100], dim=1)
    doc_emb = torch.cat([doc_emb, doc_emb[:50]])  # each positive again, as another text
    own = [[i] for i in range(50)]
    for chunk in (1, 77, 2**10, 2**25):
        mined = hard_negatives(query_emb, doc_emb, own, own, 1.0, 1, chunk)
        assert mined.columns.flatten().tolist() == list(range(500, 550))


def test_the_threshold_of_a_positive_below_zero_is_below_it():
    query_emb = torch.tensor([[1.0, 0.0]])
    doc_emb = torch.tensor([[-0.4, 0.0], [-0.5, 0.0], [-0.6, 0.0], [-0.7, 0.0]])
    mined = hard_negatives(query_emb, doc_emb, [[0]], [[0]], 0.5, 3)
    assert mined.columns.tolist() == [[2, 3, -1]]  # -0.4 - 0.2


def test_the_farthest_of_several_positives_sets_the_threshold():
    query_emb = torch.tensor([[1.0, 0.0]])
    doc_emb = torch.tensor([[0.9, 0.0], [0.5, 0.0], [0.6, 0.0], [0.4, 0.0]])
    mined = hard_negatives(query_emb, doc_emb, [[0, 1]], [[0, 1]], 1.0, 3)
    assert mined.columns.tolist() == [[3, -1, -1]]
    assert mined.positive_scores == [pytest.approx([0.9, 0.5])]

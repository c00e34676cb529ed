"""Metrics of retrieval against sentence-transformers, naive loops and a stable sort."""

import math
import random
from unittest.mock import Mock

from parts import retrieval
from parts.retrieval import best_columns, retrieval_metrics

import numpy as np
import pytest
import torch
import torch.nn.functional as F


def retrieval_case(ties, seed=0, queries=40, documents=150):
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    query_emb, corpus_emb = (torch.randn(n, 6, generator=generator) for n in (queries, documents))
    if ties:  # signs of 0.5 in four dimensions: unit vectors whose cosines are exact and mostly tie
        query_emb, corpus_emb = query_emb[:, :4].sign() / 2, corpus_emb[:, :4].sign() / 2
    relevant = [
        set(rng.sample(range(documents), rng.choice([0, 1, 1, 3, 12]))) for _ in range(queries)
    ]
    return F.normalize(query_emb, dim=1), F.normalize(corpus_emb, dim=1), relevant


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_equal_sentence_transformers(ties):
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    query_emb, corpus_emb, relevant = retrieval_case(ties)
    vectors = {f"q{i:03d}": query_emb[i] for i in range(len(query_emb))}
    vectors |= {f"d{i:03d}": corpus_emb[i] for i in range(len(corpus_emb))}

    class Model:
        similarity_fn_name, model_card_data = "cosine", Mock()
        similarity = staticmethod(lambda a, b: a @ b.T)

        def encode_query(self, texts, **kwargs):
            return torch.stack([vectors[text] for text in texts])

        encode_document = encode = encode_query

    named = {f"q{i:03d}": {f"d{j:03d}" for j in gold} for i, gold in enumerate(relevant)}
    evaluator = InformationRetrievalEvaluator(
        {key: key for key in vectors if key[0] == "q"},
        {key: key for key in vectors if key[0] == "d"},
        named,
        score_functions={"cosine": Model.similarity},
        write_csv=False,
    )
    theirs = {key.removeprefix("cosine_"): value for key, value in evaluator(Model()).items()}
    ours = retrieval_metrics(query_emb, corpus_emb, relevant)
    assert set(ours) == set(theirs)
    assert all(ours[key] == pytest.approx(theirs[key], abs=1e-6) for key in ours)


def test_metrics_equal_a_naive_loop_and_do_not_depend_on_the_chunk():
    query_emb, corpus_emb, relevant = retrieval_case(ties=True, seed=1)
    ndcg, recall = [], []
    for i, gold in enumerate(relevant):
        if not gold:
            continue
        scores = [float(query_emb[i] @ corpus_emb[j]) for j in range(len(corpus_emb))]
        ranked = sorted(range(len(scores)), key=lambda j, scores=scores: (-scores[j], j))[:10]
        gains = [1 / math.log2(rank + 2) for rank, j in enumerate(ranked) if j in gold]
        ndcg.append(sum(gains) / sum(1 / math.log2(rank + 2) for rank in range(min(10, len(gold)))))
        recall.append(len(gold & set(ranked)) / len(gold))
    metrics = retrieval_metrics(query_emb, corpus_emb, relevant, chunk=500)
    assert metrics["ndcg@10"] == pytest.approx(np.mean(ndcg))
    assert metrics["recall@10"] == pytest.approx(np.mean(recall))


@pytest.mark.parametrize("levels", [1, 2, 5, 40, 10**6])
@pytest.mark.parametrize("documents", [3, 99, 100, 101, 700])
def test_best_columns_are_those_of_a_stable_sort(levels, documents):
    generator = torch.Generator().manual_seed(levels + documents)
    scores = torch.randint(levels, (30, documents), generator=generator) / levels
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :100]
    assert torch.equal(best_columns(scores, 100), expected)


def test_a_querys_own_text_is_no_wrong_answer():
    corpus_emb = torch.eye(4)
    query_emb = torch.tensor([[1.0, 0.5, 0, 0], [0, 1.0, 0.5, 0], [0, 0, 0, 1.0]])
    relevant = [{1}, {2}, {3}]
    assert retrieval_metrics(query_emb, corpus_emb, relevant)["accuracy@1"] == pytest.approx(1 / 3)
    for chunk in (4, 100):  # query by query, all at once
        metrics = retrieval_metrics(query_emb, corpus_emb, relevant, [0, 1, None], chunk=chunk)
        assert metrics["accuracy@1"] == metrics["ndcg@10"] == 1


def test_vectors_that_are_not_numbers_rank_as_in_a_stable_sort(monkeypatch):
    query_emb, corpus_emb, relevant = retrieval_case(ties=True, documents=400)
    corpus_emb[::3], query_emb[7] = torch.nan, torch.nan
    found = retrieval_metrics(query_emb, corpus_emb, relevant)

    def stable(scores, count):
        return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]

    monkeypatch.setattr(retrieval, "best_columns", stable)
    assert retrieval_metrics(query_emb, corpus_emb, relevant) == found


def test_collapsed_embeddings_score_like_chance():
    documents, queries = 500, 400
    relevant = [{random.Random(i).randrange(documents)} for i in range(queries)]
    metrics = retrieval_metrics(torch.ones(queries, 4), torch.ones(documents, 4), relevant)
    assert metrics["recall@10"] < 0.05
    assert metrics["mrr@10"] < 0.05


def test_a_perfect_ranking_scores_one():
    eye = torch.eye(12)
    metrics = retrieval_metrics(eye, eye, [{i} for i in range(12)])
    assert metrics["ndcg@10"] == metrics["accuracy@1"] == metrics["map@100"] == 1

"""Loss, masks, pooling and metrics against hand-worked numbers, naive loops and sentence-transformers."""

import math
import random
from unittest.mock import Mock

import train_embed_lora
from parts.rows import text_id
from train_embed_lora import (
    best_columns,
    contrastive_loss,
    excluded_columns,
    pool,
    retrieval_metrics,
)

import numpy as np
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

    monkeypatch.setattr(train_embed_lora, "best_columns", stable)
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

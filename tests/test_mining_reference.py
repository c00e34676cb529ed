"""The search for negatives finds what sentence-transformers' mine_hard_negatives finds."""

from parts.mining import SAME, hard_negatives, thresholds

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

MARGIN = 0.95  # ours, of the positive's cosine; theirs is what is left of it


class GivenVectors:
    """Stands for a SentenceTransformer: each text has the vector it was given."""

    device = "cpu"

    def __init__(self, query_emb, doc_emb):
        """query_emb, doc_emb: {text: vector}."""
        self.query_emb = query_emb
        self.doc_emb = doc_emb

    def encode_query(self, texts, **kwargs):
        return torch.stack([self.query_emb[text] for text in texts]).numpy()

    def encode_document(self, texts, **kwargs):
        return torch.stack([self.doc_emb[text] for text in texts]).numpy()

    def similarity(self, query_emb, doc_emb):
        return torch.as_tensor(query_emb) @ torch.as_tensor(doc_emb).T

    def similarity_pairwise(self, query_emb, doc_emb):
        return (torch.as_tensor(query_emb) * torch.as_tensor(doc_emb)).sum(-1)


def theirs(query_emb, doc_emb, positives, count, range_max, names=None):
    """Return the columns and the scores that sentence-transformers mines for each query.

    names: {query: its text}, where it is not "query 7".
    """
    names = names or {}
    queries = [names.get(i, f"query {i}") for i in range(len(query_emb))]
    documents = [f"document {i}" for i in range(len(doc_emb))]
    for i, name in names.items():  # a query that is in the corpus: the document of its place
        documents[i] = name
    rows = {"anchor": [], "positive": []}
    for query, columns in zip(queries, positives, strict=True):
        for column in columns:  # a row each, as a data set of pairs has them
            rows["anchor"].append(query)
            rows["positive"].append(documents[column])
    model = GivenVectors(
        dict(zip(queries, query_emb, strict=True)), dict(zip(documents, doc_emb, strict=True))
    )
    options = {
        "corpus": documents,
        "relative_margin": 1 - MARGIN,
        "range_max": range_max,
        "num_negatives": count,
        "output_format": "labeled-list",
        "output_scores": True,
        "verbose": False,
    }
    # one row for each positive of a query; all have the same negatives
    mined = mine_hard_negatives(Dataset.from_dict(rows), model, **options)
    columns = {query: [] for query in queries}
    scores = {query: [] for query in queries}
    for row in mined:
        columns[row["anchor"]] = [documents.index(text) for text in row["positive"][1:]]
        scores[row["anchor"]] = row["scores"][1:]
    return list(columns.values()), list(scores.values())


def ours(query_emb, doc_emb, positives, count, known=None):
    """Return the columns and the scores that hard_negatives mines for each query."""
    mined = hard_negatives(query_emb, doc_emb, positives, known or positives, MARGIN, count)
    columns = []
    scores = []
    for found, values in zip(mined.columns.tolist(), mined.scores.tolist(), strict=True):
        columns.append([column for column in found if column >= 0])
        scores.append([value for value in values if value > -torch.inf])
    return columns, scores


def vectors_of(scores):
    """Return query and document vectors whose products are `scores` (Q, C)."""
    return torch.eye(len(scores)), scores.T.contiguous()


def drawn_positives(queries, documents, generator):
    """Return one to three columns for each query."""
    positives = []
    for i in range(queries):
        drawn = torch.randperm(documents, generator=generator)
        positives.append(drawn[: 1 + i % 3].tolist())
    return positives


@pytest.mark.parametrize("count", [1, 4])
def test_integer_scores_give_their_negatives_in_their_order(count):
    generator = torch.Generator().manual_seed(0)
    queries, documents = 60, 80
    # each query's scores all differ, since their order of ties is left open; a third are negative
    drawn = [torch.randperm(documents, generator=generator) for _ in range(queries)]
    scores = torch.stack(drawn).float() * 5 - 130
    positives = drawn_positives(queries, documents, generator)
    vectors = vectors_of(scores)
    mined = ours(*vectors, positives, count)
    assert mined == theirs(*vectors, positives, count, range_max=documents - 1)
    lowest = torch.tensor([min(scores[i, j] for j in positives[i]) for i in range(queries)])
    assert (lowest < 0).any() and (lowest > 0).any()
    assert any(len(found) < count for found in mined[0])  # the lowest of all are among positives


def test_a_document_at_the_threshold_stays_for_both():
    # 100 - 5 and -100 - 5 are the thresholds
    scores = torch.tensor([[100.0, 96, 95, 94], [-100, -104, -105, -106]])
    vectors = vectors_of(scores)
    mined = ours(*vectors, [[0], [0]], 4)
    assert mined[0] == [[2, 3], [2, 3]]
    assert mined == theirs(*vectors, [[0], [0]], 4, range_max=4)


def test_tied_scores_are_theirs():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randint(-4, 5, (40, 50), generator=generator).float()
    positives = drawn_positives(40, 50, generator)
    vectors = vectors_of(scores)
    columns, values = ours(*vectors, positives, 5)
    assert values == theirs(*vectors, positives, 5, range_max=49)[1]
    for row, found in enumerate(columns):  # theirs are in any order; ours in that of documents
        assert found == sorted(found, key=lambda column: (-scores[row, column], column))


def unit_vectors(count, generator):
    return F.normalize(torch.randn(count, 32, generator=generator), dim=1)


def test_unit_vectors_give_their_negatives_in_their_order():
    generator = torch.Generator().manual_seed(4)
    query_emb = unit_vectors(100, generator)
    doc_emb = unit_vectors(400, generator)
    # five queries are documents, too: ours leaves them out as known, theirs by their cosine of 1
    doc_emb[:5] = query_emb[:5]
    positives = [[100 + i, 200 + i] if i % 2 else [100 + i] for i in range(100)]
    for i in range(100):
        near = query_emb[i] + 0.5 * unit_vectors(1, generator)[0]
        doc_emb[100 + i] = F.normalize(near, dim=0)
    known = [[*columns, i] if i < 5 else columns for i, columns in enumerate(positives)]
    names = {i: f"query {i}" for i in range(5)}
    all_scores = query_emb @ doc_emb.T
    lowest = torch.stack([row[own].min() for row, own in zip(all_scores, positives, strict=True)])
    # ours takes what is within rounding of the threshold, theirs may not
    assert (all_scores - thresholds(lowest, MARGIN)[:, None]).abs().min() > 2 * SAME
    columns, scores = ours(query_emb, doc_emb, positives, 3, known)
    their_columns, their_scores = theirs(query_emb, doc_emb, positives, 3, 399, names)
    assert columns == their_columns
    for own, other in zip(scores, their_scores, strict=True):
        assert own == pytest.approx(other, abs=1e-6)


def test_their_default_window_finds_fewer():
    generator = torch.Generator().manual_seed(3)
    query_emb = unit_vectors(200, generator)
    doc_emb = unit_vectors(400, generator)
    doc_emb[:200] = F.normalize(query_emb + 2.5 * doc_emb[:200], dim=1)
    positives = [[i] for i in range(200)]
    count = 2
    exact, _ = ours(query_emb, doc_emb, positives, count)
    by_default, _ = theirs(query_emb, doc_emb, positives, count, range_max=None)
    # 10 for each negative and one for the positive, twice: they look at no more than these
    scores = query_emb @ doc_emb.T
    looked_at = scores.topk(10 * count + 1 + 1).values
    lowest = scores.diagonal()
    far_enough = looked_at <= (lowest - 0.05 * lowest.abs())[:, None]
    assert list(map(len, by_default)) == far_enough.sum(1).clamp(max=count).tolist()
    for found, in_window in zip(exact, by_default, strict=True):
        assert in_window == found[: len(in_window)]
    assert all(len(found) == count for found in exact)
    lacking = sum(len(found) < count for found in by_default) / len(by_default)
    assert lacking > 0.2

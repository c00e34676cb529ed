"""How well documents are found: ranks by cosine, and the metrics of sentence-transformers.

Shapes: Q queries, C documents of a corpus, D embedding.
"""

import utils  # noqa: F401  quiets libraries before they are imported

import numpy as np
import torch
import torch.nn.functional as F

METRICS = [f"{kind}@{k}" for kind in ("accuracy", "precision", "recall") for k in (1, 3, 5, 10)]
METRICS += ["mrr@10", "ndcg@10", "map@100"]
DEEPEST = 100  # rank that a metric looks at


class Vectors:
    """Vectors of texts by index, each made once until `forget`, when the model has changed."""

    def __init__(self, embed):
        """embed: makes vectors (n, D) of a list of n indices."""
        self.embed = embed
        self.forget()

    def forget(self):
        self.place = {}  # text index -> row in `known`
        self.known = None  # (n, D)

    def of(self, indices):
        """Return the vectors (n, D) of texts, whose indices may repeat."""
        new = [i for i in dict.fromkeys(indices) if i not in self.place]
        if new:
            made = self.embed(new)
            for i in new:
                self.place[i] = len(self.place)
            self.known = made if self.known is None else torch.cat([self.known, made])
        return self.known[[self.place[i] for i in indices]]


def best_columns(scores, count):
    """Return the columns of the `count` highest scores (Q, C) of each row, best first.

    Ties by ascending column: as scores.sort(descending=True, stable=True), without sorting all
    columns, since topk leaves the order of ties open.
    """
    if count >= scores.shape[1]:
        return scores.sort(dim=1, descending=True, stable=True).indices
    values, columns = scores.topk(count + 1, dim=1)  # one more, to see a tie across the border
    tied = values[:, count] == values[:, count - 1]
    for row in tied.nonzero().flatten().tolist():
        # of the columns at the last value, the first ones belong in
        last = values[row, count - 1]
        above = (scores[row] > last).nonzero().flatten()
        equal = (scores[row] == last).nonzero().flatten()
        columns[row, :count] = torch.cat([above, equal[: count - len(above)]])
    columns = columns[:, :count].sort(dim=1).values  # ascending, which a stable sort keeps in ties
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


def rank(query_emb, corpus_emb, own):
    """Return the best corpus indices of some queries by cosine, ties by ascending index.

    query_emb (Q, D), corpus_emb (C, D); own: the corpus index, or None, of each query's own text,
    which ranks last.
    """
    scores = query_emb @ corpus_emb.T
    if scores.sum().isnan():
        scores.nan_to_num_(nan=torch.inf)  # comes first, as in a sort, and equals itself
    for row, column in enumerate(own):
        if column is not None:
            scores[row, column] = -torch.inf  # columns stay those of the corpus
    return best_columns(scores, DEEPEST).tolist()


def retrieval_metrics(query_emb, corpus_emb, relevant, own=(), chunk=2**25):
    """Rank the corpus by cosine for each query, ties by ascending index, and score the ranks.

    query_emb (Q, D), corpus_emb (C, D), relevant: a set of corpus indices per query; own: the
    corpus index, or None, of each query's own text, which ranks last. The metrics are those of
    sentence-transformers' InformationRetrievalEvaluator; queries without a relevant document are
    dropped.
    """
    query_emb = F.normalize(query_emb.float(), dim=1)
    corpus_emb = F.normalize(corpus_emb.float(), dim=1)
    hits = []
    found = []
    size = max(1, chunk // len(corpus_emb))  # queries at once: 128 MiB of scores in float32
    for start in range(0, len(query_emb), size):
        part = slice(start, start + size)
        ranked = rank(query_emb[part], corpus_emb, own[part])
        for columns, gold in zip(ranked, relevant[part], strict=True):
            if gold:
                is_hit = [column in gold for column in columns]
                hits.append(np.pad(is_hit, (0, DEEPEST - len(is_hit))))  # of a small corpus
                found.append(len(gold))
    return score_ranks(np.array(hits, dtype=float), np.array(found))


def score_ranks(hits, found):
    """Return {metric: value}; hits (Q, 100): 1 at the ranks of relevant documents, found (Q,)."""
    cumulative = hits.cumsum(1)
    metrics = {}
    for k in (1, 3, 5, 10):
        metrics[f"accuracy@{k}"] = (cumulative[:, k - 1] > 0).mean()
        metrics[f"precision@{k}"] = (cumulative[:, k - 1] / k).mean()  # also of a corpus below k
        metrics[f"recall@{k}"] = (cumulative[:, k - 1] / found).mean()
    ranks = np.arange(1, DEEPEST + 1)
    # argmax is the first hit, and 0 where there is none
    top = hits[:, :10]
    metrics["mrr@10"] = np.where(top.any(1), 1 / (top.argmax(1) + 1), 0).mean()
    discount = 1 / np.log2(ranks[:10] + 1)
    # of a ranking with all relevant documents in front
    ideal = discount.cumsum()[np.minimum(found, 10) - 1]
    metrics["ndcg@10"] = (top @ discount / ideal).mean()
    precision = hits * cumulative / ranks  # at the ranks of relevant documents
    metrics["map@100"] = (precision.sum(1) / np.minimum(found, DEEPEST)).mean()
    return {name: float(value) for name, value in metrics.items()}

"""Every text of an embedding run once, as token ids."""

from dataclasses import dataclass

from parts.token_cache import cached_map, ragged, tokens_key
from parts.tokenizer import added_tokens
from utils import InputError, note

import numpy as np


@dataclass(frozen=True)
class TextRules:
    """How a text becomes tokens: what stands before it, and where it is cut."""

    query_prefix: str
    doc_prefix: str
    query_max_len: int  # tokens
    passage_max_len: int


def encode_texts(tokenizer, texts, sides, rules):
    """Return the token ids of each text, whose prefix stands before it; sides: is it a query?"""
    ids = [None] * len(texts)
    # each side in one call: a tokenizer of Rust's shares a list out over the cores
    for side, limit in ((True, rules.query_max_len), (False, rules.passage_max_len)):
        places = [i for i, is_query in enumerate(sides) if is_query == side]
        if not places:
            continue
        chosen = [texts[i] for i in places]
        # cut by the tokenizer, which keeps the room for what it adds behind a text
        rows = tokenizer(chosen, truncation=True, max_length=limit)["input_ids"]
        for i, row in zip(places, rows, strict=True):
            ids[i] = row
    return ids


class Texts:
    """Every text of a run once, as token ids: `add` gives its index, then `tokenise`, then [index].

    `values` are the ids of all texts, one behind the other; text i begins at `offsets[i]`.
    """

    def __init__(self):
        self.index = {}  # (prefix + text, whether it is a query) -> index

    def add(self, prefix, text, is_query):
        # a query and a document of the same words may be cut at different lengths
        return self.index.setdefault((prefix + text, is_query), len(self.index))

    def tokenise(self, tokenizer, rules, workers):
        """Tokenise all texts, cached by `datasets` under a hash of texts, tokenizer and lengths."""
        texts = [text for text, _ in self.index]
        sides = [is_query for _, is_query in self.index]

        def encode(batch):
            return {"input_ids": encode_texts(tokenizer, batch["text"], batch["is_query"], rules)}

        made_by = tokens_key(tokenizer, encode_texts)  # other code, other tokens
        key = [texts, sides, made_by, rules.query_max_len, rules.passage_max_len]
        columns = {"text": texts, "is_query": sides}
        data = cached_map(columns, encode, key, workers)
        self.values, self.offsets = ragged(data, "input_ids")
        lengths = np.diff(self.offsets)
        if lengths.min() == 0:  # a mean over no tokens is NaN, which spreads to all weights
            raise InputError(
                f"the base's tokenizer makes no token of the text {texts[lengths.argmin()]!r}. "
                "Delete its row, or choose another base."
            )
        return self

    def __getitem__(self, i):
        return self.values[self.offsets[i] : self.offsets[i + 1]]


def note_cut_texts(texts, rules, tokenizer):
    """Note how many texts are cut at the shorter of two lengths: final/ stores the longer alone."""
    shorter, longer = sorted((rules.query_max_len, rules.passage_max_len))
    if shorter == longer:
        return
    of_queries = shorter == rules.query_max_len
    full = []  # cut, or just as long as that; which, their whole ids tell
    for i, (text, is_query) in enumerate(texts.index):
        if is_query == of_queries and len(texts[i]) >= shorter:
            full.append(text)
    rows = tokenizer(full, verbose=False)["input_ids"] if full else []
    cut = sum(len(row) > shorter for row in rows)
    if not cut:
        return
    what = "queries" if of_queries else "documents"
    flag = "--query_max_len" if of_queries else "--passage_max_len"
    note(
        f"{cut} {what} are cut at {flag} {shorter}, but sentence-transformers has one length for "
        f"both sides and will cut them at {longer}: set model.max_seq_length = {shorter} before it "
        f"encodes {what}, or train with one length"
    )


def note_full_texts(texts, rules):
    """Note how many texts reach the length that they are cut at, if more than a hundredth do."""
    lengths = np.diff(texts.offsets)
    are_queries = np.array([is_query for _, is_query in texts.index])
    of_queries = ("queries", rules.query_max_len, "--query_max_len", are_queries)
    of_documents = ("documents", rules.passage_max_len, "--passage_max_len", ~are_queries)
    for what, limit, flag, side in (of_queries, of_documents):
        share = (lengths[side] >= limit).mean() if side.any() else 0
        if share > 0.01:
            if rules.query_max_len == rules.passage_max_len:
                flag = "--max_length"
            note(f"{share:.0%} of the {what} reach {flag} {limit}, where texts are cut")


def note_unknown(texts, tokenizer):
    """Note how much of the texts the base cannot read, if that is more than a hundredth."""
    share = unknown_share(texts, tokenizer)
    if share > 0.01:  # a rare sign here and there does no harm
        note(
            f"{share:.0%} of all tokens are {tokenizer.unk_token}: the base cannot read these "
            "texts. Choose one made for their language; intfloat/multilingual-e5-small reads many."
        )


def unknown_share(texts, tokenizer):
    """Return the share of unknown tokens in the texts, without what the tokenizer adds to each."""
    # a [CLS] and a [SEP] would halve the share of a short text
    before, behind = added_tokens(tokenizer) or ([], [])
    added = [*before, *behind]
    count = len(texts.values) - len(texts.index) * len(added)
    unknown = (texts.values == tokenizer.unk_token_id).sum()
    unknown -= len(texts.index) * added.count(tokenizer.unk_token_id)
    return unknown / max(1, count)

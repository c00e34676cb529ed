"""Rendered text becomes token ids, put together from pieces that are tokenised once each."""

import itertools
import re

import utils  # noqa: F401  quiets libraries before others import them

REMEMBERED_TOKENS = 2**18  # of pieces of rendered text


def cuts_of(tokenizer):
    """Return a pattern of the tokens before which a text may be cut, or None without one.

    The pieces may then be tokenised apart: `tokenizers` looks for added tokens first, and treats
    what stands between them apart.
    """
    if not tokenizer.is_fast or getattr(tokenizer, "split_special_tokens", False):
        return None
    added = tokenizer.added_tokens_decoder.values()
    within = set()  # characters in tokens, but for the first of each
    greedy = []  # tokens that take along what stands before them, or are looked for later
    has_whole_words = False
    for token in added:
        within.update(token.content[1:])
        has_whole_words = has_whole_words or token.single_word
        if token.lstrip or token.single_word or token.normalized:
            greedy.append(token.content)
    cuts = []
    for token in added:
        text = token.content
        may_stand_within = text[0] in within  # of another token, which the cut would part
        is_taken_along = any(other.startswith(text) for other in greedy)
        # behind a token of whole words a letter goes on with the word, which a cut would end
        goes_on = has_whole_words and re.match(r"[^\x00-\x7f]|\w", text)
        if not (may_stand_within or is_taken_along or goes_on):
            cuts.append(text)
    return re.compile("|".join(map(re.escape, cuts))) if cuts else None


class Pieces:
    """A tokenizer of rendered text, which remembers the pieces between special tokens.

    So the turns of a conversation, each of which begins with all before it, cost little more than
    the last alone.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.cuts = cuts_of(tokenizer)
        self.known = {}  # piece: its ids
        self.remembered = 0  # tokens in `known`

    def tokenised(self, text):
        """Tokenise text, which brings its special tokens along; several texts give a list each."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def ids(self, text):
        """Return tokenised(text), of which only the pieces that are new are tokenised."""
        if self.cuts is None:
            return self.tokenised(text)
        starts = [0, *(match.start() for match in self.cuts.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(starts) if end > start]
        if self.remembered > REMEMBERED_TOKENS:
            self.forget()
        new = [piece for piece in dict.fromkeys(pieces) if piece not in self.known]
        if new:  # in one call, which uses several threads
            for piece, ids in zip(new, self.tokenised(new), strict=True):
                self.known[piece] = ids
                self.remembered += len(ids)
        return list(itertools.chain.from_iterable(self.known[piece] for piece in pieces))

    def forget(self):
        """Start with an empty memory."""
        self.known.clear()
        self.remembered = 0

    def check(self, text):
        """Make no cuts from here on if they change the ids of a text.

        Some tokenizers are of a kind of their own, whose files do not say all that they do.
        """
        if self.ids(text) != self.tokenised(text):
            self.cuts = None

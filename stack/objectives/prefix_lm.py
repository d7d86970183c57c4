"""Prefix language modelling (arXiv 1910.10683, section 3.2.1): a beginning is read, the rest predicted."""

import numpy as np

from stack.data.tokenizer import Tokenizer
from stack.objectives.pairs import Pair, Pairs, Sizes, Split, Tokens


class PrefixLm(Pairs):
    """Mean cross-entropy of what follows a beginning of random length."""

    name = "prefix 1"

    def split_sizes(self, lengths: np.ndarray) -> Sizes:
        """In one row the two share the piece; either may have nearly all of it."""
        if self.model.shape == "decoder":
            return Sizes(read=lengths, written=np.ones_like(lengths))
        return Sizes(read=lengths, written=lengths)

    def splitter(self, tokenizer: Tokenizer) -> Split:
        """Anywhere, with at least one token on each side."""

        def split(piece: Tokens, random: np.random.Generator) -> Pair:
            place = int(random.integers(1, len(piece)))
            return Pair(read=piece[:place], written=piece[place:])

        return split

"""Fill in the middle (arXiv 2207.14255): the middle of a text is moved behind what surrounds it."""

import numpy as np

from stack.config import Config, FillConfig
from stack.data.tokenizer import Tokenizer
from stack.objectives.pairs import Pair, Pairs, Sizes, Split, Tokens
from stack.objectives.words import PACKED, word


class FillInMiddle(Pairs):
    """Mean cross-entropy of every token of texts that are rearranged, or not.

    Texts are cut at tokens; begin and end of a document stay where they are.
    """

    name = "middle 1"
    marks = True

    def __init__(self, config: Config) -> None:
        """As of causal rows: nothing is seen by what comes before it."""
        super().__init__(config)
        self.fields = PACKED

    def split_sizes(self, lengths: np.ndarray) -> Sizes:
        """All is written; three words are added."""
        return Sizes(read=np.zeros_like(lengths), written=lengths + 4)

    def splitter(self, tokenizer: Tokenizer) -> Split:
        """In three, at two places drawn alike."""
        options = self.options
        assert isinstance(options, FillConfig)
        before, behind, middle = (
            [word(tokenizer, getattr(options, field), self.model.vocab_size, field=field)]
            for field in ("prefix_token", "suffix_token", "middle_token")
        )

        def split(piece: Tokens, random: np.random.Generator) -> Pair:
            rearranged, suffix_first = random.random(2) < (options.rate, options.suffix_first_rate)
            if not rearranged:
                return Pair(read=piece[:0], written=piece)
            start = int(piece[0] == tokenizer.bos)
            end = len(piece) - int(len(piece) > start and piece[-1] == tokenizer.eos)
            low, high = sorted(random.integers(start, end + 1, size=2).tolist())
            parts = (before, piece[start:low], behind, piece[high:end], middle, piece[low:high])
            if suffix_first:  # arXiv 2207.14255, section 3: what both orders share, they share the words of.
                parts = (before, behind, piece[high:end], middle, piece[start:low], piece[low:high])
            text = np.concatenate([piece[:start], *parts, piece[end:]]).astype(np.int32)
            return Pair(read=piece[:0], written=text)

        return split

"""Span corruption (T5, arXiv 1910.10683, section 3.1.4): spans of tokens are removed and written in order."""

import numpy as np

from stack.config import Config, SpansConfig
from stack.data.tokenizer import Tokenizer
from stack.objectives.pairs import Sizes, Tokens
from stack.objectives.removal import Choose, Removal


class SpanCorruption(Removal):
    """Mean cross-entropy of spans that are removed.

    As many tokens and spans are removed of a text as its length says; where they lie is drawn, from all ways
    to cut the tokens that go, and those that stay, into so many runs. A text begins with one that stays, and
    ends with one that goes; so a text so short that one span is removed of it always loses its end.
    """

    name = "spans 1"

    def __init__(self, config: Config) -> None:
        """The options decide how large the parts are."""
        assert isinstance(config.objective, SpansConfig)
        self.spans = config.objective
        super().__init__(config)

    def counts(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and spans that are removed of texts of so many tokens; none of one token."""
        removed = np.clip(np.rint(lengths * self.spans.rate), 1, np.maximum(lengths - 1, 1))
        spans = np.clip(np.rint(removed / self.spans.mean_span), 1, np.minimum(removed, lengths - removed))
        return removed.astype(np.int64), np.maximum(spans, 1).astype(np.int64)

    def split_sizes(self, lengths: np.ndarray) -> Sizes:
        """Spans become one word each, and both parts end with the end of a document."""
        removed, spans = self.counts(lengths)
        return Sizes(read=lengths - removed + spans + 1, written=removed + spans + 1)

    def most_removed(self, length: int) -> int:
        """Spans."""
        return int(self.counts(np.array([length]))[1][0])

    def chooser(self, tokenizer: Tokenizer) -> Choose:
        """Spans at random places."""

        def choose(text: Tokens, random: np.random.Generator) -> np.ndarray:
            if len(text) < 2:
                return np.zeros(len(text), bool)
            removed, spans = (int(count[0]) for count in self.counts(np.array([len(text)])))
            goes = _cut(removed, spans, random)
            stays = _cut(len(text) - removed, spans, random)
            lengths = np.stack([stays, goes], axis=1).reshape(-1)
            return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)

        return choose


def _cut(number: int, runs: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of runs, each at least 1, that add up to a number; all ways are as likely."""
    places = random.choice(number - 1, runs - 1, replace=False) + 1 if runs > 1 else np.zeros(0, np.int64)
    return np.diff(np.sort(places), prepend=0, append=number)

"""Sentence removal (gap sentences, PEGASUS, arXiv 1912.08777): whole sentences are removed and written."""

import numpy as np
from jaxtyping import Bool, Int32

from stack.config import Config, SentencesConfig
from stack.data.tokenizer import Tokenizer
from stack.objectives.pairs import Sizes, Tokens
from stack.objectives.removal import Choose, Removal

_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
_MOST_CLOSES = 3
_CLOSES = "\"')]}\u2019\u201d\u00bb"


class SentenceRemoval(Removal):
    """Mean cross-entropy of sentences that are removed, drawn from all that fit the share.

    A sentence ends with a full stop, an exclamation or a question mark before white space, and with a line.
    The last sentence of a piece that does not end with one stays, as it may be half of one.
    """

    name = "sentences 1"

    def __init__(self, config: Config) -> None:
        """The options decide how large the parts are."""
        assert isinstance(config.objective, SentencesConfig)
        self.sentences = config.objective
        super().__init__(config)

    def split_sizes(self, lengths: np.ndarray) -> Sizes:
        """Of no sentence and of as many as fit the share; both parts end with the end of a document."""
        removed = self._budget(lengths)
        sentences = removed // self.sentences.shortest
        both = lengths + 2 * sentences + 2  # Each gap has a word in both.
        return Sizes(read=lengths + 1, written=removed + sentences + 1, both=both)

    def most_removed(self, length: int) -> int:
        """Sentences, each of the shortest length."""
        return max(1, int(self._budget(np.array([length]))[0]) // self.sentences.shortest)

    def _budget(self, lengths: np.ndarray) -> np.ndarray:
        return np.floor(lengths * self.sentences.rate).astype(np.int64)

    def chooser(self, tokenizer: Tokenizer) -> Choose:
        """In random order, each that still fits."""
        marks = sentence_marks(tokenizer)

        def choose(text: Tokens, random: np.random.Generator) -> np.ndarray:
            removed = np.zeros(len(text), bool)
            ends = np.flatnonzero(sentence_ends(text, marks)) + 1
            starts = np.concatenate([[0], ends])[: len(ends)]
            left = int(self._budget(np.array([len(text)]))[0])
            for number in random.permutation(len(ends)):
                length = int(ends[number] - starts[number])
                if self.sentences.shortest <= length <= left:
                    removed[starts[number] : ends[number]] = True
                    left -= length
            return removed

        return choose


def sentence_marks(tokenizer: Tokenizer) -> Int32[np.ndarray, " words"]:
    """What each word of a tokenizer says of sentences, [words], bits.

    1: it ends with a mark that may end one; 2: it begins with white space, but not with the end of a line;
    4: it has the end of a line; 8: it only closes what may stand behind such a mark.
    """
    marks = []
    for text in tokenizer.spellings:
        line = text is not None and "\n" in text
        spaced = text is None or (text[:1].isspace() and text[:1] != "\n")
        ends = text is not None and text.rstrip(_CLOSES).endswith(_ENDS)
        closes = bool(text) and not text.strip(_CLOSES)
        marks.append(1 * ends + 2 * spaced + 4 * line + 8 * closes)
    return np.array(marks, np.int32)


def sentence_ends(text: Tokens, marks: Int32[np.ndarray, " words"]) -> Bool[np.ndarray, " tokens"]:
    """Which tokens [tokens] are the last of a sentence; see `SentenceRemoval`."""
    said = marks[np.minimum(text, len(marks) - 1)]
    ended = said & 1 != 0
    for _ in range(_MOST_CLOSES):
        ended |= (said & 8 != 0) & np.concatenate([[False], ended[:-1]])
    spaced_after = np.concatenate([said[1:] & 2 != 0, [True]])
    return ended & spaced_after | (said & 4 != 0)

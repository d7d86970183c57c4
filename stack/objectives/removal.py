"""What is removed of a text, and what is left of it, each with words that stand for the other's place."""

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int32

from stack.config import RemovalConfig
from stack.config.errors import ConfigError
from stack.data.tokenizer import Tokenizer
from stack.objectives.pairs import Pair, Pairs, Split, Tokens
from stack.objectives.words import word

Choose = Callable[[Tokens, np.random.Generator], Bool[np.ndarray, " tokens"]]
"""(a text [tokens], random numbers) -> what of it is removed, [tokens] bool."""


class Removal(Pairs):
    """Mean cross-entropy of what was removed; subclasses say what is."""

    continues = False
    between = "\n"
    marks = True

    @abstractmethod
    def most_removed(self, length: int) -> int:
        """Runs of tokens that are removed of a piece of so many tokens, at most."""

    @abstractmethod
    def chooser(self, tokenizer: Tokenizer) -> Choose:
        """Chooses what is removed of a text."""

    def splitter(self, tokenizer: Tokenizer) -> Split:
        """What is left, and what was removed, both followed by the end of a document.

        The begin of a document is left out: what is read begins where the text does.

        Raises:
          ConfigError: the tokenizer has fewer sentinels than the longest piece may need.
        """
        options = self.options
        assert isinstance(options, RemovalConfig)
        number = self.most_removed(self.longest_piece())
        names = [options.sentinel.replace("{}", str(i)) for i in range(number)]
        missing = [name for name in names if tokenizer.token(name) is None]
        if missing:
            raise ConfigError(
                f"objective.sentinel: rows of {self.lengths[0]} tokens need {number} words, and the tokenizer"
                f" has no word {missing[0]!r}; add it (`stack data extend`), lower objective.rate or"
                " data.sequence_length, or name others"
            )
        size = self.model.vocab_size
        sentinels = np.array([word(tokenizer, name, size, field="sentinel") for name in names], np.int32)
        choose = self.chooser(tokenizer)
        end = np.array([tokenizer.eos], np.int32)

        def split(piece: Tokens, random: np.random.Generator) -> Pair:
            text = piece[int(piece[0] == tokenizer.bos) : -1]
            removed = choose(text, random)
            if not removed.any():
                return Pair(read=text, written=text[:0])
            left, taken = take_out(text, removed, sentinels)
            return Pair(read=np.concatenate([left, end]), written=np.concatenate([taken, end]))

        return split


def take_out(
    text: Int32[np.ndarray, " tokens"],
    removed: Bool[np.ndarray, " tokens"],
    sentinels: Int32[np.ndarray, " sentinels"],
) -> tuple[Int32[np.ndarray, " left"], Int32[np.ndarray, " taken"]]:
    """What is left of a text [tokens], and what was taken out of it.

    For the i-th run of removed tokens stands the i-th sentinel, and before the run itself, in what was taken
    out, the same (arXiv 1910.10683, section 3.1.4).
    """
    first = removed & ~np.concatenate([[False], removed[:-1]])
    runs = np.cumsum(first) - 1
    left = np.where(first, sentinels[np.maximum(runs, 0)], text)[first | ~removed]
    starts = np.flatnonzero(first[removed])
    return left, np.insert(text[removed], starts, sentinels[: len(starts)])

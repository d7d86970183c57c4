"""Tables of words and of pairs of words: what a model of masked words has to beat to have learned anything.

They are asked at the very places that the model is evaluated at, and told what it is told of them: what
stands there, and what stands beside it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from stack.config import Config
from stack.data.dataset import Data, Dataset
from stack.data.loader import heldout_rows
from stack.evaluation.evaluate import heldout_numbers
from stack.objectives.masked_words import FIELDS, MaskedExamples
from stack.objectives.words import PACKED

_ROWS = 1024  # Read at one time.
_SCORES = 1 << 22  # That exist at one time.
_UNKNOWN = -1


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well hidden words are predicted."""

    loss: float
    """Nats per word."""
    accuracy: float
    """Share of the words that were taken for the likeliest."""


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """Hidden words and what is seen of them, each [words] int32."""

    word: np.ndarray
    shown: np.ndarray
    """What stands in its place: the mask, another word or itself."""
    left: np.ndarray
    """The word before it in its text; -1 where there is none, or it is masked too."""
    right: np.ndarray
    """The one after it."""


def score_tables(config: Config, data: Data) -> dict[str, Score]:
    """How well a `unigram` and a `bigram` table of the training text predict held-out hidden words.

    The probability of a pair is interpolated with that of its second word by how many words are known to
    follow the first (Witten and Bell 1991; Chen and Goodman 1998, section 2.4), that of a word by one more
    of each. The bigram table gives the probability of a word between two others as a chain of pairs has it,
    P(word | left) P(right | word) over the sum of that for all words. Where a word is shown that may be
    random, both weigh how likely it is to be shown.

    Args:
      config: of a run whose objective hides words.
      data: what it reads; of the held-out side, the rows of `evaluate`, hidden as they are there.
    """
    examples = data.heldout.examples
    assert isinstance(examples, MaskedExamples), "the objective hides words"
    tables = Tables(adjacent(data.train), config.model.vocab_size, examples)
    size, numbers = heldout_numbers(config, data.heldout)
    totals, count = {"unigram": np.zeros(2), "bigram": np.zeros(2)}, 0
    for number in numbers:
        rows = np.arange(number * size, min((number + 1) * size, data.heldout.num_rows))
        hidden = look(heldout_rows(data.heldout, FIELDS, rows), examples.mask)
        count += len(hidden.word)
        for name, sums in tables.score(hidden).items():
            totals[name] += sums
    means = {name: (sums / max(count, 1)).tolist() for name, sums in totals.items()}
    return {name: Score(loss=loss, accuracy=accuracy) for name, (loss, accuracy) in means.items()}


def look(batch: Mapping[str, np.ndarray], mask: int) -> Hidden:
    """The hidden words of a batch of masked rows; `mask` is the word that hides."""
    row, which = np.nonzero(batch["labels"] >= 0)
    place = batch["masked"][row, which]
    # A place on each side, of no text.
    tokens, segments = (np.pad(batch[name], ((0, 0), (1, 1))) for name in ("tokens", "segments"))

    def beside(step: int) -> np.ndarray:
        word, here = tokens[row, place + 1 + step], segments[row, place + 1]
        known = (segments[row, place + 1 + step] == here) & (word != mask)
        return np.where(known, word, _UNKNOWN)

    shown = tokens[row, place + 1]
    return Hidden(word=batch["labels"][row, which], shown=shown, left=beside(-1), right=beside(1))


def adjacent(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of some rows at a time, their words [words], and the pairs [pairs, 2] of neighbours in one text."""
    fields = [field for field in PACKED if field.name in ("tokens", "segments")]
    for start in range(0, dataset.num_rows, _ROWS):
        rows = dataset.read(np.arange(start, min(start + _ROWS, dataset.num_rows)), fields)
        tokens, segments = rows["tokens"], rows["segments"]
        together = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        yield tokens[segments > 0], np.stack([tokens[:, :-1][together], tokens[:, 1:][together]], axis=1)


class Tables:
    """Counts of words and of pairs, as probabilities."""

    def __init__(
        self,
        texts: Iterable[tuple[np.ndarray, np.ndarray]],
        vocab_size: int,
        examples: MaskedExamples,
    ) -> None:
        """Counts.

        Args:
          texts: words and pairs, as `adjacent` gives them.
          vocab_size: one more than the largest word.
          examples: what hides words, and which may be hidden.
        """
        self.size = vocab_size
        self.options = examples.options
        self.mask = examples.mask
        self.candidate = np.zeros(vocab_size, bool)
        self.candidate[examples.words] = True
        words = np.zeros(vocab_size, np.int64)
        codes, times = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for some, pairs in texts:
            words += np.bincount(some, minlength=vocab_size)
            here, counts = np.unique(
                pairs[:, 0].astype(np.int64) * vocab_size + pairs[:, 1], return_counts=True
            )
            codes, places = np.unique(np.concatenate([codes, here]), return_inverse=True)
            times = np.bincount(places, np.concatenate([times, counts])).astype(np.int64)
        first, second = np.divmod(codes, vocab_size)
        self.unigram = (words + 1) / (words.sum() + vocab_size)
        self.after = _Lists(first, second, times, vocab_size)
        self.before = _Lists(second, first, times, vocab_size)
        seen, kinds = np.bincount(first, times, vocab_size), np.bincount(first, minlength=vocab_size)
        self.seen = np.maximum(seen + kinds, 1)
        # The share of the second word's own probability: all of it after a word that was never seen.
        self.share = np.where(seen > 0, kinds / self.seen, 1.0)

    def score(self, hidden: Hidden) -> dict[str, np.ndarray]:
        """Nats and words that were found the likeliest, of each table, [2] float64, summed."""
        sums = {"unigram": np.zeros(2), "bigram": np.zeros(2)}
        step = max(1, _SCORES // self.size)
        for start in range(0, len(hidden.word), step):
            some = {name: values[start : start + step] for name, values in vars(hidden).items()}
            shown = self.shown(some["shown"])
            between = self.between(some["left"], some["right"])
            for name, prior in (("unigram", self.unigram), ("bigram", between)):
                given = np.where(self.candidate, shown * prior, 0.0)
                right = given[np.arange(len(given)), some["word"]]
                nats = -np.log(right / given.sum(axis=1)).sum()
                sums[name] += nats, (given.argmax(axis=1) == some["word"]).sum()
        return sums

    def between(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """P(word | left) P(right | word), [places, words]; a neighbour that is not known tells nothing."""
        first = self.share[left][:, None] * self.unigram + self.after.rows(left) / self.seen[left][:, None]
        first = np.where(left[:, None] == _UNKNOWN, self.unigram, first)
        second = self.share * self.unigram[right][:, None] + self.before.rows(right) / self.seen
        return first * np.where(right[:, None] == _UNKNOWN, 1.0, second)

    def shown(self, words: np.ndarray) -> np.ndarray:
        """How likely a word is to be shown in the place of each, [places, words]."""
        options = self.options
        random = options.random_rate / self.candidate.sum()
        kept = 1.0 - options.mask_rate - options.random_rate
        likely = np.full((len(words), self.size), random)
        likely[np.arange(len(words)), words] += kept
        likely[words == self.mask] = options.mask_rate
        return likely


class _Lists:
    """For each word, how often it was seen with others."""

    def __init__(self, word: np.ndarray, other: np.ndarray, times: np.ndarray, size: int) -> None:
        order = np.argsort(word, kind="stable")
        self.other, self.times, self.size = other[order], times[order], size
        self.start = np.searchsorted(word[order], np.arange(size + 1))

    def rows(self, words: np.ndarray) -> np.ndarray:
        """[places, words] float64; nothing for -1."""
        counts = np.zeros((len(words), self.size))
        for place, word in enumerate(words.tolist()):
            if word != _UNKNOWN:
                here = slice(self.start[word], self.start[word + 1])
                counts[place, self.other[here]] = self.times[here]
        return counts

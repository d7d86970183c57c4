"""Masked words (BERT, arXiv 1810.04805, section 3.1): some are hidden and predicted from all others."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int32, Integer

from stack.config import Config, MaskedConfig
from stack.data.dataset import Dataset
from stack.data.examples import Plain, generator
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer
from stack.objectives.words import EXAMPLE, PACKED, Words, word

MASKED = ("batch", "masked")
FIELDS = (
    *(field for field in PACKED[:-1] if field.name != "labels"),
    Field(name="masked", axes=MASKED, padding=0),
    Field(name="labels", axes=MASKED, padding=-1),
    EXAMPLE,
)
"""Rows of which only some places, `masked`, are projected to the vocabulary and have a label."""


class MaskedWords(Words):
    """Mean cross-entropy of words at hidden places."""

    fields = FIELDS
    endings = ("held_out", "tables")

    def __init__(self, config: Config) -> None:
        """The options, and the most places of a row that are hidden."""
        super().__init__(config)
        assert isinstance(config.objective, MaskedConfig)
        self.masks = config.objective
        self.sizes["masked"] = most_hidden(config.data.sequence_length, self.masks.rate)

    def examples(self, tokenizer: Tokenizer) -> "MaskedExamples":
        """Rows with hidden words.

        Raises:
          ConfigError: the tokenizer has no mask token, or the model no row for it.
        """
        mask = word(tokenizer, self.masks.mask_token, self.model.vocab_size, field="mask_token")
        return MaskedExamples(self.masks, tokenizer, mask=mask)


class MaskedExamples(Plain):
    """Rows as they are packed, with hidden words; see `stack.data.examples.Examples`."""

    def __init__(self, options: MaskedConfig, tokenizer: Tokenizer, *, mask: int) -> None:
        """What hides words, and which words may be.

        Args:
          options: of the objective.
          tokenizer: whose special words are never hidden.
          mask: the word that hides another.
        """
        self.options = options
        self.mask = mask
        spellings = tokenizer.spellings
        self.special = np.array([text is None for text in spellings])
        self.starts = np.array([text is None or _begins_word(text) for text in spellings])
        self.words = np.flatnonzero(~self.special).astype(np.int32)

    def read(
        self,
        dataset: Dataset,
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of rows by number; see `stack.data.examples.Examples`."""
        batch = dict(dataset.read(rows, PACKED[:-1]))
        del batch["labels"]
        most = most_hidden(dataset.sequence_length, self.options.rate)
        padding = {field.name: field.padding for field in fields}
        for name in ("masked", "labels"):
            batch[name] = np.full((len(rows), most), padding[name], np.int32)
        for number, draw in enumerate(draws):
            random = generator(draw)
            tokens = batch["tokens"][number]
            hidden = self.choose(tokens, batch["segments"][number], most, random)
            batch["masked"][number, : len(hidden)] = hidden
            batch["labels"][number, : len(hidden)] = tokens[hidden]
            tokens[hidden] = self.hide(tokens[hidden], random)
        return batch

    def choose(
        self,
        tokens: Int32[np.ndarray, " length"],
        segments: Int32[np.ndarray, " length"],
        most: int,
        random: np.random.Generator,
    ) -> Integer[np.ndarray, " hidden"]:
        """Places of a row that are hidden, ascending: the share of those that may be, rounded at random."""
        places = np.flatnonzero((segments > 0) & ~self.special[np.minimum(tokens, len(self.special) - 1)])
        number = min(most, math.floor(self.options.rate * len(places) + random.random()))
        if not self.options.whole_words:
            return np.sort(random.choice(places, number, replace=False)) if number else places[:0]
        return np.sort(places[_some_words(self._begins(tokens, segments, places), number, random)])

    def hide(
        self, tokens: Int32[np.ndarray, " hidden"], random: np.random.Generator
    ) -> Int32[np.ndarray, " hidden"]:
        """What stands in the place of words that are hidden."""
        draw = random.random(len(tokens))
        others = self.words[random.integers(0, len(self.words), len(tokens))]
        masked = self.options.mask_rate
        tokens = np.where(draw < masked + self.options.random_rate, others, tokens)
        return np.where(draw < masked, self.mask, tokens).astype(np.int32)

    def _begins(
        self, tokens: np.ndarray, segments: np.ndarray, places: np.ndarray
    ) -> Bool[np.ndarray, " places"]:
        """Which of some places begin a word: by spelling, or after another text or what may not be hidden."""
        apart = np.diff(places, prepend=-2) > 1
        other = np.diff(segments[places], prepend=0) != 0
        return self.starts[tokens[places]] | apart | other


def _begins_word(text: str) -> bool:
    """Whether a token begins a word: with white space, or with a mark."""
    return text[:1].isspace() or (text[:1].isascii() and not text[:1].isalnum())


def most_hidden(length: int, rate: float) -> int:
    """Places of a row that are hidden, at most."""
    return max(1, math.ceil(length * rate))


def _some_words(
    begins: Bool[np.ndarray, " places"], number: int, random: np.random.Generator
) -> Integer[np.ndarray, " some"]:
    """Numbers of places of whole words, in random order, as long as they are no more than a number."""
    starts = np.flatnonzero(begins)
    lengths = np.diff([*starts, len(begins)])
    chosen, left = [], number
    for which in random.permutation(len(starts)):
        if lengths[which] <= left:
            chosen.append(np.arange(starts[which], starts[which] + lengths[which]))
            left -= int(lengths[which])
        if not left:
            break
    return np.concatenate([np.zeros(0, np.int64), *chosen])

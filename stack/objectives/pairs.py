"""Texts in two parts, one read and one written, laid out for a decoder or for an encoder and a decoder."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Integer

from stack.config import Config, EncoderDecoderConfig
from stack.data.dataset import Dataset
from stack.data.examples import Encoder, Plain, generator, longest
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer
from stack.objectives.words import EXAMPLE, PACKED, ROW, Words

Tokens = Int32[np.ndarray, " tokens"]
TARGET_ROW = ("batch", "target_length")
WITH_PREFIX = (*PACKED[:-1], Field(name="prefix", axes=ROW, padding=0), EXAMPLE)
"""One row: `prefix` is 1 where a token is read, and seen by all of its text."""
TWO_ROWS = (
    *(field for field in PACKED[:-1] if field.name != "labels"),
    Field(name="target_tokens", axes=TARGET_ROW, padding=0),
    Field(name="labels", axes=TARGET_ROW, padding=-1),
    Field(name="target_segments", axes=TARGET_ROW, padding=0),
    Field(name="target_positions", axes=TARGET_ROW, padding=0),
    EXAMPLE,
)
"""A row that is read and a row that is written; texts have one number in both."""


class Pair(NamedTuple):
    """One text."""

    read: Tokens
    """What is given, [tokens] int32; may be empty in one row."""
    written: Tokens
    """What is predicted, [tokens] int32; empty: nothing is, and the text is left out."""


Split = Callable[[Tokens, np.random.Generator], Pair]
"""(a piece: n tokens and the one after them, random numbers) -> its two parts."""


Room = Callable[[Int64[np.ndarray, " pieces"]], Int64[np.ndarray, " pieces"]]
"""Places of a row that pieces of so many tokens take; see `stack.data.examples.Examples`."""


class Sizes(NamedTuple):
    """The most tokens of the two parts of pieces, each [pieces] int64, which grow with the piece."""

    read: Int64[np.ndarray, " pieces"]
    written: Int64[np.ndarray, " pieces"]
    both: Int64[np.ndarray, " pieces"] | None = None
    """Of the two together; None: the sum of both."""


class PairExamples(Plain):
    """Pairs in rows; see `stack.data.examples.Examples`."""

    encoder: Encoder | None = None

    def __init__(
        self,
        split: Split,
        room: Room,
        *,
        name: str,
        lengths: tuple[int, int | None],
        start: int,
    ) -> None:
        """How texts are split, and into what.

        Args:
          split: makes a pair of a piece.
          room: places of the first row that pieces of n tokens take.
          name: of `room`; equal names give equal rows.
          lengths: of the two rows; None: both parts stand in one.
          start: the word that what is written begins after, in a row of its own.
        """
        self.split = split
        self._room = room
        self.length, self.target_length = lengths
        self.start = start
        self.packing = name

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """Places of the first row; see `Pairs.room`."""
        return self._room(lengths)

    def read(
        self,
        dataset: Dataset,
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of rows by number; see `stack.data.examples.Examples`."""
        lengths = {"length": self.length, "target_length": self.target_length or 0}
        batch = {
            field.name: np.full((len(rows), lengths[field.axes[1]]), field.padding, field.dtype)
            for field in fields
            if len(field.axes) > 1
        }
        for number, (row, draw) in enumerate(zip(rows.tolist(), draws, strict=True)):
            columns = self._columns([pair for pair in self.pairs(dataset, row, draw) if len(pair.written)])
            for name, values in batch.items():
                made = columns[name]
                values[number, : len(made)] = made
        return batch

    def pairs(self, dataset: Dataset, row: int, draw: Integer[np.ndarray, " 3"]) -> list[Pair]:
        """The texts of a row by number, none of -1."""
        random = generator(draw)
        return [self.split(piece, random) for piece in dataset.pieces(row)]

    def _columns(self, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
        """What a row holds, without padding."""
        if self.target_length is None:
            texts = [np.concatenate(pair) for pair in pairs]
            return {
                "tokens": _join([text[:-1] for text in texts]),
                "labels": _join([_labels(pair, text) for pair, text in zip(pairs, texts, strict=True)]),
                "prefix": _join(
                    [
                        np.arange(len(text) - 1) < len(pair.read)
                        for pair, text in zip(pairs, texts, strict=True)
                    ]
                ),
                **_places("", [len(text) - 1 for text in texts]),
            }
        return {
            "tokens": _join([pair.read for pair in pairs]),
            **_places("", [len(pair.read) for pair in pairs]),
            "target_tokens": _join([np.array([self.start, *pair.written[:-1]]) for pair in pairs]),
            "labels": _join([pair.written for pair in pairs]),
            **_places("target_", [len(pair.written) for pair in pairs]),
        }


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def _labels(pair: Pair, text: Tokens) -> Int32[np.ndarray, " tokens-1"]:
    """The next token where it is written, else -1."""
    return np.where(np.arange(1, len(text)) >= len(pair.read), text[1:], -1)


def _places(kind: str, lengths: Sequence[int]) -> dict[str, np.ndarray]:
    return {
        f"{kind}segments": _join([np.full(length, number) for number, length in enumerate(lengths, 1)]),
        f"{kind}positions": _join([np.arange(length) for length in lengths]),
    }


class Pairs(Words, ABC):
    """An objective whose texts are pairs: subclasses say how they are split and how large the parts are."""

    name: str
    """Of the way texts are split, with its version."""

    def __init__(self, config: Config) -> None:
        """In one row for a decoder, in two for an encoder and a decoder."""
        super().__init__(config)
        length = config.data.sequence_length
        self.start = 0
        self.lengths: tuple[int, int | None] = length, None
        self.fields, self.endings = WITH_PREFIX, ("held_out", "sample")
        if isinstance(config.model, EncoderDecoderConfig):
            target_length = self._target_length(length)
            self.start = config.model.start_token
            self.lengths = length, target_length
            self.sizes["target_length"] = target_length
            self.fields = TWO_ROWS

    @abstractmethod
    def split_sizes(self, lengths: Int64[np.ndarray, " pieces"]) -> Sizes:
        """Of the parts of pieces of so many tokens."""

    @abstractmethod
    def splitter(self, tokenizer: Tokenizer) -> Split:
        """Splits pieces.

        Raises:
          ConfigError: the tokenizer lacks a word.
        """

    def examples(self, tokenizer: Tokenizer) -> PairExamples:
        """How rows are packed, and made of pieces; see `splitter` for errors."""
        # All that may decide how large the parts are.
        options = self.options.model_dump(exclude={"z_loss", "label_smoothing", "logits_bytes", "sentinel"})
        name = f"{self.name} {self.lengths} {json.dumps(options, sort_keys=True)}"
        return PairExamples(
            self.splitter(tokenizer), self.room, name=name, lengths=self.lengths, start=self.start
        )

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """Places of the first row that keep both parts of pieces within theirs."""
        read, written, both = self.split_sizes(lengths)
        length, target_length = self.lengths
        if target_length is None:
            return (read + written if both is None else both) - 1
        return np.maximum(np.maximum(read, 1), -(-written * length // target_length))

    def longest_piece(self) -> int:
        """Tokens of the longest piece that a row takes."""
        return longest(self.room, self.lengths[0])

    def _target_length(self, length: int) -> int:
        """As the config says, or as the longest piece that fits what is read needs."""
        given = getattr(self.options, "target_length", None)
        alone = longest(lambda lengths: self.split_sizes(lengths).read, length)
        return given or int(self.split_sizes(np.array([alone])).written[0])

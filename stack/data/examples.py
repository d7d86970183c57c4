"""What an objective makes of packed text, row by row."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, Integer

from stack.config.errors import ConfigError
from stack.data.fields import Field

if TYPE_CHECKING:
    from stack.data.dataset import Dataset

TRAINING, HELDOUT = range(2)
"""What a row is drawn for; the same number gives each other choices."""


class Encoded(NamedTuple):
    """A record as tokens."""

    tokens: Integer[np.ndarray, " tokens"]
    """Without bos and eos, between which they will stand."""
    marks: Int32[np.ndarray, " stored"]
    """[tokens + 2], of bos, tokens and eos: what the encoder has to say of each; 0: nothing."""


@runtime_checkable
class Encoder(Protocol):
    """How an objective reads whole records."""

    @property
    def key(self) -> str:
        """Names all that decides what it makes of a record, beside the tokenizer."""
        ...

    def __call__(self, records: Sequence[str]) -> Sequence[Sequence[Encoded]]:
        """Tokens of records of JSON, in order: none of one that is left out, several of one in parts.

        Raises:
          StackError: a record that it cannot read; with its place.
        """
        ...


@runtime_checkable
class Examples(Protocol):
    """How the pieces of documents in a row become the fields of a batch."""

    @property
    def encoder(self) -> Encoder | None:
        """What makes tokens of whole records; None: documents are texts."""
        ...

    def encoder_of(self, task: str | None) -> Encoder | None:
        """The encoder of records of one task of several."""
        ...

    @property
    def packing(self) -> str:
        """Names `room`: equal names give equal rows. Empty: a piece takes as many places as it has tokens."""
        ...

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """Places of a row that pieces of so many tokens take at most; grows with the length."""
        ...

    def read(
        self,
        dataset: "Dataset",
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields, without `example`, of rows by number; -1 is a row of padding.

        Args:
          dataset: of which they are.
          rows: [rows] their numbers.
          draws: [rows, 3] seed, `TRAINING` or `HELDOUT`, and place, of which all random choices are made.
          fields: what is asked for.
        """
        ...


@runtime_checkable
class Placed(Protocol):
    """Examples of records whose places are decided by what is marked, beside the length."""

    def places(
        self, lengths: Int64[np.ndarray, " pieces"], marked: Int64[np.ndarray, " pieces"]
    ) -> Int64[np.ndarray, " pieces"]:
        """In place of `Examples.room`: of pieces of so many tokens, so many of which have a mark."""
        ...


class Plain:
    """Rows as they are packed: every token is predicted from those before it."""

    encoder: Encoder | None = None
    packing = ""

    def encoder_of(self, task: str | None) -> Encoder | None:
        """The one there is."""
        return self.encoder

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """A place for each token."""
        return lengths

    def read(
        self,
        dataset: "Dataset",
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of `Dataset.read`; nothing is drawn."""
        return dataset.read(rows, fields)


PLAIN = Plain()
"""What every token is predicted in."""


def longest(room: Callable[[np.ndarray], np.ndarray], sequence_length: int) -> int:
    """Tokens of the longest piece that a row takes, by `Examples.room`.

    Raises:
      ConfigError: it takes none.
    """

    def fits(length: int) -> bool:
        return bool(room(np.array([length]))[0] <= sequence_length)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise ConfigError(
            f"data.sequence_length={sequence_length} has no room for a token of text beside what the"
            f" objective adds ({int(room(np.array([1]))[0])} places for one); raise it"
        )
    return low


def generator(draw: Integer[np.ndarray, " 3"]) -> np.random.Generator:
    """The random numbers of one row: counter-based, so that any row can be made without those before it."""
    seed, purpose, place = (int(number) for number in draw)
    key = np.array([seed, place], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, purpose]))

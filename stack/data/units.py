"""Records as texts that see themselves alone: how tasks read them, and how they lie in rows."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, Int64, Integer

from stack.config.errors import StackError
from stack.data.examples import Encoded, Plain
from stack.data.fields import Field
from stack.data.records import fields_of
from stack.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from stack.data.dataset import Dataset

LEAST = 16
"""Places of a row that a unit takes at least, so that a row's number of units has a bound."""
_BEGINS, _SECOND = 1 << 30, 1 << 29
"""Marks beside a value: a unit begins here; from here on it is its second part."""
MOST_VALUE = _SECOND - 1
"""What a mark has room for."""


class Span(NamedTuple):
    """Characters of a part whose tokens have a value; of two spans on one token the bits of both."""

    start: int
    end: int
    first: int
    """Of the first token that has any of them."""
    rest: int
    """Of the others."""


class Part(NamedTuple):
    """A text of a unit."""

    text: str
    spans: Sequence[Span] = ()
    last: int = 0
    """The value of its last token."""
    is_apart: bool = True
    """Whether the end of a text stands behind it; the part after that is of another type."""
    are_apart: bool = False
    """Whether no token may have values of two spans."""


class Unit(NamedTuple):
    """Parts that see each other, and no other unit."""

    parts: Sequence[Part]
    value: int = 0
    """Of its first token, the one that begins a text."""


@runtime_checkable
class UnitReader(Protocol):
    """Finds the units of a record."""

    @property
    def key(self) -> str:
        """Names all that decides what it finds."""
        ...

    def __call__(self, record: dict[str, Any], place: str, *, labelled: bool) -> Sequence[Unit]:
        """The units, in order.

        Args:
          record: as JSON gives it.
          place: of it.
          labelled: whether what is to be predicted is read; if not, values are 0.

        Raises:
          StackError: the record has none; with its place.
        """
        ...


class Tokens(NamedTuple):
    """A part as tokens."""

    ids: Integer[np.ndarray, " tokens"]
    marks: Int32[np.ndarray, " tokens"]
    last: int
    """The value of the last one, whichever that is."""
    is_apart: bool


class Fitted(NamedTuple):
    """A record as a row has room for it."""

    parts: list[Encoded]
    """None where it is left out, several where it is read in parts."""
    is_cut: bool
    """Whether some of it is read nowhere."""


class Read(NamedTuple):
    """A unit as tokens."""

    parts: Sequence[Tokens]
    value: int


type Fit = Callable[[list[Read], int, str], list[list[Read]]]
"""(units of a record, tokens that they are too many, place) -> the units of records that fit, or none."""


@dataclass(frozen=True, kw_only=True)
class UnitEncoder:
    """Tokens of records in units; see `stack.data.examples.Encoder`."""

    tokenizer: Tokenizer
    reader: UnitReader
    sequence_length: int
    fit: Fit
    """What is done with a record that is too long."""
    fit_key: str
    """Names it."""
    labelled: bool = True
    apart: bool = False
    """Whether each unit stands by itself, as a record of its own."""

    @property
    def key(self) -> str:
        """The reader, and what is done with long ones."""
        return json.dumps(["units 1", self.reader.key, self.sequence_length, self.fit_key, self.labelled])

    def __call__(self, records: Sequence[str]) -> list[Sequence[Encoded]]:
        """Tokens and marks of each record; none: it is too long; several: it is read in parts."""
        return [made.parts for made in self.encode(records)]

    def encode(self, records: Sequence[str]) -> list["Fitted"]:
        """The same, and whether something was left out."""
        places = [getattr(record, "place", "a record") for record in records]
        units = [self._units(record, place) for record, place in zip(records, places, strict=True)]
        parts = [
            (part, place)
            for some, place in zip(units, places, strict=True)
            for unit in some
            for part in unit.parts
        ]
        tokens = iter(tokenize(self.tokenizer, parts))
        made = []
        for some, place in zip(units, places, strict=True):
            whole = [Read([next(tokens) for _ in unit.parts], unit.value) for unit in some]
            fitted: list[list[Read]] = []
            is_cut = False
            for some_units in [[unit] for unit in whole] if self.apart else [whole]:
                beyond = sum(map(stored, some_units)) - self.sequence_length
                own = [some_units] if beyond <= 0 else self.fit(some_units, beyond, place)
                is_cut |= beyond > 0 and len(own) < 2
                fitted += own
            made.append(Fitted([self._join(each) for each in fitted], is_cut))
        return made

    def _units(self, record: str, place: str) -> Sequence[Unit]:
        units = self.reader(fields_of(record, place), place, labelled=self.labelled)
        for part in (part for unit in units for part in unit.parts):
            if not part.text.strip():
                raise StackError(f"{place}: one of its texts is empty; write one, or remove the line")
            try:
                part.text.encode()
            except UnicodeEncodeError as error:
                raise StackError(
                    f"{place}: one of its texts holds half of a surrogate pair at character {error.start};"
                    " mend the line"
                ) from error
        return units

    def _join(self, units: Sequence[Read]) -> Encoded:
        bos, eos = self.tokenizer.bos, self.tokenizer.eos
        ids: list[np.ndarray] = []
        marks: list[np.ndarray] = []
        for unit in units:
            ids.append(np.array([bos], np.int32))
            marks.append(np.array([unit.value | _BEGINS], np.int32))
            second = 0
            for number, part in enumerate(unit.parts):
                ids.append(part.ids.astype(np.int32))
                marks.append(part.marks | second)
                marks[-1][-1:] |= part.last
                if part.is_apart or number == len(unit.parts) - 1:
                    ids.append(np.array([eos], np.int32))
                    marks.append(np.array([second], np.int32))
                    second = _SECOND
        return Encoded(np.concatenate(ids)[1:-1], np.concatenate(marks).astype(np.int32))


def stored(unit: Read) -> int:
    """Tokens of a unit, those around its parts too."""
    return 1 + sum(len(part.ids) + (part.is_apart or part is unit.parts[-1]) for part in unit.parts)


def tokenize(tokenizer: Tokenizer, parts: Sequence[tuple[Part, str]]) -> list[Tokens]:
    """Ids of parts, and the values of their spans.

    Args:
      tokenizer: of the run.
      parts: each with the place of its record.

    Raises:
      StackError: a part, or a span of it, has no token, or one token is of two spans that are apart.
    """
    plain = [part.text for part, _ in parts if not part.spans]
    simple = iter(tokenizer.encode_batch(plain) if plain else [])
    made = []
    for part, place in parts:
        if part.spans:
            ids, offsets = tokenizer.encode_with_offsets(part.text)
            marks = _marks(part, offsets, place)
        else:
            ids = next(simple)
            marks = np.zeros(len(ids), np.int32)
        if not len(ids):
            raise StackError(
                f"{place}: the tokenizer reads nothing in the text {part.text!r}; write another, or remove"
                " the line"
            )
        made.append(Tokens(ids, marks, part.last, part.is_apart))
    return made


def _marks(part: Part, offsets: Integer[np.ndarray, "tokens 2"], place: str) -> Int32[np.ndarray, " tokens"]:
    marks = np.zeros(len(offsets), np.int32)
    for span in part.spans:
        within = np.flatnonzero((offsets[:, 0] < span.end) & (offsets[:, 1] > span.start))
        told = f"{part.text[span.start : span.end]!r} at character {span.start}"
        if not len(within):
            raise StackError(f"{place}: the tokenizer reads nothing in {told}; mend or remove the line")
        if part.are_apart and marks[within].any():
            raise StackError(
                f"{place}: {told} begins in the token in which another ends, and a token has one tag; join"
                " both, or leave one out"
            )
        marks[within[1:]] |= span.rest
        marks[within[:1]] |= span.first
    return marks


def shorten(units: Sequence[Read], beyond: int) -> list[Read]:
    """The same with as many tokens less at least, the last ones of the longest parts."""
    lengths = np.array([len(part.ids) for unit in units for part in unit.parts])
    left = int(lengths.sum()) - beyond
    low, high = 0, int(lengths.max())
    while low < high:  # The largest bound that takes enough away.
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(lengths, middle).sum() <= left else (low, middle - 1)

    def short(part: Tokens) -> Tokens:
        return part._replace(ids=part.ids[:low], marks=part.marks[:low])

    return [unit._replace(parts=[short(part) for part in unit.parts]) for unit in units]


def fitting(too_long: Literal["refuse", "leave_out", "cut"], sequence_length: int) -> Fit:
    """What a setting `too_long` does."""

    def fit(units: list[Read], beyond: int, place: str) -> list[list[Read]]:
        if too_long == "leave_out":
            return []
        parts = sum(len(unit.parts) for unit in units)
        if too_long == "refuse" or sequence_length < 2 * (len(units) + parts):
            raise too_long_error(place, sequence_length + beyond, sequence_length)
        return [shorten(units, beyond)]

    return fit


def too_long_error(place: str, tokens: int, sequence_length: int) -> StackError:
    """Of a record that does not fit."""
    return StackError(
        f"{place}: {tokens:,} tokens, those around its texts too, and a row has"
        f" data.sequence_length={sequence_length}; raise it, or set objective.too_long to cut or leave_out"
    )


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of records, its places side by side, [places] each."""

    tokens: np.ndarray
    segments: np.ndarray
    """Units, from 1."""
    positions: np.ndarray
    types: np.ndarray
    """0 in the first part of a unit, 1 behind it."""
    values: np.ndarray
    """What the reader said of each token."""
    records: np.ndarray
    """[units] number of the record, from 0, that each is of."""

    @property
    def num_units(self) -> int:
        """Of all its records."""
        return len(self.records)

    @property
    def unit_values(self) -> np.ndarray:
        """[units] the value of each unit's first token."""
        return self.values[self.positions == 0]


def lay_out(pieces: Sequence[np.ndarray], marks: Sequence[np.ndarray]) -> Row:
    """Stored tokens of records, with their marks, as a row."""
    empty = np.zeros(0, np.int32)
    joined = np.concatenate([empty, *marks])
    begins = (joined & _BEGINS) > 0
    segments = np.cumsum(begins)
    starts = np.maximum.accumulate(np.where(begins, np.arange(len(joined)), 0))
    per_piece = [int(((piece & _BEGINS) > 0).sum()) for piece in marks]
    return Row(
        tokens=np.concatenate([empty, *pieces]),
        segments=segments,
        positions=np.arange(len(joined)) - starts,
        types=((joined & _SECOND) > 0).astype(np.int32),
        values=joined & MOST_VALUE,
        records=np.repeat(np.arange(len(marks)), per_piece),
    )


class UnitExamples(Plain):
    """Rows of records; see `stack.data.examples.Examples`."""

    def __init__(
        self,
        encoder: UnitEncoder,
        labels: Callable[[Row], Mapping[str, np.ndarray]],
        *,
        sizes: Mapping[str, int],
        least: int,
    ) -> None:
        """What reads the records, and what is predicted of a row.

        Args:
          encoder: makes tokens of records.
          labels: of a row, those fields that are no attribute of it; no longer than the axes are.
          sizes: of the axes of the fields.
          least: places that a record takes at least.
        """
        self.encoder = encoder
        self.labels = labels
        self.sizes = sizes
        self.least = least
        self.packing = f"units 1 {least}"

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """All tokens stand in a row, the last too, and no row holds too many units."""
        return np.maximum(lengths + 1, self.least)

    def read(
        self,
        dataset: "Dataset",
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of rows by number; nothing is drawn."""
        made = [lay_out(dataset.pieces(row), dataset.marks(row)) for row in rows.tolist()]
        return self.batch(made, fields, self.sizes)

    def batch(
        self, rows: Sequence[Row], fields: Sequence[Field], sizes: Mapping[str, int]
    ) -> dict[str, np.ndarray]:
        """The fields, without `example`, of rows that are laid out, filled up to the sizes of their axes."""
        made = [self.labels(row) for row in rows]
        batch = {}
        for field in fields:
            shape = [sizes[axis] for axis in field.axes[1:]]
            if field.name != "example":
                batch[field.name] = np.full((len(rows), *shape), field.padding, field.dtype)
        for number, (row, labels) in enumerate(zip(rows, made, strict=True)):
            for name, whole in batch.items():
                values = labels[name] if name in labels else getattr(row, name)
                whole[number, : len(values)] = values
        return batch

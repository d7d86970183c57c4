"""Texts that answer others: what is given is read, what is marked is predicted."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Integer

from stack.config import Config, RecordsConfig
from stack.config.errors import StackError
from stack.data.dataset import Dataset
from stack.data.examples import Encoded, Encoder, Examples, Plain
from stack.data.fields import Field
from stack.data.records import fields_of
from stack.data.tokenizer import Tokenizer
from stack.objectives.words import Words

Part = tuple[str, bool]
"""A piece of a text, and whether it is predicted."""


@runtime_checkable
class Reader(Protocol):
    """Finds the parts of a record."""

    @property
    def key(self) -> str:
        """Names all that decides what it finds."""
        ...

    def __call__(self, record: dict[str, Any], place: str) -> Sequence[Part]:
        """The parts, in order.

        Raises:
          StackError: the record has none; with its place.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PartsEncoder:
    """Tokens of records in parts, each tokenized by itself, as what is read will be where it stands alone.

    A mark is 1 where a token is predicted: those of some parts, and the end of a record that ends with one.
    """

    tokenizer: Tokenizer
    reader: Reader
    sequence_length: int
    too_long: Literal["refuse", "leave_out", "cut"]
    marks: bool
    """Whether special words that are written out stand for themselves."""

    @property
    def key(self) -> str:
        """The reader, and what is done with long ones."""
        return json.dumps(["parts 1", self.reader.key, self.sequence_length, self.too_long, self.marks])

    def __call__(self, records: Sequence[str]) -> list[Sequence[Encoded]]:
        """Tokens and marks; none: a record that is too long."""
        places = [getattr(record, "place", "a record") for record in records]
        parts = [self._parts(record, place) for record, place in zip(records, places, strict=True)]
        texts = iter(
            self.tokenizer.encode_batch([text for some in parts for text, _ in some], marks=self.marks)
        )
        return [
            self._join([(next(texts), written) for _, written in some], place)
            for some, place in zip(parts, places, strict=True)
        ]

    def _parts(self, record: str, place: str) -> Sequence[Part]:
        parts = self.reader(fields_of(record, place), place)
        if not any(text.strip() for text, written in parts if written):
            raise StackError(
                f"{place}: nothing to predict, as what should be written is empty; remove the line"
            )
        return parts

    def _join(self, parts: Sequence[tuple[np.ndarray, bool]], place: str) -> Sequence[Encoded]:
        tokens, marks = joined(parts, self.tokenizer)
        most = self.sequence_length - 1  # Of the two that stand around them one is not read.
        if len(tokens) <= most:
            return [Encoded(tokens, marks)]
        if self.too_long == "leave_out" or (self.too_long == "cut" and not marks[: most + 1].any()):
            return []
        if self.too_long == "cut":
            return [Encoded(tokens[:most], np.append(marks[: most + 1], 0).astype(np.int32))]
        raise StackError(
            f"{place}: {len(tokens):,} tokens, and a row of data.sequence_length={self.sequence_length} has"
            f" room for {most:,}; raise it, or set objective.too_long to cut or leave_out"
        )


def joined(parts: Sequence[tuple[np.ndarray, bool]], tokenizer: Tokenizer) -> Encoded:
    """The tokens of parts, whatever their number, and marks: 1 where one is predicted."""
    tokens = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in parts)]).astype(np.int32)
    if len(tokens) and tokens[0] == tokenizer.bos:  # The template's; every document begins with one.
        first, written = parts[0]
        tokens, parts = tokens[1:], [(first[1:], written), *parts[1:]]
    if len(tokens) and tokens[-1] == tokenizer.eos:  # And ends with one.
        last, written = parts[-1]
        tokens, parts = tokens[:-1], [*parts[:-1], (last[:-1], written)]
    marks = np.repeat([0, *(written for _, written in parts)], [1, *(len(ids) for ids, _ in parts)])
    return Encoded(tokens, np.append(marks, parts[-1][1]).astype(np.int32))


class MarkedExamples(Plain):
    """Rows of records; see `stack.data.examples.Examples`."""

    packing = "records 1"

    def __init__(self, encoder: Encoder) -> None:
        """What reads the records."""
        self.encoder = encoder

    def read(
        self,
        dataset: Dataset,
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of `Dataset.read`, labels only where a token is marked; nothing is drawn."""
        batch = dataset.read(rows, fields)
        padding = next(field.padding for field in fields if field.name == "labels")
        for row, labels in zip(rows.tolist(), batch["labels"], strict=True):
            marks = [piece[1:] for piece in dataset.marks(row)]
            marked = np.concatenate([np.zeros(0, np.int32), *marks])
            labels[: len(marked)][marked == 0] = padding
        return batch


class Records(Words, ABC):
    """An objective whose documents are records in parts: subclasses say how they are read."""

    def __init__(self, config: Config) -> None:
        """The options of the objective."""
        super().__init__(config)
        assert isinstance(config.objective, RecordsConfig)
        self.records = config.objective
        self.endings = ("held_out", "sample")

    @abstractmethod
    def reader(self, tokenizer: Tokenizer) -> Reader:
        """How records are read.

        Raises:
          ConfigError: the tokenizer lacks what it takes.
        """

    def examples(self, tokenizer: Tokenizer) -> Examples:
        """Rows of records."""
        encoder = PartsEncoder(
            tokenizer=tokenizer,
            reader=self.reader(tokenizer),
            sequence_length=self.sizes["length"],
            too_long=self.records.too_long,
            marks=self.marks,
        )
        return MarkedExamples(encoder)

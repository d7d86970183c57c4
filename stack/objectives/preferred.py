"""Records of two answers of which one is preferred, as rows."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer

from stack.config.errors import StackError
from stack.data.cache import Array
from stack.data.chat import ASSISTANT, ChatTemplate, Message
from stack.data.dataset import Dataset
from stack.data.examples import Encoded
from stack.data.fields import Field
from stack.data.records import fields_of, text_at, value_at
from stack.data.tokenizer import Tokenizer
from stack.objectives.records import Part, joined

PREDICTED, SECOND = 1, 2
"""Bits of a mark: the token is predicted; the rejected text begins with it."""
type Stored = tuple[np.ndarray, np.ndarray]
"""Tokens of a text with bos and eos, and 1 where one is predicted, each [stored] int32."""


@runtime_checkable
class PairReader(Protocol):
    """Finds two texts in a record."""

    @property
    def key(self) -> str:
        """Names all that decides what it finds."""
        ...

    def __call__(self, record: dict[str, Any], place: str) -> tuple[Sequence[Part], Sequence[Part]]:
        """The parts of the preferred text and of the other, in order.

        Raises:
          StackError: the record has none; with its place.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TextPairs:
    """A prompt, and two texts that complete it."""

    prompt: str | None
    """None: each of the two holds the prompt too."""
    chosen: str
    rejected: str

    @property
    def key(self) -> str:
        """The fields."""
        return json.dumps(["texts", self.prompt, self.chosen, self.rejected])

    def __call__(self, record: dict[str, Any], place: str) -> tuple[Sequence[Part], Sequence[Part]]:
        """A prompt may be empty."""

        def text(field: str, setting: str) -> str:
            if isinstance(value_at(record, field, lambda: place, setting=setting), list):
                raise StackError(
                    f"{place}: field {field!r} holds a list, not text; set objective.kind=chat_preference if"
                    f" it is of messages, or {setting} to a text"
                )
            return text_at(record, field, lambda: place, setting=setting) or ""

        before = [] if self.prompt is None else [(text(self.prompt, "objective.prompt"), False)]
        chosen, rejected = text(self.chosen, "objective.chosen"), text(self.rejected, "objective.rejected")
        return [*before, (chosen, True)], [*before, (rejected, True)]


@dataclass(frozen=True, kw_only=True)
class ChatPairs:
    """Messages, and two answers to them."""

    template: ChatTemplate
    prompt: str | None
    """None: each of the two is a whole conversation."""
    chosen: str
    rejected: str

    @property
    def key(self) -> str:
        """The template and the fields."""
        return json.dumps(["messages", self.template.key, self.prompt, self.chosen, self.rejected])

    def __call__(self, record: dict[str, Any], place: str) -> tuple[Sequence[Part], Sequence[Part]]:
        """What the assistant says after the prompt is predicted."""
        read = partial(self._messages, record, place)
        before = [] if self.prompt is None else read(self.prompt, "objective.prompt", "user")
        said = sum(message["role"] == ASSISTANT for message in before)

        def parts(field: str, setting: str) -> Sequence[Part]:
            answer = read(field, setting, ASSISTANT)
            if before and answer[0]["role"] != ASSISTANT:
                raise StackError(
                    f"{place}: {field!r} begins with a message of {answer[0]['role']} after the prompt; set"
                    " objective.prompt=null if it holds that too"
                )
            laid_out = self.template.parts([*before, *answer], place)
            written = [number for number, (_, predicted) in enumerate(laid_out) if predicted]
            given = set(written[:said])
            return [
                (text, predicted and number not in given) for number, (text, predicted) in enumerate(laid_out)
            ]

        return parts(self.chosen, "objective.chosen"), parts(self.rejected, "objective.rejected")

    def _messages(
        self, record: dict[str, Any], place: str, field: str, setting: str, role: str
    ) -> list[Message]:
        value = value_at(record, field, lambda: place, setting=setting)
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        return self.template.check(messages, f"{place}: {field!r}", field=field, setting=setting)


@dataclass(frozen=True, kw_only=True)
class PairEncoder:
    """Tokens of both texts of a record, one after the other, each tokenized part by part.

    What both begin with is the prompt, where none is given, and not predicted: it would cancel.
    """

    tokenizer: Tokenizer
    reader: PairReader
    has_prompt: bool
    sequence_length: int
    too_long: Literal["refuse", "leave_out", "cut"]
    marks: bool
    """Whether special words that are written out stand for themselves."""

    @property
    def key(self) -> str:
        """The reader, and what is done with long ones."""
        return json.dumps(["pairs 1", self.reader.key, self.sequence_length, self.too_long, self.marks])

    def __call__(self, records: Sequence[str]) -> list[Sequence[Encoded]]:
        """Tokens and marks; none: a record that is too long."""
        places = [getattr(record, "place", "a record") for record in records]
        pairs = [
            self.reader(fields_of(record, place), place)
            for record, place in zip(records, places, strict=True)
        ]
        flat = [text for pair in pairs for parts in pair for text, _ in parts]
        ids = iter(self.tokenizer.encode_batch(flat, marks=self.marks))
        tokenized = [[[(next(ids), written) for _, written in parts] for parts in pair] for pair in pairs]
        return [
            self._join(chosen, rejected, place)
            for (chosen, rejected), place in zip(tokenized, places, strict=True)
        ]

    def _join(
        self,
        chosen: Sequence[tuple[np.ndarray, bool]],
        rejected: Sequence[tuple[np.ndarray, bool]],
        place: str,
    ) -> Sequence[Encoded]:
        first, second = self._stored(chosen), self._stored(rejected)
        self._check(chosen, rejected, first, second, place)
        if not self.has_prompt:
            shared = _shared(first[0], second[0])
            if shared is None or not (first[1][shared] and second[1][shared]):
                raise StackError(
                    f"{place}: the two differ before what is predicted, or one goes on where the other ends;"
                    " give both the same prompt, or remove the line"
                )
            first[1][:shared] = second[1][:shared] = 0
        length, most = len(first[0]) + len(second[0]) - 2, self.sequence_length
        if length > most:
            if self.too_long == "refuse":
                raise StackError(
                    f"{place}: {length:,} tokens in both texts, and a row of data.sequence_length={most} has"
                    f" room for {most:,}; raise it, or set objective.too_long to cut or leave_out"
                )
            sizes = len(first[0]) - 1, len(second[0]) - 1
            first = self._cut(first, max(most // 2, most - sizes[1]))
            second = self._cut(second, max(most // 2, most - sizes[0]))
            is_pair = first[1].any() and second[1].any() and not np.array_equal(first[0], second[0])
            if self.too_long == "leave_out" or not is_pair:
                return []
        second[1][0] |= SECOND
        tokens, marks = (np.concatenate(pair) for pair in zip(first, second, strict=True))
        return [Encoded(tokens[1:-1], marks)]

    def _stored(self, parts: Sequence[tuple[np.ndarray, bool]]) -> Stored:
        tokens, marks = joined(parts, self.tokenizer)
        whole = np.concatenate([[self.tokenizer.bos], tokens, [self.tokenizer.eos]]).astype(np.int32)
        return whole, np.array(marks, np.int32)

    def _check(
        self,
        chosen: Sequence[tuple[np.ndarray, bool]],
        rejected: Sequence[tuple[np.ndarray, bool]],
        first: Stored,
        second: Stored,
        place: str,
    ) -> None:
        for name, parts in (("chosen", chosen), ("rejected", rejected)):
            if not any(len(ids) for ids, written in parts if written):
                raise StackError(f"{place}: the {name} answer is empty; remove the line")
        if np.array_equal(first[0], second[0]):
            raise StackError(f"{place}: the chosen and the rejected answer are the same; remove the line")

    def _cut(self, text: Stored, places: int) -> Stored:
        """The beginning of a text, that takes so many places of a row; its end is not predicted then."""
        tokens, marks = text
        if len(tokens) - 1 <= places:
            return text
        end = np.array([self.tokenizer.eos], np.int32)
        return np.concatenate([tokens[:places], end]), np.append(marks[:places], np.int32(0))


def _shared(one: np.ndarray, other: np.ndarray) -> int | None:
    """Tokens that both begin with; None: all of one."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else None


@dataclass(frozen=True, kw_only=True)
class PairedExamples:
    """Rows of pairs, two segments each; see `stack.data.examples.Examples`.

    Segments 2k + 1 and 2k + 2 of a row are the preferred and the other text of its pair k.
    """

    encoder: PairEncoder
    answers: int
    """Segments of a row at most."""
    reference: Array | None = None
    """Log-probabilities of the reference, nats, [2 x pieces] float32 of the pieces of a dataset."""
    packing: str = "preferences 1"

    def encoder_of(self, task: str | None) -> PairEncoder:
        """The one there is."""
        return self.encoder

    def with_reference(self, values: Array) -> "PairedExamples":
        """The same with what the reference tells of a dataset, a number per segment."""
        return replace(self, reference=values)

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """A place for each token but the last of both texts."""
        return np.maximum(lengths - 1, 1)

    def read(
        self,
        dataset: Dataset,
        rows: Integer[np.ndarray, " rows"],
        draws: Integer[np.ndarray, "rows 3"],
        fields: Sequence[Field],
    ) -> Mapping[str, np.ndarray]:
        """The fields of rows by number; nothing is drawn, and what the reference has not told is NaN."""
        sizes = {"length": dataset.sequence_length, "answers": self.answers}
        batch: dict[str, np.ndarray] = {
            field.name: np.full((len(rows), sizes[field.axes[1]]), field.padding, field.dtype)
            for field in fields
            if len(field.axes) > 1
        }
        for number, row in enumerate(rows.tolist()):
            columns = _columns(dataset.pieces(row), dataset.marks(row))
            if "reference" in batch:
                columns["reference"] = self._reference(dataset, row)
            for name, values in batch.items():
                values[number, : len(columns[name])] = columns[name]
        return batch

    def _reference(self, dataset: Dataset, row: int) -> Float32[np.ndarray, " answers"]:
        pieces = dataset.piece_numbers(row)
        if self.reference is None:
            return np.full(2 * len(pieces), np.nan, np.float32)
        return self.reference[2 * pieces.start : 2 * pieces.stop]


def _columns(pieces: Sequence[np.ndarray], marks: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """What a row holds, without padding."""
    texts = []
    for piece, marked in zip(pieces, marks, strict=True):
        middle = int(np.flatnonzero(marked & SECOND)[0])
        texts += [(piece[:middle], marked[:middle]), (piece[middle:], marked[middle:])]
    lengths = [len(tokens) - 1 for tokens, _ in texts]
    return {
        "tokens": _flat([tokens[:-1] for tokens, _ in texts]),
        "labels": _flat([np.where(marked[1:] & PREDICTED, tokens[1:], -1) for tokens, marked in texts]),
        "segments": _flat([np.full(length, number) for number, length in enumerate(lengths, 1)]),
        "positions": _flat([np.arange(length) for length in lengths]),
    }


def _flat(parts: Sequence[np.ndarray]) -> Int32[np.ndarray, " length"]:
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)

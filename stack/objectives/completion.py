"""Supervised fine-tuning on prompts and what completes them (InstructGPT, arXiv 2203.02155, section 3.5)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer

from stack.config import CompletionConfig, Config, EncoderDecoderConfig
from stack.config.errors import StackError
from stack.data.dataset import Dataset
from stack.data.examples import Encoded, Examples
from stack.data.records import text_at
from stack.data.tokenizer import Tokenizer
from stack.objectives.pairs import TWO_ROWS, Pair, PairExamples
from stack.objectives.records import Part, PartsEncoder, Reader, Records, joined


@dataclass(frozen=True, kw_only=True)
class _Fields:
    """A text that is read and one that is predicted."""

    prompt: str
    completion: str

    @property
    def key(self) -> str:
        return json.dumps(["completion", self.prompt, self.completion])

    def __call__(self, record: dict[str, Any], place: str) -> Sequence[Part]:
        """A prompt may be empty."""
        text = partial(text_at, record, where=lambda: place)
        prompt = text(self.prompt, setting="objective.prompt") or ""
        return [(prompt, False), (text(self.completion, setting="objective.completion") or "", True)]


class Completion(Records):
    """Mean cross-entropy of what completes prompts, and of the end after it.

    An encoder reads the prompt with the end of a document, and its decoder writes what completes it.
    """

    def __init__(self, config: Config) -> None:
        """In one row for a decoder, in two for an encoder and a decoder."""
        super().__init__(config)
        assert isinstance(self.records, CompletionConfig)
        self.start: int | None = None
        if isinstance(config.model, EncoderDecoderConfig):
            self.start = config.model.start_token
            self.sizes["target_length"] = self.records.target_length or self.sizes["length"]
            self.fields = TWO_ROWS
            self.continues, self.between = False, "\n"

    def reader(self, tokenizer: Tokenizer) -> Reader:
        """Both fields."""
        assert isinstance(self.records, CompletionConfig)
        return _Fields(prompt=self.records.prompt, completion=self.records.completion)

    def prompt(self, record: dict[str, Any], place: str) -> str:
        """What of a record is read.

        Raises:
          StackError: it has no such field; with its place.
        """
        assert isinstance(self.records, CompletionConfig)
        return text_at(record, self.records.prompt, lambda: place, setting="objective.prompt") or ""

    def compare(
        self, records: Sequence[dict[str, Any]], answers: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """See `stack.objectives.metrics.texts.written`."""
        from stack.objectives.metrics.texts import written

        assert isinstance(self.records, CompletionConfig)
        field = self.records.completion
        both = [pair for pair in zip(records, answers, strict=True) if "text" in pair[1]]
        records, answers = [pair[0] for pair in both], [pair[1] for pair in both]
        wanted = [text_at(record, field, lambda: "a record") or "" for record in records]
        return written([answer["text"] for answer in answers], wanted)

    def examples(self, tokenizer: Tokenizer) -> Examples:
        """Rows of records, or a row of what is read and one of what is written."""
        if self.start is None:
            return super().examples(tokenizer)
        encoder = TwoRowsEncoder(
            tokenizer=tokenizer,
            reader=self.reader(tokenizer),
            sequence_length=self.sizes["length"],
            too_long=self.records.too_long,
            marks=self.marks,
            target_length=self.sizes["target_length"],
        )
        return TwoRowsExamples(encoder, start=self.start)


@dataclass(frozen=True, kw_only=True)
class TwoRowsEncoder(PartsEncoder):
    """The same for a row that is read, the end after it too, and a row that is written."""

    target_length: int

    @property
    def key(self) -> str:
        """The reader, and what is done with long ones."""
        return json.dumps(["two rows 1", super().key, self.target_length])

    def _join(self, parts: Sequence[tuple[np.ndarray, bool]], place: str) -> Sequence[Encoded]:
        tokens, marks = joined(parts, self.tokenizer)
        written = int(marks.sum())
        read = len(tokens) + 2 - written  # And the end, in place of bos.
        found = {"data.sequence_length": read, "objective.target_length": written}
        most = {"data.sequence_length": self.sequence_length, "objective.target_length": self.target_length}
        long = [name for name in found if found[name] > most[name]]
        if not long:
            return [Encoded(tokens, marks)]
        if self.too_long == "leave_out":
            return []
        if self.too_long == "refuse":
            name = long[0]
            what = "the prompt" if name == "data.sequence_length" else "the completion"
            raise StackError(
                f"{place}: {found[name]:,} tokens in {what}, and a row of {name}={most[name]} has room for"
                f" {most[name]:,}; raise it, or set objective.too_long to cut or leave_out"
            )
        prompt, completion = tokens[: read - 1], tokens[read - 1 :]
        prompt, cut = prompt[: self.sequence_length - 1], completion[: self.target_length]
        kept = np.arange(len(prompt) + len(cut) + 2) > len(prompt)
        kept[-1] = written <= self.target_length
        return [Encoded(np.concatenate([prompt, cut]), kept.astype(np.int32))]


class TwoRowsExamples(PairExamples):
    """Pairs of records; see `stack.data.examples.Examples`."""

    def __init__(self, encoder: TwoRowsEncoder, *, start: int) -> None:
        """What reads the records, and the word that what is written begins after."""
        self.encoder = encoder
        self.start = start
        self.end = encoder.tokenizer.eos
        self.most = encoder.sequence_length, encoder.target_length
        self.length: int = encoder.sequence_length
        self.target_length: int | None = encoder.target_length
        self.packing = f"two rows 1 {encoder.target_length}"

    def room(self, lengths: Int64[np.ndarray, " pieces"]) -> Int64[np.ndarray, " pieces"]:
        """Places of the first row where both rows are as full as they can be."""
        return -(-lengths * self.length // sum(self.most))

    def places(
        self, lengths: Int64[np.ndarray, " pieces"], marked: Int64[np.ndarray, " pieces"]
    ) -> Int64[np.ndarray, " pieces"]:
        """Places of the first row that keep what is read, and what is written, within theirs."""
        length, target_length = self.most
        return np.maximum(lengths - marked + 1, -(-marked * length // target_length))

    def pairs(self, dataset: Dataset, row: int, draw: Integer[np.ndarray, " 3"]) -> list[Pair]:
        """What is read, with the end, and what is marked; nothing is drawn."""
        pieces = zip(dataset.pieces(row), dataset.marks(row), strict=True)
        return [self._pair(piece, marks > 0) for piece, marks in pieces]

    def _pair(self, piece: np.ndarray, is_written: np.ndarray) -> Pair:
        first = int(np.argmax(is_written))
        read = np.append(piece[1:first], np.int32(self.end))
        return Pair(read=read, written=piece[is_written])

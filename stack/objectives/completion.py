"""Supervised fine-tuning on prompts and what completes them (InstructGPT, arXiv 2203.02155, section 3.5)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from stack.config import CompletionConfig
from stack.data.records import text_at
from stack.data.tokenizer import Tokenizer
from stack.objectives.records import Part, Reader, Records


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
    """Mean cross-entropy of what completes prompts, and of the end after it."""

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
        wanted = [text_at(record, field, lambda: "a record") or "" for record in records]
        return written([answer["text"] for answer in answers], wanted)

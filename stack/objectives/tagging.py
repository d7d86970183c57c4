"""Tags of tokens, by begin, inside and outside (BIO); a linear head on every token (BERT, section 5.3)."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.config.tasks import TaggingConfig
from stack.data.fields import Field
from stack.data.records import text_at, value_at
from stack.data.tokenizer import Tokenizer
from stack.data.units import Part, Row, Span, Unit
from stack.objectives.classification import apply_head, cross_entropy, linear_head
from stack.objectives.labels import check_labels, label_name, label_number
from stack.objectives.task import ROW, Answer, Asked, Record, Task, drop

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.stack import Execution
    from stack.objectives.protocol import Sums


_WITHIN = re.compile(r"\w\w")
"""Both sides of a place within a word."""


class Entity(NamedTuple):
    """What has a label, from a place to before another: tokens, or characters."""

    start: int
    end: int
    label: int


@dataclass(frozen=True, kw_only=True)
class Entities:
    """Reads a text, and what stands where in it."""

    options: TaggingConfig

    @property
    def key(self) -> str:
        """All options that it reads."""
        return json.dumps(["tagging", self.options.text, self.options.entities, self.options.labels])

    def __call__(self, record: dict[str, Any], place: str, *, labelled: bool) -> Sequence[Unit]:
        """One unit of one part."""
        text = text_at(record, self.options.text, lambda: place, setting="objective.text") or ""
        if not labelled:
            return [Unit([Part(text)])]
        labels = check_labels(self.options.labels)
        spans, end = [], 0
        for entity in sorted(self.entities(record, place), key=lambda each: each["start"]):
            begin, after = entity["start"], entity["end"]
            if not 0 <= begin < after <= len(text):
                raise StackError(
                    f"{place}: an entity from character {begin} to {after} is not within the text of"
                    f" {len(text)}; mend or remove the line"
                )
            if begin < end:
                raise StackError(
                    f"{place}: the entity at character {begin} begins before the one before it ends; a token"
                    " has one tag: leave one of them out"
                )
            if not text[begin:after].strip():
                raise StackError(
                    f"{place}: the entity at character {begin} is white space alone; mend or remove the line"
                )
            if self.options.whole_words and (cuts_word(text, begin) or cuts_word(text, after)):
                raise StackError(
                    f"{place}: the entity {text[begin:after]!r} at character {begin} is a part of a word;"
                    " mend the line, or set objective.whole_words=false"
                )
            name = label_name(entity["label"], place, f"{self.options.entities}.label")
            number = label_number(name, labels, place)
            spans.append(Span(begin, after, 1 + 2 * number, 2 + 2 * number))
            end = after
        return [Unit([Part(text, spans, are_apart=True)], value=1)]

    def names(self, record: dict[str, Any], place: str) -> list[str]:
        """Labels of its entities."""
        field = f"{self.options.entities}.label"
        return [label_name(each["label"], place, field) for each in self.entities(record, place)]

    def entities(self, record: dict[str, Any], place: str) -> list[dict[str, Any]]:
        """As they are written."""
        field = self.options.entities
        found = value_at(record, field, lambda: place, setting="objective.entities")
        wanted = {"start": int, "end": int, "label": (str, int, float, bool)}
        if not isinstance(found, list) or any(
            not isinstance(each, dict)
            or any(not isinstance(each.get(name), kind) for name, kind in wanted.items())
            or any(isinstance(each[name], bool) for name in ("start", "end"))
            for each in found
        ):
            raise StackError(
                f"{place}: field {field!r} is no list of objects with start, end (characters) and label"
            )
        return found


class Tagging(Task):
    """Mean cross-entropy of the tags of tokens."""

    axis: ClassVar[str] = "length"
    labels = (Field(name="labels", axes=ROW, padding=-1),)

    def __init__(self, config: Config) -> None:
        """The options."""
        assert isinstance(config.objective, TaggingConfig)
        self.options = config.objective
        super().__init__(config)
        self.sizes["classes"] = 1 + 2 * len(self.options.labels)

    def reader(self) -> Entities:
        """Of texts and entities."""
        return Entities(options=self.options)

    def head(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """A row for outside, and two for each label."""
        return linear_head(self.model, 1 + 2 * len(check_labels(self.options.labels)), rngs)

    def label(self, row: Row) -> Mapping[str, np.ndarray]:
        """The tag of every token of a text, none of those around it."""
        known = np.repeat(row.unit_values, np.bincount(row.segments)[1:]) > 0
        around = (row.positions == 0) | (np.diff(row.segments, append=0) != 0)
        return {"labels": np.where(known & ~around, row.values, -1)}

    def read_out(
        self, model: Any, hidden: "jax.Array", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """`scores`, [batch, length, classes]."""
        hidden = drop(hidden, self.task.head_dropout, run)
        return {"scores": apply_head(self.head_of(model), hidden, run, "length")}

    def losses(
        self, scores: "Mapping[str, jax.Array]", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, Sums]":
        """Cross-entropy; `accuracy` of `number` tokens."""
        return cross_entropy(scores["scores"], batch["labels"], smoothing=self.options.label_smoothing)

    def count(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Tokens that have a tag."""
        return (batch["labels"] >= 0).sum(dtype="float32")

    def measure(self, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """Exact entities: precision, recall and entity_f1, over all labels; accuracy of tags."""
        known = outputs["labels"] >= 0
        guessed = np.where(known, outputs["scores"].argmax(-1), -1)
        found = wanted = right = 0
        for row in range(len(guessed)):
            # What stands between texts has the tag -1, so entities of two never join.
            mine, true = set(entities(guessed[row])), set(entities(outputs["labels"][row]))
            found, wanted, right = found + len(mine), wanted + len(true), right + len(mine & true)
        return {
            "accuracy": float((guessed == outputs["labels"])[known].mean()),
            "precision": right / max(1, found),
            "recall": right / max(1, wanted),
            "entity_f1": 2 * right / max(1, found + wanted),
        }

    def answer(self, asked: Asked, tokenizer: Tokenizer) -> Answer:
        """`entities`: start and end, characters of the text, label and the text itself."""
        text = str(text_at(dict(asked.record), self.options.text, lambda: "a record"))
        _, offsets = tokenizer.encode_with_offsets(text)
        scores = asked.outputs[0]["scores"][1:-1]
        tags = tags_of_words(scores, words(text, offsets)) if self.options.whole_words else scores.argmax(-1)
        told = []
        for entity in entities(tags):
            start, end = trimmed(text, int(offsets[entity.start, 0]), int(offsets[entity.end - 1, 1]))
            if start < end:
                label = self.options.labels[entity.label]
                told.append({"start": start, "end": end, "label": label, "text": text[start:end]})
        return {"entities": told}

    def compare(self, records: Sequence[Record], answers: Sequence[Answer]) -> dict[str, float]:
        """Tells precision, recall and entity_f1 by characters, of all that a text has, cut or not."""
        found = wanted = right = 0
        for record, answer in zip(records, answers, strict=True):
            true = {_by_characters(each) for each in self.reader().entities(dict(record), "a record")}
            mine = {_by_characters(each) for each in answer.get("entities", [])}
            found, wanted, right = found + len(mine), wanted + len(true), right + len(mine & true)
        return {
            "characters_precision": right / max(1, found),
            "characters_recall": right / max(1, wanted),
            "characters_entity_f1": 2 * right / max(1, found + wanted),
        }


def cuts_word(text: str, place: int) -> bool:
    """Whether the characters on both sides of a place in a text are of one word."""
    return 0 < place < len(text) and bool(_WITHIN.fullmatch(text[place - 1 : place + 1]))


def words(text: str, offsets: np.ndarray) -> np.ndarray:
    """[tokens] int64: the number, from 0, of the word that each token is of, or of a token by itself.

    Args:
      text: any.
      offsets: [tokens, 2] characters where each token begins and ends.
    """
    ends = [0, *(int(end) for _, end in offsets[:-1])]
    # Tokens of bytes may share a letter.
    goes_on = [
        cuts_word(text, int(begin)) or begin < end for (begin, _), end in zip(offsets, ends, strict=False)
    ]
    return np.cumsum(np.logical_not(goes_on), dtype=np.int64) - 1


def tags_of_words(scores: np.ndarray, words: np.ndarray) -> np.ndarray:
    """[tokens] tags of which those of a word are one label's, the likeliest of all its tokens together.

    Args:
      scores: [tokens, 1 + 2 labels]: outside, and of each label one that begins and one that goes on.
      words: [tokens] of `words`.
    """
    chances = scores - np.logaddexp.reduce(scores, axis=-1, keepdims=True)
    tags = np.zeros(len(scores), np.int64)
    for number in range(words[-1] + 1 if len(words) else 0):
        (places,) = np.nonzero(words == number)
        # Behind the first token a label goes on, whether it began here or before.
        behind = chances[places[1:]].sum(0)
        first = chances[places[0]] + np.concatenate([behind[:1], np.repeat(behind[2::2], 2)])
        tags[places[0]] = best = int(first.argmax())
        tags[places[1:]] = best + best % 2  # Tags that begin are odd.
    return tags


def _by_characters(entity: Mapping[str, Any]) -> tuple[int, int, str]:
    return entity["start"], entity["end"], label_name(entity["label"], "a record", "label")


def entities(tags: np.ndarray) -> list[Entity]:
    """Entities that tags [tokens] spell; one that begins with an inside begins there."""
    made: list[Entity] = []
    start, label = -1, -1
    for place, tag in enumerate([*tags.tolist(), 0]):
        goes_on = tag > 0 and tag % 2 == 0 and (tag - 2) // 2 == label
        if start >= 0 and not goes_on:
            made.append(Entity(start, place, label))
            start, label = -1, -1
        if tag > 0 and start < 0:
            start, label = place, (tag - 1) // 2
    return made


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Characters from a place to before another, without white space around."""
    part = text[start:end]
    return start + len(part) - len(part.lstrip()), end - (len(part) - len(part.rstrip()))

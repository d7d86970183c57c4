"""Answers that are spans of passages: where one begins and ends (BERT, arXiv 1810.04805, section 4.2)."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.config.tasks import AnswersConfig
from stack.data.fields import Field
from stack.data.records import text_at, value_at
from stack.data.tokenizer import Tokenizer
from stack.data.units import Fit, Part, Read, Row, Span, Unit
from stack.objectives.classification import apply_head, linear_head, one_hot
from stack.objectives.tagging import trimmed
from stack.objectives.task import ROW, UNITS, Answer, Asked, Task, drop, units

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.stack import Execution
    from stack.objectives.protocol import Sums

_MOST_ANSWERS = 28
"""Of a record, that a mark has a bit for."""
_NONE, _SOME = 1, 2
"""Of a record, or a part of it: it has no answer, it has one."""
_NAMED = 27
"""Bits of the number that parts of one record share."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Reads a question, its passage and the answers in it."""

    options: AnswersConfig

    @property
    def key(self) -> str:
        """All options that it reads."""
        return json.dumps(["span answers", self.options.question, self.options.context, self.options.answers])

    def __call__(self, record: dict[str, Any], place: str, *, labelled: bool) -> Sequence[Unit]:
        """One unit of two parts; bit i of a token's value: it is within answer i."""
        text = partial(text_at, record, where=lambda: place)
        question = text(self.options.question, setting="objective.question") or ""
        context = text(self.options.context, setting="objective.context") or ""
        name = hashlib.blake2b(json.dumps([question, context]).encode(), digest_size=4).digest()
        number = int.from_bytes(name) % (1 << _NAMED)
        spans = list(self._answers(record, context, place)) if labelled else []
        state = (_SOME if spans else _NONE) if labelled else 0
        return [Unit([Part(question), Part(context, spans)], value=number << 2 | state)]

    def _answers(self, record: dict[str, Any], context: str, place: str) -> Iterator[Span]:
        field = self.options.answers
        found = value_at(record, field, lambda: place, setting="objective.answers")
        wanted = {"start": int, "text": str}
        if not isinstance(found, list) or any(
            not isinstance(each, dict)
            or any(not isinstance(each.get(name), kind) for name, kind in wanted.items())
            or isinstance(each["start"], bool)
            for each in found
        ):
            raise StackError(
                f"{place}: field {field!r} is no list of objects with start, a character of the passage,"
                " and text"
            )
        found = list({(each["start"], each["text"]): each for each in found}.values())
        if len(found) > _MOST_ANSWERS:
            raise StackError(
                f"{place}: field {field!r} has {len(found)} answers, and {_MOST_ANSWERS} are read at most;"
                " leave some out"
            )
        for number, answer in enumerate(found):
            start, text = answer["start"], answer["text"]
            if not text.strip() or start < 0 or context[start : start + len(text)] != text:
                there = context[max(0, start) : max(0, start) + len(text)]
                raise StackError(
                    f"{place}: answer {text!r} is not in the passage at character {start}, where {there!r}"
                    " stands; mend or remove the line"
                )
            yield Span(start, start + len(text), 1 << number, 1 << number)


class Best(NamedTuple):
    """The best span of a part, by places of its row."""

    score: float
    """Of its begin and its end together, nats."""
    start: int
    end: int
    """Its last place."""
    none: float
    """The score of no answer."""


class SpanAnswers(Task):
    """Mean cross-entropy of where an answer begins and of where it ends, no answer at the first token."""

    axis: ClassVar[str] = "length"
    labels = (
        Field(name="start", axes=UNITS, padding=-1),
        Field(name="end", axes=UNITS, padding=-1),
        Field(name="record", axes=UNITS, padding=-1),
        Field(name="answers", axes=ROW, padding=-1),
    )

    def __init__(self, config: Config) -> None:
        """The options."""
        assert isinstance(config.objective, AnswersConfig)
        self.options = config.objective
        super().__init__(config)
        self.sizes["classes"] = 2

    def reader(self) -> Questions:
        """Of questions, passages and answers."""
        return Questions(options=self.options)

    @property
    def fit(self) -> tuple[Fit, str]:
        """Windows of a passage, or as it is with others."""
        if self.options.too_long != "windows":
            return super().fit
        length, stride = self.sizes["length"], self.options.stride

        def fit(units: list[Read], _: int, place: str) -> list[list[Read]]:
            (question, context), value = units[0]
            room = self._room(len(question.ids))
            if room < 2 * stride:
                raise StackError(
                    f"{place}: the question of {len(question.ids):,} tokens leaves {max(0, room)} of"
                    f" data.sequence_length={length} for its passage, which is less than twice"
                    f" objective.stride={stride}; raise the first, or lower the second"
                )
            made = []
            for start in window_starts(len(context.ids), room, stride):
                marks = context.marks[start : start + room]
                # Only what is whole in a window answers there.
                whole = sum(
                    1 << bit
                    for bit in range(_MOST_ANSWERS)
                    if 0 < (context.marks >> bit & 1).sum() == (marks >> bit & 1).sum()
                )
                state = value & 3 if value & 3 != _SOME or whole & 1 else _NONE
                part = context._replace(ids=context.ids[start : start + room], marks=marks & whole)
                made.append([Read([question, part], value & ~3 | state)])
            if value & 3 == _SOME and all(each[0].value & 3 != _SOME for each in made):
                raise StackError(
                    f"{place}: its first answer of {(context.marks & 1).sum():,} tokens lies whole in no"
                    f" window; raise objective.stride={stride}, or data.sequence_length={length}"
                )
            return made

        return fit, json.dumps(["windows", stride])

    def _room(self, question: int) -> int:
        """Tokens of a passage beside a question of so many."""
        return self.sizes["length"] - question - 3

    def head(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """Scores of begin and of end."""
        return linear_head(self.model, 2, rngs, bias=False)

    def label(self, row: Row) -> Mapping[str, np.ndarray]:
        """Places of the first answer, and which answers each token of a passage is within."""
        ends = np.diff(row.segments, append=0) != 0
        first = row.positions == 0
        bits = np.where((row.types == 1) & ~ends, row.values, np.where(first, 0, -1))
        values = row.unit_values
        start, end = np.full((2, row.num_units), -1)
        for unit in range(row.num_units):
            here = np.flatnonzero(row.segments == unit + 1)
            within = here[(bits[here] > 0) & (bits[here] & 1 > 0)]
            state = values[unit] & 3
            if state == _NONE:
                start[unit] = end[unit] = here[0]
            elif state == _SOME:
                start[unit], end[unit] = within[0], within[-1]
        return {"start": start, "end": end, "record": values >> 2, "answers": bits}

    def read_out(
        self, model: Any, hidden: "jax.Array", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """`scores`, [batch, length, 2]."""
        hidden = drop(hidden, self.task.head_dropout, run)
        return {"scores": apply_head(self.head_of(model), hidden, run, "length")}

    def losses(
        self, scores: "Mapping[str, jax.Array]", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, Sums]":
        """Half of the cross-entropies of begin and end; `accuracy` of `number` units with both right."""
        import jax
        import jax.numpy as jnp

        able = units(batch, self.num_units(batch)) & (batch["answers"] >= 0)[:, None, :]
        loss, right = jnp.zeros(()), jnp.ones_like(batch["start"], bool)
        for number, name in enumerate(("start", "end")):
            each = jnp.where(able, scores["scores"][:, None, :, number], -1e30)
            wanted = one_hot(batch[name], batch["tokens"].shape[1])
            loss -= (wanted * jax.nn.log_softmax(each)).sum() / 2
            right &= ((each == each.max(-1, keepdims=True)) & (wanted > 0)).any(-1)
        known = (batch["start"] >= 0).sum(dtype=jnp.float32)
        return loss, {"accuracy": right.sum(dtype=jnp.float32), "number": known}

    def count(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Passages, or parts of them."""
        return (batch["start"] >= 0).sum(dtype="float32")

    def measure(self, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """exact_match and f1 of SQuAD 2.0, over records; of those with an answer, and without."""
        from stack.objectives.metrics.answers import compare

        found: dict[int, list[tuple[Best, str, list[str]]]] = {}
        for row, (starts, records) in enumerate(zip(outputs["start"], outputs["record"], strict=True)):
            bits, scores, tokens = (outputs[name][row] for name in ("answers", "scores", "tokens"))
            for unit in np.flatnonzero(starts >= 0):
                here = np.flatnonzero(outputs["segments"][row] == unit + 1)
                best = self._best(scores[here], bits[here] >= 0)
                text = tokenizer.decode(tokens[here[best.start] : here[best.end] + 1])
                right = [
                    tokenizer.decode(tokens[here[(bits[here] > 0) & (bits[here] >> bit & 1 > 0)]])
                    for bit in range(_MOST_ANSWERS)
                    if ((bits[here] > 0) & (bits[here] >> bit & 1 > 0)).any()
                ]
                found.setdefault(int(records[unit]), []).append((best, text, right))
        told = []
        for parts in found.values():
            best, text, _ = max(parts, key=lambda part: part[0].score)
            none = min(part[0].none for part in parts) + self.options.no_answer_bias
            right = [one for part in parts for one in part[2]]
            told.append(("" if none >= best.score else text, right))
        return compare(told)

    def _best(self, scores: np.ndarray, able: np.ndarray) -> Best:
        """Of a part, by its places from its first token on."""
        begin, end = (np.where(able, scores[:, number], -np.inf) for number in (0, 1))
        begin[0] = end[0] = -np.inf
        spans = begin[:, None] + end[None, :]
        near = np.tril(np.triu(np.ones(spans.shape, bool)), self.options.longest_answer - 1)
        spans = np.where(near, spans, -np.inf)
        start, last = np.unravel_index(spans.argmax(), spans.shape)
        return Best(float(spans.max()), int(start), int(last), float(scores[0].sum()))

    def answer(self, asked: Asked, tokenizer: Tokenizer) -> Answer:
        """`answer`, its `start` and `end`, characters of the passage; null: there is none. `score`, nats.

        The score is that of the best answer over that of none.
        """
        text = partial(text_at, dict(asked.record), where=lambda: "a record")
        context = str(text(self.options.context))
        question = tokenizer.encode_batch([str(text(self.options.question))])[0]
        ids, offsets = tokenizer.encode_with_offsets(context)
        room, before = self._room(len(question)), len(question) + 2
        starts = window_starts(len(ids), room, self.options.stride) if len(ids) > room else [0]
        best: tuple[float, int, int] = (-np.inf, 0, 0)
        none = np.inf
        for row, outputs, first in zip(asked.rows, asked.outputs, starts, strict=True):
            here = self._best(outputs["scores"], self.label(row)["answers"] >= 0)
            none = min(none, here.none)
            best = max(best, (here.score, first + here.start - before, first + here.end - before))
        score = best[0] - none - self.options.no_answer_bias
        if score <= 0:
            return {"answer": None, "start": None, "end": None, "score": round(float(score), 4)}
        begin, end = trimmed(context, int(offsets[best[1], 0]), int(offsets[best[2], 1]))
        return {"answer": context[begin:end], "start": begin, "end": end, "score": round(float(score), 4)}


def window_starts(tokens: int, room: int, stride: int) -> list[int]:
    """Where windows of a passage begin that does not fit: each shares `stride` tokens with the next."""
    step = room - stride
    return [*range(0, tokens - room, step), tokens - room]

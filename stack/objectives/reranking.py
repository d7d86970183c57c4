"""Passages by how they answer a query, both read together (monoBERT, arXiv 1901.04085)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.config.tasks import RerankingConfig
from stack.data.fields import Field
from stack.data.records import text_at, value_at
from stack.data.tokenizer import Tokenizer
from stack.data.units import Part, Row, Unit
from stack.objectives.classification import apply_head, linear_head
from stack.objectives.metrics.ranking import measure_lists
from stack.objectives.task import UNITS, Answer, Asked, Record, Task, drop, pool

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.stack import Execution
    from stack.objectives.protocol import Sums

_UNKNOWN, _NO, _YES = 1, 2, 3
"""Of a passage: whether it answers."""


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Reads a query and its passages."""

    options: RerankingConfig

    @property
    def key(self) -> str:
        """All options that it reads."""
        o = self.options
        return json.dumps(["reranking", o.query, o.passages, o.relevant, o.most_passages])

    def __call__(self, record: dict[str, Any], place: str, *, labelled: bool) -> Sequence[Unit]:
        """A unit of two parts for each passage; with labels of so many as are trained on."""
        options = self.options
        query = text_at(record, options.query, lambda: place, setting="objective.query") or ""
        passages = value_at(record, options.passages, lambda: place, setting="objective.passages")
        if (
            not isinstance(passages, list)
            or not passages
            or any(not isinstance(one, str) for one in passages)
        ):
            raise StackError(f"{place}: field {options.passages!r} is no list of texts; give it passages")
        order = list(range(len(passages)))
        states = dict.fromkeys(order, _UNKNOWN)
        if labelled:
            relevant = value_at(record, options.relevant, lambda: place, setting="objective.relevant")
            if (
                not isinstance(relevant, list)
                or not relevant
                or any(type(number) is not int or number not in states for number in relevant)
            ):
                raise StackError(
                    f"{place}: field {options.relevant!r} is no list of numbers of passages, from 0 to"
                    f" {len(passages) - 1}, one at least; mend or remove the line"
                )
            states = {number: _YES if number in relevant else _NO for number in order}
            order.sort(key=lambda number: states[number] != _YES)
            order = sorted(order[: options.most_passages])
        return [Unit([Part(query), Part(passages[number])], value=states[number]) for number in order]


class Reranking(Task):
    """Mean cross-entropy of the passages that answer among those of their query."""

    labels = (Field(name="labels", axes=UNITS, padding=-1), Field(name="records", axes=UNITS, padding=-1))

    stands_apart: ClassVar[bool] = True

    def __init__(self, config: Config) -> None:
        """The options."""
        assert isinstance(config.objective, RerankingConfig)
        self.options = config.objective
        super().__init__(config)
        self.sizes["classes"] = 1

    def reader(self) -> Lists:
        """Of queries and passages."""
        return Lists(options=self.options)

    def head(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """One score."""
        return linear_head(self.model, 1, rngs, bias=False)

    def label(self, row: Row) -> Mapping[str, np.ndarray]:
        """Whether each passage answers, -1 where nobody says; and its record."""
        values = row.unit_values
        return {"labels": np.where(values >= _NO, values - _NO, -1), "records": row.records}

    def read_out(
        self, model: Any, hidden: "jax.Array", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """`scores`, [batch, units]."""
        hidden = pool(hidden, batch, self.num_units(batch), self.pooling, run)
        if self.pools_by_model:
            hidden = model.pool(hidden, run.layout)
        scores = apply_head(self.head_of(model), drop(hidden, self.task.head_dropout, run), run, "units")
        return {"scores": scores[..., 0]}

    def losses(
        self, scores: "Mapping[str, jax.Array]", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, Sums]":
        """Of each query, over those that answer; `accuracy`: of `number` queries one of them is the first."""
        import jax
        import jax.numpy as jnp

        logits, relevant = scores["scores"], batch["labels"] > 0
        together = self._together(batch)
        each = jnp.where(together, logits[:, None, :], -1e30)
        answers = (together & relevant[:, None, :]).sum(-1, dtype=jnp.float32).clip(1.0)
        loss = (jnp.where(relevant, jax.nn.logsumexp(each, axis=-1) - logits, 0.0) / answers).sum()
        # The first of those that score highest, once a query.
        best = relevant & (logits == each.max(-1))
        right = (best / (together & best[:, None, :]).sum(-1).clip(1)).sum(dtype=jnp.float32)
        return loss, {"accuracy": right, "number": self.count(batch)}

    def _together(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Which passages are of one query, [batch, units, units] bool."""
        records, known = batch["records"], batch["labels"] >= 0
        same = records[:, :, None] == records[:, None, :]
        return same & known[:, :, None] & known[:, None, :]

    def count(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Queries."""
        import jax.numpy as jnp

        relevant = batch["labels"] > 0
        answers = (self._together(batch) & relevant[:, None, :]).sum(-1, dtype=jnp.float32).clip(1.0)
        return (relevant / answers).sum()

    def measure(self, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """Mrr and ndcg_at_10 over queries."""
        scores, relevant = [], []
        for row in range(len(outputs["labels"])):
            labels, records = outputs["labels"][row], outputs["records"][row]
            for record in np.unique(records[labels >= 0]):
                here = (records == record) & (labels >= 0)
                scores.append(outputs["scores"][row][here])
                relevant.append(labels[here] > 0)
        return measure_lists(scores, relevant)

    def answer(self, asked: Asked, tokenizer: Tokenizer) -> Answer:
        """`order`: numbers of passages, the best first; `scores` of all, as they come."""
        scores = np.concatenate([outputs["scores"] for outputs in asked.outputs])
        order = np.argsort(-scores, kind="stable")
        return {"order": order.tolist(), "scores": [round(float(score), 6) for score in scores]}

    def least_rows(self, record: Record) -> int:
        """One for each passage."""
        return len(value_at(dict(record), self.options.passages, lambda: "a record", setting=""))  # pyrefly: ignore[bad-argument-type]

    def compare(self, records: Sequence[Record], answers: Sequence[Answer]) -> dict[str, float]:
        """Tells mrr and ndcg_at_10 of whole lists, where an evaluation has `most_passages` of each."""
        scores, relevant = [], []
        for record, answer in zip(records, answers, strict=True):
            if "scores" in answer:
                field = self.options.relevant
                right: Any = value_at(dict(record), field, lambda: "a record", setting="objective.relevant")
                scores.append(np.array(answer["scores"]))
                relevant.append(np.isin(np.arange(len(scores[-1])), right))
        return {f"whole_{name}": value for name, value in measure_lists(scores, relevant).items()}

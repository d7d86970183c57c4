"""Sentences that tell the most (BertSum, arXiv 1903.10318): each is scored at its last token."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.config.tasks import KeySentencesConfig
from stack.data.fields import Field
from stack.data.records import text_at, value_at
from stack.data.tokenizer import Tokenizer
from stack.data.units import Fit, Part, Read, Row, Unit, too_long_error
from stack.objectives.classification import apply_head, linear_head
from stack.objectives.task import ROW, Answer, Asked, Record, Task, drop

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.stack import Execution
    from stack.objectives.protocol import Sums

_UNKNOWN, _NO, _YES = 1, 2, 3
"""Of a sentence's last token: whether it is in the summary."""


@dataclass(frozen=True, kw_only=True)
class Sentences:
    """Reads the sentences of a text."""

    options: KeySentencesConfig

    @property
    def key(self) -> str:
        """All options that it reads."""
        return json.dumps(["key sentences", self.options.sentences, self.options.labels])

    def __call__(self, record: dict[str, Any], place: str, *, labelled: bool) -> Sequence[Unit]:
        """One unit, a part for each sentence."""
        sentences = self.sentences(record, place)
        states = [_UNKNOWN] * len(sentences)
        if labelled:
            labels = self.labels(record, place)
            if len(labels) != len(sentences):
                raise StackError(
                    f"{place}: {len(labels)} labels for {len(sentences)} sentences; give as many"
                )
            states = [_YES if label else _NO for label in labels]
        parts = [
            Part(text if number == 0 else f" {text}", last=state, is_apart=False)
            for number, (text, state) in enumerate(zip(sentences, states, strict=True))
        ]
        return [Unit(parts)]

    def sentences(self, record: Mapping[str, Any], place: str) -> list[str]:
        """As they are written."""
        field = self.options.sentences
        found = value_at(dict(record), field, lambda: place, setting="objective.sentences")
        if not isinstance(found, list) or not found or any(not isinstance(each, str) for each in found):
            raise StackError(f"{place}: field {field!r} is no list of sentences; give it texts")
        return found

    def labels(self, record: Mapping[str, Any], place: str) -> list[int]:
        """Whether each sentence is in the summary."""
        field = self.options.labels
        found = value_at(dict(record), field, lambda: place, setting="objective.labels")
        if not isinstance(found, list) or any(label not in (0, 1) for label in found):
            raise StackError(f"{place}: field {field!r} is no list of 0 and 1, one for each sentence")
        return found


class KeySentences(Task):
    """Mean cross-entropy of whether sentences are in the summary."""

    axis: ClassVar[str] = "length"
    labels = (Field(name="labels", axes=ROW, padding=-1),)

    def __init__(self, config: Config) -> None:
        """The options."""
        assert isinstance(config.objective, KeySentencesConfig)
        self.options = config.objective
        super().__init__(config)
        self.sizes["classes"] = 1

    def reader(self) -> Sentences:
        """Of sentences and labels."""
        return Sentences(options=self.options)

    @property
    def fit(self) -> tuple[Fit, str]:
        """`cut` leaves out the sentences that do not fit, the last ones."""
        if self.options.too_long != "cut":
            return super().fit
        length = self.sizes["length"]

        def fit(units: list[Read], _: int, place: str) -> list[list[Read]]:
            parts, value = units[0]
            ends = np.cumsum([len(part.ids) for part in parts])
            number = int(np.searchsorted(ends, length - 2, side="right"))
            if not number:
                raise too_long_error(f"{place}: its first sentence", int(ends[0]) + 2, length)
            return [[Read(parts[:number], value)]]

        return fit, "whole sentences"

    def head(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """One score."""
        return linear_head(self.model, 1, rngs)

    def label(self, row: Row) -> Mapping[str, np.ndarray]:
        """0 or 1 at the last token of each sentence; -2 where nobody says, -1 at other tokens."""
        values = np.where(row.positions == 0, 0, row.values)
        return {"labels": np.select([values >= _NO, values == _UNKNOWN], [values - _NO, -2], -1)}

    def read_out(
        self, model: Any, hidden: "jax.Array", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """`scores`, [batch, length]."""
        hidden = drop(hidden, self.task.head_dropout, run)
        return {"scores": apply_head(self.head_of(model), hidden, run, "length")[..., 0]}

    def losses(
        self, scores: "Mapping[str, jax.Array]", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, Sums]":
        """Cross-entropy of yes and no; `accuracy` of `number` sentences."""
        import jax
        import jax.numpy as jnp

        logits, labels = scores["scores"], batch["labels"]
        known = labels >= 0
        loss = ((jax.nn.softplus(logits) - labels * logits) * known).sum()
        right = ((logits > 0) == (labels > 0)) & known
        return loss, {"accuracy": right.sum(dtype=jnp.float32), "number": known.sum(dtype=jnp.float32)}

    def count(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """Sentences that have a label."""
        return (batch["labels"] >= 0).sum(dtype="float32")

    def measure(self, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """Tells precision_at_k and recall_at_k of the `taken` best; lead_precision_at_k of the first ones.

        Where a summary has fewer, precision is over as many as it has.
        """
        precision, recall, lead = [], [], []
        for row in range(len(outputs["labels"])):
            labels, segments = outputs["labels"][row], outputs["segments"][row]
            for unit in range(1, int(segments.max(initial=0)) + 1):
                here = (segments == unit) & (labels >= 0)
                true, scores = labels[here] > 0, outputs["scores"][row][here]
                if true.any():
                    k = min(self.options.taken, len(true))
                    best = np.argsort(-scores, kind="stable")[:k]
                    precision.append(true[best].sum() / min(k, true.sum()))
                    recall.append(true[best].sum() / true.sum())
                    lead.append(true[:k].sum() / min(k, true.sum()))
        told = {"precision_at_k": precision, "recall_at_k": recall, "lead_precision_at_k": lead}
        return {name: float(np.mean(values)) for name, values in told.items() if values}

    def answer(self, asked: Asked, tokenizer: Tokenizer) -> Answer:
        """`sentences`: numbers of the best, in their order; `summary`: their text; `scores` of all."""
        sentences = self.reader().sentences(asked.record, "a record")
        last = self.label(asked.rows[0])["labels"] == -2
        scores = asked.outputs[0]["scores"][last]
        best = sorted(np.argsort(-scores, kind="stable")[: self.options.taken].tolist())
        shares = 1 / (1 + np.exp(-np.float64(scores)))
        return {
            "sentences": best,
            "summary": " ".join(sentences[number] for number in best),
            "scores": [round(float(share), 6) for share in shares],
        }

    def compare(self, records: Sequence[Record], answers: Sequence[Answer]) -> dict[str, float]:
        """ROUGE of extracts, of as many first sentences, and of those of the labels (the oracle)."""
        from stack.objectives.metrics.texts import rouge

        told: dict[str, float] = {}
        both = [pair for pair in zip(records, answers, strict=True) if "summary" in pair[1]]
        records, answers = [pair[0] for pair in both], [pair[1] for pair in both]
        reader, taken = self.reader(), self.options.taken
        texts = [reader.sentences(record, "a record") for record in records]
        labels = [reader.labels(record, "a record") for record in records]
        oracle = [
            " ".join(text for text, label in zip(some, each, strict=True) if label)
            for some, each in zip(texts, labels, strict=True)
        ]
        wanted = oracle
        if self.options.summary is not None:
            field = self.options.summary
            wanted = [text_at(dict(record), field, lambda: "a record") or "" for record in records]
            told |= {f"oracle_{name}": value for name, value in rouge(oracle, wanted).items()}
        lead = [" ".join(some[:taken]) for some in texts]
        told |= {f"lead_{name}": value for name, value in rouge(lead, wanted).items()}
        return rouge([answer["summary"] for answer in answers], wanted) | told

"""Classification of texts and of pairs (BERT, arXiv 1810.04805, section 4.1): a linear head on one vector."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.config.tasks import ClassificationConfig
from stack.data.fields import Field
from stack.data.records import text_at, value_at
from stack.data.tokenizer import Tokenizer
from stack.data.units import Part, Row, Unit
from stack.objectives.labels import check_labels, label_name, label_number
from stack.objectives.task import UNITS, Answer, Asked, Task, drop, pool

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.stack import Execution
    from stack.objectives.protocol import Sums

_HALF = 28
"""Labels of several that one mark has room for."""
_LOW = (1 << _HALF) - 1


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Reads a text or a pair, and its label or labels."""

    options: ClassificationConfig

    @property
    def key(self) -> str:
        """All options that it reads."""
        o = self.options
        return json.dumps(["classification", o.text, o.second, o.label, o.multi_label, o.labels])

    def __call__(self, record: dict[str, Any], place: str, *, labelled: bool) -> Sequence[Unit]:
        """One unit."""
        text = partial(text_at, record, where=lambda: place)
        texts = [text(self.options.text, setting="objective.text") or ""]
        if self.options.second is not None:
            texts.append(text(self.options.second, setting="objective.second") or "")
        parts = [Part(text) for text in texts]
        if not labelled:
            return [Unit(parts)]
        labels = check_labels(self.options.labels)
        numbers = [label_number(name, labels, place) for name in self.names(record, place)]
        if not self.options.multi_label:
            return [Unit(parts, value=1 + numbers[0])]
        bits = sum(1 << number for number in set(numbers))
        parts[-1] = parts[-1]._replace(last=bits >> _HALF)
        return [Unit(parts, value=(bits & _LOW) << 1 | 1)]

    def names(self, record: dict[str, Any], place: str) -> list[str]:
        """Its labels, as they are written."""
        field = self.options.label
        value = value_at(record, field, lambda: place, setting="objective.label")
        if not self.options.multi_label:
            if isinstance(value, list):
                raise StackError(
                    f"{place}: field {field!r} is a list, and a record has one label; set"
                    " objective.multi_label=true"
                )
            return [label_name(value, place, field)]
        if not isinstance(value, list):
            raise StackError(f"{place}: field {field!r} is no list of labels; give it one, empty for none")
        return [label_name(each, place, field) for each in value]


class Classification(Task):
    """Mean cross-entropy of labels, weighted; of several labels that of each as a yes or no."""

    def __init__(self, config: Config) -> None:
        """The options, and fields as there are one or several labels."""
        assert isinstance(config.objective, ClassificationConfig)
        self.options = config.objective
        axes = (*UNITS, "classes") if self.options.multi_label else UNITS
        self.labels = (Field(name="labels", axes=axes, padding=-1),)
        super().__init__(config)
        self.sizes["classes"] = len(self.options.labels)

    def reader(self) -> Texts:
        """Of texts and labels."""
        return Texts(options=self.options)

    def head(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """A row of weights for each label."""
        return linear_head(self.model, len(check_labels(self.options.labels)), rngs)

    def label(self, row: Row) -> Mapping[str, np.ndarray]:
        """A number, or a 0 or 1 of each label."""
        values = row.unit_values
        if not self.options.multi_label:
            return {"labels": values - 1}
        ends = np.flatnonzero(np.diff(row.segments, append=0))
        bits = (values >> 1).astype(np.int64) | row.values[ends - 1].astype(np.int64) << _HALF
        each = bits[:, None] >> np.arange(self.sizes["classes"]) & 1
        return {"labels": np.where(values[:, None] & 1, each, -1)}

    def read_out(
        self, model: Any, hidden: "jax.Array", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """`scores`, [batch, units, classes]."""
        hidden = pool(hidden, batch, self.num_units(batch), self.pooling, run)
        if self.pools_by_model:
            hidden = model.pool(hidden, run.layout)
        return {
            "scores": apply_head(self.head_of(model), drop(hidden, self.task.head_dropout, run), run, "units")
        }

    def losses(
        self, scores: "Mapping[str, jax.Array]", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, Sums]":
        """Cross-entropy, weighted; `accuracy` of `number` labels."""
        import jax
        import jax.numpy as jnp

        logits, labels, smoothing = scores["scores"], batch["labels"], self.options.label_smoothing
        if self.options.multi_label:
            wanted = (labels > 0) * (1 - smoothing) + smoothing / 2
            each = jax.nn.softplus(logits) - wanted * logits
            right, known = (logits > 0) == (labels > 0), labels >= 0
            loss = (each * known).sum() / self.sizes["classes"]
            plain = jax.nn.softplus(logits) - (labels > 0) * logits
            return loss, {
                "plain": (plain * known).sum(),
                "accuracy": (right & known).sum(dtype=jnp.float32),
                "number": known.sum(dtype=jnp.float32),
            }
        return cross_entropy(logits, labels, smoothing=smoothing, weights=self._class_weights())

    def count(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """The weights of the labels; of several labels the records."""
        if self.options.multi_label:
            return (batch["labels"] >= 0).sum(dtype="float32") / self.sizes["classes"]
        return (one_hot(batch["labels"], self.sizes["classes"]) * self._class_weights()).sum()

    def _class_weights(self) -> "float | jax.Array":
        import jax.numpy as jnp

        weights = self.options.class_weights
        return 1.0 if isinstance(weights, str) else jnp.array(weights, jnp.float32)

    def measure(self, outputs: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, float]:
        """See `stack.objectives.metrics.classes`."""
        from stack.objectives.metrics.classes import measure_one, measure_several

        names = self.options.labels
        if self.options.multi_label:
            known = outputs["labels"][..., 0] >= 0
            return measure_several(_sigmoid(outputs["scores"][known]), outputs["labels"][known], names)
        known = outputs["labels"] >= 0
        return measure_one(_softmax(outputs["scores"][known]), outputs["labels"][known], names)

    def answer(self, asked: Asked, tokenizer: Tokenizer) -> Answer:
        """`label`, or `labels` of a probability of a half and more; `probabilities` of all."""
        scores = asked.outputs[0]["scores"][0]
        names = self.options.labels
        if self.options.multi_label:
            shares = _sigmoid(scores)
            some = [name for name, share in zip(names, shares, strict=True) if share >= 0.5]
            return {"labels": some, "probabilities": _named(names, shares)}
        shares = _softmax(scores)
        return {"label": names[int(shares.argmax())], "probabilities": _named(names, shares)}


def linear_head(model: Any, number: int, rngs: "nnx.Rngs", *, bias: bool = True) -> "nnx.Module":
    """A linear map from a hidden state to so many scores; a bias that a softmax takes out is left out."""
    from stack.layers.linear import Linear

    inputs, outputs = (("embed", model.embed_dim),), (("classes", number),)
    return Linear(inputs, outputs, bias=bias, std=model.init_std, rngs=rngs)


def apply_head(head: Any, hidden: "jax.Array", run: "Execution", axis: str) -> "jax.Array":
    """Scores of hidden states, [batch, axis, embed] -> [batch, axis, classes] float32."""
    import jax.numpy as jnp

    from stack.parallel.zero import gather_at_use

    head = gather_at_use(head, run.layout)
    return head(hidden, run.layout, ("batch", axis, "classes")).astype(jnp.float32)


def cross_entropy(
    logits: "jax.Array", labels: "jax.Array", *, smoothing: float, weights: "float | jax.Array" = 1.0
) -> "tuple[jax.Array, Sums]":
    """The sum of the cross-entropies of labels, times their weights; how many of which `number` are right.

    `plain` is the same sum without weights and smoothing, which is what is told.

    Args:
      logits: [..., classes] float32.
      labels: [...] int32; -1: there is none.
      smoothing: share of a target that is spread over all classes.
      weights: [classes] float32.
    """
    import jax
    import jax.numpy as jnp

    targets = one_hot(labels, logits.shape[-1])
    smooth = targets * (1 - smoothing) + smoothing / logits.shape[-1]
    shares = jax.nn.log_softmax(logits)
    loss = -((smooth * shares).sum(-1) * (targets * weights).sum(-1)).sum()
    best = (logits == logits.max(-1, keepdims=True)) & (targets > 0)
    right = best.any(-1).sum(dtype=jnp.float32)
    return loss, {"plain": -(targets * shares).sum(), "accuracy": right, "number": targets.sum()}


def one_hot(labels: "jax.Array", number: int) -> "jax.Array":
    """[...] int32 -> [..., number] float32; of -1 zeros."""
    import jax.numpy as jnp

    return (labels[..., None] == jnp.arange(number, dtype=labels.dtype)).astype(jnp.float32)


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(np.float64(scores) - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _sigmoid(scores: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -np.float64(scores)))


def _named(names: Sequence[str], shares: np.ndarray) -> dict[str, float]:
    return {name: round(float(share), 6) for name, share in zip(names, shares, strict=True)}

"""What all tasks share: a trunk, a head on it, and labelled records.

Who prepares data needs no JAX, so what computes is imported where it does.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.config.tasks import PooledConfig, TaskConfig
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer
from stack.data.units import LEAST, Fit, Row, UnitEncoder, UnitExamples, UnitReader, fitting
from stack.objectives.words import EXAMPLE, ROW

if TYPE_CHECKING:
    import jax
    from flax import nnx

    from stack.models.protocol import Model
    from stack.models.stack import Execution
    from stack.objectives.protocol import Outputs, Sums

UNITS = ("batch", "units")
READ = tuple(
    Field(name=name, axes=ROW, padding=0) for name in ("tokens", "segments", "positions", "prefix", "types")
)
"""What the trunk reads; the last two are not of every trunk."""
type Record = Mapping[str, Any]
type Answer = dict[str, Any]
"""What is predicted of a record, plain values for JSON."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A record that something is predicted of, and the rows that it was read as."""

    record: Record
    rows: Sequence[Row]
    outputs: Sequence[Mapping[str, np.ndarray]]
    """Of each row, without padding."""


class Task(ABC):
    """An objective with a head of its own; its labels come with records."""

    endings: tuple[str, ...] = ("task",)
    stands_apart: ClassVar[bool] = False
    """Whether each unit is scored by itself, so that a record that is asked has a row for each."""
    axis: ClassVar[str] = "units"
    """What there are scores of in a row: units, or places (`length`)."""
    continues: ClassVar[bool] = True
    between: ClassVar[str] = ""
    marks: ClassVar[bool] = False
    labels: tuple[Field, ...]
    """What of a batch is predicted."""

    name: str | None = None
    """Of one task of several."""

    def __init__(self, config: Config) -> None:
        """The options of the task and of its trunk."""
        assert isinstance(config.objective, TaskConfig)
        self.task = config.objective
        self.model = config.model
        length, units = config.data.sequence_length, self.task.units
        self.packed = config.data.packed
        self.dropout_rates: tuple[float, ...] = (self.task.head_dropout,)
        number = max(units, units * (length // (units * LEAST))) if self.packed else units
        self.sizes: dict[str, int] = {"length": length, "units": number, "masked": 0, "target_length": 0}
        has_types = self.model.shape == "encoder" and getattr(self.model, "num_types", 0) > 1
        more = [
            field for field, read in zip(READ[3:], (self.task.bidirectional, has_types), strict=True) if read
        ]
        self.fields = (*READ[:3], *more, *self.labels, EXAMPLE)

    @abstractmethod
    def reader(self) -> UnitReader:
        """How records are read."""

    @abstractmethod
    def head(self, rngs: "nnx.Rngs") -> "nnx.Module":
        """What stands on the trunk, in float32."""

    @abstractmethod
    def label(self, row: Row) -> Mapping[str, np.ndarray]:
        """The fields of `labels` of a row."""

    @abstractmethod
    def read_out(
        self, model: "Any", hidden: "jax.Array", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """What the head makes of hidden states, float32: what the loss is of, and what is predicted from.

        Args:
          model: whose head it is.
          hidden: its last states, [batch, length, embed].
          batch: the fields.
          run: how the model is run.
        """

    @abstractmethod
    def losses(
        self, scores: "Mapping[str, jax.Array]", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[jax.Array, Sums]":
        """The sum of the losses of all that has a label, and other sums; float32."""

    @abstractmethod
    def count(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """What has a label in a batch, as it is weighed; float32."""

    @abstractmethod
    def measure(self, outputs: "Mapping[str, np.ndarray]", tokenizer: Tokenizer) -> dict[str, float]:
        """The task's metrics of rows: `score`'s arrays and the batch's fields, [rows, ...] each."""

    def least_rows(self, record: Record) -> int:
        """Rows that a record has if nothing of it is left out."""
        return 1

    @abstractmethod
    def answer(self, asked: Asked, tokenizer: Tokenizer) -> Answer:
        """What is predicted of a record."""

    @property
    def fit(self) -> tuple[Fit, str]:
        """What is done with a record that is too long, and its name."""
        task: Any = self.task
        return fitting(task.too_long, self.sizes["length"]), task.too_long

    def encoder(self, tokenizer: Tokenizer, *, labelled: bool) -> UnitEncoder:
        """What makes tokens of records, of those that are to be predicted without labels."""
        fit, key = self.fit
        return UnitEncoder(
            tokenizer=tokenizer,
            reader=self.reader(),
            sequence_length=self.sizes["length"],
            fit=fit,
            fit_key=key,
            labelled=labelled,
            apart=self.stands_apart and not labelled,
        )

    def examples(self, tokenizer: Tokenizer) -> UnitExamples:
        """Rows of records."""
        least = self.task.units * LEAST if self.packed else 1
        encoder = self.encoder(tokenizer, labelled=True)
        return UnitExamples(
            encoder, self.row_fields, sizes=self.sizes, least=min(least, self.sizes["length"])
        )

    def row_fields(self, row: Row) -> Mapping[str, np.ndarray]:
        """What is predicted of a row, and which of its tokens all of their text see."""
        return {**self.label(row), "prefix": np.full(len(row.tokens), self.task.bidirectional, np.int32)}

    def equip(self, model: "Any", rngs: "nnx.Rngs") -> None:
        """Puts the head in the place of that over words."""
        model.leave_out_words(pooler=self.pools_by_model)
        model.task = self.head(rngs)

    def num_units(self, batch: "Mapping[str, jax.Array]") -> int:
        """Units that a batch has room for in a row."""
        return next(batch[field.name].shape[1] for field in self.labels if "units" in field.axes)

    @property
    def pooling(self) -> str:
        """Whose hidden state stands for a text."""
        assert isinstance(self.task, PooledConfig)
        if self.task.pooling != "auto":
            return self.task.pooling
        if self.task.bidirectional:
            return "mean"
        return {"decoder": "last", "encoder": "first", "encoder_decoder": "mean"}[self.model.shape]

    @property
    def pools_by_model(self) -> bool:
        """Whether the model has a layer for that."""
        has_pooler = self.model.shape == "encoder" and getattr(self.model, "pooler", False)
        return isinstance(self.task, PooledConfig) and self.pooling == "first" and bool(has_pooler)

    def ask(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> Sequence[str]:
        """There is nothing to write.

        Raises:
          StackError: always.
        """
        raise StackError(
            f"objective.kind={self.kind} writes no text; ask it with: stack predict RUN --input FILE.jsonl"
        )

    @property
    def kind(self) -> str:
        """As the config names it."""
        return str(getattr(self.task, "kind", ""))

    def head_of(self, model: Any) -> Any:
        """This task's head."""
        return model.task if self.name is None else getattr(model.task, self.name)

    def score(
        self, model: "Any", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "dict[str, jax.Array]":
        """What the head makes of a batch; see `read_out`."""
        return self.read_out(model, model.encode(batch, run), batch, run)

    def divisor(self, batch: "Mapping[str, jax.Array]") -> "jax.Array":
        """What has a label in a batch, at least a millionth."""
        return self.count(batch).clip(1e-6)

    def loss(
        self, model: "Model", batch: "Mapping[str, jax.Array]", run: "Execution", divisor: "jax.Array"
    ) -> "tuple[jax.Array, Sums]":
        """The loss over the divisor; its sum, and what it is of."""
        loss, sums = self.losses(self.score(model, batch, run), batch, run)
        return loss / divisor, sums | self._totals(loss, batch)

    def judge(
        self, model: "Model", batch: "Mapping[str, jax.Array]", run: "Execution"
    ) -> "tuple[Sums, Outputs]":
        """The same sums, and what metrics are made of: the scores, and what of the batch is no word."""
        scores = self.score(model, batch, run)
        loss, sums = self.losses(scores, batch, run)
        fields = {field.name: batch[field.name] for field in (*READ[:2], *self.labels)}
        return sums | self._totals(loss, batch), {**fields, **scores}

    def _totals(self, loss: "jax.Array", batch: "Mapping[str, jax.Array]") -> "Sums":
        tokens = (batch["segments"] > 0).sum(dtype="float32")
        return {"nll": loss, "count": self.count(batch), "tokens": tokens}

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """`loss` (nats per label, without weights and smoothing), `tokens` read, and `accuracy`."""
        told = {"loss": sums["nll"] / sums["count"].clip(1e-6), "tokens": sums["tokens"]}
        if "plain" in sums:
            told["loss"] = sums["plain"] / sums["number"].clip(1.0)
        if "accuracy" in sums:
            told["accuracy"] = sums["accuracy"] / sums["number"].clip(1.0)
        return told

    def evaluate(
        self,
        sums: Mapping[str, float],
        outputs: "Mapping[str, np.ndarray]",
        *,
        tokenizer: Tokenizer,
        num_bytes: float | None,
    ) -> dict[str, float]:
        """Loss, and the task's own metrics.

        Raises:
          StackError: there is no label.
        """
        if not sums["count"]:
            raise StackError(
                f"objective.kind={self.kind} finds no label in the held-out rows; hold out more records"
            )
        loss = sums["nll"] / sums["count"]
        if "plain" in sums:
            loss = sums["plain"] / sums["number"]
        return {"loss": loss, **self.measure(outputs, tokenizer)}


def units(batch: "Mapping[str, jax.Array]", number: int) -> "jax.Array":
    """Which places are of which unit, [batch, units, length] bool.

    Args:
      batch: segments, [batch, length] int32.
      number: of units of a row.
    """
    import jax.numpy as jnp

    return batch["segments"][:, None, :] == 1 + jnp.arange(number, dtype=jnp.int32)[None, :, None]


def pool(
    hidden: "jax.Array", batch: "Mapping[str, jax.Array]", number: int, how: str, run: "Execution"
) -> "jax.Array":
    """A vector of each unit, [batch, units, embed] in the dtype of the hidden states; of none zeros.

    Args:
      hidden: [batch, length, embed].
      batch: segments and positions, [batch, length] int32.
      number: of units of a row.
      how: `first`, `last` or `mean`.
      run: layout.
    """
    import jax.numpy as jnp

    mine = units(batch, number)
    if how == "first":
        mine &= (batch["positions"] == 0)[:, None, :]
    if how == "last":
        segments = batch["segments"]
        following = jnp.concatenate([segments[:, 1:], jnp.zeros_like(segments[:, :1])], axis=1)
        mine &= (segments != following)[:, None, :]
    weights = run.layout.shard(mine.astype(hidden.dtype), "batch", "units", "length")
    summed = jnp.einsum("bul,ble->bue", weights, hidden, preferred_element_type=jnp.float32)
    places = mine.sum(2, dtype=jnp.float32).clip(1.0)[..., None]
    return run.layout.shard((summed / places).astype(hidden.dtype), "batch", "units", "embed")


def drop(x: "jax.Array", rate: float, run: "Execution") -> "jax.Array":
    """Dropout of what enters a head, [batch, ..., embed]."""
    from stack.layers.dropout import HEAD, MLP_OUT, dropout, layer_keys

    keys = None if run.keys is None else layer_keys(run.keys, HEAD)
    names = ("batch", *(None,) * (x.ndim - 1))
    return dropout(x, rate=rate, keys=keys, place=MLP_OUT, layout=run.layout, names=names)

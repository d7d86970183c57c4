"""What the step, the loader, the planner and the trainer ask of an objective."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from stack.data.examples import Examples
from stack.data.fields import Field
from stack.data.tokenizer import Tokenizer
from stack.models.protocol import Model
from stack.models.stack import Execution

type Sums = dict[str, jax.Array]
"""Float32 scalars that add up over micro-batches and batches."""

type Outputs = dict[str, jax.Array]
"""[batch, ...] each: what an evaluation needs of every row, beside the sums."""


@runtime_checkable
class Referenced(Protocol):
    """An objective that compares a model with the one that its run began with, text by text."""

    reference: str
    """The field with what that one tells, [batch, texts] float32; the examples of the objective have
    `with_reference`, which takes it of all texts of a dataset."""

    def log_probs(
        self, model: Model, batch: Mapping[str, jax.Array], run: Execution
    ) -> tuple[jax.Array, jax.Array]:
        """Log-probabilities of texts, nats, and their labels, each [batch, texts] float32."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What a model is trained for, built as `Class(config)` from the whole config.

    The class of a config's kind is named in that config's section alone.
    """

    fields: tuple[Field, ...]
    """What a batch holds: the loader makes it and the planner its abstract batch."""
    sizes: Mapping[str, int]
    """Of the axes of the fields but `batch`."""
    endings: tuple[str, ...]
    """What is shown when a run ends: names of `stack.train.watch.endings`."""
    continues: bool
    """Whether what a model writes goes on with its prompt, or is a text of its own."""
    between: str
    """What is shown between a prompt and what is written."""
    dropout_rates: Sequence[float]
    """Of what it drops itself, beside the model."""
    marks: bool
    """Whether special words written out in a prompt stand for themselves, and are shown in the answer."""

    def __init__(self, config: Any) -> None: ...

    def examples(self, tokenizer: Tokenizer) -> Examples:
        """How packed text becomes the fields.

        Raises:
          ConfigError: the tokenizer lacks a word that the objective needs.
        """
        ...

    def equip(self, model: Any, rngs: nnx.Rngs) -> None:
        """Adds to a model that is built what the objective needs beside, or takes away what it does not."""
        ...

    def ask(self, tokenizer: Tokenizer, prompts: Sequence[str]) -> Sequence[str]:
        """The texts that a model is given for prompts that a person writes.

        Raises:
          StackError: a prompt that cannot be one.
        """
        ...

    def divisor(self, batch: Mapping[str, jax.Array]) -> jax.Array:
        """What the loss of a whole batch is divided by, float32: its labels, at least 1."""
        ...

    def loss(
        self, model: Model, batch: Mapping[str, jax.Array], run: Execution, divisor: jax.Array
    ) -> tuple[jax.Array, Sums]:
        """The loss of a micro-batch, over the divisor of the whole batch, and its sums.

        Args:
          model: with weights ready for use.
          batch: the fields.
          run: how the model is run.
          divisor: of `divisor`.
        """
        ...

    def judge(self, model: Model, batch: Mapping[str, jax.Array], run: Execution) -> tuple[Sums, Outputs]:
        """What `evaluate` is made of: a batch's sums, and what is needed of each of its rows."""
        ...

    def metrics(self, sums: Mapping[str, Any]) -> dict[str, Any]:
        """What a training step tells of its sums."""
        ...

    def evaluate(
        self,
        sums: Mapping[str, float],
        outputs: Mapping[str, Any],
        *,
        tokenizer: Tokenizer,
        num_bytes: float | None,
    ) -> dict[str, float]:
        """What an evaluation tells of held-out rows.

        Args:
          sums: of all batches.
          outputs: of all rows, NumPy arrays.
          tokenizer: of the run.
          num_bytes: UTF-8 bytes of the text; None where its tokens are not all of it.
        """
        ...

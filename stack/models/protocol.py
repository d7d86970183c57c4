"""What the step, the planner and inference ask of a model."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx

from stack.models.cost import Cost
from stack.models.stack import Execution


class Output(NamedTuple):
    """What a model gives its objective."""

    hidden: jax.Array
    """[batch, length, embed] in the compute dtype, after the final norm."""
    table: jax.Array
    """[vocab, embed] in the compute dtype: the rows that hidden states are compared with."""
    bias: jax.Array | None = None
    """[vocab] float32, added to the scores of words; None: nothing is."""


@runtime_checkable
class Model(Protocol):
    """An `nnx.Module` built as `Class(config, rngs=...)`, whose parameters are declared by `parameter`.

    Its layers go through `stack.models.stack.run_layers`, its weights through `gather_at_use` where no
    layer does that. The class of a config's kind is named in that config's section alone.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs) -> None: ...

    @staticmethod
    def cost(config: Any) -> Cost:
        """The matrix products and attentions of a forward pass, of which FLOPs and planned time are read."""
        ...

    def encode(self, batch: Mapping[str, jax.Array], run: Execution) -> jax.Array:
        """The last hidden states of what is read, [batch, length, embed] in the compute dtype.

        Args:
          batch: tokens, positions and segments, [batch, length] int32.
          run: how.
        """
        ...

    def leave_out_words(self, *, pooler: bool) -> None:
        """Takes away the parameters that only score words, where a task has a head of its own.

        Args:
          pooler: whether that of a model that has one is kept.
        """
        ...

    def __call__(self, batch: Mapping[str, jax.Array], run: Execution) -> Output:
        """What the objective's loss is made of.

        Args:
          batch: the fields that the objective names.
          run: layout, kernels, dropout keys and what is kept for the backward pass.
        """
        ...

"""A moving average of the weights: noise of the last steps averages out of it (arXiv 1803.05407)."""

from typing import Any

import jax
import jax.numpy as jnp

from stack.step import guard


def average(decay: float, mean: Any, params: Any, *, applied: jax.Array, is_good: jax.Array) -> Any:
    """The moving average after a step; float32, in the places of the parameters.

    Early it looks back less far, or it would long be of the initial weights: the decay is at most
    (1 + t) / (10 + t) after t applied steps.

    Args:
      decay: share of the old average in the new one.
      mean: the old one.
      params: after the step.
      applied: steps applied before it, int32 scalar.
      is_good: whether it is applied, bool scalar; if not, the average stays, bit for bit.
    """
    share = 1.0 - jnp.minimum(decay, (1.0 + applied) / (10.0 + applied))
    new = jax.tree.map(lambda old, now: old + share * (now - old), mean, params)
    return guard.choose(is_good, new, mean)

"""Dropout whose bits are a function of (seed, step, example, layer) and of nothing else.

Every example has its own key, so its bits are the same on any layout, in any micro-batch, and when
rematerialisation draws them again.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from stack.parallel.rules import Layout

EMBEDDING, ATTENTION, ATTENTION_OUT, MLP_OUT, CROSS, CROSS_OUT = range(6)
"""The places of a layer where bits are drawn."""
HEAD = 1 << 30
"""The number of a head, as of a layer."""


def example_keys(seed: int, step: Int[Array, ""], example: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """One key per example, [batch]; `example` is its number within the step, [batch] int32."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return fold(key, example)


def fold(key: Key[Array, ""], numbers: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """`key` folded with each of `numbers`, [batch]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


def layer_keys(keys: Key[Array, " batch"], layer: Int[Array, ""] | int) -> Key[Array, " batch"]:
    """The keys of one layer, [batch]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, layer)


def dropout(
    x: Float[Array, "batch ..."],
    *,
    rate: float,
    keys: Key[Array, " batch"] | None,
    place: int,
    layout: Layout,
    names: tuple[str | None, ...],
) -> Float[Array, "batch ..."]:
    """Zeroes a share `rate` of `x` and divides the rest by 1 - rate; nothing without keys.

    Args:
      x: [batch, ...], any float dtype.
      rate: in [0, 1).
      keys: [batch] keys of this layer, or None outside training.
      place: where in the layer, so that two places draw different bits.
      layout: how things lie on the mesh.
      names: the logical axes of `x`.
    """
    if keys is None or rate == 0.0:
        return x
    keys = layer_keys(keys, place)
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(layout.shard(keep, *names), x / (1.0 - rate), jnp.zeros((), x.dtype))

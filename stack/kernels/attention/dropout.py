"""Dropout of attention weights, by bits that every kernel can make where it needs them.

A bit is a function of (seed, step, example, layer, place, head, query, key). JAX's own Threefry (a
counter-based generator: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) draws two
words for each query of each head; a mixer of 32 bits makes of them and of the key's number one word for
each key. So no array of the size of the scores is drawn or kept, and any tile of any kernel on any layout
drops the same weights.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt32

from stack.parallel.rules import Layout

GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x21F0AAAD, 0xD35A2D97
"""2^32 over the golden ratio, and the multipliers of Chris Wellons' 32-bit mixer of low bias
(github.com/skeeto/hash-prospector)."""


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Which weights of an attention are dropped."""

    rate: float
    """Share of the weights that is dropped, in (0, 1); the others are divided by 1 - rate."""
    rows: UInt32[Array, "batch heads queries 2"]
    """[batch, heads, queries, 2] uint32, random: what the bits of a query's row of weights are made of."""


def _unflatten(rate: float, arrays: tuple[Any]) -> Dropout:
    """Not through the constructor: a tree of partitions, say, is a dropout of no arrays."""
    dropout = object.__new__(Dropout)
    object.__setattr__(dropout, "rate", rate)
    object.__setattr__(dropout, "rows", *arrays)
    return dropout


jax.tree_util.register_pytree_node(Dropout, lambda dropout: ((dropout.rows,), dropout.rate), _unflatten)


def draw(keys: Key[Array, " batch"], *, rate: float, heads: int, queries: int, layout: Layout) -> Dropout:
    """The dropout of one attention, laid out as its queries are.

    Args:
      keys: [batch] keys of each example, of this layer and this place in it.
      rate: in (0, 1).
      heads: of the queries.
      queries: of a row.
      layout: how things lie on the mesh; the bits do not depend on it.
    """
    rows = jax.vmap(lambda key: jax.random.bits(key, (heads, queries, 2), jnp.uint32))(keys)
    return Dropout(rate=rate, rows=layout.shard(rows, "batch", "heads", None, None))


def keep(
    rows: UInt32[Array, "*rows queries 2"], keys: Int[Array, " keys"], rate: float
) -> Bool[Array, "*rows queries keys"]:
    """Which weights stay.

    Args:
      rows: [..., queries, 2] uint32, of `Dropout`.
      keys: [keys] int32, the numbers of the keys in their row, from 0.
      rate: of `Dropout`.

    Returns:
      [..., queries, keys] bool.
    """
    return mix(rows[..., 0, None], rows[..., 1, None], keys.astype(jnp.uint32)) < jnp.uint32(threshold(rate))


def mix(row0: jax.Array, row1: jax.Array, key: jax.Array) -> jax.Array:
    """One random word for each of three uint32 arrays that broadcast against each other.

    Elementwise, so that it may stand in a kernel: the words of a query's row and the number of a key.
    """
    x = key * jnp.uint32(GOLDEN) + row0
    x ^= x >> jnp.uint32(16)
    x *= jnp.uint32(FIRST)
    x += row1
    x ^= x >> jnp.uint32(15)
    x *= jnp.uint32(SECOND)
    return x ^ (x >> jnp.uint32(15))


def threshold(rate: float) -> int:
    """A weight is kept where its word is below this."""
    return min(round((1 - rate) * 2**32), 2**32 - 1)

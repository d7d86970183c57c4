"""Tables of vectors: words and positions."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from stack.parallel.rules import Layout


class Embedding(nnx.Module):
    """A table [rows, embed], normal with deviation `std`; rows from `used` on are zero and stay so."""

    def __init__(self, rows: tuple[str, int], embed_dim: int, *, std: float, used: int, rngs: nnx.Rngs):
        """`rows` is the name and padded size of the first axis."""
        name, size = rows
        table = std * jax.random.normal(rngs.params(), (size, embed_dim), jnp.float32)
        table = jnp.where(jnp.arange(size)[:, None] < used, table, 0.0)
        self.table = nnx.Param(table, axes=(name, "embed"))

    def __call__(self, ids: jax.Array, layout: Layout, dtype: jnp.dtype) -> jax.Array:
        """[batch, length] int32 -> [batch, residual_length, embed] in `dtype`."""
        rows = lookup(self.table[...].astype(dtype), ids, layout)
        return layout.shard(rows, "batch", "residual_length", "embed")


def lookup(table: jax.Array, ids: jax.Array, layout: Layout) -> jax.Array:
    """Rows of a table that may be split over `tensor`, [batch, length, embed].

    Inside `shard_map`, where each device reads its own rows and the rest are added as zeros: a plain
    indexed read of a split table has no sharding rule.
    """
    if layout.trivial:
        return table[ids]
    spec = jax.typeof(table).sharding.spec
    rows_split = spec.partitions[0]
    batch = layout.spec("batch", "length") or P()
    read = _read if rows_split is None else partial(_read_split, axis=rows_split)
    return jax.shard_map(read, in_specs=(spec, batch), out_specs=P(*batch))(table, ids)


def _read(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


def _read_split(table: jax.Array, ids: jax.Array, *, axis: str) -> jax.Array:
    here = ids - jax.lax.axis_index(axis) * table.shape[0]
    mine = (here >= 0) & (here < table.shape[0])
    rows = table[jnp.where(mine, here, 0)]
    return _sum_over(jnp.where(mine[..., None], rows, jnp.zeros((), table.dtype)), axis)


def _sum_over(rows: jax.Array, axis: str) -> jax.Array:
    return jax.lax.psum(rows, axis)

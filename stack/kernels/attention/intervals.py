"""Every mask as one interval of keys per query: what block-wise kernels skip and mask by.

Documents are runs of columns, and a query sees its document from some column to another: up to itself, to
the end of the prefix, or within a window. So two numbers a query tell the whole mask, and the extremes of a
block of queries tell which blocks of keys none of them sees, and which all of them see whole.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from stack.kernels.attention.mask import Mask


class Intervals(NamedTuple):
    """Each query sees the keys of columns `start` <= key < `end`; none where they are equal."""

    start: Int32[Array, "batch queries"]
    end: Int32[Array, "batch queries"]

    def allowed(self, keys: int) -> Bool[Array, "batch queries keys"]:
        """[batch, queries, keys] bool: what `Mask.allowed` says."""
        columns = jnp.arange(keys, dtype=jnp.int32)
        return (columns >= self.start[..., None]) & (columns < self.end[..., None])


class Blocks(NamedTuple):
    """For each block of one side, the blocks of the other that it meets: `first` <= block < `last`.

    Of those, `whole_first` <= block < `whole_last` are seen whole and need no mask.
    """

    first: Int32[Array, "batch blocks"]
    whole_first: Int32[Array, "batch blocks"]
    whole_last: Int32[Array, "batch blocks"]
    last: Int32[Array, "batch blocks"]


def intervals(mask: Mask) -> Intervals:
    """The intervals of a mask; queries and keys lie in the order of their columns.

    A token that sees those before it in its own row sees the columns before its own: positions count up
    within a document.

    Args:
      mask: of whole rows: each query of `causal` and `prefix`, and of every window, has its own column
        among the keys.
    """
    batch, queries = mask.query_positions.shape
    keys = mask.key_positions.shape[1]
    columns = jax.lax.broadcasted_iota(jnp.int32, (batch, queries), 1)
    key_columns = jax.lax.broadcasted_iota(jnp.int32, (batch, keys), 1)
    start, end = jnp.zeros_like(columns), jnp.full_like(columns, keys)
    prefix_end = end
    in_prefix = None if mask.prefix is None else jnp.where(mask.prefix, key_columns + 1, 0)
    if mask.query_segments is not None and mask.key_segments is not None:
        start = _by_segment("min", key_columns, mask.key_segments, mask.query_segments)
        end = _by_segment("max", key_columns + 1, mask.key_segments, mask.query_segments)
        if in_prefix is not None:
            prefix_end = _by_segment("max", in_prefix, mask.key_segments, mask.query_segments)
    elif in_prefix is not None:
        prefix_end = jnp.broadcast_to(in_prefix.max(1, keepdims=True), end.shape)
    if mask.kind == "causal":
        end = jnp.minimum(end, columns + 1)
    elif mask.kind == "prefix":
        end = jnp.minimum(end, jnp.maximum(columns + 1, prefix_end))
    if mask.window is not None:
        near = (jnp.maximum(start, columns - mask.window + 1), jnp.minimum(end, columns + mask.window))
        if mask.local is None:
            start, end = near
        else:
            start, end = (jnp.where(mask.local, *pair) for pair in zip(near, (start, end), strict=True))
    if mask.lengths is not None:
        end = jnp.minimum(end, mask.lengths[:, None].astype(jnp.int32))
    return Intervals(start, jnp.maximum(start, end))


def _by_segment(
    extreme: Literal["min", "max"], values: jax.Array, segments: jax.Array, wanted: jax.Array
) -> jax.Array:
    """For each wanted number of a document, the least or largest value of its columns; 0 for none."""
    # Numbers count from 1 and every document has a column, so there are no more than columns.
    shape = (values.shape[0], 1 + values.shape[1])
    rows = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 0)
    table = jnp.full(shape, values.shape[1] if extreme == "min" else 0, jnp.int32).at[rows, segments]
    table = table.min(values) if extreme == "min" else table.max(values)
    return jnp.take_along_axis(table, wanted, axis=1, mode="fill", fill_value=0)


def key_blocks(seen: Intervals, *, queries: int, keys: int, length: int) -> Blocks:
    """The blocks of keys that each block of queries meets, [batch, queries / `queries`] each.

    Args:
      seen: of rows whose length is a multiple of `queries`.
      queries: of a block.
      keys: of a block.
      length: keys of a row, a multiple of `keys`.
    """
    batch = seen.start.shape[0]
    start, end = (side.reshape(batch, -1, queries) for side in seen)
    sees = start < end
    first = jnp.where(sees, start, length).min(-1) // keys
    last = -(-jnp.where(sees, end, 0).max(-1) // keys)
    return _blocks(first, last, -(-start.max(-1) // keys), end.min(-1) // keys)


def query_blocks(seen: Intervals, *, queries: int, keys: int, length: int) -> Blocks:
    """The blocks of queries that each block of keys meets, [batch, length / `keys`] each; see `key_blocks`.

    Between the first and the last there may be a block that it does not meet, if queries see no key.
    """
    batch = seen.start.shape[0]
    start, end = (side.reshape(batch, -1, queries)[:, None] for side in seen)
    low = jnp.arange(0, length, keys, dtype=jnp.int32)[:, None]
    meets = ((start < low[..., None] + keys) & (end > low[..., None]) & (start < end)).any(-1)
    whole = ((start <= low[..., None]) & (end >= low[..., None] + keys)).all(-1)
    numbers = jnp.arange(meets.shape[-1], dtype=jnp.int32)
    count = len(numbers)
    first = jnp.where(meets, numbers, count).min(-1)
    last = jnp.where(meets, numbers + 1, 0).max(-1)
    # The first run of whole ones.
    whole_first = jnp.where(whole, numbers, count).min(-1)
    broken = ~whole & (numbers >= whole_first[..., None])
    return _blocks(first, last, whole_first, jnp.where(broken, numbers, count).min(-1))


def _blocks(first: jax.Array, last: jax.Array, whole_first: jax.Array, whole_last: jax.Array) -> Blocks:
    last = jnp.maximum(first, last)
    whole_first = jnp.clip(whole_first, first, last)
    whole_last = jnp.clip(whole_last, whole_first, last)
    return Blocks(first, whole_first, whole_last, last)

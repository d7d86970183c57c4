"""Relative position bias: what a score gains by the distance of its key (arXiv 1910.10683, section 2.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int

from stack.config import EncoderDecoderConfig
from stack.layers.mlp import matrix_std
from stack.layers.parameter import parameter
from stack.parallel.rules import Layout


class RelativeBias(nnx.Module):
    """A number for each head and range of distances, which all layers of a stack share."""

    def __init__(self, config: EncoderDecoderConfig, *, both_ways: bool, rngs: nnx.Rngs):
        """A table [buckets, heads] float32, used elementwise as a norm's scale is.

        Args:
          config: the buckets.
          both_ways: whether keys stand to either side, half of the buckets for each.
          rngs: for the table, normal of `matrix_std`.
        """
        self.both_ways = both_ways
        self.bounds = bounds(config.relative_buckets // (1 + both_ways), config.relative_max_distance)
        shape = (config.relative_buckets, config.num_heads)
        table = matrix_std(config, config.embed_dim) * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.table = parameter(table, axes=("buckets", "heads"), role="vector")

    def __call__(
        self, queries: int, keys: int, layout: Layout, *, first: jax.Array | int = 0
    ) -> Float32[Array, "groups heads queries keys"]:
        """What is added to the scores of columns of a row, [groups, heads, queries, keys] float32.

        Tokens of one document stand side by side, so their distance is that of their columns wherever it
        begins: rows that hold several need no bias of their own. A group is the rows of one replica, so that
        the gradient is summed over replicas once, for the table, and not for every score of every layer.

        Args:
          queries: columns that ask, side by side.
          keys: columns that answer, from the first on.
          layout: how things lie on the mesh.
          first: the column of the first query.
        """
        table = self.table[...]
        groups = math.prod(layout.size(axis) for axis in layout.mesh_axes("batch"))
        spec = layout.spec("batch", None, "heads")
        table = jax.lax.broadcast_in_dim(table, (groups, *table.shape), (1, 2), out_sharding=spec)
        distances = jnp.arange(queries + keys - 1, dtype=jnp.int32) - (queries - 1) - first
        select = jax.nn.one_hot(self.buckets(distances), self.table.shape[0], dtype=jnp.float32)
        by_distance = jnp.einsum(
            "db,gbh->ghd",
            select,
            table,
            precision="highest",
            out_sharding=layout.spec("batch", "heads", None),
        )
        return _by_row(by_distance, queries, keys)

    def buckets(self, distances: Int[Array, " distances"]) -> Int[Array, " distances"]:
        """The bucket of the distances of keys from queries, int32: below 0 before, above 0 after."""
        away = abs(distances) if self.both_ways else jnp.maximum(-distances, 0)
        bucket = (away[:, None] >= np.array(self.bounds)).sum(-1, dtype=jnp.int32)
        return bucket + jnp.where(distances > 0, len(self.bounds) + 1, 0) if self.both_ways else bucket


def bounds(buckets: int, max_distance: int) -> tuple[int, ...]:
    """The shortest distance of each bucket but the first, which begins with 0.

    Half of the buckets hold a distance each; the others grow by a constant factor up to `max_distance`.
    """
    each = buckets // 2
    growth = (max_distance / each) ** (1 / (buckets - each))
    # A power that is a whole number may come out a trifle above it.
    longer = (math.ceil(each * growth**power - 1e-6) for power in range(buckets - each))
    return (*range(1, each), *longer)


def _by_row(
    by_distance: Float32[Array, "groups heads distances"], queries: int, keys: int
) -> Float32[Array, "groups heads queries keys"]:
    """Each query's own stretch of the distances: that of the last query begins at 0.

    Rows one shorter than what is repeated slide along it by one; the transpose is a sum, not a scatter.
    """
    width = queries + keys
    row = jnp.pad(by_distance, ((0, 0), (0, 0), (0, 1)))
    rows = jnp.broadcast_to(row[:, :, None], (*row.shape[:2], queries, width))
    flat = rows.reshape(*row.shape[:2], queries * width)
    start = queries - 1
    flat = flat[..., start : start + queries * (width - 1)]
    return flat.reshape(*row.shape[:2], queries, width - 1)[..., :keys]

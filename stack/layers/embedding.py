"""Tables of vectors: words and positions."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int

from stack.layers.parameter import parameter
from stack.parallel.rules import Layout


class Embedding(nnx.Module):
    """A table [rows, embed], normal with deviation `std`; rows from `used` on are zero and stay so."""

    def __init__(
        self,
        rows: tuple[str, int],
        embed_dim: int,
        *,
        std: float,
        used: int,
        scale: float | None = None,
        rngs: nnx.Rngs,
    ):
        """`rows` is the name and padded size of the first axis; what is read is multiplied by `scale`."""
        name, size = rows
        table = std * jax.random.normal(rngs.params(), (size, embed_dim), jnp.float32)
        table = jnp.where(jnp.arange(size)[:, None] < used, table, 0.0)
        self.scale = scale
        self.table = parameter(table, axes=(name, "embed"), role="table")

    def __call__(
        self, ids: Int[Array, "batch length"], layout: Layout, dtype: jnp.dtype
    ) -> Float[Array, "batch length embed"]:
        """[batch, length] int32 -> [batch, residual_length, embed] in `dtype`, as is the scale."""
        rows = lookup(self.table[...].astype(dtype), ids, layout)
        rows = rows if self.scale is None else rows * jnp.asarray(self.scale, dtype)
        return layout.shard(rows, "batch", "residual_length", "embed")


def lookup(
    table: Float[Array, "rows embed"], ids: Int[Array, "batch length"], layout: Layout
) -> Float[Array, "batch length embed"]:
    """Rows of a table that may be split over `tensor`, [batch, length, embed].

    Inside `shard_map`, where each device reads its own rows and the rest are added as zeros: a plain
    indexed read of a split table has no sharding rule. The table's gradient is summed in float32 over the
    tokens of a device, in an order that does not change from run to run, and rounded once.

    Args:
      table: [rows, embed], any float dtype; with a mesh, gathered over `fsdp`.
      ids: [batch, length] int32, below the number of rows.
      layout: how things lie on the mesh.
    """
    spec = P() if layout.trivial else jax.typeof(table).sharding.spec
    axis = spec.partitions[0] if spec.partitions else None
    rows, dtype = table.shape[0] // (layout.size(axis) if axis else 1), table.dtype
    batch = layout.spec("batch", "length") or P()

    def read(table: jax.Array, ids: jax.Array) -> jax.Array:
        if axis is None:
            return table[ids]
        here, mine = _own(ids, rows, axis)
        return _sum_over(jnp.where(mine[..., None], table[here], jnp.zeros((), dtype)), axis)

    def add(ids: jax.Array, cotangent: jax.Array) -> jax.Array:
        if axis is not None:
            # Others' rows are added, as zeros, to a row that is cut off.
            here, mine = _own(ids, rows, axis)
            ids = jnp.where(mine, here, rows)
        gradient = sum_rows(cotangent.reshape(-1, cotangent.shape[-1]), ids.reshape(-1), rows + 1)[:rows]
        gradient = gradient.astype(dtype)
        return jax.lax.pcast(gradient, tuple(spec.reduced), to="unreduced") if spec.reduced else gradient

    @jax.custom_vjp
    def call(table: jax.Array, ids: jax.Array) -> jax.Array:
        if layout.trivial:
            return read(table, ids)
        return jax.shard_map(read, in_specs=(spec, batch), out_specs=P(*batch))(table, ids)

    def backward(ids: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, None]:
        if layout.trivial:
            return add(ids, cotangent), None
        out = P(*spec.partitions, unreduced=spec.reduced)
        return jax.shard_map(add, in_specs=(batch, P(*batch)), out_specs=out)(ids, cotangent), None

    call.defvjp(lambda table, ids: (call(table, ids), ids), backward)
    return call(table, ids)


def select(
    x: Float[Array, "batch length embed"], places: Int[Array, "batch some"], layout: Layout
) -> Float[Array, "batch some embed"]:
    """Some places of each row, [batch, some, embed]; places of one row that count are all different.

    Inside `shard_map`, where each device has its own rows whole.

    Args:
      x: [batch, length, embed], whole in length.
      places: [batch, some] int32, below the length.
      layout: how things lie on the mesh.
    """

    def read(x: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places[..., None], axis=1)

    if layout.trivial:
        return read(x, places)
    batch = layout.spec("batch") or P()
    return jax.shard_map(read, in_specs=(batch, batch), out_specs=batch)(x, places)


def sum_rows(
    values: Float[Array, "values width"], rows: Int[Array, " values"], number: int
) -> Float32[Array, "{number} width"]:
    """The sum of the values of each row, [number, width] float32, the same bits each time.

    A CPU adds them one after another. Elsewhere a scatter would add atomically, in any order, so values
    are sorted by row and each run of one row is summed by a product.

    Args:
      values: [values, width], any float dtype; all finite.
      rows: [values] int32, the row each belongs to.
      number: of rows.
    """
    return jax.lax.platform_dependent(
        values,
        rows,
        cpu=partial(_scatter_rows, number=number),
        default=partial(sum_sorted_rows, number=number),
    )


def _scatter_rows(values: jax.Array, rows: jax.Array, *, number: int) -> jax.Array:
    return jax.ops.segment_sum(values.astype(jnp.float32), rows, number)


def sum_sorted_rows(
    values: Float[Array, "values width"], rows: Int[Array, " values"], *, number: int, chunk: int = 2048
) -> Float32[Array, "{number} width"]:
    """`sum_rows` as on an accelerator: chunk by chunk times a matrix of which values are of one row."""
    # What is made of rows alone would else be made early, and kept.
    values, rows = jax.lax.optimization_barrier((values, rows))
    chunk = min(chunk, len(rows))
    padding = -len(rows) % chunk
    order = jnp.argsort(rows, stable=True)
    in_order = jnp.pad(rows[order], (0, padding), constant_values=number).reshape(-1, chunk)

    def add(sums: jax.Array, some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        order, rows = some
        same = (rows[:, None] == rows).astype(values.dtype)
        runs = jnp.matmul(same, values[order], precision="highest", preferred_element_type=jnp.float32)
        first = jnp.concatenate([jnp.ones((1,), bool), rows[1:] != rows[:-1]])
        # All but a run's first go to rows beyond the end, each to its own, and are dropped.
        target = jnp.where(first, rows, number + jnp.arange(chunk, dtype=rows.dtype))
        return sums.at[target].add(runs, mode="drop", unique_indices=True), None

    # Zeros that are made of nothing would be made before the backward pass of the last layer, and kept.
    # Inside shard_map these are each device's own, as its rows are.
    zero = jnp.minimum(rows[0], 0).astype(jnp.float32)
    sums = jnp.broadcast_to(zero, (number, values.shape[1]))
    return jax.lax.scan(add, sums, (jnp.pad(order, (0, padding)).reshape(-1, chunk), in_order))[0]


def _own(ids: jax.Array, rows: int, axis: str) -> tuple[jax.Array, jax.Array]:
    """Where ids lie in this device's rows, 0 for those that do not, and which do."""
    here = ids - jax.lax.axis_index(axis) * rows
    mine = (here >= 0) & (here < rows)
    return jnp.where(mine, here, 0), mine


def _sum_over(rows: jax.Array, axis: str) -> jax.Array:
    return jax.lax.psum(rows, axis)

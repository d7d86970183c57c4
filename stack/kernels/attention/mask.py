"""Who sees whom."""

import dataclasses
from functools import partial
from typing import Literal

import jax

Kind = Literal["causal", "full", "prefix"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "query_positions",
        "key_positions",
        "query_segments",
        "key_segments",
        "lengths",
        "prefix",
    ],
    meta_fields=["kind", "window"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys each query sees: those of its own document that its kind allows."""

    kind: Kind = "causal"
    """`causal`: keys at its own position or before; `full`: all; `prefix`: those that `causal` sees and,
    besides, all of the document's prefix (arXiv 1910.10683, section 3.2.1)."""
    window: int | None = None
    """Positions a query sees, its own included; of `full`, as many to either side. None: all."""
    query_positions: jax.Array
    """[batch, queries] int32, position within the document."""
    key_positions: jax.Array
    """[batch, keys] int32."""
    query_segments: jax.Array | None = None
    """[batch, queries] int32, number of the document within the row; None: one document per row."""
    key_segments: jax.Array | None = None
    """[batch, keys] int32."""
    lengths: jax.Array | None = None
    """[batch] int32: keys of a row that hold a token, the first ones; None: all do, or segments tell."""
    prefix: jax.Array | None = None
    """[batch, keys] bool: the keys that are in their document's prefix; read with `prefix` alone."""

    def allowed(self) -> jax.Array:
        """[batch, queries, keys] bool."""
        distance = self.query_positions[:, :, None] - self.key_positions[:, None, :]
        allowed = distance >= 0
        if self.kind == "full":
            allowed |= True
        elif self.kind == "prefix":
            if self.prefix is None:
                raise ValueError("a mask of kind prefix needs the keys that are in it")
            allowed |= self.prefix[:, None, :]
        if self.window is not None:
            allowed &= abs(distance) < self.window
        if self.query_segments is not None and self.key_segments is not None:
            allowed &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.lengths is not None:
            keys = jax.lax.broadcasted_iota(self.lengths.dtype, (1, 1, self.key_positions.shape[1]), 2)
            allowed &= keys < self.lengths[:, None, None]
        return allowed


def row_mask(
    segments: jax.Array,
    positions: jax.Array,
    *,
    packed: bool,
    kind: Kind = "causal",
    window: int | None = None,
) -> Mask:
    """The mask of whole rows, as the data makes them.

    Args:
      segments: [batch, length] int32, number of the document within the row from 1, 0 for padding.
      positions: [batch, length] int32, position within the document.
      packed: whether a row may hold several documents. If not, its one document stands at the start, so
        places are told by their columns and padding by the row's length alone.
      kind: see `Mask`; `prefix` wants more than rows tell.
      window: see `Mask`.
    """
    if packed:
        return Mask(
            kind=kind,
            window=window,
            query_positions=positions,
            key_positions=positions,
            query_segments=segments,
            key_segments=segments,
        )
    columns = jax.lax.broadcasted_iota(positions.dtype, positions.shape, 1, out_sharding=_spec(positions))
    lengths = (segments > 0).sum(1, dtype=positions.dtype)
    return Mask(kind=kind, window=window, query_positions=columns, key_positions=columns, lengths=lengths)


def _spec(x: jax.Array) -> jax.sharding.PartitionSpec | None:
    sharding = jax.typeof(x).sharding
    return sharding.spec if sharding.mesh.axis_names else None

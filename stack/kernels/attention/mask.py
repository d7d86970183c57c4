"""Who sees whom."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import jax
from jaxtyping import Array, Bool, Int

Kind = Literal["causal", "full", "prefix"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which keys each query sees: those of its own document that its kind allows."""

    kind: Kind = "causal"
    """`causal`: keys at its own position or before; `full`: all; `prefix`: those that `causal` sees and,
    besides, all of the document's prefix (arXiv 1910.10683, section 3.2.1)."""
    window: int | None = None
    """Positions a query sees, its own included; of `full`, as many to either side. None: all."""
    local: Bool[Array, ""] | None = None
    """Scalar bool: whether the window holds, where a scan over layers tells only when it runs; None: it
    does."""
    query_positions: Int[Array, "batch queries"]
    """[batch, queries] int32, position within the document."""
    key_positions: Int[Array, "batch keys"]
    """[batch, keys] int32."""
    query_segments: Int[Array, "batch queries"] | None = None
    """[batch, queries] int32, number of the document within the row; None: one document per row."""
    key_segments: Int[Array, "batch keys"] | None = None
    """[batch, keys] int32."""
    lengths: Int[Array, " batch"] | None = None
    """[batch] int32: keys of a row that hold a token, the first ones; None: all do, or segments tell."""
    prefix: Bool[Array, "batch keys"] | None = None
    """[batch, keys] bool: the keys that are in their document's prefix; read with `prefix` alone."""

    def allowed(self) -> Bool[Array, "batch queries keys"]:
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
            near = abs(distance) < self.window
            allowed &= near if self.local is None else near | ~self.local
        if self.query_segments is not None and self.key_segments is not None:
            allowed &= self.query_segments[:, :, None] == self.key_segments[:, None, :]
        if self.lengths is not None:
            keys = jax.lax.broadcasted_iota(self.lengths.dtype, (1, 1, self.key_positions.shape[1]), 2)
            allowed &= keys < self.lengths[:, None, None]
        return allowed


_STATIC = ("kind", "window")
_ARRAYS = tuple(field.name for field in dataclasses.fields(Mask) if field.name not in _STATIC)


def _flatten(mask: Mask) -> tuple[list[Any], tuple[Any, ...]]:
    return [getattr(mask, name) for name in _ARRAYS], tuple(getattr(mask, name) for name in _STATIC)


def _unflatten(static: tuple[Any, ...], arrays: Iterable[Any]) -> Mask:
    """Not through the constructor: a tree of partitions, say, is a mask of no arrays."""
    mask = object.__new__(Mask)
    for name, value in zip((*_ARRAYS, *_STATIC), (*arrays, *static), strict=True):
        object.__setattr__(mask, name, value)
    return mask


jax.tree_util.register_pytree_node(Mask, _flatten, _unflatten)


def row_mask(
    segments: Int[Array, "batch length"],
    positions: Int[Array, "batch length"],
    *,
    packed: bool,
    kind: Kind = "causal",
    window: int | None = None,
    prefix: Int[Array, "batch length"] | None = None,
) -> Mask:
    """The mask of whole rows, as the data makes them.

    Args:
      segments: [batch, length] int32, number of the document within the row from 1, 0 for padding.
      positions: [batch, length] int32, position within the document.
      packed: whether a row may hold several documents. If not, its one document stands at the start, so
        places are told by their columns and padding by the row's length alone.
      kind: see `Mask`.
      window: see `Mask`.
      prefix: [batch, length] int32, 1 for keys that are in their document's prefix; None: there is none.
    """
    make = partial(Mask, kind=kind, window=window, prefix=None if prefix is None else prefix > 0)
    if packed:
        return make(
            query_positions=positions,
            key_positions=positions,
            query_segments=segments,
            key_segments=segments,
        )
    columns = jax.lax.broadcasted_iota(positions.dtype, positions.shape, 1, out_sharding=_spec(positions))
    lengths = (segments > 0).sum(1, dtype=positions.dtype)
    return make(query_positions=columns, key_positions=columns, lengths=lengths)


def _spec(x: jax.Array) -> jax.sharding.PartitionSpec | None:
    sharding = jax.typeof(x).sharding
    return sharding.spec if sharding.mesh.axis_names else None

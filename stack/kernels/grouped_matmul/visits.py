"""Which tiles of tokens each group's weight meets: the schedule of every implementation that has tiles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


class Visits(NamedTuple):
    """Pairs of a tile of tokens and a group that has some of its rows, in the order of the rows."""

    tile: Int32[Array, " visits"]
    """Ascending. Beyond the last visit there is, the number of tiles."""
    group: Int32[Array, " visits"]
    """Ascending; groups without tokens are left out."""
    first: Int32[Array, " visits"]
    """The first row that is both the tile's and the group's, counted from the first token."""
    last: Int32[Array, " visits"]
    """One beyond the last such row; `first` where there is no visit."""


def most_visits(tokens: int, groups: int, rows: int) -> int:
    """Visits at most: each tile once, and once more for each border of two groups.

    Args:
      tokens: of all groups and beyond.
      groups: how many.
      rows: of a tile.
    """
    return -(-tokens // rows) + groups - 1


def visits(sizes: Int32[Array, " groups"], *, tokens: int, rows: int) -> Visits:
    """The visits of tiles of so many rows, as many as there are at most.

    Every row of every group is in one visit. What of `sizes` goes beyond the tokens is cut off.

    Args:
      sizes: [groups] int32, tokens of each group, which follow one another from the first row on.
      tokens: of all groups and beyond.
      rows: of a tile; the last one may have less.
    """
    begins, ends = bounds(sizes, tokens=tokens)
    first_tile = begins // rows
    counts = jnp.where(ends > begins, (ends - 1) // rows - first_tile + 1, 0)
    until = jnp.cumsum(counts)
    number = jnp.arange(most_visits(tokens, len(sizes), rows), dtype=jnp.int32)
    is_visit = number < until[-1]
    group = jnp.searchsorted(until, number, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, len(sizes) - 1)
    tile = first_tile[group] + number - (until - counts)[group]
    tile = jnp.where(is_visit, tile, -(-tokens // rows))
    first = jnp.where(is_visit, jnp.maximum(begins[group], tile * rows), 0)
    last = jnp.where(is_visit, jnp.minimum(ends[group], (tile + 1) * rows), 0)
    return Visits(tile, group, first, last)


def bounds(
    sizes: Int32[Array, " groups"], *, tokens: int
) -> tuple[Int32[Array, " groups"], Int32[Array, " groups"]]:
    """The first row of each group and one beyond its last, both at most the number of tokens."""
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    return jnp.minimum(ends - sizes, tokens), jnp.minimum(ends, tokens)


def in_group(rows: jax.Array, first: jax.Array, last: jax.Array) -> jax.Array:
    """Whether rows, by number, are those of a visit."""
    return (rows >= first) & (rows < last)

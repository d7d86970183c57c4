"""The sizes of tiles, the order in which they are computed, and what both kernels share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from stack.kernels.attention.mosaic_gpu.tiles import COMPUTE

HALF = 64
"""Rows of a result that one warpgroup computes, and depth of a step: as wide as shared memory is swizzled."""
ROWS = COMPUTE * HALF
"""Of a tile of the result."""
STAGES = 3
"""Steps whose operands shared memory holds: of 256 columns, with the results, 208 of 227 KiB."""
SWIZZLE = 128
PANEL = 16
"""Tiles of rows that are computed next to one another, column by column: 132 of them at a time read about as
many rows as columns."""


def columns_of(width: int) -> int:
    """Columns of a tile of the result; `width` is a multiple of 128."""
    return 256 if width % 256 == 0 else 128


def place(number: jax.Array, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The tile, (row, column) of so many, that is computed as the `number`th."""
    panel = lax.div(number, PANEL * columns)
    rest = lax.rem(number, PANEL * columns)
    height = jnp.minimum(PANEL, rows - panel * PANEL)
    return panel * PANEL + lax.rem(rest, height), lax.div(rest, height)


def launch(kernel: Callable[..., None], *, out_type: Any, scratch: list[Any], tiles: int) -> Any:
    """A kernel for so many tiles: two warpgroups that compute, one that copies."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(tiles,),
        grid_names=("tile",),
        num_threads=COMPUTE + 1,
        thread_name="group",
    )


class Ring:
    """The side of a warpgroup that computes of what `feed` fills.

    One product is left running while the next is begun, so that the tensor cores do not wait: a slot is free
    one step after it was read.
    """

    def __init__(self, ready: Any, free: Any, stages: int) -> None:
        self.ready, self.free, self.stages = ready, free, stages

    def slot(self, step: jax.Array) -> jax.Array:
        """Where the operands of a step are, once they are there."""
        slot = lax.rem(step, self.stages)
        plgpu.barrier_wait(self.ready.at[slot])
        return slot

    def begun(self, step: jax.Array, first: jax.Array | int = 0) -> None:
        """The product of a step is on its way, and that of the one before is done; before `first` is none."""
        plgpu.wgmma_wait(1)
        pl.when(step > first)(lambda: self.done(step - 1))

    def done(self, step: jax.Array) -> None:
        """The operands of a step have been read."""
        plgpu.barrier_arrive(self.free.at[lax.rem(step, self.stages)])


def rows_between(first: jax.Array, last: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Which rows of a matrix have a number in first .. last - 1."""
    rows = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
    return (rows >= first) & (rows < last)

"""What the kernels share."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from stack.kernels.attention.dropout import mix, threshold
from stack.kernels.attention.mosaic_gpu.sizes import COMPUTE, Tile

LOG2_E = math.log2(math.e)
ROWS = plgpu.Layout.WGMMA.reduce(1)
"""How one number for each row of a matrix lies in registers."""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What scores go through between the product and the exponential."""

    scale: float
    softcap: float | None
    dropout: float
    """Share of weights dropped."""

    @property
    def plain(self) -> bool:
        """Whether they are but scaled."""
        return self.softcap is None and not self.dropout

    def scaled(self, products: jax.Array) -> jax.Array:
        """Scores in powers of two: log2(e) x cap(scale x query key^T)."""
        if self.softcap is None:
            return products * (self.scale * LOG2_E)
        return _tanh(products * (self.scale / self.softcap)) * (self.softcap * LOG2_E)

    def kept(self, words: Sequence[jax.Array], columns: jax.Array) -> jax.Array:
        """Which weights stay; see `stack.kernels.attention.dropout.keep`."""
        first, second = words
        return mix(first, second, columns.astype(jnp.uint32)) < jnp.uint32(threshold(self.dropout))

    def slope(self, scores: jax.Array) -> jax.Array | float:
        """The derivative of scores, which are given in powers of two, by the product they are made of."""
        if self.softcap is None:
            return self.scale
        share = scores * (1 / (self.softcap * LOG2_E))
        return self.scale * (1.0 - share * share)


def _tanh(x: jax.Array) -> jax.Array:
    """By an exponential: the GPU's own approximation is right to 11 bits only."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2 * LOG2_E)))


def matrix(rows: int, columns: int, *copies: int, swizzle: int) -> Any:
    """Shared memory for so many copies of a bfloat16 matrix that tensor cores read."""
    transforms = plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM((*copies, rows, columns), jnp.bfloat16, transforms=transforms)


def swizzle_of(*sizes: int) -> int:
    """Bytes over which shared memory is permuted so that no two threads meet in a bank.

    Args:
      sizes: what all of a kernel's matrices are multiples of, rows and columns.
    """
    return next(size for size in (128, 64, 32) if not any(each % (size // 2) for each in sizes))


def zeros(rows: int, columns: int) -> jax.Array:
    """An accumulator."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), plgpu.Layout.WGMMA)


def product(left: Any, right: Any, rows: int, columns: int) -> jax.Array:
    """The product of two matrices in shared memory, float32."""

    def multiply(result: Any) -> jax.Array:
        plgpu.wgmma(result, left, right)
        return result[...]

    return pl.run_scoped(multiply, plgpu.ACC((rows, columns), jnp.float32))


def accumulate(left: jax.Array, right: Any, sums: jax.Array) -> jax.Array:
    """Adds to `sums`, in place, the product of a matrix in registers and one in shared memory."""
    if _is_interpreted.get():  # The interpreter has no sums to begin with, and no products of registers.
        sums += jnp.dot(left, right[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # A read of this kind needs it; it hides where `key_gradients` lacks its own.
        return sums

    def multiply(result: Any) -> None:
        plgpu.wgmma(result, left, right)

    return cast("jax.Array", pl.run_state(multiply)(plgpu.ACC.init(sums)))


_is_interpreted: ContextVar[bool] = ContextVar("is_interpreted", default=False)


@contextmanager
def interpreted() -> Iterator[None]:
    """What is traced within runs in Pallas's interpreter of GPUs, on a CPU; races are errors."""
    token = _is_interpreted.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
    finally:
        _is_interpreted.reset(token)


def feed(
    steps: jax.Array, stages: int, copies: Callable[[jax.Array], Iterable[tuple[Any, Any, Iterable]]]
) -> None:
    """Keeps a ring in shared memory full: what the warpgroup that copies does.

    Args:
      steps: how many there are to copy.
      stages: of the ring.
      copies: for the number of a step, groups of (ready, free, [(source, ring), ...]): barriers, one for each
        stage, that tell when a group of copies has arrived, and when both that compute have read it.
    """

    @pl.loop(0, steps)
    def _(step: jax.Array) -> None:
        slot = lax.rem(step, stages)
        for ready, free, pairs in copies(step):
            pl.when(step >= stages)(partial(plgpu.barrier_wait, free.at[slot]))
            for source, ring in pairs:
                plgpu.copy_gmem_to_smem(source, ring.at[slot], ready.at[slot])

    @pl.loop(jnp.maximum(0, steps - stages), steps)
    def _(step: jax.Array) -> None:  # Until all is read: no block of threads ends with a barrier in use.
        for _, free, _ in copies(step):
            plgpu.barrier_wait(free.at[lax.rem(step, stages)])


def spread(values: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """One number for each row (axis 0) or column (axis 1) of a matrix, in all of its places."""
    return lax.broadcast_in_dim(values, shape, [axis])


def through[T](blocks: Sequence[jax.Array], step: Callable[..., T], carry: T) -> T:
    """Takes a step for each block that is met.

    Args:
      blocks: the four numbers of `Blocks`.
      step: (number of the block, carry, masked=whether some of it is not seen) -> carry.
      carry: what the first step gets.
    """
    first, whole_first, whole_last, last = blocks
    masked, whole = (partial(step, masked=told) for told in (True, False))
    carry = lax.fori_loop(first, whole_first, masked, carry)
    carry = lax.fori_loop(whole_first, whole_last, whole, carry)
    return lax.fori_loop(whole_last, last, masked, carry)


def feed_keys(
    blocks: Sequence[jax.Array], tile: Tile, row: jax.Array, kv_head: jax.Array, *rings: tuple[Any, ...]
) -> None:
    """`feed` with the blocks of keys and of values that are met, each (source, ring, ready, free)."""
    first, _, _, last = blocks

    def copies(step: jax.Array) -> list[tuple]:
        place = (row, pl.ds((first + step) * tile.keys, tile.keys), kv_head)
        return [(ready, free, [(source.at[place], ring)]) for source, ring, ready, free in rings]

    feed(last - first, tile.stages, copies)


def launch(kernel: Callable[..., None], *, out_type: Any, scratch: list[Any], grid: tuple[int, ...]) -> Any:
    """A kernel for a grid of heads, tiles and batch: two warpgroups that compute, one that copies."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("heads", "tiles", "batch"),
        num_threads=COMPUTE + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )

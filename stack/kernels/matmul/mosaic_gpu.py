"""Products in 8 bits with a scale for each 128 of the sum, for NVIDIA's Hopper GPUs, in Pallas.

The tensor cores multiply 128 of the sum; what they give is scaled and added in float32 in registers, as in
DeepSeek-V3 (arXiv 2412.19437, section 3.3.2), so that neither a scale nor their own partial sums, of about
14 bits, reach beyond 128.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from stack.kernels.attention.mosaic_gpu.tiles import (
    COLUMNS,
    COMPUTE,
    ROWS,
    feed,
    product,
    spread,
    zeros,
)

SIZE = 128
"""Of a block of the sum, and of the tile of the result that a block of threads computes, both ways."""
_ROWS = SIZE // COMPUTE
"""Rows of a tile that a warpgroup computes."""
_BAND = 8
"""Tiles of rows that are gone through before the next column, so that the second level of cache is hit."""


def multiply(
    left: jax.Array, left_scale: jax.Array, right: jax.Array, right_scale: jax.Array, dtype: Any
) -> jax.Array:
    """The product, the second operand transposed, of which each 128 of the sum is scaled: [rows, columns].

    Args:
      left: [rows, sum] float8, all of whose sizes are multiples of 128.
      left_scale: [rows, sum / 128] float32.
      right: [columns, sum] float8.
      right_scale: [columns, sum / 128] float32; or [columns / 128, sum / 128], for squares.
      dtype: of the result, bfloat16 or float32.
    """
    (rows, length), columns = left.shape, right.shape[0]
    tiles, steps, tile = (rows // SIZE, columns // SIZE), length // SIZE, (_ROWS, SIZE)
    stages = 5 if jnp.dtype(dtype).itemsize == 2 else 4  # Of 32 KiB, beside the result, in shared memory.
    squares = right_scale.shape[0] != columns
    if squares:
        right_scale = jnp.repeat(right_scale, SIZE, axis=0)

    def kernel(*refs: Any) -> None:
        *sources, out_ref, (left_ring, right_ring, left_scales, right_scales, result), (ready, free) = refs
        group = lax.axis_index("group")
        row, column = plgpu.planar_snake(lax.axis_index("tile"), tiles, 0, _BAND)

        @pl.when(group < COMPUTE)
        def compute() -> None:
            plgpu.set_max_registers(232, action="increase")
            mine = pl.ds(group * _ROWS, _ROWS)

            def step(number: jax.Array, sums: jax.Array) -> jax.Array:
                slot = lax.rem(number, stages)
                plgpu.barrier_wait(ready.at[slot])
                of_rows = plgpu.load(left_scales.at[slot, mine], layout=ROWS)
                if squares:
                    scales = spread(of_rows * right_scales[slot, 0], tile, 0)
                else:
                    of_columns = plgpu.load(right_scales.at[slot], layout=COLUMNS)
                    scales = spread(of_rows, tile, 0) * spread(of_columns, tile, 1)
                found = product(left_ring.at[slot, mine], right_ring.at[slot].transpose((1, 0)), *tile)
                plgpu.commit_smem()  # What was read so is written anew by another path to memory.
                plgpu.barrier_arrive(free.at[slot])
                return sums + found * scales

            sums = lax.fori_loop(0, steps, step, zeros(_ROWS, SIZE))
            result[mine] = sums.astype(dtype)
            plgpu.commit_smem()
            place = pl.ds(row * SIZE + group * _ROWS, _ROWS), pl.ds(column * SIZE, SIZE)
            plgpu.copy_smem_to_gmem(result.at[mine], out_ref.at[place])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == COMPUTE)
        def copy() -> None:
            plgpu.set_max_registers(40, action="decrease")
            places = [pl.ds(index * SIZE, SIZE) for index in (row, column)]
            rings = (left_ring, right_ring), (left_scales, right_scales)

            def copies(number: jax.Array) -> list[tuple]:
                along = pl.ds(number * SIZE, SIZE)
                values = [source.at[place, along] for source, place in zip(sources[:2], places, strict=True)]
                scales = [source.at[number, place] for source, place in zip(sources[2:], places, strict=True)]
                pairs = zip((*values, *scales), (*rings[0], *rings[1]), strict=True)
                return [(ready, free, list(pairs))]

            feed(jnp.int32(steps), stages, copies)

    def ring(dtype: Any) -> Any:
        transforms = plgpu.TilingTransform((8, SIZE)), plgpu.SwizzleTransform(SIZE)
        return plgpu.SMEM((stages, SIZE, SIZE), dtype, transforms=transforms)

    memory = (
        ring(left.dtype),
        ring(right.dtype),
        plgpu.SMEM((stages, SIZE), jnp.float32),
        plgpu.SMEM((stages, SIZE), jnp.float32),
        plgpu.SMEM((SIZE, SIZE), dtype),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=stages),
    )
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, columns), dtype),
        scratch_types=[memory, barriers],
        grid=(tiles[0] * tiles[1],),
        grid_names=("tile",),
        num_threads=COMPUTE + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return run(left, right, left_scale.T, right_scale.T)

"""The gradient of the weights, on Hopper.

A block of threads has a tile of one group's gradient and goes through the group's tokens, 64 at a time. Where
some of these are another group's, they are made zero in shared memory before they are multiplied.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from stack.kernels.attention.mosaic_gpu.tiles import COMPUTE, feed, matrix, through
from stack.kernels.grouped_matmul.mosaic_gpu.tiles import (
    HALF,
    ROWS,
    STAGES,
    SWIZZLE,
    Ring,
    columns_of,
    launch,
    place,
    rows_between,
)
from stack.kernels.grouped_matmul.visits import bounds


def weight_gradient(tokens: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.WeightGradient`.

    Args:
      tokens: [tokens, inputs] bfloat16; `tokens` and `inputs` multiples of 128.
      cotangent: [tokens, outputs] bfloat16; so is `outputs`.
      sizes: [groups] int32.
    """
    length, inputs = tokens.shape
    width, groups = cotangent.shape[1], len(sizes)
    columns = columns_of(width)
    tiles = (inputs // ROWS) * (width // columns)
    begins, ends = bounds(sizes, tokens=length)
    blocks = blocks_of(begins, ends)
    order = jnp.argsort(begins - ends).astype(jnp.int32)  # The largest group takes longest: it begins first.

    def kernel(
        tokens_ref: Any,
        cotangent_ref: Any,
        begins_ref: Any,
        ends_ref: Any,
        blocks_ref: Any,
        order_ref: Any,
        out_ref: Any,
        memory: Any,
        barriers: Any,
    ) -> None:
        group = lax.axis_index("group")
        number = lax.axis_index("tile")
        mine = order_ref[lax.div(number, tiles)]
        row, column = place(lax.rem(number, tiles), inputs // ROWS, width // columns)
        met = [blocks_ref[mine, i] for i in range(4)]
        first = met[0]
        tokens_ring, cotangent_ring, out_buffer = memory
        ready, free, masked_too = barriers
        across = pl.ds(column * columns, columns)

        @pl.when(group < COMPUTE)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            ring = Ring(ready, free, STAGES)
            begin, end = begins_ref[mine], ends_ref[mine]

            def mask(ref: Any, base: jax.Array, width: int) -> None:
                for start in range(0, width, HALF):
                    part = ref.at[:, pl.ds(start, HALF)]
                    whole = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                    is_mine = rows_between(begin - base, end - base, (HALF, HALF))
                    part[...] = jnp.where(is_mine, whole, jnp.zeros_like(whole))

            def products(sums: Any) -> jax.Array:
                def step(block: jax.Array, carry: None, *, masked: bool) -> None:
                    slot = ring.slot(block - first)
                    left, right = tokens_ring.at[slot, :, pl.ds(group * HALF, HALF)], cotangent_ring.at[slot]
                    if masked:
                        mask(left, block * HALF, HALF)
                        pl.when(group == 0)(partial(mask, right, block * HALF, columns))
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(masked_too)
                        plgpu.barrier_wait(masked_too)
                    plgpu.wgmma(sums, left.transpose((1, 0)), right)
                    ring.begun(block - first)
                    return carry

                through(met, step, None)
                return sums[...]

            result = pl.run_scoped(products, plgpu.ACC((HALF, columns), jnp.float32))
            pl.when(met[3] > first)(lambda: ring.done(met[3] - first - 1))
            out = out_buffer.at[group]
            out[...] = result.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[mine, pl.ds(row * ROWS + group * HALF, HALF), across])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == COMPUTE)
        def copy() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def copies(step: jax.Array) -> list[tuple]:
                deep = pl.ds((first + step) * HALF, HALF)
                sources = (
                    (tokens_ref.at[deep, pl.ds(row * ROWS, ROWS)], tokens_ring),
                    (cotangent_ref.at[deep, across], cotangent_ring),
                )
                return [(ready, free, sources)]

            feed(met[3] - first, STAGES, copies)

    block = partial(matrix, swizzle=SWIZZLE)
    memory = (
        block(HALF, ROWS, STAGES),
        block(HALF, columns, STAGES),
        block(HALF, columns, COMPUTE),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTE),
    )
    return launch(
        kernel,
        out_type=jax.ShapeDtypeStruct((groups, inputs, width), jnp.bfloat16),
        scratch=[memory, barriers],
        tiles=groups * tiles,
    )(tokens, cotangent, begins, ends, blocks, order)


def blocks_of(begins: jax.Array, ends: jax.Array) -> jax.Array:
    """[groups, 4] int32, blocks of 64 tokens of each group in the order `through` takes them."""
    first, last = begins // HALF, -(-ends // HALF)
    last = jnp.where(ends > begins, last, first)
    whole_first = jnp.minimum(-(-begins // HALF), last)
    whole_last = jnp.maximum(ends // HALF, whole_first)
    return jnp.stack([first, whole_first, jnp.minimum(whole_last, last), last], axis=-1)

"""Tokens times the weights of their groups, on Hopper.

A block of threads has a tile of tokens and of columns. It goes through the groups that have some of these
tokens, multiplies the whole tile by each one's weight and keeps the rows that are the group's; so each number
of the result is written once, by one block, and borders of groups may lie anywhere. Two warpgroups compute,
each for half of the tokens, while a third copies operands into a ring in shared memory.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from stack.kernels.attention.mosaic_gpu.tiles import COMPUTE, feed, matrix
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
from stack.kernels.grouped_matmul.visits import visits


def multiply(tokens: jax.Array, weights: jax.Array, sizes: jax.Array, *, transposed: bool) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.Multiply`.

    Args:
      tokens: [tokens, inputs] bfloat16; `tokens` and `inputs` multiples of 128.
      weights: [groups, inputs, outputs] bfloat16; transposed, [groups, outputs, inputs]; so is `outputs`.
      sizes: [groups] int32.
      transposed: whether the weights' last axis is what is summed over.
    """
    length, inputs = tokens.shape
    width = weights.shape[1 if transposed else 2]
    columns, tiles = columns_of(width), length // ROWS
    steps = inputs // HALF
    plan = visits(sizes, tokens=length, rows=ROWS)
    number = jnp.arange(tiles + 1, dtype=jnp.int32)
    begins = jnp.searchsorted(plan.tile, number, method="compare_all").astype(jnp.int32)
    # What many groups share takes long: it begins first.
    order = jnp.argsort(begins[:-1] - begins[1:]).astype(jnp.int32)

    def kernel(
        tokens_ref: Any,
        weights_ref: Any,
        begins_ref: Any,
        order_ref: Any,
        groups_ref: Any,
        first_ref: Any,
        last_ref: Any,
        out_ref: Any,
        memory: Any,
        barriers: Any,
    ) -> None:
        group = lax.axis_index("group")
        row, column = place(lax.axis_index("tile"), tiles, width // columns)
        row = order_ref[row]
        first_visit = begins_ref[row]
        count = begins_ref[row + 1] - first_visit
        tokens_ring, weights_ring, out_buffer = memory
        ready, free = barriers
        across = pl.ds(column * columns, columns)

        @pl.when(group < COMPUTE)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            ring = Ring(ready, free, STAGES)
            out = out_buffer.at[group]
            base = row * ROWS + group * HALF
            shape = (HALF, columns)
            out[...] = plgpu.layout_cast(jnp.zeros(shape, jnp.bfloat16), plgpu.Layout.WGMMA)

            @pl.loop(0, count)
            def _(number: jax.Array) -> None:
                begin = number * steps

                def products(sums: Any) -> jax.Array:
                    @pl.loop(begin, begin + steps)
                    def _(step: jax.Array) -> None:
                        slot = ring.slot(step)
                        weight = weights_ring.at[slot]
                        plgpu.wgmma(
                            sums,
                            tokens_ring.at[slot, pl.ds(group * HALF, HALF)],
                            weight.transpose((1, 0)) if transposed else weight,
                        )
                        ring.begun(step, first=begin)

                    return sums[...]

                result = pl.run_scoped(products, plgpu.ACC(shape, jnp.float32))
                ring.done(begin + steps - 1)
                visit = first_visit + number
                is_mine = rows_between(first_ref[visit] - base, last_ref[visit] - base, shape)
                others = plgpu.load(out, layout=plgpu.Layout.WGMMA)
                out[...] = jnp.where(is_mine, result.astype(jnp.bfloat16), others)

            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out, out_ref.at[pl.ds(base, HALF), across])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == COMPUTE)
        def copy() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def copies(step: jax.Array) -> list[tuple]:
                deep = pl.ds(lax.rem(step, steps) * HALF, HALF)
                weight = weights_ref.at[groups_ref[first_visit + lax.div(step, steps)]]
                sources = (
                    (tokens_ref.at[pl.ds(row * ROWS, ROWS), deep], tokens_ring),
                    (weight.at[(across, deep) if transposed else (deep, across)], weights_ring),
                )
                return [(ready, free, sources)]

            feed(count * steps, STAGES, copies)

    block = partial(matrix, swizzle=SWIZZLE)
    memory = (
        block(ROWS, HALF, STAGES),
        block(columns, HALF, STAGES) if transposed else block(HALF, columns, STAGES),
        block(HALF, columns, COMPUTE),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=STAGES),
    )
    return launch(
        kernel,
        out_type=jax.ShapeDtypeStruct((length, width), jnp.bfloat16),
        scratch=[memory, barriers],
        tiles=tiles * (width // columns),
    )(tokens, weights, begins, order, plan.group, plan.first, plan.last)

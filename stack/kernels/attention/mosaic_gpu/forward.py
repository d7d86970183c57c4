"""Flash attention forward on Hopper (arXiv 2205.14135, 2407.08608).

A block of threads has a tile of queries of one head. Two warpgroups compute, each for its half, while a
third copies keys and values into a ring in shared memory. The two take turns: while one multiplies, the
other takes exponentials.
"""

from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from stack.kernels.attention.mosaic_gpu.sizes import COMPUTE, Tile
from stack.kernels.attention.mosaic_gpu.tiles import (
    LOG2_E,
    ROWS,
    Scores,
    accumulate,
    feed_keys,
    launch,
    matrix,
    spread,
    swizzle_of,
    through,
    zeros,
)

_LOWEST = -1e30
"""Below every score: in place of minus infinity, whose difference from itself is no number."""


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    blocks: jax.Array,
    rows: jax.Array | None,
    scores: Scores,
    tile: Tile,
) -> tuple[jax.Array, jax.Array]:
    """The output, and the log-sum-exp of the scores in powers of two.

    Args:
      query: [batch, queries, heads, width] bfloat16; `queries` a multiple of two of the tile's.
      key: [batch, keys, kv_heads, width] bfloat16; `keys` a multiple of the tile's.
      value: as `key`.
      seen: [2, batch, queries] int32, the first key that each query sees, and one beyond the last.
      blocks: [batch, tiles, 4] int32, the blocks of keys that each two of the tile's queries meet, in the
        order of `Blocks`.
      rows: [2, batch, heads, queries] uint32, random words of dropout, or None.
      scores: what they go through.
      tile: sizes of blocks.

    Returns:
      [batch, queries, heads, width] bfloat16, and [batch, heads, queries] float32. For a query that sees no
      key, zeros and infinity.
    """
    batch, length, heads, width = query.shape
    shared_by = heads // key.shape[2]
    tiles = length // (COMPUTE * tile.queries)
    shape = (tile.queries, tile.keys)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, seen_ref: Any, blocks_ref: Any, *refs: Any) -> None:
        *rows_ref, out_ref, lse_ref, memory, barriers = refs
        group, row, head = (lax.axis_index(name) for name in ("group", "batch", "heads"))
        # Under a causal mask the last have most to do: they begin first.
        number = tiles - 1 - lax.axis_index("tiles")
        blocks = [blocks_ref[row, number, i] for i in range(4)]
        first = blocks[0]
        q_buffer, k_ring, v_ring, seen_buffer, lse_buffer, rows_buffer = memory
        q_ready, k_ready, v_ready, k_free, v_free, turn = barriers

        def take_turn() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(group < COMPUTE)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            mine = pl.ds((number * COMPUTE + group) * tile.queries, tile.queries)
            q = q_buffer.at[group]
            copies = [
                (q_ref.at[row, mine, head], q),
                (seen_ref.at[:, row, mine], seen_buffer.at[group]),
                *((ref.at[:, row, head, mine], rows_buffer.at[group]) for ref in rows_ref),
            ]
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, q_ready.at[group])
            plgpu.barrier_wait(q_ready.at[group])

            def load(buffer: Any) -> list[jax.Array]:
                return [plgpu.load(buffer.at[group, i], layout=ROWS) for i in range(2)]

            start, end = load(seen_buffer)
            words = load(rows_buffer) if rows_ref else []

            def step(block: jax.Array, carry: tuple, *, masked: bool) -> tuple:
                sums, highest, total = carry
                slot = lax.rem(block - first, tile.stages)
                plgpu.barrier_wait(k_ready.at[slot])

                def multiply(result: Any) -> jax.Array:
                    plgpu.wgmma(result, q, k_ring.at[slot].transpose((1, 0)))
                    take_turn()
                    return result[...]

                s = scores.scaled(pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32)))
                plgpu.barrier_arrive(k_free.at[slot])
                columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                columns += block * tile.keys
                if masked:
                    is_seen = (columns >= spread(start, shape, 0)) & (columns < spread(end, shape, 0))
                    s = jnp.where(is_seen, s, -jnp.inf)
                higher = jnp.maximum(highest, s.max(1))
                shrink = jnp.exp2(highest - higher)
                weights = jnp.exp2(s - spread(higher, shape, 0))
                total = total * shrink + weights.sum(1)
                sums *= spread(shrink, sums.shape, 0)
                if rows_ref:
                    keep = scores.kept([spread(word, shape, 0) for word in words], columns)
                    weights = jnp.where(keep, weights, 0.0)
                weights = weights.astype(jnp.bfloat16)
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)

                sums = accumulate(weights, v_ring.at[slot], sums)
                plgpu.barrier_arrive(v_free.at[slot])
                return sums, higher, total

            carry = (
                zeros(tile.queries, width),
                plgpu.layout_cast(jnp.full((tile.queries,), _LOWEST, jnp.float32), ROWS),
                plgpu.layout_cast(jnp.zeros((tile.queries,), jnp.float32), ROWS),
            )
            pl.when(group == 1)(take_turn)
            sums, highest, total = through(blocks, step, carry)
            pl.when(group == 0)(take_turn)
            sees = total > 0
            share = 1.0 / ((1 - scores.dropout) * jnp.where(sees, total, 1.0))
            q[...] = (sums * spread(share, sums.shape, 0)).astype(jnp.bfloat16)
            lse = highest + jnp.log(jnp.where(sees, total, 1.0)) * LOG2_E
            lse_buffer[group] = jnp.where(sees, lse, jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out_ref.at[row, mine, head])
            plgpu.copy_smem_to_gmem(lse_buffer.at[group], lse_ref.at[row, head, mine])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == COMPUTE)
        def copy() -> None:
            plgpu.set_max_registers(24, action="decrease")
            kv_head = lax.div(head, shared_by)

            keys, values = (k_ref, k_ring, k_ready, k_free), (v_ref, v_ring, v_ready, v_free)
            feed_keys(blocks, tile, row, kv_head, keys, values)

    block = partial(matrix, swizzle=swizzle_of(width, tile.queries, tile.keys))
    memory = (
        block(tile.queries, width, COMPUTE),
        block(tile.keys, width, tile.stages),
        block(tile.keys, width, tile.stages),
        plgpu.SMEM((COMPUTE, 2, tile.queries), jnp.int32),
        plgpu.SMEM((COMPUTE, tile.queries), jnp.float32),
        None if rows is None else plgpu.SMEM((COMPUTE, 2, tile.queries), jnp.uint32),
    )
    ready = plgpu.Barrier(num_barriers=tile.stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages)
    barriers = (
        plgpu.Barrier(num_arrivals=2 if rows is None else 3, num_barriers=COMPUTE),
        ready,
        ready,
        free,
        free,
        plgpu.Barrier(num_arrivals=COMPUTE),
    )
    run = launch(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(query.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        scratch=[memory, barriers],
        grid=(heads, tiles, batch),
    )
    output, lse = run(query, key, value, seen, blocks, *(() if rows is None else (rows,)))
    return output, lse

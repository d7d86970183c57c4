"""Flash attention backward on Hopper (arXiv 2205.14135, algorithm 4; 2407.08608).

Two kernels, each of which owns what it writes, so that sums have one order and a gradient is the same to the
last bit whenever it is computed: one goes through the keys of a tile of queries, the other through the
queries of a tile of keys, those of every head that shares them. Both compute the weights again from the
log-sum-exp.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from stack.kernels.attention.mosaic_gpu.sizes import COMPUTE, Tile
from stack.kernels.attention.mosaic_gpu.tiles import (
    COLUMNS,
    ROWS,
    Scores,
    accumulate,
    feed,
    feed_keys,
    launch,
    matrix,
    product,
    spread,
    swizzle_of,
    through,
    zeros,
)


def query_gradient(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    statistics: jax.Array,
    seen: jax.Array,
    blocks: jax.Array,
    rows: jax.Array | None,
    scores: Scores,
    tile: Tile,
) -> jax.Array:
    """The gradient of the queries, [batch, queries, heads, width] bfloat16.

    Args:
      query: [batch, queries, heads, width] bfloat16, as `forward` takes it.
      key: [batch, keys, kv_heads, width] bfloat16.
      value: as `key`.
      cotangent: of the output, as `query`.
      statistics: [2, batch, heads, queries] float32: the log-sum-exp in powers of two, and the sum over the
        width of output x cotangent.
      seen: [2, batch, queries] int32, as `forward` takes it.
      blocks: [batch, tiles, 4] int32, likewise.
      rows: [2, batch, heads, queries] uint32, likewise.
      scores: what they go through.
      tile: sizes of blocks.
    """
    batch, length, heads, width = query.shape
    shared_by = heads // key.shape[2]
    tiles = length // (COMPUTE * tile.queries)
    shape = (tile.queries, tile.keys)

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, d_ref: Any, *refs: Any) -> None:
        statistics_ref, seen_ref, blocks_ref, *rows_ref, out_ref, memory, barriers = refs
        group, row, head = (lax.axis_index(name) for name in ("group", "batch", "heads"))
        number = tiles - 1 - lax.axis_index("tiles")  # See `forward`.
        blocks = [blocks_ref[row, number, i] for i in range(4)]
        first = blocks[0]
        q_buffer, d_buffer, k_ring, v_ring, statistics_buffer, seen_buffer, rows_buffer = memory
        q_ready, k_ready, v_ready, k_free, v_free = barriers

        @pl.when(group < COMPUTE)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            mine = pl.ds((number * COMPUTE + group) * tile.queries, tile.queries)
            q, d = q_buffer.at[group], d_buffer.at[group]
            copies = [
                (q_ref.at[row, mine, head], q),
                (d_ref.at[row, mine, head], d),
                (statistics_ref.at[:, row, head, mine], statistics_buffer.at[group]),
                (seen_ref.at[:, row, mine], seen_buffer.at[group]),
                *((ref.at[:, row, head, mine], rows_buffer.at[group]) for ref in rows_ref),
            ]
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, q_ready.at[group])
            plgpu.barrier_wait(q_ready.at[group])

            def load(buffer: Any) -> list[jax.Array]:
                return [plgpu.load(buffer.at[group, i], layout=ROWS) for i in range(2)]

            lse, inner = load(statistics_buffer)
            start, end = load(seen_buffer)
            words = load(rows_buffer) if rows_ref else []

            def step(block: jax.Array, sums: jax.Array, *, masked: bool) -> jax.Array:
                slot = lax.rem(block - first, tile.stages)
                k, v = k_ring.at[slot], v_ring.at[slot]
                plgpu.barrier_wait(k_ready.at[slot])
                s = scores.scaled(product(q, k.transpose((1, 0)), *shape))
                weights = jnp.exp2(s - spread(lse, shape, 0))
                columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
                columns += block * tile.keys
                if masked:
                    is_seen = (columns >= spread(start, shape, 0)) & (columns < spread(end, shape, 0))
                    weights = jnp.where(is_seen, weights, 0.0)
                plgpu.barrier_wait(v_ready.at[slot])
                d_weights = product(d, v.transpose((1, 0)), *shape)
                plgpu.barrier_arrive(v_free.at[slot])
                if rows_ref:
                    keep = scores.kept([spread(word, shape, 0) for word in words], columns)
                    d_weights = jnp.where(keep, d_weights * (1 / (1 - scores.dropout)), 0.0)
                d_scores = weights * (d_weights - spread(inner, shape, 0)) * scores.slope(s)
                sums = accumulate(d_scores.astype(jnp.bfloat16), k, sums)
                plgpu.barrier_arrive(k_free.at[slot])
                return sums

            sums = through(blocks, step, zeros(tile.queries, width))
            q[...] = sums.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, out_ref.at[row, mine, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == COMPUTE)
        def copy() -> None:
            plgpu.set_max_registers(24, action="decrease")
            kv_head = lax.div(head, shared_by)

            keys, values = (k_ref, k_ring, k_ready, k_free), (v_ref, v_ring, v_ready, v_free)
            feed_keys(blocks, tile, row, kv_head, keys, values)

    ready = plgpu.Barrier(num_barriers=tile.stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages)
    vectors = (COMPUTE, 2, tile.queries)
    block = partial(matrix, swizzle=swizzle_of(width, tile.queries, tile.keys))
    memory = (
        block(tile.queries, width, COMPUTE),
        block(tile.queries, width, COMPUTE),
        block(tile.keys, width, tile.stages),
        block(tile.keys, width, tile.stages),
        plgpu.SMEM(vectors, jnp.float32),
        plgpu.SMEM(vectors, jnp.int32),
        None if rows is None else plgpu.SMEM(vectors, jnp.uint32),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=4 if rows is None else 5, num_barriers=COMPUTE),
        ready,
        ready,
        free,
        free,
    )
    return launch(
        kernel,
        out_type=jax.ShapeDtypeStruct(query.shape, jnp.bfloat16),
        scratch=[memory, barriers],
        grid=(heads, tiles, batch),
    )(query, key, value, cotangent, statistics, seen, blocks, *(() if rows is None else (rows,)))


def key_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cotangent: jax.Array,
    statistics: jax.Array,
    seen: jax.Array,
    blocks: jax.Array,
    rows: jax.Array | None,
    scores: Scores,
    tile: Tile,
    wanted: Literal["both", "key", "value"] = "both",
) -> list[jax.Array]:
    """The gradients of keys and values, [batch, keys, kv_heads, width] bfloat16 each.

    Args:
      query: [batch, queries, heads, width] bfloat16; see `query_gradient`.
      key: [batch, keys, kv_heads, width] bfloat16; `keys` a multiple of two of the tile's.
      value: as `key`.
      cotangent: of the output, as `query`.
      statistics: [2, batch, heads, queries] float32.
      seen: [2, batch, queries] int32.
      blocks: [batch, tiles, 4] int32, the blocks of queries that each two of the tile's keys meet, in the
        order of `Blocks`.
      rows: [2, batch, heads, queries] uint32, or None.
      scores: what they go through.
      tile: sizes of blocks.
      wanted: of which; both sums of a wide head are more than registers hold.
    """
    batch, length, kv_heads, width = key.shape
    shared_by = query.shape[2] // kv_heads
    tiles = length // (COMPUTE * tile.keys)
    shape = (tile.keys, tile.queries)
    outputs = 2 if wanted == "both" else 1

    def kernel(q_ref: Any, k_ref: Any, v_ref: Any, d_ref: Any, *refs: Any) -> None:
        statistics_ref, seen_ref, blocks_ref, *rows_ref = refs[: -outputs - 2]
        out_refs, (memory, barriers) = refs[-outputs - 2 : -2], refs[-2:]
        group, row, kv_head = (lax.axis_index(name) for name in ("group", "batch", "heads"))
        number = lax.axis_index("tiles")  # Under a causal mask the first have most to do.
        blocks = [blocks_ref[row, number, i] for i in range(4)]
        first = blocks[0]
        count = blocks[3] - first
        k_buffer, v_buffer, q_ring, d_ring, statistics_ring, seen_ring, rows_ring = memory
        k_ready, q_ready, d_ready, q_free, d_free = barriers

        @pl.when(group < COMPUTE)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            base = (number * COMPUTE + group) * tile.keys
            mine = pl.ds(base, tile.keys)
            k, v = k_buffer.at[group], v_buffer.at[group]
            for ref, buffer in ((k_ref, k), (v_ref, v)):
                plgpu.copy_gmem_to_smem(ref.at[row, mine, kv_head], buffer, k_ready.at[group])
            plgpu.barrier_wait(k_ready.at[group])

            def step(block: jax.Array, carry: tuple, *, head: jax.Array, masked: bool) -> tuple:
                slot = lax.rem(head * count + block - first, tile.stages)
                q, d = q_ring.at[slot], d_ring.at[slot]

                def load(ring: Any) -> list[jax.Array]:
                    halves = [plgpu.load(ring.at[slot, i], layout=COLUMNS) for i in range(2)]
                    return [spread(half, shape, 1) for half in halves]

                plgpu.barrier_wait(q_ready.at[slot])
                lse, inner = load(statistics_ring)
                s = scores.scaled(product(k, q.transpose((1, 0)), *shape))
                weights = jnp.exp2(s - lse)
                columns = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + base
                if masked:
                    start, end = load(seen_ring)
                    weights = jnp.where((columns >= start) & (columns < end), weights, 0.0)
                keep = scores.kept(load(rows_ring), columns) if rows_ref else None
                plgpu.commit_smem()  # What was read so is written anew by another path to memory.
                plgpu.barrier_wait(d_ready.at[slot])
                sums = []
                if wanted != "key":
                    left = weights
                    if keep is not None:
                        left = jnp.where(keep, weights * (1 / (1 - scores.dropout)), 0.0)
                    sums.append(accumulate(left.astype(jnp.bfloat16), d, carry[-1]))
                if wanted != "value":
                    d_weights = product(v, d.transpose((1, 0)), *shape)
                    if keep is not None:
                        d_weights = jnp.where(keep, d_weights * (1 / (1 - scores.dropout)), 0.0)
                    d_scores = weights * (d_weights - inner) * scores.slope(s)
                    sums.insert(0, accumulate(d_scores.astype(jnp.bfloat16), q, carry[0]))
                plgpu.barrier_arrive(d_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return tuple(sums)

            def queries_of(head: jax.Array, carry: tuple) -> tuple:
                return through(blocks, partial(step, head=head), carry)

            carry = tuple(zeros(tile.keys, width) for _ in range(outputs))
            carry = lax.fori_loop(0, shared_by, queries_of, carry)
            for sums, buffer, out_ref in zip(carry, (k, v), out_refs, strict=False):
                buffer[...] = sums.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(buffer, out_ref.at[row, mine, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == COMPUTE)
        def copy() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def copies(step: jax.Array) -> list[tuple]:
                head = kv_head * shared_by + lax.div(step, count)
                mine = pl.ds((first + lax.rem(step, count)) * tile.queries, tile.queries)
                queries = [
                    (q_ref.at[row, mine, head], q_ring),
                    (statistics_ref.at[:, row, head, mine], statistics_ring),
                    (seen_ref.at[:, row, mine], seen_ring),
                    *((ref.at[:, row, head, mine], rows_ring) for ref in rows_ref),
                ]
                cotangents = [(d_ref.at[row, mine, head], d_ring)]
                return [(q_ready, q_free, queries), (d_ready, d_free, cotangents)]

            feed(shared_by * count, tile.stages, copies)

    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=tile.stages)
    vectors = (tile.stages, 2, tile.queries)
    block = partial(matrix, swizzle=swizzle_of(width, tile.queries, tile.keys))
    memory = (
        block(tile.keys, width, COMPUTE),
        block(tile.keys, width, COMPUTE),
        block(tile.queries, width, tile.stages),
        block(tile.queries, width, tile.stages),
        plgpu.SMEM(vectors, jnp.float32),
        plgpu.SMEM(vectors, jnp.int32),
        None if rows is None else plgpu.SMEM(vectors, jnp.uint32),
    )
    barriers = (
        plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
        plgpu.Barrier(num_arrivals=3 if rows is None else 4, num_barriers=tile.stages),
        plgpu.Barrier(num_barriers=tile.stages),
        free,
        free,
    )
    return launch(
        kernel,
        out_type=[jax.ShapeDtypeStruct(key.shape, jnp.bfloat16)] * outputs,
        scratch=[memory, barriers],
        grid=(kv_heads, tiles, batch),
    )(query, key, value, cotangent, statistics, seen, blocks, *(() if rows is None else (rows,)))

"""Tiles of tokens, one after the other, each multiplied by the weight of its group, in array operations.

The work is that of the tokens, and at most of one more tile for each group; nothing is stored beside operands
and results.
"""

import jax
import jax.numpy as jnp

from stack.kernels.grouped_matmul.request import Request
from stack.kernels.grouped_matmul.visits import Visits, in_group, visits

LEAST_ROWS, MOST_ROWS = 32, 512
"""Of a tile."""


def rows_of(tokens: int, groups: int) -> int:
    """Rows of a tile: about those of a group, so that a border costs no more than the group itself."""
    rows = LEAST_ROWS
    while rows < MOST_ROWS and 2 * rows <= tokens // groups:
        rows *= 2
    return min(rows, tokens)


def multiply(
    tokens: jax.Array, weights: jax.Array, sizes: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.Multiply`."""
    rows, plan = _plan(tokens, sizes)
    axis = 1 if transposed else 0

    def visit(number: jax.Array, result: jax.Array) -> jax.Array:
        begin, is_mine = _tile(plan, number, rows, tokens.shape[0])
        tile = jax.lax.dynamic_slice_in_dim(tokens, begin, rows)
        weight = jax.lax.dynamic_index_in_dim(weights, plan.group[number], keepdims=False)
        product = jax.lax.dot_general(
            tile, weight, (((1,), (axis,)), ((), ())), preferred_element_type=_wide(tokens)
        )
        others = jax.lax.dynamic_slice_in_dim(result, begin, rows)
        mixed = jnp.where(is_mine, product.astype(result.dtype), others)
        return jax.lax.dynamic_update_slice_in_dim(result, mixed, begin, axis=0)

    zeros = jnp.zeros((tokens.shape[0], weights.shape[2 - axis]), tokens.dtype)
    return jax.lax.fori_loop(0, len(plan.tile), visit, zeros)


def weight_gradient(tokens: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.WeightGradient`."""
    rows, plan = _plan(tokens, sizes)

    def visit(number: jax.Array, sums: jax.Array) -> jax.Array:
        begin, is_mine = _tile(plan, number, rows, tokens.shape[0])
        left, right = (
            jnp.where(is_mine, jax.lax.dynamic_slice_in_dim(each, begin, rows), 0)
            for each in (tokens, cotangent)
        )
        product = jax.lax.dot_general(
            left, right, (((0,), (0,)), ((), ())), preferred_element_type=sums.dtype
        )
        group = plan.group[number]
        before = jax.lax.dynamic_index_in_dim(sums, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, before + product, group, axis=0)

    zeros = jnp.zeros((len(sizes), tokens.shape[1], cotangent.shape[1]), _wide(tokens))
    return jax.lax.fori_loop(0, len(plan.tile), visit, zeros).astype(tokens.dtype)


def _plan(tokens: jax.Array, sizes: jax.Array) -> tuple[int, Visits]:
    rows = rows_of(tokens.shape[0], len(sizes))
    return rows, visits(sizes, tokens=tokens.shape[0], rows=rows)


def _tile(plan: Visits, number: jax.Array, rows: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Where a visit's tile begins, the last one moved back among the tokens, and which rows are its."""
    begin = jnp.minimum(plan.tile[number] * rows, tokens - rows)
    places = begin + jnp.arange(rows, dtype=jnp.int32)
    return begin, in_group(places, plan.first[number], plan.last[number])[:, None]


def _wide(array: jax.Array) -> jnp.dtype:
    return jnp.promote_types(array.dtype, jnp.float32)


def obstacles(_: Request) -> list[str]:
    """It has none."""
    return []

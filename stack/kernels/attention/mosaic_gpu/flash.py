"""Flash attention of what one device holds, differentiable."""

from functools import partial

import jax
import jax.numpy as jnp

from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.intervals import Blocks, Intervals, intervals, key_blocks, query_blocks
from stack.kernels.attention.mask import Mask
from stack.kernels.attention.mosaic_gpu.backward import key_gradients, query_gradient
from stack.kernels.attention.mosaic_gpu.forward import forward
from stack.kernels.attention.mosaic_gpu.sizes import (
    COMPUTE,
    WIDEST_OF_BOTH,
    Tiles,
    padded,
    row_multiple,
    tiles_of,
)
from stack.kernels.attention.mosaic_gpu.tiles import Scores


def attend_local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    _bias: None,
    dropout: Dropout | None,
    *,
    scale: float | None,
    softcap: float | None,
    tiles: Tiles | None,
) -> jax.Array:
    """See `stack.kernels.attention.attend`; of one device's rows and heads."""
    length, width = query.shape[1], query.shape[3]
    scores = Scores(
        scale=width**-0.5 if scale is None else scale,
        softcap=softcap,
        dropout=0.0 if dropout is None else dropout.rate,
    )
    tiles = tiles_of(padded(width), plain=scores.plain) if tiles is None else tiles
    multiple = row_multiple(tiles)
    # What pads are queries that see nothing, keys that none sees, and zeros in products.
    query, key, value = (_pad(_pad(each, 1, multiple), 3, 16) for each in (query, key, value))
    seen = _pad(jnp.stack(intervals(mask)), 2, multiple)
    rows = None if dropout is None else _pad(jnp.moveaxis(dropout.rows, -1, 0), 3, multiple)
    return _flash(query, key, value, seen, rows, scores, tiles)[:, :length, :, :width]


def _pad(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """With zeros at the end of an axis, to a multiple."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    rows: jax.Array | None,
    scores: Scores,
    tiles: Tiles,
) -> jax.Array:
    return _flash_forward(query, key, value, seen, rows, scores, tiles)[0]


def _flash_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    rows: jax.Array | None,
    scores: Scores,
    tiles: Tiles,
) -> tuple[jax.Array, tuple]:
    tile = tiles.forward
    met = key_blocks(Intervals(*seen), queries=COMPUTE * tile.queries, keys=tile.keys, length=key.shape[1])
    output, lse = forward(query, key, value, seen, _stack(met), rows, scores, tile)
    return output, (query, key, value, seen, rows, output, lse)


def _flash_backward(scores: Scores, tiles: Tiles, saved: tuple, cotangent: jax.Array) -> tuple:
    query, key, value, seen, rows, output, lse = saved
    inner = jnp.einsum("bqhd,bqhd->bhq", output, cotangent, preferred_element_type=jnp.float32)
    inputs = query, key, value, cotangent, jnp.stack([lse, inner]), seen
    tile = tiles.query_gradient
    met = key_blocks(Intervals(*seen), queries=COMPUTE * tile.queries, keys=tile.keys, length=key.shape[1])
    d_query = query_gradient(*inputs, _stack(met), rows, scores, tile)
    tile = tiles.key_gradients
    met = query_blocks(Intervals(*seen), queries=tile.queries, keys=COMPUTE * tile.keys, length=key.shape[1])
    of_keys = partial(key_gradients, *inputs, _stack(met), rows, scores, tile)
    if query.shape[3] <= WIDEST_OF_BOTH:
        d_key, d_value = of_keys("both")
    else:
        (d_key,), (d_value,) = of_keys("key"), of_keys("value")
    return d_query, d_key, d_value, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _stack(blocks: Blocks) -> jax.Array:
    """[batch, tiles, 4] int32."""
    return jnp.stack(blocks, axis=-1)

"""A kernel that was never measured on a device is tried there before a run relies on it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stack.kernels.attention import reference
from stack.kernels.attention.api import attend
from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.mask import Mask, row_mask
from stack.kernels.attention.request import Request
from stack.kernels.attention.tiling import Tiled
from stack.parallel.rules import ONE_DEVICE

LIMIT = 0.02
"""Of the error. bfloat16 alone gives up to 0.008; a mask, a head or a block that is wrong, 0.1 and more."""
_LONGEST = 1024


def trial_error(
    name: str | Tiled, request: Request, *, window: int | None = None, shared_by: int = 1
) -> float:
    """How far from the definition a kernel is on the default device, forward and backward.

    Args:
      name: in `KERNELS`, with tiles if not its own.
      request: what is to be attended; its length is cut at 1,024.
      window: tokens that each sees, if it does not see all.
      shared_by: heads that share keys and values, of which at most 8 are tried.

    Returns:
      The largest error of the output and of the gradients of query, key and value, each by its norm.
    """
    length, heads = min(request.length or _LONGEST, _LONGEST), min(shared_by, 8)
    mask = _mask(request, length, window)
    draws = (
        jax.random.normal(key, (1, length, number, request.head_dim), request.dtype)
        for key, number in zip(jax.random.split(jax.random.key(0), 4), (heads, 1, 1, heads), strict=True)
    )
    query, key, value, slope = draws
    # Of padding nothing is asked.
    real = jnp.ones((1, length), bool) if mask.query_segments is None else mask.query_segments > 0
    slope *= real[..., None, None]
    dropout = None
    if request.dropout:
        rows = jax.random.bits(jax.random.key(1), (1, heads, length, 2), jnp.uint32)
        dropout = Dropout(rate=request.dropout, rows=rows)
    options: dict[str, Any] = {"softcap": request.softcap, "dropout": dropout, "bias": None, "scale": None}

    def both_ways(attention: Any, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        output, back = jax.vjp(attention, *arrays)
        return output * real[..., None, None], *back(slope.astype(output.dtype))

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value, mask, ONE_DEVICE, kernel=name, **options)

    def definition(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return reference.attend(query, key, value, mask, **options)

    found = jax.jit(partial(both_ways, kernel))(query, key, value)
    wide = [each.astype(jnp.float32) for each in (query, key, value)]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(both_ways, definition))(*wide)
    errors = [
        jnp.linalg.norm(one.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        for one, want in zip(found, exact, strict=True)
    ]
    return float(jnp.stack(errors).max())  # No number, if one is none.


def _mask(request: Request, length: int, window: int | None) -> Mask:
    columns = jnp.arange(length, dtype=jnp.int32)[None]
    packed = request.packed_length is not None and not request.cross
    second = 3 * length // 8 if packed else length
    segments = jnp.where(columns < second, 1, 2)
    if packed:
        segments = jnp.where(columns < length - length // 16, segments, 0)
    positions = jnp.where(columns < second, columns, columns - second)
    prefix = (positions < length // 4).astype(jnp.int32) if request.kind == "prefix" else None
    kind = "full" if request.cross else request.kind
    return row_mask(segments, positions, packed=packed, kind=kind, window=window, prefix=prefix)

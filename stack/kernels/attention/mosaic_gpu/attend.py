"""Attention by the kernels beside: what they can do, and how arrays come to them."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.intervals import Blocks, Intervals, intervals, key_blocks, query_blocks
from stack.kernels.attention.mask import Mask
from stack.kernels.attention.mosaic_gpu.backward import key_gradients, query_gradient
from stack.kernels.attention.mosaic_gpu.forward import forward
from stack.kernels.attention.mosaic_gpu.tiles import COMPUTE, WIDEST_OF_BOTH, Scores, tiles_of
from stack.kernels.attention.request import Request
from stack.parallel.rules import Layout

_ROWS = 128
"""Queries and keys are padded to a multiple of it: that of every tile."""


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    layout: Layout,
    *,
    bias: jax.Array | None,
    scale: float | None,
    softcap: float | None,
    dropout: Dropout | None,
) -> jax.Array:
    """See `stack.kernels.attention.attend`; bfloat16 without a bias, of whole rows.

    Blocks of keys that no query of a tile sees are neither read nor multiplied: the work is that of the
    pairs that see each other, rounded to blocks. A query that sees no key gets zeros. Always inside
    `shard_map`: see `cudnn`.
    """
    if bias is not None:
        raise ValueError("mosaic_gpu takes no bias; use xla")
    if query.dtype != jnp.bfloat16:
        raise ValueError(f"mosaic_gpu attends in bfloat16, not in {query.dtype}; use xla")
    own = mask.kind != "full" or mask.window is not None
    if own and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"mosaic_gpu attends whole rows, not {query.shape[1]} queries to {key.shape[1]} keys; use xla"
        )
    scores = Scores(
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        dropout=0.0 if dropout is None else dropout.rate,
    )
    local = partial(_attend_local, scores=scores)
    if layout.trivial:
        return local(query, key, value, mask, dropout)
    heads = layout.spec("batch", None, "heads") or P()
    kv_heads = layout.spec("batch", None, "kv_heads") or P()
    rows = layout.spec("batch") or P()
    masks = jax.tree.map(lambda array: rows if array.ndim else P(), mask)
    drops = jax.tree.map(lambda _: layout.spec("batch", "heads", None, None) or P(), dropout)
    specs = (heads, kv_heads, kv_heads, masks, drops)
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(
        query, key, value, mask, dropout
    )


def obstacles(request: Request) -> list[str]:
    """Everything that keeps the kernels from computing what is asked; empty: they can."""
    capability = request.compute_capability
    version = _cuda_version() if request.platform == "gpu" else 0
    checks = (
        (request.platform != "gpu", f"the platform is {request.platform}, not an NVIDIA GPU"),
        (
            capability is not None and capability != 9.0,
            f"compute capability {capability} is not 9.0 (H100, H200), whose instructions it uses",
        ),
        (request.dtype != "bfloat16", f"dtype is {request.dtype}, not bfloat16"),
        (request.head_dim > 256, f"head width {request.head_dim} is over 256"),
        (request.bias, "it takes no bias"),
        (
            12_080 <= version < 12_091,
            f"CUDA {version // 1000}.{version % 1000 // 10} assembles masks wrongly, mended in 12.9.1",
        ),
    )
    return [text for failed, text in checks if failed]


def _cuda_version() -> int:
    """Of the CUDA that is installed here, e.g. 12080 for 12.8; 0: there is none."""
    from jax._src.lib import cuda_versions

    if cuda_versions is None:
        return 0
    try:
        return cuda_versions.cuda_runtime_get_version()
    except RuntimeError:
        return 0


def _attend_local(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, dropout: Dropout | None, *, scores: Scores
) -> jax.Array:
    length, width = query.shape[1], query.shape[3]
    # What pads are queries that see nothing, keys that none sees, and zeros in products.
    query, key, value = (_pad(_pad(each, 1, _ROWS), 3, 16) for each in (query, key, value))
    seen = _pad(jnp.stack(intervals(mask)), 2, _ROWS)
    rows = None if dropout is None else _pad(jnp.moveaxis(dropout.rows, -1, 0), 3, _ROWS)
    return _flash(query, key, value, seen, rows, scores)[:, :length, :, :width]


def _pad(array: jax.Array, axis: int, multiple: int) -> jax.Array:
    """With zeros at the end of an axis, to a multiple."""
    missing = -array.shape[axis] % multiple
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    rows: jax.Array | None,
    scores: Scores,
) -> jax.Array:
    return _flash_forward(query, key, value, seen, rows, scores)[0]


def _flash_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    rows: jax.Array | None,
    scores: Scores,
) -> tuple[jax.Array, tuple]:
    tile = tiles_of(query.shape[3], plain=scores.plain).forward
    met = key_blocks(Intervals(*seen), queries=COMPUTE * tile.queries, keys=tile.keys, length=key.shape[1])
    output, lse = forward(query, key, value, seen, _stack(met), rows, scores, tile)
    return output, (query, key, value, seen, rows, output, lse)


def _flash_backward(scores: Scores, saved: tuple, cotangent: jax.Array) -> tuple:
    query, key, value, seen, rows, output, lse = saved
    tiles = tiles_of(query.shape[3], plain=scores.plain)
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

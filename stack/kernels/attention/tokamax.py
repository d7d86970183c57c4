"""Tokamax's flash attention for NVIDIA's Hopper and Blackwell GPUs, where it is installed.

Its kernels (github.com/openxla/tokamax) take what a mask comes to here, one run of keys a query, so no mask
of the size of the scores is made. Nothing takes their place: what they cannot is an obstacle.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from stack.kernels.attention.assembler import wrong_masks
from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.intervals import intervals
from stack.kernels.attention.island import on_each_device
from stack.kernels.attention.mask import Mask
from stack.kernels.attention.request import Request
from stack.parallel.rules import Layout

MISSING = "it is not installed: pip install 'stack[tokamax]'"

TILE = 128
"""Queries that a block of threads of the backward pass takes together."""


def installed() -> bool:
    """Whether Tokamax is. It is imported where it runs alone, as that takes seconds."""
    return importlib.util.find_spec("tokamax") is not None


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
    """See `stack.kernels.attention.attend`; bfloat16 without a bias or dropout, of whole rows.

    The padding of a causal row that is not packed sees what stands before it, and nobody reads it.
    """
    if bias is not None or dropout is not None:
        raise ValueError("tokamax takes no bias or dropout of attention; use xla")
    if query.dtype != jnp.bfloat16:
        raise ValueError(f"tokamax attends in bfloat16, not in {query.dtype}; use xla")
    own = mask.kind != "full" or mask.window is not None
    if own and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"tokamax attends whole rows, not {query.shape[1]} queries to {key.shape[1]} keys; use xla"
        )
    if not installed():
        raise ValueError(f"tokamax cannot run: {MISSING}")
    local = partial(_attend_local, scale=scale, softcap=softcap)
    return on_each_device(local, query, key, value, mask, layout)


def obstacles(request: Request) -> list[str]:
    """Everything that keeps Tokamax from computing what is asked; empty: it can."""
    capability = request.compute_capability
    wrong = wrong_masks() if request.platform == "gpu" else None
    widest = 256 if capability is None or capability < 10.0 else 192
    checks = (
        (request.platform != "gpu", f"the platform is {request.platform}, not an NVIDIA GPU"),
        (
            capability is not None and capability not in (9.0, 10.0, 10.3),
            f"its backward pass is for compute capability 9.0, 10.0 and 10.3, not {capability}",
        ),
        (request.dtype != "bfloat16", f"dtype is {request.dtype}, not bfloat16"),
        (request.head_dim > widest, f"head width {request.head_dim} is over {widest}"),
        (request.dropout > 0, "it has no attention dropout"),
        (request.bias, "the gradient of a bias would store all scores"),
        (wrong is not None, f"{wrong}"),
        (not installed(), MISSING),
    )
    return [text for failed, text in checks if failed]


def operation() -> Callable[..., jax.Array]:
    """Tokamax's own kernels, forward and backward, with the tiles of its rules.

    Tiles that it was tuned to are not looked up: it has those of one GPU for shapes of its own, and each miss
    would be told.
    """
    from tokamax._src.ops.attention import pallas_mosaic_gpu, pallas_mosaic_gpu_vjp
    from tokamax.config import ignore_autotuning_cache

    def backward(*arrays: Any, **options: Any) -> Any:
        with ignore_autotuning_cache(True):
            return pallas_mosaic_gpu_vjp.PallasMosaicGpuFlashAttentionVjp()(*arrays, **options)

    def attention(*arrays: jax.Array, **options: Any) -> jax.Array:
        kernel = pallas_mosaic_gpu.PallasMosaicGpuFlashAttention(vjp=backward)
        tiles = kernel.bind(*arrays, return_residuals=True, **options).heuristics_config
        return kernel.replace(config=tiles)(*arrays, **options)

    return attention


def _attend_local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    _bias: None = None,
    _dropout: None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    from tokamax._src.ops.attention.base import Mask as Runs

    seen = intervals(mask)
    causal = mask.kind == "causal"
    begins = mask.query_segments is not None or mask.window is not None
    runs = Runs(
        # Without an end of their own, causal rows' kernels leave out the half that nobody sees.
        is_causal=causal,
        k_start=_in_tiles(seen.start)[:, None] if begins else None,
        k_end=None if causal else _in_tiles(seen.end)[:, None],
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    arrays = (_in_tiles(array) for array in (query, key, value))
    output = operation()(*arrays, mask=runs, logits_scale=scale, logits_soft_cap=softcap)
    return output[:, : query.shape[1]]


def _in_tiles(array: jax.Array) -> jax.Array:
    """[batch, length, ...] with zeros to a multiple of `TILE` tokens: kernels read the numbers of whole ones.

    What is added is behind the last token, so it is seen in no causal row, and in no other, whose runs end.
    """
    missing = -array.shape[1] % TILE
    return jnp.pad(array, [(0, 0), (0, missing)] + [(0, 0)] * (array.ndim - 2)) if missing else array

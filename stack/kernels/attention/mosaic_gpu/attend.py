"""Attention by the kernels beside: what they can do, and how arrays come to them."""

from functools import partial

import jax
import jax.numpy as jnp

from stack.kernels.attention.assembler import wrong_masks
from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.island import on_each_device
from stack.kernels.attention.mask import Mask
from stack.kernels.attention.mosaic_gpu.sizes import Tiles
from stack.kernels.attention.request import Request
from stack.parallel.rules import Layout


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
    tiles: Tiles | None = None,
) -> jax.Array:
    """See `stack.kernels.attention.attend`; bfloat16 without a bias, of whole rows.

    Blocks of keys that no query of a tile sees are neither read nor multiplied: the work is that of the
    pairs that see each other, rounded to blocks. A query that sees no key gets zeros.
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
    from stack.kernels.attention.mosaic_gpu.flash import attend_local  # Pallas takes half a second to import.

    local = partial(attend_local, scale=scale, softcap=softcap, tiles=tiles)
    return on_each_device(local, query, key, value, mask, layout, dropout=dropout)


def obstacles(request: Request) -> list[str]:
    """Everything that keeps the kernels from computing what is asked; empty: they can."""
    checks = (
        (request.head_dim > 256, f"head width {request.head_dim} is over 256"),
        (request.bias, "it takes no bias"),
    )
    device = device_obstacles(request.platform, request.compute_capability, request.dtype)
    return device + [text for failed, text in checks if failed]


def device_obstacles(platform: str, capability: float | None, dtype: str) -> list[str]:
    """What keeps kernels for Hopper in bfloat16 from running on a device; empty: they can."""
    wrong = wrong_masks() if platform == "gpu" else None
    checks = (
        (platform != "gpu", f"the platform is {platform}, not an NVIDIA GPU"),
        (
            capability is not None and capability != 9.0,
            f"compute capability {capability} is not 9.0 (H100, H200), whose instructions it uses",
        ),
        (dtype != "bfloat16", f"dtype is {dtype}, not bfloat16"),
        (wrong is not None, f"{wrong}"),
    )
    return [text for failed, text in checks if failed]

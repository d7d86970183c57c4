"""cuDNN's fused attention, on NVIDIA GPUs from compute capability 8.0."""

from dataclasses import replace
from functools import partial

import jax

from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.island import on_each_device
from stack.kernels.attention.mask import Mask
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
) -> jax.Array:
    """See `stack.kernels.attention.attend`; whole rows only, as many queries as keys.

    One document per row needs no mask and runs at full speed; packed rows pass one, [batch, 1, queries,
    keys], which cuDNN reads from memory.
    """
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"cudnn attends whole rows, not {query.shape[1]} queries to {key.shape[1]} keys; use xla"
        )
    if bias is not None or softcap is not None or dropout is not None:
        raise ValueError("cudnn has no bias, soft cap or dropout of attention; use xla")
    return on_each_device(partial(_attend_local, scale=scale), query, key, value, mask, layout)


def obstacles(request: Request) -> list[str]:
    """Everything that keeps cuDNN from computing what is asked; empty: it can."""
    capability = request.compute_capability
    largest = 256 if capability is None or capability >= 9.0 else 128
    length = request.packed_length
    checks = (
        (request.platform != "gpu", f"the platform is {request.platform}, not an NVIDIA GPU"),
        (capability is not None and capability < 8.0, f"compute capability {capability} < 8.0"),
        (request.dtype != "bfloat16", f"dtype is {request.dtype}, not bfloat16"),
        (request.head_dim % 8 != 0, f"head width {request.head_dim} is not a multiple of 8"),
        (request.head_dim > largest, f"head width {request.head_dim} is over {largest}"),
        (request.dropout > 0, "it has no attention dropout"),
        (request.softcap is not None, "it has no soft cap"),
        (request.bias, "it takes no bias here"),
        (request.cross, "here it attends to no row of another length"),
        (length is not None and length % 2 == 1, f"packed rows of {length} tokens, an odd number"),
    )
    return [text for failed, text in checks if failed]


def _attend_local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    _bias: None = None,
    _dropout: None = None,
    *,
    scale: float | None = None,
) -> jax.Array:
    packed = mask.query_segments is not None
    explicit = packed or mask.kind == "prefix"
    if mask.local is not None and not explicit:
        # A window is a constant of the kernel, which leaves out what is beyond it.
        near, far = (
            partial(_attend_local, mask=replace(mask, local=None, window=window), scale=scale)
            for window in (mask.window, None)
        )
        return jax.lax.cond(mask.local, near, far, query, key, value)
    causal = mask.kind == "causal"
    window = None if explicit or mask.window is None else mask.window - 1
    # A causal row's padding comes last, where no token looks.
    lengths = None if explicit or causal else mask.lengths
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask.allowed()[:, None] if explicit else None,
        # A mask says so too, but told of it cuDNN leaves out the half that is masked.
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window, 0 if causal else window),
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )

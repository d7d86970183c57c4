"""Attention in plain array operations: the reference, and the only kernel off NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from stack.kernels.attention.dropout import Dropout, keep
from stack.kernels.attention.mask import Mask
from stack.kernels.attention.request import Request
from stack.parallel.rules import Layout


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    _: Layout,
    *,
    bias: jax.Array | None,
    scale: float | None,
    softcap: float | None,
    dropout: Dropout | None,
) -> jax.Array:
    """See `stack.kernels.attention.attend`. Scores are in float32."""
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        groups, shape = bias.shape[0], (heads, queries, key.shape[1])
        bias = jnp.broadcast_to(bias.astype(jnp.float32), (groups, *shape))
        if groups > 1:
            bias = jnp.broadcast_to(bias[:, None], (groups, batch // groups, *shape)).reshape(batch, *shape)
        scores = scores + bias.reshape(-1, kv_heads, heads // kv_heads, *shape[1:])
    allowed = mask.allowed()
    scores = scores + jnp.where(allowed, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    if dropout is not None:
        rows = dropout.rows.reshape(batch, kv_heads, heads // kv_heads, queries, 2)
        kept = keep(rows, jnp.arange(key.shape[1]), dropout.rate)
        weights = jnp.where(kept, weights / (1 - dropout.rate), jnp.zeros((), weights.dtype))
    mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value)
    # Of no key nothing: the softmax of a row without one is even over all of them.
    return jnp.where(allowed.any(-1)[..., None, None], mixed.reshape(query.shape), jnp.zeros((), mixed.dtype))


def obstacles(_: Request) -> list[str]:
    """It has none."""
    return []

"""Attention in plain array operations: the reference, and the only kernel off NVIDIA GPUs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    allowed: jax.Array,
    *,
    softcap: float | None,
    drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """See `stack.kernels.attention.attend`; `allowed` is [batch, queries, keys]. Scores are in float32."""
    batch, queries, heads, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bqhgd,bkhd->bhgqk", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * head_dim**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores + jnp.where(allowed, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    weights = drop(jax.nn.softmax(scores, axis=-1).astype(query.dtype))
    mixed = jnp.einsum("bhgqk,bkhd->bqhgd", weights, value)
    return mixed.reshape(query.shape)

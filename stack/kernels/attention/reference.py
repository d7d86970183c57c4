"""The definition of attention, for tests to compare with: every score exists, in float32."""

import jax
import jax.numpy as jnp

from stack.kernels.attention.dropout import Dropout, keep
from stack.kernels.attention.mask import Mask


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """See `stack.kernels.attention.attend`; [batch, queries, heads, head_dim] float32."""
    query, key, value = (array.astype(jnp.float32) for array in (query, key, value))
    batch, queries, heads, head_dim = query.shape
    key, value = (jnp.repeat(array, heads // array.shape[2], axis=2) for array in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest")
    scores *= head_dim**-0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        shape = (heads, queries, key.shape[1])
        bias = jnp.broadcast_to(bias.astype(jnp.float32), (bias.shape[0], *shape))
        scores += jnp.repeat(bias, batch // bias.shape[0], axis=0)
    allowed = mask.allowed()[:, None]
    highest = jax.lax.stop_gradient(jnp.where(allowed, scores, -1e30).max(-1, keepdims=True))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - highest, 0.0)), 0.0)
    # A query that sees no key has a sum of 0.
    weights /= jnp.maximum(weights.sum(-1, keepdims=True), 1e-30)
    if dropout is not None:
        kept = keep(dropout.rows, jnp.arange(key.shape[1]), dropout.rate)
        weights = jnp.where(kept, weights / (1 - dropout.rate), 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value, precision="highest")

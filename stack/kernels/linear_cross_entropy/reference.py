"""The truth: all logits at once, gradients by differentiation, on one device."""

import jax
import jax.numpy as jnp

from stack.kernels.linear_cross_entropy.head import Head, Sums


def linear_cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    head: Head,
    bias: jax.Array | None = None,
) -> Sums:
    """See `stack.kernels.linear_cross_entropy.linear_cross_entropy`; `head.chunk` has no meaning here.

    Computed in float32 at the least, in float64 of float64 arrays, whatever the dtype of the arrays.
    """
    if not head.layout.trivial:
        raise ValueError("linear_cross_entropy: the reference is for one device; take xla_chunked on a mesh")
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    words = table[: head.vocab_size].astype(dtype)
    scores = jnp.einsum("ble,ve->blv", hidden.astype(dtype), words, precision="highest")
    if bias is not None:
        scores = scores + bias[: head.vocab_size]
    if head.softcap is not None:
        scores = head.softcap * jnp.tanh(scores / head.softcap)
    counts = labels >= 0
    normaliser = jax.nn.logsumexp(scores, axis=-1)
    label_score = jnp.take_along_axis(scores, jnp.where(counts, labels, 0)[..., None], axis=-1)[..., 0]
    nll = jnp.where(counts, normaliser - label_score, 0.0).sum()
    penalty = jnp.where(counts, head.z_loss * jnp.square(normaliser), 0.0).sum()
    evenly = jnp.where(counts, head.smoothing * (label_score - scores.mean(-1)), 0.0).sum()
    correct = counts & (label_score >= scores.max(-1))
    return Sums(loss=scale * (nll + evenly + penalty), nll=nll, correct=correct.sum(dtype=dtype))

"""One entry for every implementation of attention."""

from collections.abc import Callable

import jax

from stack.kernels.attention import cudnn, xla
from stack.kernels.attention.mask import Mask
from stack.parallel.rules import Layout


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    layout: Layout,
    *,
    kernel: str,
    window: int | None = None,
    softcap: float | None = None,
    drop: Callable[[jax.Array], jax.Array] = lambda weights: weights,
) -> jax.Array:
    """softmax(query key^T / sqrt(head_dim)) value, within documents.

    Args:
      query: [batch, queries, heads, head_dim], any float dtype.
      key: [batch, keys, kv_heads, head_dim]; heads / kv_heads queries share each.
      value: as `key`.
      mask: who sees whom.
      layout: how the arrays lie on the mesh.
      kernel: `xla` or `cudnn`; nothing falls back.
      window: tokens seen, the query's own included; None: all.
      softcap: c of c x tanh(score / c); None: as they are.
      drop: applied to the weights [batch, kv_heads, group, queries, keys]; `xla` only.

    Returns:
      Shape and dtype of `query`.
    """
    if kernel == "xla":
        return xla.attend(query, key, value, mask.allowed(window), softcap=softcap, drop=drop)
    if kernel == "cudnn":
        return cudnn.attend(query, key, value, mask, layout, window=window)
    raise ValueError(f"unknown attention kernel {kernel!r}: xla or cudnn")

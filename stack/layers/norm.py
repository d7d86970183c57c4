"""Normalisation over the last axis, in float32."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx


class Norm(nnx.Module):
    """LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467) of the last axis."""

    def __init__(self, kind: Literal["layernorm", "rmsnorm"], axis: tuple[str, int], epsilon: float):
        """`axis` is the name and size of the normalised axis; scale one, bias zero, float32."""
        name, size = axis
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(name,))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), axes=(name,)) if kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Shape and dtype of `x`."""
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)

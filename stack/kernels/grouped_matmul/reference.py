"""The definition, for tests to compare with: every token is multiplied by every group's weight."""

import jax
import jax.numpy as jnp


def grouped_matmul(tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `stack.kernels.grouped_matmul.grouped_matmul`, of one device; differentiable.

    Args:
      tokens: [tokens, inputs], any float dtype.
      weights: [groups, inputs, outputs].
      sizes: [groups] int32.

    Returns:
      [tokens, outputs], computed in float32 at the least, in float64 of float64 arrays.
    """
    dtype = jnp.promote_types(tokens.dtype, jnp.float32)
    ends = jnp.cumsum(sizes)
    rows = jnp.arange(tokens.shape[0])[:, None]
    is_of = (rows >= ends - sizes) & (rows < ends)
    # A number that is none must not reach another group: masked before the product, and after it.
    of_group = jnp.where(is_of.T[:, :, None], tokens.astype(dtype), 0)
    products = jnp.einsum("gti,gio->gto", of_group, weights.astype(dtype), precision="highest")
    return jnp.where(is_of.T[:, :, None], products, 0).sum(0)

"""`jax.lax.ragged_dot`, as XLA has it.

On CPUs and NVIDIA GPUs it is a dense product over all groups: the tokens are laid out once for each group,
zeros where they are another's, so memory and work are those of groups x tokens.
"""

import jax
import jax.numpy as jnp

from stack.kernels.grouped_matmul.request import Request
from stack.kernels.grouped_matmul.visits import bounds

_TRANSPOSED = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)
_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def multiply(
    tokens: jax.Array, weights: jax.Array, sizes: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.Multiply`."""
    sizes = _cut(sizes, tokens)
    wide = jnp.promote_types(tokens.dtype, jnp.float32)
    if transposed:
        result = jax.lax.ragged_dot_general(tokens, weights, sizes, _TRANSPOSED, preferred_element_type=wide)
    else:
        result = jax.lax.ragged_dot(tokens, weights, sizes, preferred_element_type=wide)
    return result.astype(tokens.dtype)


def weight_gradient(tokens: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.WeightGradient`."""
    wide = jnp.promote_types(tokens.dtype, jnp.float32)
    sizes = _cut(sizes, tokens)
    gradient = jax.lax.ragged_dot_general(tokens, cotangent, sizes, _BY_GROUP, preferred_element_type=wide)
    return gradient.astype(tokens.dtype)


def _cut(sizes: jax.Array, tokens: jax.Array) -> jax.Array:
    begins, ends = bounds(sizes, tokens=tokens.shape[0])
    return ends - begins


def obstacles(_: Request) -> list[str]:
    """It has none."""
    return []

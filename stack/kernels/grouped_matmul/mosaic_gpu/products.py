"""Products by the kernels beside: what they can do, and how arrays come to them."""

import jax
import jax.numpy as jnp

from stack.kernels.attention.mosaic_gpu import device_obstacles
from stack.kernels.grouped_matmul.request import Request

_MULTIPLE = 128
"""Of tokens, inputs and outputs. Tokens are padded; a weight that was would be copied at every use."""


def multiply(
    tokens: jax.Array, weights: jax.Array, sizes: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.Multiply`; bfloat16, widths of multiples of 128."""
    from stack.kernels.grouped_matmul.mosaic_gpu import by_token  # Pallas takes half a second to import.

    return by_token.multiply(_pad(tokens), weights, sizes, transposed=transposed)[: len(tokens)]


def weight_gradient(tokens: jax.Array, cotangent: jax.Array, sizes: jax.Array) -> jax.Array:
    """See `stack.kernels.grouped_matmul.choice.WeightGradient`; bfloat16, widths of multiples of 128."""
    from stack.kernels.grouped_matmul.mosaic_gpu import by_group

    return by_group.weight_gradient(_pad(tokens), _pad(cotangent), sizes)


def _pad(array: jax.Array) -> jax.Array:
    missing = -len(array) % _MULTIPLE
    return jnp.pad(array, ((0, missing), (0, 0))) if missing else array


def obstacles(request: Request) -> list[str]:
    """Everything that keeps the kernels from computing what is asked; empty: they can."""
    found = device_obstacles(request.platform, request.compute_capability, request.dtype)
    odd = [
        f"{name} on a device are {width}, no multiple of {_MULTIPLE}"
        for name, width in (("inputs", request.inputs), ("outputs", request.outputs))
        if width % _MULTIPLE
    ]
    return found + odd

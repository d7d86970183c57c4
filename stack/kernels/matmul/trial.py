"""Products in 8 bits by a kernel for blocks, compared with their definition on the device at hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stack.kernels.matmul.fp8 import project
from stack.kernels.matmul.operands import Fp8
from stack.parallel.rules import ONE_DEVICE

LIMIT = 0.02
"""Of the error. Both multiply the same rounded numbers: what the tensor cores add up, and rounding to
bfloat16, give 0.003; a scale that is another block's, 1 and more."""
_SHAPE = 2, 320, 1024, 384
"""Examples, tokens, inputs and outputs: more blocks of a sum than the kernel holds at once, some short."""


def trial_error(how: Fp8, dtype: Any) -> float:
    """How far from the definition a kernel is on the default device, forward and backward.

    Args:
      how: in 8 bits.
      dtype: of the model.

    Returns:
      The largest error of the product and of both gradients, each by its norm.
    """
    examples, tokens, inputs, outputs = _SHAPE
    shapes = (examples, tokens, inputs), (inputs, outputs), (examples, tokens, outputs)

    def array(seed: int, shape: tuple[int, ...]) -> jax.Array:
        sizes, values = jax.random.normal(jax.random.key(seed), (2, *shape))
        return jnp.exp2(3 * sizes) * values  # No two blocks have the same scale for long.

    x, weight, slope = (array(*each) for each in enumerate(shapes))

    def both_ways(how: Fp8) -> tuple[jax.Array, ...]:
        def product(x: jax.Array, weight: jax.Array) -> jax.Array:
            kernel = nnx.Param(weight, axes=("embed", "mlp"), role="float8")
            names = "batch", "length", "mlp"
            return project(x, kernel, ONE_DEVICE, names, contracted=1, how=how)

        output, back = jax.vjp(jax.jit(product), x.astype(dtype), weight)
        return output, *back(slope.astype(dtype))

    with jax.default_matmul_precision("highest"):
        exact = both_ways(dataclasses.replace(how, kernel="reference"))
    errors = [
        jnp.linalg.norm((one - want).astype(jnp.float32)) / jnp.linalg.norm(want.astype(jnp.float32))
        for one, want in zip(both_ways(how), exact, strict=True)
    ]
    return float(jnp.stack(errors).max())  # No number, if one is none.

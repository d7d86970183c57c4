"""Affine maps between named axes."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from stack.layers.parameter import parameter
from stack.parallel.rules import Layout
from stack.parallel.zero import project

Axes = tuple[tuple[str, int], ...]
"""Names and sizes, e.g. (("heads", 12), ("head_dim", 64))."""


class Linear(nnx.Module):
    """y[..., outputs] = sum over inputs of x[..., inputs] kernel[inputs, outputs] + bias[outputs]."""

    def __init__(self, inputs: Axes, outputs: Axes, *, bias: bool, std: float, rngs: nnx.Rngs):
        """Kernel normal with deviation `std`, bias zero, both float32."""
        names = tuple(name for name, _ in inputs + outputs)
        shape = tuple(size for _, size in inputs + outputs)
        kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.num_inputs = len(inputs)
        self.kernel = parameter(kernel, axes=names, role="matrix")
        self.bias = _bias(outputs) if bias else None

    def __call__(
        self, x: Float[Array, "batch length *inputs"], layout: Layout, names: tuple[str, ...]
    ) -> Float[Array, "batch length *outputs"]:
        """`x` ends in the input axes; the result has its dtype and the logical axes `names`."""
        y = project(x, self.kernel, layout, names, contracted=self.num_inputs)
        return y if self.bias is None else add_bias(y, self.bias[...])


def _bias(outputs: Axes) -> nnx.Param:
    names, shape = zip(*outputs, strict=True)
    return parameter(jnp.zeros(shape, jnp.float32), axes=names, role="vector")


def add_bias(y: Float[Array, "*whole"], bias: Float32[Array, "..."]) -> Float[Array, "*whole"]:
    """Y + bias, in the dtype of y; added in float32, so that the bias's gradient is summed in float32."""
    return (y.astype(jnp.float32) + bias).astype(y.dtype)

"""Affine maps between named axes."""

import jax
import jax.numpy as jnp
from flax import nnx

from stack.parallel.rules import Layout
from stack.parallel.zero import gather_weight, is_gathered

Axes = tuple[tuple[str, int], ...]
"""Names and sizes, e.g. (("heads", 12), ("head_dim", 64))."""


class Linear(nnx.Module):
    """y[..., outputs] = sum over inputs of x[..., inputs] kernel[inputs, outputs] + bias[outputs]."""

    def __init__(self, inputs: Axes, outputs: Axes, *, bias: bool, std: float, rngs: nnx.Rngs):
        """Kernel normal with deviation `std`, bias zero, both float32."""
        names = tuple(name for name, _ in inputs + outputs)
        shape = tuple(size for _, size in inputs + outputs)
        split = len(inputs)
        self.inputs = names[:split]
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=names)
        self.bias = nnx.Param(jnp.zeros(shape[split:], jnp.float32), axes=names[split:]) if bias else None

    def __call__(self, x: jax.Array, layout: Layout, names: tuple[str, ...]) -> jax.Array:
        """`x` ends in the input axes; the result has its dtype and the logical axes `names`."""
        contracted = len(self.inputs)
        dimensions = (tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))), ((), ())
        partial = layout.product_spec(names, contracted=self.inputs)

        def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
            kernel = gather_weight(kernel, layout, self.kernel.axes, matrix=True) if split else kernel
            return jax.lax.dot_general(x, kernel.astype(x.dtype), dimensions, out_sharding=partial)

        split = layout.zero == 3 and not is_gathered(self.kernel[...], layout)
        if split:
            # The backward pass gathers again: what was gathered for the forward pass would be kept until
            # then, for all layers, which is the whole model.
            product = jax.checkpoint(product, prevent_cse=False)
        y = layout.shard(product(x, self.kernel[...]), *names)
        return y if self.bias is None else add_bias(y, self.bias[...])


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """Y + bias, in the dtype of y; added in float32, so that the bias's gradient is summed in float32."""
    return (y.astype(jnp.float32) + bias).astype(y.dtype)

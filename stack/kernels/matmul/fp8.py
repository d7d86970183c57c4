"""Products with a weight whose operands are in 8 bits, and so are those of their gradients."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from stack.kernels.matmul.blocks import FORMS, BlockOperands
from stack.kernels.matmul.float8 import BACKWARD, FORWARD, Scaled, largest, quantize
from stack.kernels.matmul.operands import Fp8, Operands, cotangent_spec, lay_out, without_types
from stack.parallel.rules import Layout
from stack.parallel.zero import is_gathered

PRODUCT = "float8_product"
"""What policies of rematerialisation call a product's result."""


def project(
    x: Float[Array, "*rows"],
    kernel: nnx.Variable,
    layout: Layout,
    names: tuple[str, ...],
    *,
    contracted: int,
    how: Fp8,
    amax: Float32[Array, "2"] | None = None,
) -> Float[Array, "*whole"]:
    """`stack.parallel.zero.project` in float8: e4m3 forward, e5m2 for gradients (arXiv 2209.05433).

    Operands are rounded where they are used: what the backward pass finds saved is `x` as it came and the
    weight as it lies. At stage 3 the weight is rounded before it is gathered, which moves half the bytes.
    With one scale, a gradient is rounded once for both of its products. With channels, whose scales lie along
    the sum of the gradient's products, the other operand's scales are multiplied into the gradient first, and
    it is rounded once for each. Sums are in float32, forward in the tensor cores' fast mode.

    Args:
      x: [batch, length, inputs], any float dtype.
      kernel: [inputs, outputs], gathered by the step, or at stage 3 as it lies at rest.
      layout: how things lie on the mesh.
      names: logical axes of the result, which has the dtype of `x`.
      contracted: how many axes the inputs are.
      how: in 8 bits.
      amax: float32 [2], what scales are made for: the largest of `x` and of the gradient of the result.
        Its own gradient is what they are, for those of the next step. None: what they are is what is taken.
    """
    operands = BlockOperands if how.blocks in FORMS else _Tensors
    products = operands(
        layout=layout,
        kernel=kernel,
        names=names,
        rows=x.ndim - contracted,
        contracted=contracted,
        is_split=layout.zero == 3 and not is_gathered(kernel[...], layout),
        how=how,
    )

    @jax.custom_vjp
    def product(x: jax.Array, weight: jax.Array, amax: jax.Array | None) -> jax.Array:
        return products.forward(x, weight, amax)

    product.defvjp(
        lambda *inputs: (product(*inputs), inputs),
        lambda inputs, cotangent: products.backward(*inputs, cotangent=cotangent),
    )
    return checkpoint_name(product(x, kernel[...], amax), PRODUCT)


class _Tensors(Operands):
    """Those of products with one scale, or one for each number of the result."""

    def forward(self, x: jax.Array, weight: jax.Array, amax: jax.Array | None) -> jax.Array:
        """The product of `x` and the weight."""
        inputs, outer = range(self.contracted), range(self.rows)
        x8, w8 = self._activations(x, amax), self._weight(weight, x.dtype)
        contracting = tuple(self.rows + axis for axis in inputs), tuple(inputs)
        y = _dot(x8, w8, contracting, self.result, x.dtype, precision=jax.lax.Precision.DEFAULT)
        y = self.layout.shard(y, *self.names)
        return _scale(_scale(y, x8, outer), w8, range(self.rows, y.ndim))

    def backward(
        self, x: jax.Array, weight: jax.Array, amax: jax.Array | None, *, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Gradients of `x`, of the weight as it came, and what was the largest."""
        x8, w8 = self._activations(x, amax), self._weight(weight, x.dtype)
        rows, outputs = tuple(range(self.rows)), tuple(range(self.rows, cotangent.ndim))
        columns = tuple(range(self.contracted, weight.ndim))
        if self.how.blocks == "tensor":
            for_x = for_weight = self._gradient(cotangent, None, None if amax is None else amax[1])
        else:
            for_x = self._gradient(_scale(cotangent, w8, outputs), outputs)
            for_weight = self._gradient(_scale(cotangent, x8, rows), rows)
        highest = jax.lax.Precision.HIGHEST
        gradient = _dot(
            for_x, w8, (outputs, columns), cotangent_spec(x, self.layout), x.dtype, precision=highest
        )
        gradient = _scale(gradient, for_x, rows)
        change = _dot(x8, for_weight, (rows, rows), self.change, x.dtype, precision=highest)
        change = _scale(change, for_weight, columns)
        if self.how.blocks == "tensor":
            gradient, change = _scale(gradient, w8, ()), _scale(change, x8, ())
        largest_now = None if amax is None else jnp.stack([largest(x), largest(cotangent)])
        return gradient, self.scatter(change, weight), largest_now

    def _activations(self, x: jax.Array, amax: jax.Array | None) -> Scaled:
        x = without_types(x, self.layout)
        if amax is not None:
            return quantize(x, FORWARD, amax[0])
        axes = None if self.how.blocks == "tensor" else tuple(range(self.rows, x.ndim))
        return quantize(x, FORWARD, largest(x, axes))

    def _gradient(
        self, cotangent: jax.Array, axes: tuple[int, ...] | None, amax: jax.Array | None = None
    ) -> Scaled:
        """In 8 bits, and then laid out for its products."""
        scaled = quantize(cotangent, BACKWARD, largest(cotangent, axes) if amax is None else amax)
        return scaled if self.result is None else lay_out(scaled, P(*self.result.partitions))

    def _weight(self, weight: jax.Array, dtype: jnp.dtype) -> Scaled:
        """In 8 bits, and whole over `fsdp`."""
        weight = self.at_rest(weight, dtype)
        axes = None if self.how.blocks == "tensor" else tuple(range(self.contracted))
        scaled = quantize(weight, FORWARD, largest(weight, axes))
        return lay_out(scaled, self.whole) if self.is_split else scaled


def _dot(
    left: Scaled,
    right: Scaled,
    contracting: tuple[tuple[int, ...], tuple[int, ...]],
    spec: P | None,
    dtype: jnp.dtype,
    *,
    precision: jax.lax.Precision,
) -> jax.Array:
    """A product of values in `dtype`, without their scales.

    Without precision DEFAULT, cuBLAS adds up partial sums of Hopper's tensor cores, of about 14 bits, in
    float32 (arXiv 2412.19437, section 3.3.2).
    """
    return jax.lax.dot_general(
        left.values,
        right.values,
        (contracting, ((), ())),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=spec,
    )


def _scale(y: jax.Array, by: Scaled, axes: range | tuple[int, ...]) -> jax.Array:
    """`y` times a scale, or scales of blocks that lie along some of its axes. Powers of two round nothing."""
    scale = by.scale
    if scale.ndim:
        sizes = [y.shape[axis] if axis in axes else 1 for axis in range(y.ndim)]
        assert math.prod(sizes) == scale.size
        scale = scale.reshape(sizes)
    unreduced = jax.typeof(y).sharding.spec.unreduced
    if unreduced:
        scale = jax.reshard(scale, P(*jax.typeof(scale).sharding.spec.partitions, reduced=unreduced))
    return y * scale.astype(y.dtype)

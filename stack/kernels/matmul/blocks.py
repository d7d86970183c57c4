"""Products in 8 bits whose scales change along their sums: blocks of DeepSeek-V3, and MX.

`block` (arXiv 2412.19437, section 3.3): an activation or a gradient has a scale for each 1 x 128 along the
sum of a product, a weight for each 128 x 128. `mx` (the Microscaling formats of OCP; arXiv 2506.08027 trains
in them): every operand has one for each 1 x 32 along the sum. So what enters two products, with sums of two
directions, is rounded twice, but for a weight in squares. With scales so near, gradients need no more range
than e4m3 has.

Blocks lie on one device, so all is local to it: rounding and products. No largest number is agreed on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from stack.config.layout import FLOAT8_BLOCKS
from stack.kernels.matmul.float8 import FORWARD, Scaled, largest, scale_for
from stack.kernels.matmul.operands import Operands, cotangent_spec, without_types


@dataclass(frozen=True)
class Form:
    """What shares a scale."""

    size: int
    """Numbers along a sum."""
    across: int
    """Rows of a weight's block, across the sum."""
    scales: Any = jnp.float32
    """Their dtype; both hold the same powers of two."""

    def shape(self, axis: int, *, weight: bool = False) -> tuple[int, int]:
        """A block of a matrix that is summed over an axis."""
        across = self.across if weight else 1
        return (across, self.size) if axis else (self.size, across)


FORMS = {
    "block": Form(FLOAT8_BLOCKS["block"], FLOAT8_BLOCKS["block"]),
    "mx": Form(FLOAT8_BLOCKS["mx"], 1, jnp.float8_e8m0fnu),
}
"""By the name of `kernels.fp8.blocks`."""


def quantize_blocks(
    x: Float[Array, "rows columns"], shape: tuple[int, int], scales: Any = jnp.float32
) -> Scaled:
    """`x` in e4m3 with a scale for each block, the last of a row or a column as long as it is.

    Args:
      x: any float dtype.
      shape: of a block.
      scales: the dtype of scales.

    Returns:
      Values as `x`, and scales [rows / shape[0], columns / shape[1]], rounded up.
    """
    padded = _pad(x, shape)
    (rows, columns), (height, width) = padded.shape, shape
    cut = padded.reshape(rows // height, height, columns // width, width)
    scale = scale_for(largest(cut, (1, 3)), FORWARD)
    # None is larger than its scale allows; where one is not finite, the scale is NaN, and so is the block.
    values = (cut.astype(jnp.float32) / scale).astype(FORWARD)
    return Scaled(values.reshape(padded.shape)[: x.shape[0], : x.shape[1]], scale[:, 0, :, 0].astype(scales))


def multiply_reference(left: Scaled, right: Scaled, form: Form, dtype: Any) -> Float[Array, "rows columns"]:
    """The product of numbers in 8 bits, the second transposed, summed in float32: the definition.

    Args:
      left: [rows, sum] e4m3, scales [rows, blocks].
      right: [columns, sum] e4m3, scales [columns / across, blocks], or [columns, blocks].
      form: of blocks.
      dtype: of the result.
    """
    exact = _expanded(left, form), _expanded(right, form)
    y = jax.lax.dot_general(*exact, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.astype(dtype)


def _expanded(scaled: Scaled, form: Form) -> Float32[Array, "rows sum"]:
    """What is meant: a power of two and 4 bits, which float32 holds."""
    rows, length = scaled.values.shape
    height = 1 if scaled.scale.shape[0] == rows else form.across
    scale = scaled.scale.astype(jnp.float32)
    scale = jnp.repeat(jnp.repeat(scale, height, axis=0)[:rows], form.size, axis=1)[:, :length]
    return scaled.values.astype(jnp.float32) * scale


def multiply_hopper(left: Scaled, right: Scaled, form: Form, dtype: Any) -> Float[Array, "rows columns"]:
    """`multiply_reference` of blocks of 128 on a Hopper GPU, in its tensor cores."""
    from stack.kernels.matmul import mosaic_gpu  # Pallas takes half a second to import.

    size, shape = form.size, (left.values.shape[0], right.values.shape[0])
    left, right = (
        Scaled(_pad(one.values, (size, size)), _pad(one.scale, (size, 1)) if is_line else one.scale)
        for one, is_line in ((left, True), (right, right.scale.shape[0] == shape[1]))
    )
    return mosaic_gpu.multiply(*left, *right, dtype)[: shape[0], : shape[1]]


def multiply_blackwell(left: Scaled, right: Scaled, form: Form, dtype: Any) -> Float[Array, "rows columns"]:
    """`multiply_reference` of MX on a Blackwell GPU: cuDNN's product, by way of XLA."""
    values = (_pad(one.values, (1, form.size))[None] for one in (left, right))
    scales = (one.scale[None] for one in (left, right))
    return jax.nn.scaled_matmul(*values, *scales, preferred_element_type=dtype)[0]


MULTIPLY: dict[str, Callable[[Scaled, Scaled, Form, Any], jax.Array]] = {
    "reference": multiply_reference,
    "mosaic_gpu": multiply_hopper,
    "scaled_matmul": multiply_blackwell,
}
"""What there is on a device; see `multiply_reference`."""


class BlockOperands(Operands):
    """Those of products with scales for blocks of their sums."""

    @property
    def form(self) -> Form:
        """Of blocks."""
        return FORMS[self.how.blocks]

    def forward(self, x: jax.Array, weight: jax.Array, amax: jax.Array | None) -> jax.Array:
        """The product of `x` and the weight."""
        assert amax is None, "blocks have no past"

        def local(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
            w8 = Scaled(_matrix(values, self.contracted).T, scale.T)
            y = self._multiply(self._lines(x), w8, x.dtype)
            return y.reshape(*x.shape[: self.rows], *values.shape[self.contracted :])

        x, w8 = without_types(x, self.layout), self._weight(weight, x.dtype, axis=0)
        y = self._on_each_device(local, self.result, x, *w8)
        return self.layout.shard(y, *self.names)

    def backward(
        self, x: jax.Array, weight: jax.Array, amax: jax.Array | None, *, cotangent: jax.Array
    ) -> tuple[jax.Array, jax.Array, None]:
        """Gradients of `x` and of the weight as it came."""
        dtype, spec = x.dtype, cotangent_spec(x, self.layout)
        if self.result is not None:
            cotangent = jax.reshard(cotangent, P(*self.result.partitions))

        def local(
            x: jax.Array, cotangent: jax.Array, values: jax.Array, scale: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            w8 = Scaled(_matrix(values, self.contracted), scale)
            gradient = self._multiply(self._lines(cotangent), w8, dtype)
            change = self._multiply(self._along_tokens(x), self._along_tokens(cotangent), dtype)
            return gradient.reshape(x.shape), change.reshape(values.shape)

        operands = without_types(x, self.layout), cotangent, *self._weight(weight, dtype, axis=1)
        specs = None if spec is None else (self._partial(spec), self.change)
        gradient, change = self._on_each_device(local, specs, *operands)
        if spec is not None:
            gradient = jax.reshard(gradient, spec)
        return gradient, self.scatter(change, weight), None

    def _partial(self, spec: P) -> P:
        """How the gradient of `x` lies before what outputs on other devices give it is added."""
        summed = {
            axis for name in self.kernel.axes[self.contracted :] for axis in self.layout.mesh_axes(name)
        }
        return P(*spec.partitions, unreduced=summed)

    def _multiply(self, left: Scaled, right: Scaled, dtype: Any) -> jax.Array:
        return MULTIPLY[self.how.kernel](left, right, self.form, dtype)

    def _lines(self, x: jax.Array) -> Scaled:
        """[batch x length, columns] in 8 bits, in blocks along its columns."""
        return quantize_blocks(_matrix(x, self.rows), self.form.shape(1), self.form.scales)

    def _along_tokens(self, x: jax.Array) -> Scaled:
        """[columns, batch x length] in 8 bits, in blocks of tokens of one example."""
        x = x.reshape(*x.shape[: self.rows], -1)
        x = jnp.pad(x, [(0, 0)] * (self.rows - 1) + [(0, -x.shape[-2] % self.form.size), (0, 0)])
        scaled = quantize_blocks(_matrix(x, self.rows), self.form.shape(0), self.form.scales)
        return Scaled(scaled.values.T, scaled.scale.T)

    def _weight(self, weight: jax.Array, dtype: jnp.dtype, *, axis: int) -> Scaled:
        """In 8 bits for a sum over inputs (axis 0) or outputs (axis 1), and whole over `fsdp`.

        It is rounded before it is gathered where each device has whole blocks. Scales are those of a matrix
        of inputs and outputs.
        """
        shape = self.form.shape(axis, weight=True)
        weight = self.at_rest(weight, dtype)
        is_early = self.is_split and self._has_whole_blocks(weight, shape)
        if self.is_split and not is_early:
            weight = jax.reshard(weight, self.whole)

        def local(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, scale = quantize_blocks(_matrix(weight, self.contracted), shape, self.form.scales)
            return values.reshape(weight.shape), scale

        spec = None if self.layout.trivial else jax.typeof(weight).sharding.spec
        specs = None if spec is None else (spec, self._of_scales(spec))
        values, scale = self._on_each_device(local, specs, weight)
        if not is_early:
            return Scaled(values, scale)
        return Scaled(jax.reshard(values, self.whole), jax.reshard(scale, self._of_scales(self.whole)))

    def _of_scales(self, spec: P) -> P:
        """How scales of a weight lie that lies so."""
        return P(spec.partitions[0], spec.partitions[self.contracted])

    def _has_whole_blocks(self, weight: jax.Array, shape: tuple[int, int]) -> bool:
        """Whether each device has whole blocks of a weight that is split, and as a matrix one part of it."""
        sharding = jax.typeof(weight).sharding
        sizes, spec = sharding.shard_shape(weight.shape), sharding.spec.partitions
        groups = slice(0, self.contracted), slice(self.contracted, None)
        return all(
            math.prod(sizes[group]) % size == 0 and not any(spec[group][1:])
            for group, size in zip(groups, shape, strict=True)
        )

    def _on_each_device(self, local: Callable[..., Any], out_specs: Any, *arrays: jax.Array) -> Any:
        """Runs `local` on what each device holds."""
        if self.layout.trivial:
            return local(*arrays)
        specs = tuple(jax.typeof(array).sharding.spec for array in arrays)
        return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def _matrix(x: jax.Array, rows: int) -> jax.Array:
    """Of an array whose first axes are rows."""
    return x.reshape(math.prod(x.shape[:rows]), -1)


def _pad(x: jax.Array, multiples: tuple[int, int]) -> jax.Array:
    """With zeros at the ends, to multiples."""
    missing = [-size % multiple for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, [(0, each) for each in missing]) if any(missing) else x

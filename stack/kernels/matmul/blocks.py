"""Products in 8 bits with scales along their sums, one for each 128, as in DeepSeek-V3 (arXiv 2412.19437).

An activation or a gradient has a scale for each 1 x 128 along the sum of a product, and is rounded once for
either of its two products; a weight has one for each 128 x 128, and is rounded once. With scales so near,
gradients need no more range than e4m3 has (section 3.3.2).

Blocks lie on one device, so all is local to it: rounding and products. No largest number is agreed on.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32

from stack.config.layout import FLOAT8_BLOCK as SIZE
from stack.kernels.matmul.float8 import FORWARD, Scaled, largest, scale_for
from stack.kernels.matmul.operands import Operands, cotangent_spec, without_types


def quantize_blocks(x: Float[Array, "rows columns"], shape: tuple[int, int]) -> Scaled:
    """`x` in e4m3 with a scale for each block, the last of a row or a column as long as it is.

    Args:
      x: any float dtype.
      shape: of a block.

    Returns:
      Values as `x`, and scales [rows / shape[0], columns / shape[1]] float32, rounded up.
    """
    padded = _pad(x, shape)
    (rows, columns), (height, width) = padded.shape, shape
    cut = padded.reshape(rows // height, height, columns // width, width)
    scale = scale_for(largest(cut, (1, 3)), FORWARD)
    # None is larger than its scale allows; where one is not finite, the scale is NaN, and so is the block.
    values = (cut.astype(jnp.float32) / scale).astype(FORWARD)
    return Scaled(values.reshape(padded.shape)[: x.shape[0], : x.shape[1]], scale[:, 0, :, 0])


def multiply_reference(left: Scaled, right: Scaled, dtype: Any) -> Float[Array, "rows columns"]:
    """The product of numbers in 8 bits, the second transposed, summed in float32: the definition.

    Args:
      left: [rows, sum] e4m3, scales [rows, blocks].
      right: [columns, sum] e4m3, scales [columns, blocks], or [blocks, blocks] of squares.
      dtype: of the result.
    """
    exact = _expanded(left), _expanded(right)  # A power of two and 4 bits: float32 holds the product.
    y = jax.lax.dot_general(*exact, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return y.astype(dtype)


def _expanded(scaled: Scaled) -> Float32[Array, "rows sum"]:
    rows, length = scaled.values.shape
    height = 1 if scaled.scale.shape[0] == rows else SIZE
    scale = jnp.repeat(jnp.repeat(scaled.scale, height, axis=0)[:rows], SIZE, axis=1)[:, :length]
    return scaled.values.astype(jnp.float32) * scale


def multiply_hopper(left: Scaled, right: Scaled, dtype: Any) -> Float[Array, "rows columns"]:
    """`multiply_reference` on a Hopper GPU, in its tensor cores."""
    from stack.kernels.matmul import mosaic_gpu  # Pallas takes half a second to import.

    shape = left.values.shape[0], right.values.shape[0]
    left, right = (
        Scaled(_pad(one.values, (SIZE, SIZE)), _pad(one.scale, (SIZE, 1)) if is_line else one.scale)
        for one, is_line in ((left, True), (right, right.scale.shape[0] == shape[1]))
    )
    return mosaic_gpu.multiply(*left, *right, dtype)[: shape[0], : shape[1]]


MULTIPLY: dict[str, Callable[[Scaled, Scaled, Any], jax.Array]] = {
    "reference": multiply_reference,
    "mosaic_gpu": multiply_hopper,
}
"""left right^T by what there is on a device; see `multiply_reference`."""


class BlockOperands(Operands):
    """Those of products with scales for blocks of their sums."""

    def forward(self, x: jax.Array, weight: jax.Array, amax: jax.Array | None) -> jax.Array:
        """The product of `x` and the weight."""
        assert amax is None, "blocks have no past"

        def local(x: jax.Array, values: jax.Array, scale: jax.Array) -> jax.Array:
            w8 = Scaled(_matrix(values, self.contracted).T, scale.T)
            y = self._multiply(quantize_blocks(_matrix(x, self.rows), (1, SIZE)), w8, x.dtype)
            return y.reshape(*x.shape[: self.rows], *values.shape[self.contracted :])

        x, w8 = without_types(x, self.layout), self._weight(weight, x.dtype)
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
            dy = quantize_blocks(_matrix(cotangent, self.rows), (1, SIZE))
            gradient = self._multiply(dy, Scaled(_matrix(values, self.contracted), scale), dtype)
            tokens = [_along_tokens(one, self.rows) for one in (x, cotangent)]
            change = self._multiply(tokens[0], tokens[1], dtype)
            return gradient.reshape(x.shape), change.reshape(values.shape)

        operands = without_types(x, self.layout), cotangent, *self._weight(weight, dtype)
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
        return MULTIPLY[self.how.kernel](left, right, dtype)

    def _weight(self, weight: jax.Array, dtype: jnp.dtype) -> Scaled:
        """In 8 bits, with scales [inputs / 128, outputs / 128], and whole over `fsdp`.

        It is rounded before it is gathered where each device has whole blocks.
        """
        weight = self.at_rest(weight, dtype)
        is_early = self.is_split and self._has_whole_blocks(weight)
        if self.is_split and not is_early:
            weight = jax.reshard(weight, self.whole)

        def local(weight: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, scale = quantize_blocks(_matrix(weight, self.contracted), (SIZE, SIZE))
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

    def _has_whole_blocks(self, weight: jax.Array) -> bool:
        """Whether a weight that is split over devices has whole blocks on each."""
        sharding = jax.typeof(weight).sharding
        shape = sharding.shard_shape(weight.shape)
        groups = slice(0, self.contracted), slice(self.contracted, None)
        whole = (math.prod(shape[group]) % SIZE == 0 for group in groups)
        return all(whole) and not any(any(sharding.spec.partitions[group][1:]) for group in groups)

    def _on_each_device(self, local: Callable[..., Any], out_specs: Any, *arrays: jax.Array) -> Any:
        """Runs `local` on what each device holds."""
        if self.layout.trivial:
            return local(*arrays)
        specs = tuple(jax.typeof(array).sharding.spec for array in arrays)
        return jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)(*arrays)


def _matrix(x: jax.Array, rows: int) -> jax.Array:
    """Of an array whose first axes are rows."""
    return x.reshape(math.prod(x.shape[:rows]), -1)


def _along_tokens(x: jax.Array, rows: int) -> Scaled:
    """[columns, batch x length] in 8 bits, blocks of tokens of one example."""
    x = x.reshape(*x.shape[:rows], -1)
    x = jnp.pad(x, [(0, 0)] * (rows - 1) + [(0, -x.shape[-2] % SIZE), (0, 0)])
    scaled = quantize_blocks(_matrix(x, rows), (SIZE, 1))
    return Scaled(scaled.values.T, scaled.scale.T)


def _pad(x: jax.Array, multiples: tuple[int, int]) -> jax.Array:
    """With zeros at the ends, to multiples."""
    missing = [-size % multiple for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, [(0, each) for each in missing]) if any(missing) else x

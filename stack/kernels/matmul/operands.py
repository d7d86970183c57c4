"""What products in 8 bits are asked for, and how their operands lie on a mesh."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import layout as memory_layout
from jax.sharding import PartitionSpec as P

from stack.kernels.matmul.float8 import Scaled
from stack.parallel.rules import Layout
from stack.parallel.zero import scatter_gradient

Blocks = Literal["tensor", "channel", "block", "mx"]
"""What shares a scale: all of an operand; or what one number of the result is summed over, [1, inputs] of the
activations and [inputs, 1] of the weight; or blocks of what is summed: see `stack.kernels.matmul.blocks`."""
Kernel = Literal["xla", "reference", "mosaic_gpu", "scaled_matmul"]
"""What multiplies: XLA's product of float8 arrays; of blocks, their definition or a kernel."""


@dataclass(frozen=True, kw_only=True)
class Fp8:
    """How products are computed in 8 bits."""

    blocks: Blocks = "tensor"
    scaling: str = "current"
    """`current`: an operand is scaled by its own largest number; `delayed`: by one that is given."""
    kernel: Kernel = "xla"
    """`xla` for tensors and channels; of blocks, what there is on the device."""


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Those of the three products of a layer's weight."""

    layout: Layout
    kernel: nnx.Variable
    names: tuple[str, ...]
    """Logical axes of the result."""
    rows: int
    """Axes of `x` that are not inputs."""
    contracted: int
    """Axes of the inputs."""
    is_split: bool
    """Whether the weight is gathered here."""
    how: Fp8

    @property
    def whole(self) -> P:
        """How the weight lies once it is gathered."""
        return self.layout.whole_spec(self.kernel.axes)

    @property
    def result(self) -> P | None:
        """How the result lies before partial sums are added."""
        return self.layout.product_spec(self.names, contracted=self.kernel.axes[: self.contracted])

    @property
    def change(self) -> P | None:
        """How the weight's gradient lies before it is summed over examples."""
        if self.layout.trivial:
            return None
        return P(*self.whole.partitions, unreduced=self.layout.replicas)

    def at_rest(self, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The weight as it came, in a dtype."""
        if self.is_split:  # As it lies at rest; see `stack.parallel.zero`.
            order = memory_layout.Layout(major_to_minor=tuple(range(weight.ndim)))
            weight = memory_layout.with_layout_constraint(weight, order)
        return without_types(weight, self.layout).astype(dtype)

    def scatter(self, gradient: jax.Array, weight: jax.Array) -> jax.Array:
        """A partial sum as the weight's gradient is wanted."""
        if not self.is_split:
            return gradient.astype(weight.dtype)
        partial_sum = bool(jax.typeof(weight).sharding.spec.reduced)
        return scatter_gradient(
            gradient, self.layout, self.kernel.axes, self.kernel.role, partial_sum=partial_sum
        )


def lay_out(scaled: Scaled, spec: P) -> Scaled:
    """Values on devices as told, and scales of blocks with them."""
    scale = scaled.scale
    if scale.ndim:
        entries = zip(spec.partitions, scale.shape, strict=True)
        scale = jax.reshard(scale, P(*(entry if size > 1 else None for entry, size in entries)))
    return Scaled(jax.reshard(scaled.values, spec), scale)


def without_types(x: jax.Array, layout: Layout) -> jax.Array:
    """`x` as it lies, but not `reduced`: what is used elementwise cannot be."""
    spec = jax.typeof(x).sharding.spec
    return x if layout.trivial or not spec.reduced else jax.reshard(x, P(*spec.partitions))


def cotangent_spec(x: jax.Array, layout: Layout) -> P | None:
    """How the gradient of `x` lies: what is `reduced` has one that is a partial sum."""
    spec = jax.typeof(x).sharding.spec
    return None if layout.trivial else P(*spec.partitions, unreduced=spec.reduced)

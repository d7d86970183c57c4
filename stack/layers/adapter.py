"""What is added to a product with a frozen matrix, and trained in its place."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from stack.parallel.rules import Layout
from stack.parallel.zero import gather_weight, is_gathered, project

NAMES = ("lora_a", "lora_b", "dora_magnitude")
"""What its parameters are called, in the module whose matrix they are added to."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """How much is added to one matrix, or to those of a stack of layers."""

    rank: int
    """Of the sum."""
    alpha: float
    """Over the rank, what it is multiplied by."""
    has_magnitude: bool
    """Whether each output has a length of its own (DoRA)."""

    @property
    def scale(self) -> float:
        """What the product of both matrices is multiplied by."""
        return self.alpha / self.rank


def adapt(
    y: jax.Array,
    x: jax.Array,
    kernel: nnx.Variable,
    lora: tuple[nnx.Variable, nnx.Variable],
    magnitude: nnx.Variable | None,
    adapter: Adapter,
    layout: Layout,
    names: tuple[str, ...],
    *,
    contracted: int,
) -> jax.Array:
    """A product x W with its adapter: x W + s x A B (LoRA, arXiv 2106.09685, equation 3).

    With a magnitude, m of each output, that sum is multiplied by m / |W + s A B|, whose denominator has no
    gradient (DoRA, arXiv 2402.09353, equations 5 and 11).

    Args:
      y: x W, [..., outputs], any float dtype.
      x: [..., inputs].
      kernel: W, [inputs, outputs], gathered or as it lies at rest, as `project` takes it.
      lora: A, [inputs, rank], and B, [rank, outputs], the same.
      magnitude: m, [outputs] float32, or None.
      adapter: s.
      layout: how things lie on the mesh.
      names: logical axes of the result, which has the dtype of `y`.
      contracted: how many axes the inputs are.
    """
    a, b = lora
    # As long as the result: where `residual_length` is split the sums over inputs end in its parts.
    between = (*names[: y.ndim - (kernel[...].ndim - contracted)], "rank")
    low = project(_complete(x, layout), a, layout, between, contracted=contracted)
    y = y + adapter.scale * _raise(low, b, layout, names)
    if magnitude is None:
        return y
    length = lengths(kernel, lora, adapter, layout, contracted=contracted)
    return (y.astype(jnp.float32) * (magnitude[...] / length)).astype(y.dtype)


def _complete(x: jax.Array, layout: Layout) -> jax.Array:
    """An activation whose gradient is whole, where that of `x` is a partial sum: see `Layout.sum_late`."""
    spec = jax.typeof(x).sharding.spec
    return x if layout.trivial or not spec.reduced else jax.reshard(x, P(*spec.partitions))


def _raise(low: jax.Array, b: nnx.Variable, layout: Layout, names: tuple[str, ...]) -> jax.Array:
    """The product with B; where `tensor` splits the length, B's gradients on its devices are added up."""
    length = frozenset(layout.mesh_axes(names[1]))
    if layout.trivial or not length:
        return project(low, b, layout, names, contracted=1)
    weight = b[...] if is_gathered(b[...], layout) else gather_weight(b[...], layout, b.axes, b.role)
    whole, replicas = layout.whole_spec(b.axes), layout.replicas

    @jax.custom_vjp
    def spread(weight: jax.Array) -> jax.Array:
        return jax.reshard(weight, P(*whole, reduced=replicas | length))

    def collect(_: None, cotangent: jax.Array) -> tuple[jax.Array]:
        total = jax.reshard(cotangent.astype(layout.reduce_dtype), P(*whole, unreduced=replicas))
        return (total.astype(cotangent.dtype),)

    spread.defvjp(lambda weight: (spread(weight), None), collect)
    spec = layout.product_spec(names, contracted=("rank",))
    dimensions = ((low.ndim - 1,), (0,)), ((), ())
    product = jax.lax.dot_general(low, spread(weight).astype(low.dtype), dimensions, out_sharding=spec)
    return layout.shard(product, *names)


def lengths(
    kernel: nnx.Variable,
    lora: tuple[nnx.Variable, nnx.Variable],
    adapter: Adapter,
    layout: Layout,
    *,
    contracted: int,
) -> jax.Array:
    """|W + s A B| of each output, [outputs] float32, without a gradient; the sum itself is never made.

    Its square is |W|² + 2 s B (Aᵀ W) + s² B (Aᵀ A) B, of products no larger than B.
    """
    weight, a, b = (_whole(variable, layout) for variable in (kernel, *lora))
    inputs, outputs = kernel.axes[:contracted], kernel.axes[contracted:]
    axes = tuple(range(contracted))

    def across(left: jax.Array, right: jax.Array, names: tuple[str, ...]) -> jax.Array:
        product = jax.lax.dot_general(
            left,
            right,
            ((axes, axes), ((), ())),
            preferred_element_type=jnp.float32,
            out_sharding=layout.product_spec(names, contracted=inputs),
        )
        return layout.shard(product, *names)

    wide, b = weight.astype(jnp.float32), b.astype(jnp.float32)
    both, own = across(a, weight, ("rank", *outputs)), across(a, a, ("rank", "rank"))
    dot = partial(jax.lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))
    mixed = dot(own, b, out_sharding=layout.spec("rank", *outputs))
    s = adapter.scale
    squares = layout.shard((wide * wide).sum(axes), *outputs)
    return jnp.sqrt(squares + 2 * s * (b * both).sum(0) + s**2 * (b * mixed).sum(0))


def _whole(variable: nnx.Variable, layout: Layout) -> jax.Array:
    """A matrix, whole over `fsdp`, without a gradient."""
    weight = jax.lax.stop_gradient(variable[...])
    if layout.trivial:
        return weight if layout.dtype is None else weight.astype(layout.dtype)
    if not is_gathered(weight, layout):
        weight = gather_weight(weight, layout, variable.axes, variable.role)
    return jax.reshard(weight, layout.whole_spec(variable.axes))


def magnitudes(kernel: np.ndarray, inputs: tuple[int, ...]) -> np.ndarray:
    """The length of what a matrix has for each output, [outputs] float32; computed in float64, on the host.

    Args:
      kernel: [inputs, outputs].
      inputs: which of its axes they are.
    """
    return np.sqrt(np.square(kernel.astype(np.float64)).sum(inputs)).astype(np.float32)


def merged(
    kernel: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    magnitude: np.ndarray | None,
    scale: float,
) -> np.ndarray:
    """The one matrix that does what a matrix and its adapter do, float32; computed in float64, on the host.

    Args:
      kernel: W, [inputs, outputs].
      a: [inputs, rank].
      b: [rank, outputs].
      magnitude: [outputs], or None.
      scale: of A B.
    """
    wide = [array.astype(np.float64) for array in (kernel, a, b)]
    total = wide[0] + scale * np.tensordot(wide[1], wide[2], 1)
    if magnitude is not None:
        inputs = tuple(range(a.ndim - 1))
        total *= magnitude.astype(np.float64) / np.sqrt((total**2).sum(inputs))
    return total.astype(np.float32)

"""Muon: momentum with all its singular values made about one.

Keller Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon); its scale, by which it goes with the
learning rate and weight decay of AdamW, is that of arXiv 2502.16982, section 2.2.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

ITERATIONS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, (x x^T) x and (x x^T)^2 x: singular values from some hundredths to 1 come to lie around 1 within five
iterations, between about 0.7 and 1.2; smaller ones grow 3.4-fold in each."""
_RMS = 0.2
"""The root mean square of AdamW's updates, about."""


def scale_by_muon(momentum: float, axes: Any, *, dtype: str) -> optax.GradientTransformation:
    """Nesterov's momentum of each matrix, orthogonalized; of a stack of layers each by itself.

    Args:
      momentum: share of the old sum of gradients in the new one.
      axes: the logical axes of each matrix, one of whose sides is `embed`; () of what is none.
      dtype: what goes between devices and what the products are computed in.
    """

    def update(updates: Any, _: Any) -> Any:
        return jax.tree.map(partial(_of_parameter, dtype=dtype), axes, updates, is_leaf=_is_names)

    return optax.chain(optax.trace(momentum, nesterov=True), optax.stateless(update))


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)


def _of_parameter(names: tuple[str, ...], update: Any, *, dtype: str) -> Any:
    """The update of one parameter; what is left out of the tree stays so."""
    if not isinstance(update, jax.Array):
        return update
    whole = update if names[0] == "layers" else update[None]
    dealt, way_back = _deal_out(whole.astype(dtype))
    layers_here, (layers, *sizes) = whole.shape[0], dealt.shape
    ours = names[1:] if names[0] == "layers" else names
    rows = sizes[0] if ours[0] == "embed" else math.prod(sizes[:-1])
    matrices = dealt.reshape(layers, rows, -1)
    result = orthogonalize(matrices).reshape(dealt.shape)
    for spec in way_back:
        result = jax.reshard(result, spec)
    scale = _RMS * math.sqrt(max(matrices.shape[1:]))
    result = scale * result[:layers_here].astype(update.dtype)
    return result if names[0] == "layers" else result[0]


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """About U V^T of each matrix U S V^T, by Newton and Schulz's iteration.

    Args:
      matrices: [number, rows, columns], each whole on one device; their dtype is that of the products, too.
    """
    norms = jnp.linalg.norm(matrices.astype(jnp.float32), axis=(1, 2), keepdims=True)
    x = (matrices.astype(jnp.float32) / (norms + 1e-7)).astype(matrices.dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = jnp.matrix_transpose(x) if is_tall else x
    first, second, third = _COEFFICIENTS

    def step(_: int, x: jax.Array) -> jax.Array:
        square = x @ jnp.matrix_transpose(x)
        return first * x + (second * square + third * square @ square) @ x

    x = jax.lax.fori_loop(0, ITERATIONS, step, x)
    return jnp.matrix_transpose(x) if is_tall else x


def _deal_out(stack: jax.Array) -> tuple[jax.Array, list[P]]:
    """Matrices that are split over devices, dealt out to them whole, and the ways back to how they lay.

    One mesh axis after the other comes from a side to the front, which is an all-to-all each. Matrices of
    zeros are added for each device to have as many.
    """
    sharding = jax.typeof(stack).sharding
    sides = [_names(entry) for entry in sharding.spec.partitions[1:]]
    sides += [()] * (stack.ndim - 1 - len(sides))
    moving = [(place, axis) for place, side in enumerate(sides) for axis in reversed(side)]
    ways = math.prod(sharding.mesh.shape[axis] for _, axis in moving)
    stack = jnp.pad(stack, ((0, -len(stack) % ways), *[(0, 0)] * (stack.ndim - 1)))
    front: tuple[str, ...] = ()
    way_back: list[P] = []
    for place, axis in moving:
        way_back.insert(0, P(front or None, *(side or None for side in sides)))
        front = (*front, axis)
        sides[place] = sides[place][:-1]
        stack = jax.reshard(stack, P(front, *(side or None for side in sides)))
    return stack, way_back


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)

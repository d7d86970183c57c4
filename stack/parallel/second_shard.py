"""The second shard of ZeRO++ (hpZ, arXiv 2306.10209): what keeps weights off the network between nodes.

The mesh has a node, or a few, along `fsdp` and `tensor`, and the nodes along `data`. At rest, parameters lie
split over `fsdp` and `data`. Once a step, before its first micro-batch, they cross `data`: every node then
holds all weights once, in the compute dtype, split over `fsdp` alone. From this second shard layers are
gathered, forward and backward, and nothing of it crosses the network. Gradients are added up over `fsdp`
layer by layer, and over `data` once a step, into the shards at rest.

Both ways across `data` may be taken in 8 bits. Weights are then rounded once, and both passes compute with
what came out of it; their gradient is taken as that of the exact ones (straight-through). A gradient is
rounded once as well, after it has been summed in its node; sums over nodes are float32.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stack.parallel.int8 import Blocks, dequantize, quantize, spec_of_blocks
from stack.parallel.rules import Layout, Role, axes_of, split_axes

AXIS = "data"
"""Of the mesh: what parameters at rest are split over, and their second shards are not."""


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "master"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class SecondShard:
    """A parameter as a step holds it: what is computed with, and where its gradient goes.

    One value of the two dtypes: a gradient has the dtype and partition of what it is taken of, and sums of
    gradients are float32.
    """

    weight: jax.Array
    """In the compute dtype, split as `Layout.second_spec` says."""
    master: jax.Array
    """[the same shape] float32, whose values nothing reads. As it lies at rest, or as the second shard does
    where its gradient is yet to be added up over `data`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return self.weight.shape

    def __getitem__(self, index: Any) -> Self:
        """Itself: a variable is read as `variable[...]`."""
        assert index is Ellipsis, "a second shard is gathered before it is indexed"
        return self


def gather_second(weight: jax.Array, layout: Layout, names: tuple[str, ...], role: Role) -> jax.Array:
    """The second shard of a parameter at rest, in the compute dtype; without a gradient."""
    weight, dtype = jax.lax.stop_gradient(weight), layout.dtype or weight.dtype
    split, second = (spec(names, weight.shape, role) for spec in (layout.parameter_spec, layout.second_spec))
    marked = P(*second, reduced=layout.replicas - split_axes(second))
    if layout.gather_dtype == "compute" or split == second:
        weight = jax.reshard(weight.astype(dtype), P(*split, reduced=layout.replicas - split_axes(split)))
        return jax.reshard(weight, marked)
    blocks = quantize(weight, ways=_ways(split, layout))
    # The barrier keeps the numbers in 8 bits until they are there.
    blocks = jax.lax.optimization_barrier(
        Blocks(*(jax.reshard(part, spec_of_blocks(second)) for part in blocks))
    )
    return jax.reshard(dequantize(blocks).astype(dtype), marked)


def scatter_second(cotangent: jax.Array, layout: Layout, names: tuple[str, ...], role: Role) -> jax.Array:
    """The sum over `data` of a gradient that lies as the second shard does, split as the parameter is.

    Args:
      cotangent: a partial sum on each place of `data`, summed over all other replicas; in
        `layout.reduce_dtype`.
      layout: how things lie on the mesh.
      names: logical axes of the parameter.
      role: what it is used for.
    """
    split, second = (
        spec(names, cotangent.shape, role) for spec in (layout.parameter_spec, layout.second_spec)
    )
    if layout.scatter_dtype == "reduce" or split == second:
        return jax.reshard(cotangent, split)
    place = next(place for place, entry in enumerate(split) if AXIS in axes_of(entry))

    def add(partial_sum: jax.Array) -> jax.Array:
        parts = jnp.stack(jnp.split(partial_sum, layout.size(AXIS), axis=place))
        blocks = Blocks(*(jax.lax.all_to_all(part, AXIS, 0, 0, tiled=True) for part in quantize(parts)))
        return dequantize(blocks).sum(0)

    # Unchecked: partial sums have no type here that anything but a sum would take.
    return jax.shard_map(add, in_specs=P(*second, unreduced={AXIS}), out_specs=P(*split), check_vma=False)(
        cotangent
    )


def _ways(spec: P, layout: Layout) -> int:
    """Devices that the last axis is split over."""
    ways = 1
    for axis in axes_of(spec.partitions[-1]):
        ways *= layout.size(axis)
    return ways

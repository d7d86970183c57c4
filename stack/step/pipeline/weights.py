"""Parameters of a pipeline between rest and use.

At rest they are split over `fsdp` and `stage` alike, along any of their dimensions but the layers:
evaluation, checkpoints and the optimizer know nothing of stages. For a step each stage takes the layers it
runs, whole, in the compute dtype: an all-to-all over `stage` deals them out, and an all-gather over `fsdp`
makes them whole. Gradients go back the same way.

All of it runs inside `shard_map` over `MANUAL`, and sees the shards of one device.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from stack.parallel.rules import axes_of

MANUAL = ("data", "fsdp", "stage")
"""The mesh axes that a pipeline's step splits by hand; `tensor` stays in the types of arrays."""


class Deal(NamedTuple):
    """Which layers of a stack each stage has."""

    layers: np.ndarray
    """[stages, slots] int32: the layer in each slot. A slot too many repeats one, and is never run."""
    slots: np.ndarray
    """[layers] int32: the stage and slot of each layer, as stage x slots + slot."""

    @staticmethod
    def of(first: np.ndarray, number: np.ndarray, most: int) -> "Deal":
        """Of chunks with so many layers each.

        Args:
          first: [chunks, stages] int, the first layer of each.
          number: [chunks, stages] int, how many it has.
          most: slots of a chunk.
        """
        chunks, stages = first.shape
        layers = np.zeros((stages, chunks * most), np.int32)
        slots = np.zeros(int(number.sum()), np.int32)
        for chunk, stage in np.ndindex(chunks, stages):
            own = first[chunk, stage] + np.arange(number[chunk, stage])
            where = chunk * most + np.arange(most)
            layers[stage, where] = own[np.minimum(np.arange(most), len(own) - 1)]
            slots[own] = stage * chunks * most + where[: len(own)]
        return Deal(layers, slots)


def manual_spec(spec: P) -> P:
    """What of a partition the step splits by hand."""
    return P(*(tuple(axis for axis in axes_of(entry) if axis in MANUAL) or None for entry in spec))


def by_hand(function: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
    """A function that exchanges something over `MANUAL`, on each device's own part of an array.

    Inside another `shard_map`, over what is left: beside an axis that is in the type, JAX 0.11.2 does not
    lower a reduce-scatter, and XLA makes whole over it what an all-to-all or an all-gather has.
    """
    spec, mesh = jax.typeof(values).sharding.spec, jax.sharding.get_abstract_mesh()
    rest = set(mesh.axis_names) - set(MANUAL)
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names=rest, check_vma=False)(values)


def gather(shard: jax.Array, spec: P, dtype: Any, deal: Deal | None) -> jax.Array:
    """A parameter as a stage uses it: whole; or if it is of layers, whole and those of the stage alone.

    Args:
      shard: as it lies at rest.
      spec: of `manual_spec`.
      dtype: the compute dtype.
      deal: of layers, which are the first axis.
    """
    return by_hand(partial(_gather, spec=spec, deal=deal), shard.astype(dtype))


def _gather(weight: jax.Array, spec: P, deal: Deal | None) -> jax.Array:
    if deal is not None:
        dimension = _dimension(spec, "stage")
        if dimension is None:
            weight = jnp.take(weight, jnp.asarray(deal.layers)[jax.lax.axis_index("stage")], axis=0)
        else:
            weight = jnp.take(weight, jnp.asarray(deal.layers.reshape(-1)), axis=0)
            weight = jax.lax.all_to_all(weight, "stage", split_axis=0, concat_axis=dimension, tiled=True)
    for dimension, axis in reversed(list(_splits(spec))):
        if deal is None or axis != "stage":
            weight = jax.lax.all_gather(weight, axis, axis=dimension, tiled=True)
    return weight


def scatter(gradient: jax.Array, spec: P, deal: Deal | None) -> jax.Array:
    """The gradient of a parameter, summed over all that have a part in it, as the parameter lies at rest."""
    return by_hand(partial(_scatter, spec=spec, deal=deal), gradient).astype(jnp.float32)


def _scatter(gradient: jax.Array, spec: P, deal: Deal | None) -> jax.Array:
    summed = set(MANUAL)
    for dimension, axis in _splits(spec):
        if deal is None or axis != "stage":
            gradient = jax.lax.psum_scatter(gradient, axis, scatter_dimension=dimension, tiled=True)
            summed -= {axis}
    if deal is not None:
        dimension, slots = _dimension(spec, "stage"), deal.layers.shape[1]
        if dimension is None:
            mine = jnp.asarray(deal.slots) - jax.lax.axis_index("stage") * slots
            here = (mine >= 0) & (mine < slots)
            rows = jnp.take(gradient, jnp.where(here, mine, 0), axis=0)
            gradient = jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
        else:
            gradient = jax.lax.all_to_all(gradient, "stage", split_axis=dimension, concat_axis=0, tiled=True)
            gradient = jnp.take(gradient, jnp.asarray(deal.slots), axis=0)
            summed -= {"stage"}
    return jax.lax.psum(gradient, tuple(axis for axis in MANUAL if axis in summed))


def _splits(spec: P) -> Iterator[tuple[int, str]]:
    """The dimensions that are split and over which axes, the outermost first."""
    for dimension, entry in enumerate(spec):
        for axis in axes_of(entry):
            yield dimension, axis


def _dimension(spec: P, axis: str) -> int | None:
    return next((dimension for dimension, other in _splits(spec) if other == axis), None)

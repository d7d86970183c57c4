"""Arrays of a pipeline: slots in front of what waits in them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def replaced[T](some: list[T], place: int, one: T) -> list[T]:
    """The list with another entry in a place."""
    return [*some[:place], one, *some[place + 1 :]]


def zeros(like: Any, front: tuple[int, ...] = ()) -> jax.Array:
    """Of a shape and partition, with axes in front."""
    spec = P(*[None] * len(front), *like.sharding.spec)
    return jnp.zeros((*front, *like.shape), like.dtype, out_sharding=spec)


def at(values: jax.Array, index: jax.Array | int) -> jax.Array:
    """One of those along the first axis."""
    return jax.lax.dynamic_index_in_dim(values, index, keepdims=False)


def put_one(slots: jax.Array, slot: jax.Array, value: jax.Array) -> jax.Array:
    """Slots with another value in one of them."""
    return jax.lax.dynamic_update_index_in_dim(slots, value.astype(slots.dtype), slot, 0)


def put(slots: list[jax.Array], slot: jax.Array, values: list[jax.Array]) -> list[jax.Array]:
    """The same of several arrays."""
    return [put_one(of, slot, value) for of, value in zip(slots, values, strict=True)]


def take(slots: list[jax.Array], slot: jax.Array) -> list[jax.Array]:
    """What is in a slot of several arrays."""
    return [at(of, slot) for of in slots]


def put_layer[T](slots: T, slot: jax.Array, layer: jax.Array, values: T) -> T:
    """Into [slots, layers, ...]."""

    def put(of: jax.Array, value: jax.Array) -> jax.Array:
        where = (slot, layer, *[0] * value.ndim)
        return jax.lax.dynamic_update_slice(of, value[None, None], where)

    return jax.tree.map(put, slots, values)


def take_layer[T](slots: T, slot: jax.Array, layer: jax.Array) -> T:
    """Out of [slots, layers, ...]."""

    def take(of: jax.Array) -> jax.Array:
        where = (slot, layer, *[0] * (of.ndim - 2))
        return jax.lax.dynamic_slice(of, where, (1, 1, *of.shape[2:]))[0, 0]

    return jax.tree.map(take, slots)

"""Trees of arrays, compared bit for bit."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stack.train.checkpoint.checkpoints import named_leaves

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def different_leaves(one: Any, other: Any) -> list[str]:
    """The names of the leaves that are not equal to the last bit, of two trees of one layout."""
    same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: (_bits(x) == _bits(y)).all(), a, b))(one, other)
    return [name for name, is_same in named_leaves(same).items() if not is_same]


def digests(tree: Any) -> Any:
    """A number of each leaf that a change of its bits is likely to change: uint32, whatever the layout."""

    def digest(leaf: jax.Array) -> jax.Array:
        bits = _bits(leaf).astype(jnp.uint32)
        # Whole numbers are added in any order; the product keeps equal changes from cancelling.
        return (bits * jnp.uint32(2654435761) ^ (bits >> 15)).sum(dtype=jnp.uint32)

    return jax.tree.map(digest, tree)


def fingerprint(tree: Any) -> str:
    """A digest of the bits of all leaves, of where in them they are, and of their names.

    16 letters, the same on every layout: whole numbers are added in any order. It tells apart, and guards
    against nobody.
    """

    def digest(leaf: jax.Array) -> jax.Array:
        place = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        mixed = _mix(_bits(leaf).astype(jnp.uint32) ^ _mix(place))
        return jnp.stack([mixed.sum(dtype=jnp.uint32), _mix(mixed).sum(dtype=jnp.uint32)])

    told = jax.jit(lambda tree: jax.tree.map(digest, tree))(tree)
    text = "".join(f"{name} {np.asarray(pair).tolist()}\n" for name, pair in named_leaves(told).items())
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _mix(number: jax.Array) -> jax.Array:
    """Every bit of a uint32 spread over all of them (the finalizer of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        number = (number ^ (number >> shift)) * jnp.uint32(factor)
    return number ^ (number >> 16)


def _bits(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize])

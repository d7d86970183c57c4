"""Trees of arrays, compared bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp

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


def _bits(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == bool:
        return leaf.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(leaf, _UNSIGNED[leaf.dtype.itemsize])

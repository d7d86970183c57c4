"""Arrays in 8 bits on their way between nodes: integers, and a scale for each block of them.

The rounding of qwZ in ZeRO++ (arXiv 2306.10209, section 3.1): symmetric, to nearest, by block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

LONGEST = 256
"""Numbers of a block, at most: a float32 scale then adds 1.6% to what is sent."""
_LEVELS = 127


class Blocks(NamedTuple):
    """An array [..., length] as blocks of numbers that follow each other on its last axis."""

    values: jax.Array
    """[..., blocks, size] int8, from -127 to 127."""
    scales: jax.Array
    """[..., blocks, 1] float32: what one step of the values is."""


def block_size(length: int) -> int:
    """The largest divisor of a length up to `LONGEST`."""
    return next(size for size in range(min(length, LONGEST), 0, -1) if length % size == 0)


def quantize(x: jax.Array, *, ways: int = 1) -> Blocks:
    """`x` in 8 bits; no number is further from its own than half a scale, 1/254 of the block's largest.

    A block of zeros stays one. One with an infinity or a NaN comes back without a finite number in it, so
    that neither is lost.

    Args:
      x: [..., length], any float dtype.
      ways: that the last axis is split over devices; no block is on two of them.
    """
    length = x.shape[-1]
    size = block_size(length // ways)
    blocks = x.astype(jnp.float32).reshape(*x.shape[:-1], length // size, size)
    scales = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / _LEVELS
    steps = jnp.where((scales > 0) & (scales < jnp.inf), blocks / scales, 0)
    return Blocks(jnp.round(steps).astype(jnp.int8), scales)


def dequantize(blocks: Blocks) -> jax.Array:
    """The array of `quantize`, [..., length] float32."""
    x = blocks.values.astype(jnp.float32) * blocks.scales
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def spec_of_blocks(spec: P) -> P:
    """The partition of both arrays of blocks, of an array with this one."""
    return P(*spec.partitions, None, reduced=spec.reduced)

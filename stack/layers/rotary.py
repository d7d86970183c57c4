"""Rotary position embedding (arXiv 2104.09864)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from stack.config import RopeConfig


def frequencies(config: RopeConfig, head_dim: int) -> Float32[Array, " half"]:
    """Radians per position of each pair of channels, [head_dim / 2] float32."""
    base = config.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if config.scaling == "none":
        return base
    if config.scaling == "linear":
        return base / config.factor
    wavelength = 2 * math.pi / base
    low = config.original_length / config.low_frequency_factor
    high = config.original_length / config.high_frequency_factor
    # 1 where the wavelength is short and stays, 0 where it is long and is stretched in full.
    keep = jnp.clip(
        (config.original_length / wavelength - config.low_frequency_factor)
        / (config.high_frequency_factor - config.low_frequency_factor),
        0.0,
        1.0,
    )
    keep = jnp.where(wavelength < high, 1.0, jnp.where(wavelength > low, 0.0, keep))
    return base * (keep + (1 - keep) / config.factor)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    radians: Float32[Array, " half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates channel i against channel i + head_dim / 2 by position x frequency.

    Args:
      x: [batch, length, heads, head_dim], any float dtype.
      positions: [batch, length] int32.
      radians: [head_dim / 2] float32, from `frequencies`.

    Returns:
      Shape and dtype of `x`; the rotation is computed in float32.
    """
    angle = positions[..., None, None].astype(jnp.float32) * radians
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)

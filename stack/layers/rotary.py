"""Rotary position embedding (arXiv 2104.09864)."""

import math

import jax
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
    if config.scaling == "yarn":
        keep = _yarn_share(config, head_dim)
        return base * (keep + (1 - keep) / config.factor)
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


def amplitude(config: RopeConfig) -> float:
    """What rotated queries and keys are multiplied by (arXiv 2309.00071, section 3.4)."""
    if config.scaling != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    return 0.1 * math.log(max(config.factor, 1.0)) + 1.0


def _yarn_share(config: RopeConfig, head_dim: int) -> Float32[Array, " half"]:
    """1 for channels that stay, 0 for those that are stretched in full (arXiv 2309.00071, section 3.2)."""

    def channel(turns: float) -> float:
        wavelength = config.original_length / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(config.theta))

    low, high = channel(config.fast_turns), channel(config.slow_turns)
    if config.whole_channels:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low or 0.001)
    return 1.0 - jnp.clip(ramp, 0.0, 1.0)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    positions: Int[Array, "batch length"],
    radians: Float32[Array, " half"],
    amplitude: jax.Array | float = 1.0,
) -> Float[Array, "batch length heads head_dim"]:
    """Rotates channel i against channel i + head_dim / 2 by position x frequency.

    Args:
      x: [batch, length, heads, head_dim], any float dtype.
      positions: [batch, length] int32.
      radians: [head_dim / 2] float32, from `frequencies`.
      amplitude: what the result is multiplied by.

    Returns:
      Shape and dtype of `x`; the rotation is computed in float32.
    """
    angle = positions[..., None, None].astype(jnp.float32) * radians
    cos, sin = amplitude * jnp.cos(angle), amplitude * jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)

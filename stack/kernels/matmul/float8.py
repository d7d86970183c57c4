"""Numbers in 8 bits beside a scale (arXiv 2209.05433): what is quantized, and how."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

FORWARD = jnp.float8_e4m3fn
"""Of activations and weights: 3 bits of mantissa, at most 448, no infinity."""
BACKWARD = jnp.float8_e5m2
"""Of gradients: 2 bits of mantissa, at most 57,344."""


class Scaled(NamedTuple):
    """values x scale."""

    values: jax.Array
    """float8, of any shape."""
    scale: jax.Array
    """float32 powers of two: one, [], or one for each block, with dimensions of size 1 where it is whole."""


def largest(x: Float[Array, "..."], axes: tuple[int, ...] | None = None) -> Float32[Array, "..."]:
    """Max |x|, float32: of all of it, [], or over some axes, which stay with size 1.

    Of an array that is split over devices it is that of the whole.
    """
    return jnp.max(jnp.abs(x), axis=axes, keepdims=axes is not None).astype(jnp.float32)


def scale_for(amax: Float32[Array, "..."], dtype: Any) -> Float32[Array, "..."]:
    """The least power of two above amax / the largest number of a float8 dtype; float32.

    A power of two rounds nothing by itself, here or where results are scaled back; of two that are near each
    other, both give the same numbers but for those below 2^-15 of the largest, which lose bits. It is NaN
    where amax is not finite: what is scaled by it then shows it. It stays within 2^-120 and 2^126.
    """
    bits = jax.lax.bitcast_convert_type(amax / float(jnp.finfo(dtype).max), jnp.int32)
    exponent = jnp.clip((bits >> _MANTISSA) + 1, _BIAS - 120, _BIAS + 126)
    power = jax.lax.bitcast_convert_type(exponent << _MANTISSA, jnp.float32)
    return jnp.where(jnp.isfinite(amax), power, jnp.nan)


_MANTISSA, _BIAS = 23, 127


def quantize(x: Float[Array, "..."], dtype: Any, amax: Float32[Array, "..."]) -> Scaled:
    """`x` in float8, rounded to nearest, ties to even.

    Args:
      x: any float dtype.
      dtype: `FORWARD` or `BACKWARD`.
      amax: float32, of `x` or of what is thought to be like it, one or one for each block; broadcast to `x`.
        What is larger than its scale allows becomes the largest number there is. What is infinite becomes
        NaN, and so does what was NaN: neither is taken for a large number.
    """
    scale, limit = scale_for(amax, dtype), float(jnp.finfo(dtype).max)
    values = x.astype(jnp.float32) / scale
    values = jnp.where(jnp.isfinite(values), jnp.clip(values, -limit, limit), jnp.nan)
    return Scaled(values.astype(dtype), scale)

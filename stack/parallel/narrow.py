"""Numbers in fewer bits, to be sent between machines: rounded to the nearest, a scale for each block."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

Width = Literal["float32", "bfloat16", "float8", "int4"]

BLOCK = 64
"""Numbers that share a scale, in float32: half a bit each."""
_LARGEST = {"float8": 448.0, "int4": 7.0}


def narrow(values: Float32[np.ndarray, "..."], width: Width) -> dict[str, np.ndarray]:
    """What is sent: `values` in that width, and for 8 and 4 bits the `scales` of their blocks.

    The largest number of a block is exact but for the rounding of its scale; others are off by at most half
    of the step of their width. What is not finite makes its whole block NaN.
    """
    if width == "float32":
        return {"values": values.astype(np.float32)}
    if width == "bfloat16":
        return {"values": values.astype(jnp.bfloat16).view(np.uint16)}
    flat = np.zeros(-(-max(1, values.size) // BLOCK) * BLOCK, np.float32)
    flat[: values.size] = values.reshape(-1)
    blocks = flat.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(axis=1) / np.float32(_LARGEST[width])
    finite = np.isfinite(scales)
    divisors = np.where(finite & (scales > 0), scales, 1.0).astype(np.float32)[:, None]
    units = np.where(finite[:, None], blocks, 0.0) / divisors
    scales = np.where(finite, scales, np.nan).astype(np.float32)
    if width == "float8":
        return {"values": units.astype(jnp.float8_e4m3fn).view(np.uint8), "scales": scales}
    whole = np.clip(np.rint(units), -7, 7).astype(np.int8).reshape(-1, 2) & 15
    return {"values": (whole[:, 0] | whole[:, 1] << 4).astype(np.uint8), "scales": scales}


def widen(sent: dict[str, np.ndarray], width: Width, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """The float32 numbers of what `narrow` made of an array of a shape."""
    values = sent["values"]
    if width == "float32":
        return values.reshape(shape)
    if width == "bfloat16":
        return values.view(jnp.bfloat16).astype(np.float32).reshape(shape)
    if width == "float8":
        units = values.view(jnp.float8_e4m3fn).astype(np.float32)
    else:
        halves = np.stack([values & 15, values >> 4], axis=1).astype(np.int8)
        units = (halves - 16 * (halves > 7)).astype(np.float32)
    whole = (units.reshape(-1, BLOCK) * sent["scales"][:, None]).reshape(-1)
    return whole[: int(np.prod(shape))].reshape(shape)

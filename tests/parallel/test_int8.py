"""Numbers in 8 bits on their way: NumPy's, near enough, and nothing that is not finite is lost."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stack.parallel.int8 import LONGEST, Blocks, block_size, dequantize, quantize

SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 6, 40, 256, 384]))
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
LEAST = float(np.finfo(np.float32).tiny)


def reference(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of blocks of so many, in float64."""
    blocks = x.astype(np.float64).reshape(*x.shape[:-1], -1, size)
    scales = np.abs(blocks).max(-1, keepdims=True) / 127
    return np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0)), scales


@settings(deadline=None, max_examples=60)
@given(x=SHAPES.flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=NUMBERS)))
def test_a_number_is_within_half_a_step_of_its_own(x):
    size = block_size(x.shape[-1])
    blocks = quantize(jnp.asarray(x))
    values, scales = reference(x, size)
    assert blocks.values.dtype == jnp.int8
    assert blocks.values.shape == (*x.shape[:-1], x.shape[-1] // size, size)
    np.testing.assert_allclose(blocks.scales, scales, rtol=1e-6, atol=LEAST)
    # A tie may fall to either side where the scale was rounded.
    seen = scales > LEAST
    assert np.abs(np.where(seen, np.asarray(blocks.values, np.float64) - values, 0)).max() <= 1
    limit = np.broadcast_to(0.5001 * scales + LEAST, values.shape).reshape(x.shape)
    assert (np.abs(np.asarray(dequantize(blocks), np.float64) - x) <= limit).all()


def test_zeros_stay_zeros():
    assert not np.asarray(dequantize(quantize(jnp.zeros((2, 300))))).any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_takes_its_block_with_it_and_no_other(bad):
    x = np.random.default_rng(0).normal(size=(2, 2 * LONGEST)).astype(np.float32)
    x[1, LONGEST + 7] = bad
    y = np.asarray(dequantize(quantize(jnp.asarray(x))))
    assert not np.isfinite(y[1, LONGEST:]).any()
    assert np.isfinite(y[0]).all()
    assert np.isfinite(y[1, :LONGEST]).all()


@pytest.mark.parametrize(("length", "size"), [(4096, 256), (384, 192), (96, 96), (257, 1)])
def test_blocks_divide_the_axis(length, size):
    assert block_size(length) == size


def test_no_block_is_on_two_devices():
    x = jnp.arange(512.0)
    blocks = quantize(x, ways=4)
    assert blocks.values.shape == (4, 128)
    parts = [quantize(part) for part in jnp.split(x, 4)]
    expected = Blocks(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    np.testing.assert_array_equal(blocks.values, expected.values)
    np.testing.assert_array_equal(blocks.scales, expected.scales)

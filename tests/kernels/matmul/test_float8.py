"""Rounding to 8 bits, against ml_dtypes and by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from stack.kernels.matmul.float8 import BACKWARD, FORWARD, largest, quantize, scale_for

DTYPES = [FORWARD, BACKWARD]


@pytest.mark.parametrize("dtype", DTYPES, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [1e-25, 1e-6, 1.0, 1e9])
def test_numbers_are_rounded_as_ml_dtypes_rounds_them(dtype, size):
    draw = np.random.default_rng(0)
    x = (draw.standard_normal(5000) * size * 2.0 ** draw.integers(-24, 1, 5000)).astype(np.float32)
    scaled = jax.jit(lambda x: quantize(x, dtype, largest(x)))(x)
    limit = float(ml_dtypes.finfo(dtype).max)
    power = float(scaled.scale)
    assert np.log2(power) == np.round(np.log2(power))
    assert limit / 2 * power <= np.abs(x).max() <= limit * power
    expected = (x.astype(np.float64) / power).astype(dtype)
    np.testing.assert_array_equal(np.asarray(scaled.values).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=["e4m3", "e5m2"])
def test_each_block_has_a_scale_of_its_own(dtype):
    x = jnp.array([[1.0, -3.0], [1e-9, 2e-9], [0.0, 0.0]])
    scaled = quantize(x, dtype, largest(x, (1,)))
    assert scaled.scale.shape == (3, 1)
    np.testing.assert_allclose(scaled.values.astype(jnp.float32) * scaled.scale, x, rtol=0.13)


@pytest.mark.parametrize("dtype", DTYPES, ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_never_taken_for_a_large_number(dtype, bad):
    x = jnp.array([1.0, bad, -2.0])
    assert np.isnan(quantize(x, dtype, largest(x)).values.astype(jnp.float32)).all()
    given = quantize(x, dtype, jnp.float32(2.0)).values.astype(jnp.float32)
    np.testing.assert_array_equal(np.isnan(given), [False, True, False])


@pytest.mark.parametrize("dtype", DTYPES, ids=["e4m3", "e5m2"])
def test_larger_than_thought_is_the_largest_there_is(dtype):
    limit = float(jnp.finfo(dtype).max)
    scaled = quantize(jnp.array([3.0, -1e30, 1e7]), dtype, jnp.float32(limit))
    np.testing.assert_array_equal(scaled.values.astype(jnp.float32), [1.5, -limit, limit])


def test_a_scale_is_within_what_float32_divides_by():
    for amax in (0.0, 1e-45, 1e-38, 1.0, 3.4e38):
        scale = scale_for(jnp.float32(amax), FORWARD)
        assert 2.0**-121 < scale < 2.0**127
        assert 1 / scale > 0
    assert scale_for(jnp.float32(448.0), FORWARD) == 2.0
    assert scale_for(jnp.float32(447.0), FORWARD) == 1.0

"""Products in 8 bits and their gradients, against NumPy's in float64 of numbers that ml_dtypes rounds."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from stack.kernels.matmul.fp8 import Fp8, project
from stack.layers.parameter import parameter
from stack.parallel.rules import ONE_DEVICE

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2

UP = (8, 16, 24), (24, 40), ("embed", "mlp"), ("batch", "length", "mlp"), 1
OUT = (8, 16, 4, 6), (4, 6, 20), ("heads", "head_dim", "embed"), ("batch", "residual_length", "embed"), 2
ODD = (8, 3, 7), (7, 5), ("embed", "mlp"), ("batch", "length", "mlp"), 1


def rounded(x, dtype, axes=None, amax=None):
    """`x` in float64 as 8 bits hold it, with a scale for everything but some axes."""
    if amax is None:
        amax = np.abs(x).max(axis=axes, keepdims=True)
    limit = float(ml_dtypes.finfo(dtype).max)
    scale = 2.0 ** (np.floor(np.log2(amax / limit)) + 1)
    return np.clip(x / scale, -limit, limit).astype(np.float32).astype(dtype).astype(np.float64) * scale


def expected(x, weight, cotangent, blocks, amax):
    """The product and both gradients."""
    matrix, rows = weight.reshape(-1, np.prod(weight.shape[-1:])), x.reshape(-1, weight[..., 0].size)
    y = cotangent.reshape(len(rows), -1)
    if blocks == "tensor":
        first, second = (None, None) if amax is None else amax
        rows, matrix = rounded(rows, E4M3, amax=first), rounded(matrix, E4M3)
        y8 = rounded(y, E5M2, amax=second)
        return rows @ matrix, y8 @ matrix.T, rows.T @ y8
    rows8, matrix8 = rounded(rows, E4M3, 1), rounded(matrix, E4M3, 0)
    limit = float(ml_dtypes.finfo(E4M3).max)
    columns = 2.0 ** (np.floor(np.log2(np.abs(matrix).max(0) / limit)) + 1)
    tokens = 2.0 ** (np.floor(np.log2(np.abs(rows).max(1, keepdims=True) / limit)) + 1)
    for_x, for_weight = rounded(y * columns, E5M2, 1), rounded(y * tokens, E5M2, 0)
    return rows8 @ matrix8, for_x @ (matrix8 / columns).T, (rows8 / tokens).T @ for_weight


def arrays(x_shape, weight_shape, contracted):
    draw = np.random.default_rng(1)
    x = draw.standard_normal(x_shape) * 2.0 ** draw.integers(-8, 4, (*x_shape[:2], *[1] * contracted))
    weight = 0.1 * draw.standard_normal(weight_shape)
    shape = (*x_shape[:2], *weight_shape[contracted:])
    cotangent = 1e-6 * draw.standard_normal(shape) * 2.0 ** draw.integers(-8, 4, shape[2:])
    return tuple(array.astype(np.float32) for array in (x, weight, cotangent))


def close(actual, exact, *, rtol):
    actual = np.asarray(actual, np.float64).reshape(exact.shape)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=rtol * np.abs(exact).max())


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(UP, "float32"), (UP, "bfloat16"), (OUT, "float32"), (ODD, "float32")],
    ids=["up", "up bfloat16", "out", "odd"],
)
@pytest.mark.parametrize(
    ("blocks", "amax"),
    [("tensor", None), ("channel", None), ("tensor", (3.0, 1e-6)), ("tensor", (1e3, 1.0))],
    ids=["tensor", "channel", "too little", "too much"],
)
def test_products_and_gradients_are_those_of_rounded_numbers(blocks, amax, case, dtype):
    x_shape, weight_shape, axes, names, contracted = case
    x, weight, cotangent = (
        np.asarray(jnp.asarray(array, dtype), np.float64)
        for array in arrays(x_shape, weight_shape, contracted)
    )

    def run(x, weight, amax):
        kernel, how = parameter(weight, axes=axes, role="float8"), Fp8(blocks=blocks)
        return project(x, kernel, ONE_DEVICE, names, contracted=contracted, how=how, amax=amax)

    inputs = jnp.asarray(x, dtype), jnp.asarray(weight, jnp.float32)
    given = None if amax is None else jnp.array(amax, jnp.float32)
    y, backward = jax.vjp(jax.jit(run), *inputs, given)
    assert y.dtype == dtype
    dx, dweight, latest = backward(jnp.asarray(cotangent, dtype))
    assert dx.dtype == dtype
    assert dweight.dtype == jnp.float32
    rtol = 1e-6 if dtype == "float32" else 2.0**-8
    for actual, exact in zip((y, dx, dweight), expected(x, weight, cotangent, blocks, amax), strict=True):
        close(actual, exact, rtol=rtol)
    if amax is not None:
        now = [np.abs(array).max() for array in (x, cotangent)]
        np.testing.assert_array_equal(latest, np.array(now, np.float32))

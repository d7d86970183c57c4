"""Every implementation gives what NumPy does in float64, forward and backward."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import SIZES, Case

from stack.kernels.grouped_matmul import KERNELS, grouped_matmul, reference

LIMITS = {"float32": 1e-6, "bfloat16": 2.0**-8}
"""Of the norm of the error over that of the array. bfloat16 rounds a result once, by up to 2^-9 of it."""
ANYWHERE = [name for name in KERNELS if name != "mosaic_gpu"]
"""Those that run on a CPU; `test_mosaic_gpu` has the other."""
CASES = [
    *(Case(*SIZES[name], 24, 40) for name in SIZES),
    Case(*SIZES["odd"], 1, 3),
    *(Case(*SIZES[name], 40, 24, "bfloat16") for name in ("odd", "empty ones", "skewed")),
]


def check(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.linalg.norm(found[name] - array) <= limit * np.linalg.norm(array), name


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ANYWHERE)
def test_an_implementation_is_numpy_s(name, case):
    check(case.actual(name), case.expected(), LIMITS[case.dtype])


@pytest.mark.parametrize("sizes", SIZES)
def test_the_reference_is_numpy_s(sizes):
    case = Case(*SIZES[sizes], 6, 10, "float64")
    with jax.enable_x64(True):
        arrays = case.arrays()
        sizes = jnp.asarray(case.sizes, jnp.int32)
        result, pull = jax.vjp(partial(reference.grouped_matmul, sizes=sizes), *arrays.values())
        found = dict(zip(case.expected(), (result, *pull(case.slope())), strict=True))
        assert {array.dtype for array in found.values()} == {jnp.dtype("float64")}
        check(jax.tree.map(np.asarray, found), case.expected(), 1e-14)


@pytest.mark.parametrize("name", ANYWHERE)
def test_float64_stays(name):
    case = Case(*SIZES["odd"], 24, 40, "float64")
    with jax.enable_x64(True):
        check(case.actual(name), case.expected(), 1e-14)


@pytest.mark.parametrize("name", ANYWHERE)
def test_rows_of_no_group_get_zeros_and_give_none(name):
    case = Case(*SIZES["some tokens belong to none"], 24, 40)
    found = case.actual(name)
    for key in ("result", "tokens"):
        assert not found[key][71:].any()
        assert found[key][:71].any(1).all()
    assert not found["weights"][1].any()


def test_what_is_no_number_stays_in_its_group():
    case = Case(*SIZES["odd"], 24, 40)
    arrays = case.arrays()
    sizes = jnp.asarray([case.sizes], jnp.int32)
    tokens, weights = arrays["tokens"].at[40].set(jnp.nan), arrays["weights"].at[3].set(jnp.inf)

    def product(tokens, weights):
        return grouped_matmul(tokens, weights, sizes, implementation="xla_chunked")

    result, pull = jax.vjp(product, tokens, weights)
    _, of_weights = pull(case.slope())
    np.testing.assert_array_equal(np.flatnonzero(~np.isfinite(result).all(1)), [40, *range(132, 193)])
    np.testing.assert_array_equal(np.isfinite(of_weights).all((1, 2)), [True, False, True, True])

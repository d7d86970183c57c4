"""Numbers in fewer bits are off by no more than half a step, and nothing bad is hidden."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stack.parallel.narrow import BLOCK, narrow, widen

VALUES = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=0, max_dims=3, max_side=20),
    elements=st.floats(-1e4, 1e4, width=32),
)


def blocks(values: np.ndarray) -> np.ndarray:
    flat = np.zeros(-(-max(1, values.size) // BLOCK) * BLOCK)
    flat[: values.size] = values.reshape(-1)
    return flat.reshape(-1, BLOCK)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_four_bits_are_off_by_half_a_step_of_their_block(values):
    found = widen(narrow(values, "int4"), "int4", values.shape)
    step = np.abs(blocks(values)).max(axis=1, keepdims=True) / 7
    assert (np.abs(blocks(found) - blocks(values)) <= 0.5001 * step + 1e-30).all()


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_eight_bits_are_off_by_a_sixteenth_of_each_number(values):
    found = widen(narrow(values, "float8"), "float8", values.shape)
    least = np.abs(blocks(values)).max(axis=1, keepdims=True) / 448 * 2.0**-9  # Of what is below all normals.
    assert (
        np.abs(blocks(found) - blocks(values)) <= np.abs(blocks(values)) / 16 + 1.001 * least + 1e-30
    ).all()


@given(VALUES)
def test_thirty_two_bits_are_the_numbers_and_sixteen_are_bfloat16(values):
    np.testing.assert_array_equal(widen(narrow(values, "float32"), "float32", values.shape), values)
    found = widen(narrow(values, "bfloat16"), "bfloat16", values.shape)
    assert (np.abs(found - values) <= np.abs(values) * 2.0**-8 + 1e-37).all()


@pytest.mark.parametrize("width", ["float32", "bfloat16", "float8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(width, bad):
    values = np.ones(3 * BLOCK, np.float32)
    values[BLOCK] = bad
    found = widen(narrow(values, width), width, values.shape)
    assert not np.isfinite(found[BLOCK])
    np.testing.assert_array_equal(found[:BLOCK], 1)
    np.testing.assert_array_equal(found[2 * BLOCK :], 1)


@pytest.mark.parametrize(
    ("width", "bits"), [("float32", 32), ("bfloat16", 16), ("float8", 8.5), ("int4", 4.5)]
)
def test_as_many_bits_are_sent(width, bits):
    sent = narrow(np.ones((8, BLOCK), np.float32), width)
    assert 8 * sum(part.nbytes for part in sent.values()) == bits * 8 * BLOCK

"""The schedule of tiles: every row of every group once, and no more work than tokens and borders."""

import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.kernels.grouped_matmul.mosaic_gpu.by_group import blocks_of
from stack.kernels.grouped_matmul.mosaic_gpu.tiles import HALF
from stack.kernels.grouped_matmul.visits import bounds, most_visits, visits

Sizes = st.lists(st.one_of(st.just(0), st.integers(0, 3), st.integers(0, 400)), min_size=6, max_size=6)
Tokens = st.sampled_from([1, 130, 640, 1100])
"""Of few shapes, as each is compiled anew: fewer or more than are in groups."""


def owners(sizes, tokens):
    """The group of each row, and the number of groups for rows of none."""
    rows = np.repeat(np.arange(len(sizes)), sizes)[:tokens]
    return np.pad(rows, (0, tokens - len(rows)), constant_values=len(sizes))


def check(sizes, tokens, rows):
    plan = [np.asarray(each) for each in visits(jnp.asarray(sizes, jnp.int32), tokens=tokens, rows=rows)]
    tile, group, first, last = plan
    found = np.full(tokens, len(sizes))
    for number in np.flatnonzero(last > first):
        mine = slice(first[number], last[number])
        assert tile[number] * rows <= first[number] < last[number] <= (tile[number] + 1) * rows
        assert (found[mine] == len(sizes)).all(), "no row twice"
        found[mine] = group[number]
    np.testing.assert_array_equal(found, owners(sizes, tokens))
    assert len(tile) == most_visits(tokens, len(sizes), rows)
    assert (np.diff(tile) >= 0).all()
    is_visit = tile < -(-tokens // rows)
    assert (last > first)[is_visit].all(), "no visit for nothing"
    assert not last[~is_visit].any()


@given(sizes=Sizes, tokens=Tokens, rows=st.sampled_from([8, 128]))
@settings(max_examples=100, deadline=None)
def test_every_row_of_every_group_is_in_one_visit(sizes, tokens, rows):
    check(sizes, tokens, rows)


@pytest.mark.parametrize("name", SIZES)
def test_the_cases_of_the_other_tests_too(name):
    check(*SIZES[name], 128)


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [
        (16_384, [2048] * 8),
        (65_536, [512] * 128),
        (65_536, [65_536] + [0] * 127),
        (65_536, [1] * 127 + [65_409]),
        (65_536, [0] * 128),
    ],
    ids=["Mixtral", "Qwen3", "one has all", "one has nearly all", "none"],
)
def test_work_is_that_of_the_tokens_and_of_a_tile_for_each_group(tokens, sizes):
    rows = 128
    plan = visits(jnp.asarray(sizes, jnp.int32), tokens=tokens, rows=rows)
    number = int((np.asarray(plan.last) > np.asarray(plan.first)).sum())
    busy = sum(size > 0 for size in sizes)
    assert sum(sizes) / rows <= number <= sum(sizes) / rows + busy
    if not any(size % rows for size in sizes):
        assert number == sum(sizes) / rows


@given(sizes=Sizes, tokens=Tokens)
@settings(max_examples=100, deadline=None)
def test_a_group_s_gradient_takes_the_blocks_its_tokens_are_in(sizes, tokens):
    begins, ends = bounds(jnp.asarray(sizes, jnp.int32), tokens=tokens)
    blocks = np.asarray(blocks_of(begins, ends))
    of_row = owners(sizes, tokens)
    for group, (first, whole_first, whole_last, last) in enumerate(blocks):
        met = set(np.flatnonzero(of_row == group) // HALF)
        assert met == set(range(first, last))
        assert first <= whole_first <= whole_last <= last
        for block in range(whole_first, whole_last):
            assert (of_row[block * HALF : (block + 1) * HALF] == group).all()
            assert (block + 1) * HALF <= tokens
        assert whole_first - first + last - whole_last <= 2, "two borders"
    assert (blocks[:, 3] - blocks[:, 0]).sum() <= sum(sizes) / HALF + 2 * len(sizes)

"""Bits of attention dropout: what they are, as often as they should be, of one another independent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import MeshConfig
from stack.kernels.attention import attend
from stack.kernels.attention.dropout import Dropout, draw, keep, mix, threshold
from stack.kernels.attention.mask import Mask
from stack.layers.dropout import ATTENTION, CROSS, example_keys, layer_keys
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout

RATE, EXAMPLES, HEADS, QUERIES, KEYS = 0.25, 8, 4, 48, 64


def drawn(*, seed=0, step=7, first=40, layer=2, place=ATTENTION, layout=ONE_DEVICE):
    numbers = layout.shard(jnp.arange(first, first + EXAMPLES, dtype=jnp.int32), "batch")
    keys = layer_keys(layer_keys(example_keys(seed, jnp.int32(step), numbers), layer), place)
    return draw(keys, rate=RATE, heads=HEADS, queries=QUERIES, layout=layout)


def kept(**place):
    """[example, head, query, key] bool."""
    return np.asarray(keep(drawn(**place).rows, jnp.arange(KEYS), RATE))


def mixed(row0, row1, key):
    """`mix` of whole numbers without bounds."""
    x = (key * 0x9E3779B9 + row0) % 2**32
    x ^= x >> 16
    x = (x * 0x21F0AAAD + row1) % 2**32
    x ^= x >> 15
    x = x * 0xD35A2D97 % 2**32
    return x ^ (x >> 15)


def test_a_word_is_what_it_is_defined_to_be():
    words = np.random.default_rng(0).integers(0, 2**32, (2, 50), np.uint32)
    keys = np.array([*range(40), 2**31 - 1, *range(1000, 1009)], np.uint32)
    expected = [mixed(int(a), int(b), int(c)) for a, b, c in zip(*words, keys, strict=True)]
    np.testing.assert_array_equal(np.asarray(mix(*map(jnp.asarray, (*words, keys)))), expected)
    assert int(mix(jnp.uint32(1), jnp.uint32(2), jnp.uint32(3))) == 0x0B5ABC00
    assert mixed(1, 2, 3) == 0x0B5ABC00


def test_bits_are_words_below_the_threshold():
    rows = np.asarray(drawn().rows)
    example, head, query, key = 3, 1, 20, 33
    word = mixed(int(rows[example, head, query, 0]), int(rows[example, head, query, 1]), key)
    assert kept()[example, head, query, key] == (word < 0.75 * 2**32)
    assert [threshold(rate) for rate in (0.5, 0.25, 1e-12)] == [2**31, 3 * 2**30, 2**32 - 1]


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9])
def test_the_rate_is_dropped(rate):
    dropped = ~np.asarray(keep(drawn().rows, jnp.arange(KEYS), rate))
    error = np.sqrt(rate * (1 - rate) / dropped.size)
    assert dropped.mean() == pytest.approx(rate, abs=5 * error)
    # Of each key too, and of each query; 5 deviations among a few hundred.
    for axes in ((0, 1, 2), (0, 1, 3)):
        number = np.prod([dropped.shape[axis] for axis in axes])
        assert abs(dropped.mean(axes) - rate).max() < 5 * np.sqrt(rate * (1 - rate) / number)


@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["examples", "heads", "queries", "keys"])
@pytest.mark.parametrize("apart", [1, 2, 3])
def test_neighbours_are_independent(axis, apart):
    bits = np.moveaxis(kept(), axis, 0)
    check_independent(bits[apart:], bits[:-apart])


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"step": 8}, {"first": 48}, {"layer": 3}, {"place": CROSS}], ids=str
)
def test_another_seed_step_example_layer_or_place_draws_other_bits(change):
    check_independent(kept(), kept(**change))


def check_independent(one, other):
    """Pearson's chi-square of the four pairs of two bits, 3 degrees of freedom: 1 in 10^5 is above 26."""
    expected = np.outer([RATE, 1 - RATE], [RATE, 1 - RATE]) * one.size
    pairs = itertools.product((False, True), repeat=2)
    seen = np.reshape([((one == a) & (other == b)).sum() for a, b in pairs], (2, 2))
    assert ((seen - expected) ** 2 / expected).sum() < 26, seen / one.size


def test_runs_of_keys_are_as_many_as_of_independent_bits():
    """Patterns of 8 neighbouring keys, 255 degrees of freedom, within 5 deviations of the mean."""
    rows = drawn().rows
    bits = np.asarray(keep(rows, jnp.arange(8 * KEYS), 0.5)).reshape(-1, 8)
    seen = np.bincount(bits @ (1 << np.arange(8)), minlength=256)
    expected = len(bits) / 256
    assert abs(((seen - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


def test_bits_follow_the_example_not_its_place_in_the_batch():
    np.testing.assert_array_equal(kept(first=42)[:6], kept(first=40)[2:])


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 4}, {"data": 8, "fsdp": 1}], ids=str
)
def test_bits_are_the_same_on_every_layout(sizes):
    config = MeshConfig.model_validate(sizes)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    with meshes.use(mesh):
        found = jax.jit(lambda: drawn(layout=layout))()
    assert found.rows.sharding.spec == layout.spec("batch", "heads", None, None)
    np.testing.assert_array_equal(found.rows, drawn().rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_weights_are_divided_by_their_share(dtype):
    """Values that name their keys: what comes out are the weights."""
    places = jnp.broadcast_to(jnp.arange(QUERIES), (2, QUERIES))
    mask = Mask(kind="full", query_positions=places, key_positions=places)
    query, key = jnp.zeros((2, QUERIES, HEADS, QUERIES), dtype), jnp.zeros((2, QUERIES, 2, QUERIES), dtype)
    value = jnp.broadcast_to(jnp.eye(QUERIES, dtype=dtype)[:, None], key.shape)
    dropout = Dropout(rate=RATE, rows=drawn().rows[:2])
    weights = attend(query, key, value, mask, ONE_DEVICE, kernel="xla", dropout=dropout)
    stays = kept()[:2, ..., :QUERIES].swapaxes(1, 2)
    np.testing.assert_allclose(
        np.float32(weights), stays / QUERIES / (1 - RATE), rtol=1e-6 if dtype == "float32" else 1e-2
    )

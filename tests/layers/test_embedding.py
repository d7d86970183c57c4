"""Reading a table that is split over devices gives what reading it whole gives, gradients too."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import MeshConfig
from stack.layers.embedding import Embedding, lookup, sum_rows, sum_sorted_rows
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout
from stack.parallel.zero import gather_weight

ROWS, WIDTH = 24, 16
NAMES = ("vocab", "embed")
IDS = np.random.default_rng(0).integers(0, 21, (8, 12)).astype(np.int32)
TABLE = np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)
WEIGHT = np.random.default_rng(2).normal(size=(8, 12, WIDTH)).astype(np.float32)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 1, "data": 2, "tensor": 4},
        {"fsdp": 2, "data": 2, "tensor": 2},
        {"fsdp": 8},
        {"fsdp": 2, "tensor": 4, "sequence_parallel": True},
    ],
    ids=str,
)
def test_a_split_table_reads_as_a_whole_one(sizes):
    config = MeshConfig.model_validate(sizes)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)

    @jax.jit
    @jax.value_and_grad
    def read(table, ids, weight):
        rows = lookup(gather_weight(table, layout, NAMES, "table"), ids, layout)
        return (rows * weight).sum()

    with meshes.use(mesh):
        spec = layout.parameter_spec(NAMES, TABLE.shape, "table")
        table = jax.device_put(TABLE, jax.NamedSharding(mesh, spec))
        ids = jax.device_put(IDS, layout.sharding("batch", "length"))
        weight = jax.device_put(WEIGHT, layout.sharding("batch", "length", "embed"))
        rows = jax.jit(lambda t, i: lookup(gather_weight(t, layout, NAMES, "table"), i, layout))
        np.testing.assert_array_equal(rows(table, ids), TABLE[IDS])
        value, gradient = read(table, ids, weight)

    expected = np.zeros(TABLE.shape)
    np.add.at(expected, IDS, WEIGHT)
    assert float(value) == pytest.approx((TABLE[IDS] * WEIGHT).sum(), rel=1e-5)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert gradient.sharding.spec == spec


def test_rows_nobody_uses_are_zero_and_the_rest_have_the_deviation_asked_for():
    embedding = Embedding(("vocab", 4096), 64, std=0.02, used=4000, rngs=nnx.Rngs(0))
    table = np.asarray(embedding.table[...])
    assert table.dtype == np.float32
    assert not table[4000:].any()
    assert table[:4000].std() == pytest.approx(0.02, rel=0.02)


def test_rows_come_in_the_dtype_asked_for():
    embedding = Embedding(("vocab", ROWS), WIDTH, std=1.0, used=ROWS, rngs=nnx.Rngs(0))
    rows = embedding(jnp.asarray(IDS), ONE_DEVICE, jnp.dtype("bfloat16"))
    assert rows.dtype == "bfloat16"
    np.testing.assert_array_equal(rows, embedding.table[...].astype("bfloat16")[IDS])


def word_frequencies(rows, tokens):
    """Ids as in text: the commonest word is a twentieth of them."""
    share = 1 / (np.arange(rows) + 2.7)
    return np.random.default_rng(3).choice(rows, tokens, p=share / share.sum()).astype(np.int32)


def sort(chunk):
    return lambda values, ids, number: sum_sorted_rows(values, ids, number=number, chunk=chunk)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("add", [sum_rows, sort(5000), sort(4096), sort(100), sort(1)])
def test_rows_are_summed_in_float32(add, dtype):
    """In bfloat16 the commonest row was 25% off: 256 + 1 is 256."""
    ids = word_frequencies(300, 4096)
    values = np.random.default_rng(4).normal(1.0, 0.1, (4096, 8)).astype(dtype)
    expected = np.zeros((301, 8))
    np.add.at(expected, ids, values.astype(np.float64))
    actual = add(jnp.asarray(values), jnp.asarray(ids), 301)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-4)


def test_a_bfloat16_table_gets_a_gradient_rounded_once():
    ids = word_frequencies(300, 4096).reshape(8, 512)
    table = jnp.zeros((300, 8), jnp.bfloat16)
    weight = jnp.asarray(np.random.default_rng(4).normal(1.0, 0.1, (8, 512, 8)), jnp.bfloat16)
    gradient = jax.grad(lambda t: (lookup(t, jnp.asarray(ids), ONE_DEVICE) * weight).sum())(table)
    expected = np.zeros((300, 8))
    np.add.at(expected, ids, np.asarray(weight, np.float64))
    assert gradient.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(gradient, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_what_is_read_is_multiplied_by_a_scale_rounded_to_the_compute_dtype():
    """sqrt(1152) = 33.94 is 34 in bfloat16."""
    ids, make = jnp.asarray(IDS), partial(Embedding, ("vocab", ROWS), WIDTH, std=1.0, used=ROWS)
    plain, scaled = make(rngs=nnx.Rngs(0)), make(scale=1152**0.5, rngs=nnx.Rngs(0))
    half = jnp.dtype("bfloat16")
    rows = plain(ids, ONE_DEVICE, half)
    np.testing.assert_array_equal(scaled(ids, ONE_DEVICE, half), rows * jnp.asarray(34, half))
    np.testing.assert_array_equal(scaled.table[...], plain.table[...])

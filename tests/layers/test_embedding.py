"""Reading a table that is split over devices gives what reading it whole gives, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import MeshConfig
from stack.layers.embedding import Embedding, lookup
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
        rows = lookup(gather_weight(table, layout, NAMES, matrix=True), ids, layout)
        return (rows * weight).sum()

    with meshes.use(mesh):
        spec = layout.parameter_spec(NAMES, TABLE.shape, matrix=True)
        table = jax.device_put(TABLE, jax.NamedSharding(mesh, spec))
        ids = jax.device_put(IDS, layout.sharding("batch", "length"))
        weight = jax.device_put(WEIGHT, layout.sharding("batch", "length", "embed"))
        rows = jax.jit(lambda t, i: lookup(gather_weight(t, layout, NAMES, matrix=True), i, layout))
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

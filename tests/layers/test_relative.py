"""Relative position bias: whole buckets, the same wherever a document begins, one gradient for all layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from stack.config import EncoderDecoderConfig, MeshConfig
from stack.layers.relative import RelativeBias, bounds
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout


def bias(*, both_ways, **options):
    changes = {"position": "relative", "embed_dim": 32, "num_heads": 4} | options
    return RelativeBias(EncoderDecoderConfig(**changes), both_ways=both_ways, rngs=nnx.Rngs(0))


def test_buckets_are_those_of_t5():
    """Of 32 buckets to a distance of 128, as Mesh TensorFlow and transformers have them."""
    assert bounds(16, 128) == (*range(1, 9), 12, 16, 23, 32, 46, 64, 91)
    longer = (19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113)
    assert bounds(32, 128) == (*range(1, 17), *longer)


@pytest.mark.parametrize(
    ("both_ways", "expected"),
    [
        # After a query come the upper half of the buckets; to a decoder all that comes after is bucket 0.
        (True, {-400: 15, -91: 15, -90: 14, -8: 8, -1: 1, 0: 0, 1: 17, 8: 24, 90: 30, 400: 31}),
        (False, {-400: 31, -113: 31, -112: 30, -17: 16, -16: 16, -1: 1, 0: 0, 1: 0, 400: 0}),
    ],
)
def test_a_distance_has_its_bucket(both_ways, expected):
    distances = jnp.array(list(expected))
    assert bias(both_ways=both_ways).buckets(distances).tolist() == list(expected.values())


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("queries", "keys", "first"), [(7, 7, 0), (3, 9, 4), (1, 6, 5), (5, 2, 0)])
def test_a_score_gains_the_number_of_its_heads_bucket(both_ways, queries, keys, first):
    layer = bias(both_ways=both_ways, relative_buckets=8, relative_max_distance=6)
    got = layer(queries, keys, ONE_DEVICE, first=first)
    distance = np.arange(keys) - (np.arange(queries)[:, None] + first)
    buckets = np.asarray(layer.buckets(jnp.asarray(distance.ravel()))).reshape(queries, keys)
    expected = np.moveaxis(np.asarray(layer.table[...])[buckets], -1, 0)[None]
    np.testing.assert_array_equal(got, expected)


def test_the_gradient_of_a_bucket_is_the_sum_over_its_scores():
    layer = bias(both_ways=True, relative_buckets=8, relative_max_distance=6)
    pull = np.random.default_rng(0).normal(size=(1, 4, 6, 9)).astype(np.float32)

    graph, state = nnx.split(layer)

    @jax.jit
    @jax.grad
    def gradient(state):
        return (nnx.merge(graph, state)(6, 9, ONE_DEVICE) * pull).sum()

    (got,) = jax.tree.leaves(gradient(state))
    distance = (np.arange(9) - np.arange(6)[:, None]).ravel()
    expected = np.zeros((8, 4))
    buckets = np.asarray(layer.buckets(jnp.asarray(distance)))
    np.add.at(expected, buckets, np.moveaxis(pull[0], 0, -1).reshape(-1, 4))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_every_replica_has_one_group_and_its_own_heads():
    config = MeshConfig(data=2, fsdp=2, tensor=2)
    mesh = meshes.build(config, jax.devices()[:8])
    layout = Layout.of(mesh, config)
    with meshes.use(mesh):
        layer = bias(both_ways=True)
        got = jax.jit(lambda: layer(5, 5, layout))()
    assert got.shape == (4, 4, 5, 5)
    assert got.sharding.shard_shape(got.shape) == (1, 2, 5, 5)
    np.testing.assert_array_equal(got, np.broadcast_to(layer(5, 5, ONE_DEVICE), got.shape))

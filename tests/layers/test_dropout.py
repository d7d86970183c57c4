"""Dropout's bits are a function of seed, step, example and layer, and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import MeshConfig
from stack.layers.dropout import ATTENTION_OUT, MLP_OUT, dropout, example_keys, layer_keys
from stack.parallel import mesh as meshes
from stack.parallel.rules import ONE_DEVICE, Layout

SHAPE = (8, 16, 32)
NAMES = ("batch", "residual_length", "embed")
EXAMPLES = np.arange(40, 48, dtype=np.int32)


def kept(*, seed=0, step=7, examples=EXAMPLES, layer=2, place=MLP_OUT, layout=ONE_DEVICE, rate=0.3):
    """Where ones survive, [batch, length, embed]."""
    keys = layer_keys(example_keys(seed, jnp.int32(step), jnp.asarray(examples)), layer)
    ones = layout.shard(jnp.ones((len(examples), *SHAPE[1:])), *NAMES)
    y = dropout(ones, rate=rate, keys=keys, place=place, layout=layout, names=NAMES)
    return np.asarray(y) > 0


def test_nothing_is_dropped_outside_training_or_at_rate_zero():
    x = jnp.ones(SHAPE)
    keys = example_keys(0, jnp.int32(0), jnp.asarray(EXAMPLES))
    options = {"place": MLP_OUT, "layout": ONE_DEVICE, "names": NAMES}
    assert dropout(x, rate=0.5, keys=None, **options) is x
    assert dropout(x, rate=0.0, keys=keys, **options) is x


def test_the_rate_is_dropped_and_the_rest_is_scaled_so_that_the_mean_stays():
    x = jnp.full((8, 64, 64), 3.0, jnp.bfloat16)
    keys = example_keys(0, jnp.int32(0), jnp.asarray(EXAMPLES))
    y = dropout(x, rate=0.25, keys=keys, place=MLP_OUT, layout=ONE_DEVICE, names=NAMES)
    assert y.dtype == x.dtype
    assert set(np.unique(np.float32(y))) == {0.0, 4.0}
    share = (np.float32(y) == 0).mean()
    assert share == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / x.size))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"step": 8}, {"examples": EXAMPLES + 8}, {"layer": 3}, {"place": ATTENTION_OUT}]
)
def test_another_seed_step_example_layer_or_place_draws_other_bits(change):
    same = (kept() == kept(**change)).mean()
    assert same == pytest.approx(0.7**2 + 0.3**2, abs=0.04), "as often alike as independent bits are"


def test_bits_follow_the_example_not_its_place_in_the_batch():
    whole = kept()
    np.testing.assert_array_equal(kept(examples=EXAMPLES[::-1]), whole[::-1])
    np.testing.assert_array_equal(kept(examples=EXAMPLES[2:4]), whole[2:4])


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 4, "sequence_parallel": True},
        {"data": 8, "fsdp": 1},
    ],
    ids=str,
)
def test_bits_are_the_same_on_every_layout(sizes):
    config = MeshConfig.model_validate(sizes)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    with meshes.use(mesh):
        survivors = jax.jit(lambda: dropped_ones(layout))()
    np.testing.assert_array_equal(np.asarray(survivors) > 0, kept())


def dropped_ones(layout):
    keys = layer_keys(example_keys(0, jnp.int32(7), layout.shard(jnp.asarray(EXAMPLES), "batch")), 2)
    ones = layout.shard(jnp.ones(SHAPE), *NAMES)
    return dropout(ones, rate=0.3, keys=keys, place=MLP_OUT, layout=layout, names=NAMES)

"""On a mesh: the same numbers, types that say where things lie, and nothing gathered."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grouped_matmul_cases import Case
from jax.sharding import PartitionSpec as P

from stack.config import MeshConfig
from stack.kernels.grouped_matmul import grouped_matmul
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout
from stack.parallel.zero import gather_weight

MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "fsdp": 8, "tensor": 1},
    {"data": 1, "fsdp": 1, "tensor": 8},
    {"data": 4, "fsdp": 1, "tensor": 2},
]
TOKENS, GROUPS, INPUTS, OUTPUTS = 96, 3, 16, 24


def sizes_of(shards):
    """Of each shard others; some of its tokens belong to no group."""
    local = TOKENS // shards
    return [[i % (local // 3), local // 2, 0] for i in range(1, shards + 1)]


def both_ways(product, slope, *operands):
    result, pull = jax.vjp(product, *operands)
    return result, *pull(slope)


@pytest.mark.parametrize("names", [("embed", "mlp"), ("mlp", "embed")], ids=str)
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_a_mesh_changes_nothing_and_the_types_say_where_things_lie(config, gathered, names):
    config = MeshConfig.model_validate(config)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    shards = config.data * config.fsdp
    parts = [Case(tuple(sizes), TOKENS // shards, INPUTS, OUTPUTS) for sizes in sizes_of(shards)]
    arrays = Case((1,) * GROUPS, TOKENS, INPUTS, OUTPUTS)
    tokens, weights = (np.asarray(array) for array in arrays.arrays().values())
    slope = np.asarray(arrays.slope())
    weight_axes = ("layers", *names)
    at_rest = (
        layout.parameter_spec(weight_axes, weights.shape, "matrix")
        if gathered
        else layout.whole_spec(weight_axes)
    )

    def product(tokens, weights, sizes):
        if gathered:
            weights = gather_weight(weights, layout, weight_axes, "matrix")
            if names[0] == "embed":  # As a layer hands them on, its gradients added once for all products.
                tokens = layout.sum_late(tokens, "batch", "embed")
        return grouped_matmul(tokens, weights, sizes, layout, names=names)

    def run(tokens, weights, sizes, slope):
        found = both_ways(partial(product, sizes=sizes), slope, tokens, weights)
        for array, like in zip(found, (slope, tokens, weights), strict=True):
            assert jax.typeof(array) == jax.typeof(like)
        return found

    with meshes.use(mesh):
        found = jax.jit(run)(
            jax.device_put(tokens, layout.sharding("batch", names[0])),
            jax.device_put(weights, jax.NamedSharding(mesh, at_rest)),
            jax.device_put(np.asarray(sizes_of(shards), np.int32), layout.sharding("batch", None)),
            jax.device_put(slope, layout.sharding("batch", names[1])),
        )
    expected = by_shard(parts, tokens, weights, slope)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


def by_shard(parts, tokens, weights, slope):
    """NumPy's answers, each shard's tokens by themselves; gradients of weights are added."""
    result, of_tokens, of_weights = np.zeros(slope.shape), np.zeros(tokens.shape), np.zeros(weights.shape)
    for shard, part in enumerate(parts):
        begin = shard * part.tokens
        for group, size in enumerate(part.sizes):
            mine = slice(begin, begin + size)
            result[mine] = tokens[mine] @ weights[group].astype(np.float64)
            of_tokens[mine] = slope[mine] @ weights[group].T.astype(np.float64)
            of_weights[group] += tokens[mine].T.astype(np.float64) @ slope[mine]
            begin += size
    return result, of_tokens, of_weights


def test_bfloat16_gradients_of_plain_weights_are_added_in_float32():
    config = MeshConfig(data=8, fsdp=1)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    with meshes.use(mesh):
        # 256 + 7 x 1: bfloat16 has no 257, and stays at 256 whichever it adds first.
        tokens = jax.device_put(jnp.ones((8, 1), "bfloat16").at[0].set(256), layout.sharding("batch", None))
        weights = jax.device_put(jnp.ones((1, 1, 1), "bfloat16"), layout.sharding(None, None, None))
        sizes = jax.device_put(jnp.ones((8, 1), jnp.int32), layout.sharding("batch", None))

        def total(weights):
            return grouped_matmul(tokens, weights, sizes, layout).astype("float32").sum()

        assert jax.jit(jax.grad(total))(weights).item() == 264
        program = jax.make_jaxpr(jax.grad(total))(weights)
    # The sum above is right on a CPU whichever dtype is asked for.
    resharded: list[Any] = [one.invars[0].aval for one in program.eqns if one.primitive.name == "reshard"]
    assert [array.dtype for array in resharded if array.sharding.spec.unreduced] == ["float32"]


def test_what_lies_elsewhere_is_refused():
    config = MeshConfig(data=1, fsdp=4, tensor=2)
    mesh = meshes.build(config)
    layout = Layout.of(mesh, config)
    with meshes.use(mesh):
        tokens = jax.device_put(jnp.ones((8, 4)), layout.sharding("batch", None))
        weights = jax.device_put(jnp.ones((2, 4, 4)), jax.NamedSharding(mesh, P(None, "fsdp", "tensor")))
        sizes = jax.device_put(jnp.ones((4, 2), jnp.int32), layout.sharding("batch", None))
        with pytest.raises(ValueError, match=r"weights lie on the mesh as .*fsdp.*; gather them first"):
            grouped_matmul(tokens, weights, sizes, layout)
        whole = jax.reshard(weights, P(None, None, "tensor"))
        with pytest.raises(ValueError, match="tokens lie on the mesh as "):
            grouped_matmul(jax.reshard(tokens, P()), whole, sizes, layout)
        with pytest.raises(ValueError, match=r"shape \[1, 2\]; .* on 4 devices it must be \[4, 2\]"):
            grouped_matmul(tokens, whole, jnp.ones((1, 2), jnp.int32), layout)

"""The second shard: what 8 bits do to the numbers, and what is refused. Without them the contract has it."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from stack.config import Config, ConfigError, MeshConfig
from stack.doctor.numerics import LIMIT, ONE_DEVICE, STEP, Cell, config_of, example_batch
from stack.parallel import mesh as meshes
from stack.parallel.int8 import block_size
from stack.parallel.second_shard import scatter_second
from stack.step import program as programs
from stack.step import state as states
from stack.step.program import Program
from stack.step.step import eval_step, loss_gradient

MESH = {"data": 2, "fsdp": 4, "zero": 3, "second_shard": True}
Values = dict[str, np.ndarray]


def cell(**mesh: Any) -> Cell:
    return Cell(parts=("second shard",), mesh=MeshConfig.model_validate(MESH | mesh))


def program(cell: Cell) -> Program:
    return programs.build(config_of(cell, "gpt", "float32"), jax.devices()[: cell.num_devices])


def named(tree: Any) -> Values:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(jax.reshard(leaf, P()))
        for path, leaf in leaves
    }


@cache
def initial() -> Values:
    made = program(ONE_DEVICE)
    with meshes.use(made.mesh):
        return named(states.init_params(made))


def batch(made: Program) -> dict[str, Any]:
    rows = example_batch(made.objective.fields)
    return {
        field.name: jax.device_put(rows[field.name], made.layout.sharding(*field.axes))
        for field in made.objective.fields
    }


def place(made: Program, values: Values) -> Any:
    leaves, tree = jax.tree_util.tree_flatten_with_path(made.parameters)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    arrays = [
        jax.device_put(values[name], leaf.sharding) for name, (_, leaf) in zip(names, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


def compute(cell: Cell, values: Values) -> tuple[float, Values]:
    """Loss and gradients of one batch, at these parameters."""
    made = program(cell)
    with meshes.use(made.mesh):
        step = jax.device_put(np.int32(STEP), made.layout.sharding())
        gradient, sums = jax.jit(partial(loss_gradient, made))(place(made, values), step, batch(made))
        return float(sums["loss"]), named(gradient)


def rounded(made: Program) -> tuple[Values, Values]:
    """Parameters a quarter of a step above what they are rounded to, and that; vectors are as they begin.

    By NumPy. Numbers half way between two steps would go to either, by the last bit of a scale.
    """
    leaves = jax.tree_util.tree_leaves_with_path(made.parameters)
    exact, narrow = dict(initial()), dict(initial())
    for (path, leaf), role in zip(leaves, jax.tree.leaves(made.roles), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        value = exact[name]
        if role == "vector":
            continue
        blocks = value.reshape(*value.shape[:-1], -1, block_size(leaf.sharding.shard_shape(leaf.shape)[-1]))
        scales = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
        steps = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
        exact[name] = ((steps + np.float32(0.25) * (np.abs(steps) < 127)) * scales).reshape(value.shape)
        narrow[name] = (steps * scales).reshape(value.shape)
    return exact, narrow


@pytest.mark.full
def test_weights_in_8_bits_give_the_gradient_of_the_rounded_weights():
    """Both passes compute with the same rounded weights, and the gradient goes straight to the exact ones."""
    where = cell(gather_dtype="int8")
    exact, narrow = rounded(program(where))
    loss, gradient = compute(where, exact)
    expected_loss, expected = compute(ONE_DEVICE, narrow)
    assert loss == pytest.approx(expected_loss, rel=LIMIT)
    for name, leaf in expected.items():
        limit = LIMIT * float(np.abs(leaf).max())
        np.testing.assert_allclose(gradient[name], leaf, rtol=0, atol=limit, err_msg=name)
    _, unrounded = compute(ONE_DEVICE, exact)
    moved = np.abs(unrounded["embed.table"] - gradient["embed.table"]).max()
    assert moved > 100 * LIMIT * np.abs(unrounded["embed.table"]).max()


def test_gradients_in_8_bits_are_rounded_once_in_each_node():
    loss, gradient = compute(cell(scatter_dtype="int8"), initial())
    expected_loss, expected = compute(ONE_DEVICE, initial())
    assert loss == pytest.approx(expected_loss, rel=LIMIT)
    squares = [np.square(gradient[name] - leaf).sum() for name, leaf in expected.items()]
    distance = np.sqrt(sum(squares) / sum(np.square(leaf).sum() for leaf in expected.values()))
    assert 1e-4 < distance < 0.01


def test_evaluation_computes_with_the_exact_weights():
    losses = []
    for where in (ONE_DEVICE, cell(gather_dtype="int8")):
        made = program(where)
        with meshes.use(made.mesh):
            sums, _ = jax.jit(partial(eval_step, made))(place(made, initial()), batch(made))
            losses.append(float(sums["nll"]))
    assert losses[1] == pytest.approx(losses[0], rel=LIMIT)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stays_so_in_8_bits(bad: float):
    made = program(cell(scatter_dtype="int8"))
    names, layout = ("embed", "mlp"), made.layout
    values = np.arange(2 * 32 * 64, dtype=np.float32).reshape(2, 32, 64)  # Of both places of `data`.
    values[1, 5, 7] += bad

    def total(both: jax.Array) -> jax.Array:
        spec = layout.second_spec(names, both.shape[1:], "matrix").partitions
        ones = jnp.ones(2, jnp.float32, out_sharding=P("data"))
        # A product whose summed axis is split leaves a partial sum on each place.
        lone = jnp.einsum("d,dij->ij", ones, both, out_sharding=P(*spec, unreduced={"data"}))
        return scatter_second(lone, layout, names, "matrix")

    with meshes.use(made.mesh):
        both = jax.device_put(values, NamedSharding(made.mesh, P("data", "fsdp")))
        result = np.asarray(jax.reshard(jax.jit(total)(both), P()))
    if np.isfinite(bad):
        np.testing.assert_allclose(result, values.sum(0), rtol=0, atol=values.max() / 127)
    else:
        assert not np.isfinite(result[5]).any()
        assert np.isfinite(np.delete(result, 5, axis=0)).all()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["mesh.zero=1"], r"second_shard=true is not read with zero=1; remove it, or set zero=3"),
        (
            ["mesh.data=1", "mesh.fsdp=8"],
            r"mesh\.second_shard splits .* is 1 beside fsdp=8; set mesh\.data to the number",
        ),
        (["mesh.tables_once=true"], r"tables_once=true is not read with second_shard=true; remove it"),
        (["mesh.stage=2"], r"mesh\.zero=3 gathers each layer again .* set mesh\.zero=1"),
        (["kernels.matmul=fp8"], r"mesh\.second_shard=true is not read with kernels\.matmul=fp8"),
        (["mesh.second_shard=false", "mesh.gather_dtype=int8"], r"gather_dtype='int8' is not read"),
        (["mesh.second_shard=false", "mesh.scatter_dtype=int8"], r"scatter_dtype='int8' is not read"),
    ],
)
def test_what_has_no_second_shard_is_refused(overrides: list[str], told: str):
    with pytest.raises(ConfigError, match=told):
        refuse(config_of(cell(), "gpt", "float32"), overrides)


def refuse(config: Config, overrides: list[str]) -> None:
    changed = config.replace(*overrides)
    programs.on_mesh(changed, meshes.abstract(changed.mesh, 8 * changed.mesh.stage), "gpu")

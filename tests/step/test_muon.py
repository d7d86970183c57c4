"""Muon's update is its formula, of each layer by itself, and the same on any mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import ConfigError
from stack.doctor.numerics import ONE_DEVICE, config_of
from stack.parallel import mesh as meshes
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.compile import capture_stderr, compile_step, devices
from stack.step import program as programs
from stack.step import state as states
from stack.step.muon import ITERATIONS, orthogonalize
from stack.step.step import apply

OPTIONS = (
    *("optimizer.kind=muon", "optimizer.learning_rate=0.1", "optimizer.weight_decay=0.2"),
    *("optimizer.clip_norm=null", "optimizer.schedule={kind: constant, warmup_steps: 0}"),
)
# Two layers are dealt out to four devices, and to two; heads are split, and not.
LAYOUTS = {
    "fsdp": ["mesh.fsdp=4"],
    "fsdp and tensor": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "zero 0": ["mesh.fsdp=2", "mesh.zero=0"],
}


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """The iteration, in float64, of one matrix."""
    x = matrix / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def program(*overrides: str, devices: int = 1) -> programs.Program:
    config = config_of(ONE_DEVICE, "llama", "float32").replace(*OPTIONS, *overrides)
    return programs.build(config, jax.devices()[:devices])


def after(made: programs.Program, steps: int = 2) -> tuple[Any, Any]:
    """The parameters at the beginning and after some updates by gradients made of them."""
    with meshes.use(made.mesh):
        state = states.init(made)
        params, opt_state = state["params"], state["opt_state"]
        first = jax.device_get(params)
        update = jax.jit(partial(apply, made))
        for step in range(steps):
            gradient = jax.tree.map(lambda leaf, s=step: jnp.cos(1e3 * leaf + s), state["params"])
            params, opt_state = update(gradient, opt_state, params, jnp.bool(True))
        return first, jax.device_get(params)


@pytest.fixture(scope="module")
def one_device() -> tuple[Any, Any]:
    return after(program())


@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 16, 48), (1, 20, 20)])
def test_singular_values_come_to_be_about_one(shape) -> None:
    matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    ours = np.asarray(orthogonalize(jnp.asarray(matrices)))
    for matrix, result in zip(matrices, ours, strict=True):
        np.testing.assert_allclose(result, newton_schulz(matrix.astype(np.float64)), atol=2e-4)
        values = np.linalg.svd(result, compute_uv=False)
        assert (values > 0.5).all()
        assert (values < 1.3).all()
    zeros = orthogonalize(jnp.zeros(shape, "bfloat16"))
    assert zeros.dtype == "bfloat16"
    assert not np.asarray(zeros, np.float32).any()


def test_the_update_is_its_formula(one_device) -> None:
    first, now = one_device
    for path, fold in (
        (("attention", "query"), lambda x: x.reshape(x.shape[0], -1)),
        (("attention", "out"), lambda x: x.reshape(-1, x.shape[-1])),
        (("mlp", "down"), lambda x: x),
    ):
        start, end = ((tree["layers"][path[0]][path[1]]["kernel"]) for tree in (first, now))
        for layer in range(len(start)):
            weight = fold(start[layer]).astype(np.float64)
            total = np.zeros_like(weight)
            gradients = [np.cos(1e3 * start[layer] + np.float32(step)) for step in range(2)]
            for gradient in map(fold, gradients):
                total = gradient + 0.95 * total
                update = 0.2 * np.sqrt(max(weight.shape)) * newton_schulz(gradient + 0.95 * total)
                weight = weight - 0.1 * (update + 0.2 * weight)
            np.testing.assert_allclose(fold(end[layer]), weight, atol=2e-4, err_msg=".".join(path))


def test_tables_and_vectors_are_adams(one_device) -> None:
    _, now = one_device
    _, adam = after(program("optimizer.kind=adamw"))
    for path in (("embed", "table"), ("head", "table"), ("final_norm", "scale")):
        np.testing.assert_array_equal(now[path[0]][path[1]], adam[path[0]][path[1]])
    kernels = (tree["layers"]["mlp"]["up"]["kernel"] for tree in (now, adam))
    assert np.abs(np.subtract(*kernels)).max() > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_is_the_same_on_any_mesh(one_device, layout) -> None:
    overrides = LAYOUTS[layout]
    devices = int(np.prod([int(one.split("=")[1]) for one in overrides if "zero" not in one]))
    _, now = after(program(*overrides, devices=devices))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), now, one_device[1])


def test_in_bfloat16_it_is_nearly_that_of_float32(one_device) -> None:
    moves = []
    for first, now in (after(program("model.dtype=bfloat16")), one_device):
        start, end = (tree["layers"]["mlp"]["up"]["kernel"] for tree in (first, now))
        moves.append(end - start)
    # Each product rounds by 0.4%, and five steps multiply that; the values it leaves are between 0.7 and 1.2.
    assert np.linalg.norm(moves[0] - moves[1]) < 0.1 * np.linalg.norm(moves[1])


@pytest.mark.full
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_matrices_go_from_all_to_all_and_are_never_gathered() -> None:
    """In the step compiled for GPUs, where weights are gathered in bfloat16 and nothing in float32 is."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    changes = (*(f"mesh.{axis}={size}" for axis, size in mesh.items()), "model.dtype=bfloat16")
    with meshes.without_cache(), capture_stderr() as lines:
        step = compile_step(program().config.replace(*changes), devices("h200", 8))
    assert not [line for line in lines if "nvoluntary" in line]
    found = {(one.kind, one.axes) for one in collectives(step.as_text() or "", mesh)}
    assert {("all-to-all", ("fsdp",)), ("all-to-all", ("tensor",))} <= found
    assert not [kind for kind, axes in found if kind == "all-gather" and axes != ("fsdp",)]


def test_what_it_cannot_be_with_is_told() -> None:
    config = program().config.replace("train.offload_optimizer=true")
    with pytest.raises(
        ConfigError, match=r"^train\.offload_optimizer: muon takes all layers of a matrix at "
    ):
        programs.check_offload(config, {"device", "pinned_host"})

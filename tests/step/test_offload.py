"""Host memory holds moments and saved activations, and no number changes by it."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stack.config import Config, ConfigError
from stack.parallel.mesh import without_cache
from stack.planner.compiled.compile import compile_step, devices, has_plugin
from stack.step import program as programs
from stack.step import state as states
from stack.step.program import Program
from stack.step.step import apply, loss_gradient, train_step
from stack.train.checkpoint.checkpoints import Checkpoints

FIELDS = {
    "model": {
        "vocab_size": 200,
        "num_layers": 3,
        "embed_dim": 16,
        "num_heads": 2,
        "max_length": 16,
        "dtype": "float32",
        # A key's bias has no gradient but rounding, as the softmax takes it out.
        "qkv_bias": False,
    },
    "data": {"sequence_length": 16},
    "optimizer": {"learning_rate": 1e-2, "clip_norm": 0.1, "schedule": {"warmup_steps": 2}},
    "train": {"steps": 8, "batch_size": 8, "remat": "full"},
}
MESH = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulation=2"]
SMOOTH = "optimizer.epsilon=1e-3"
"""Adam's steps follow gradients smoothly: with a tiny epsilon they have the sign of what may be rounding."""
OPTIMIZER, ACTIVATIONS = "train.offload_optimizer=true", "train.offload_activations=true"


def program(*overrides: str) -> Program:
    """On as many devices as the mesh asks for, or one."""
    config = Config.model_validate(FIELDS).replace(*overrides)
    mesh = config.mesh
    return programs.build(config, jax.devices()[: mesh.data * max(mesh.fsdp, 1) * mesh.tensor])


def batch(program: Program) -> dict[str, jax.Array]:
    rows, length = program.config.train.batch_size, program.config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, 200, (rows, length + 1), dtype=np.int32)
    places = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    arrays = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segments": np.ones_like(places),
        "positions": places,
    }
    sharding = program.layout.sharding("batch", "length")
    example = jax.device_put(np.arange(rows, dtype=np.int32), program.layout.sharding("batch"))
    return {name: jax.device_put(value, sharding) for name, value in arrays.items()} | {"example": example}


def train(program: Program, state: dict[str, Any], steps: int) -> dict[str, Any]:
    with jax.set_mesh(states.concrete(program)):
        step = jax.jit(lambda state, batch: train_step(program, state, batch), donate_argnums=0)
        for _ in range(steps):
            state, _ = step(state, batch(program))
    return state


def gradient(program: Program) -> Any:
    with jax.set_mesh(states.concrete(program)):
        compute = jax.jit(lambda *inputs: loss_gradient(program, *inputs)[0])
        return compute(states.init_params(program), jnp.int32(0), batch(program))


def assert_close(tree: Any, expected: Any, *, rtol: float = 1e-6) -> None:
    """Each leaf to `rtol` of its largest number; second moments, which are squares, to twice that."""
    leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(expected))[0]
    for (path, wanted), found in zip(leaves, jax.tree.leaves(jax.device_get(tree)), strict=True):
        name = jax.tree_util.keystr(path)
        limit = (2 if ".nu" in name else 1) * rtol * max(1e-30, float(np.abs(wanted).max()))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=limit, err_msg=name)


def kinds(tree: Any) -> set[str | None]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree)}


def moments(state: dict[str, Any]) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]


STAGES = [
    pytest.param([*MESH, f"mesh.zero={zero}"], id=f"8 devices, zero {zero}", marks=pytest.mark.full)
    for zero in (1, 3)
]
LAYOUTS = [pytest.param([], id="1 device"), *STAGES]


@pytest.mark.parametrize("mesh", LAYOUTS)
def test_parameters_after_three_steps_are_those_without_offload(mesh):
    plain, offloaded = program(*mesh, SMOOTH), program(*mesh, SMOOTH, OPTIMIZER, ACTIVATIONS)
    expected = train(plain, states.init(plain), 3)
    state = train(offloaded, states.init(offloaded), 3)
    # As much for each step, whose rounding the next one begins with: gradients of one are held to it below.
    assert_close(state, expected, rtol=3e-6)
    assert kinds(moments(expected)) == {"device"}
    assert kinds(moments(state)) == {"pinned_host"}, "they go back after the update"
    assert kinds(state["params"]) == {"device"}


@pytest.mark.parametrize("remat", ["full", pytest.param("save_qkv_proj", marks=pytest.mark.full)])
@pytest.mark.parametrize("mesh", [[], pytest.param([*MESH, "mesh.zero=3"], marks=pytest.mark.full)])
def test_gradients_are_those_without_offload(mesh, remat):
    mesh = [*mesh, f"train.remat={remat}"]
    assert_close(gradient(program(*mesh, ACTIVATIONS)), gradient(program(*mesh)))


@pytest.mark.parametrize(("remat", "saved"), [("full", 1), ("save_qkv_proj", 4)])
def test_what_layers_save_waits_on_the_host(remat, saved):
    """Their inputs, [layers, batch, length, embed], and the queries, keys and values of 2 heads of 8."""

    def stacks(*overrides: str) -> tuple[int, int]:
        traced = program(f"train.remat={remat}", *overrides)
        inputs = (states.abstract(traced), batch(traced))
        with jax.set_mesh(states.concrete(traced)):
            text = str(jax.make_jaxpr(partial(train_step, traced))(*inputs))
        device, host = (re.findall(rf":f32{at}\[3,8,16,(?:16|2,8)\]", text) for at in ("", "<host>"))
        return len(device), len(host)

    on_device, on_host = stacks(ACTIVATIONS)
    assert (on_device, on_host) == (0, saved)
    on_device, on_host = stacks()
    assert on_device >= saved
    assert on_host == 0


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(
            ["optimizer.kind=adamw", "optimizer.clip_norm=null", "optimizer.weight_decay=0"],
            marks=pytest.mark.full,
        ),
        ["optimizer.kind=adamw", "optimizer.decay_embeddings=true"],
        pytest.param(["optimizer.kind=lion"], marks=pytest.mark.full),
        [
            "optimizer.kind=sgd",
            "optimizer.groups.0={parameters: [layers.mlp.*, embed.*], learning_rate_factor: 3}",
            "optimizer.groups.1={parameters: ['*scale'], weight_decay: 0.5}",
        ],
    ],
    ids=lambda overrides: " ".join(overrides).replace("optimizer.", ""),
)
def test_the_update_by_layers_is_the_update_of_the_whole(optimizer):
    plain, offloaded = program(*optimizer), program(*optimizer, OPTIMIZER)
    with jax.set_mesh(states.concrete(plain)):
        state = states.init(plain)
        params, opt_state = state["params"], state["opt_state"]
        gradient = jax.tree.map(lambda leaf: jnp.cos(1e3 * leaf + 1), params)
        for _ in range(2):  # The first update of moments that are zero hides what is lost of them.
            trees = gradient, opt_state, params, jnp.bool(True)
            expected = jax.jit(partial(apply, plain))(*trees)
            found = jax.jit(partial(apply, offloaded))(*trees)
            assert_close(found, expected)
            params, opt_state = expected


@pytest.mark.parametrize(
    ("first", "then"), [([OPTIMIZER], []), pytest.param([], [OPTIMIZER], marks=pytest.mark.full)]
)
def test_a_run_goes_on_with_offload_or_without(tmp_path, first, then):
    plain = program(SMOOTH)
    expected = train(plain, states.init(plain), 3)
    began, resumed = program(*first, SMOOTH), program(*then, SMOOTH)
    with Checkpoints(tmp_path, began.config.checkpoint) as checkpoints:
        checkpoints.save(2, train(began, states.init(began), 2), {})
        checkpoints.wait()
        state = checkpoints.restore(2, states.abstract(resumed))
    assert kinds(moments(state)) == {"pinned_host" if then else "device"}
    assert_close(train(resumed, state, 1), expected)


def in_process(folder: Path) -> set[str | None]:
    """One of two processes: what it reaches, having saved and read what it was half-way, is the same.

    Returns where the moments lie.
    """
    mesh = ["mesh.data=2", "mesh.fsdp=2", SMOOTH]
    plain, offloaded = program(*mesh), program(*mesh, OPTIMIZER, ACTIVATIONS)
    with Checkpoints(folder, offloaded.config.checkpoint) as checkpoints:
        checkpoints.save(2, train(offloaded, states.init(offloaded), 2), {})
        checkpoints.wait()
        state = checkpoints.restore(2, states.abstract(offloaded))
    assert not moments(state)[0].is_fully_addressable
    assert_close(here(train(offloaded, state, 1)), here(train(plain, states.init(plain), 3)))
    return kinds(moments(state))


def here(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: [np.asarray(shard.data) for shard in leaf.addressable_shards], tree)


@pytest.mark.full
def test_two_processes_offload(tmp_path, run_processes):
    assert run_processes(in_process, tmp_path, processes=2, devices=2) == [{"pinned_host"}] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh=auto"], r"^mesh: auto names no layout yet; name one, or let the trainer choose"),
        (
            ["train.remat=auto"],
            r"^train\.remat: auto names no layout yet; name one, or let the trainer choose",
        ),
        ([OPTIMIZER, "optimizer.kind=adafactor"], r"^train\.offload_optimizer: adafactor's state is"),
    ],
)
def test_what_has_no_program_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        program(*overrides)


@pytest.mark.parametrize("field", [OPTIMIZER, ACTIVATIONS])
def test_devices_without_host_memory_are_refused(field):
    config = Config.model_validate(FIELDS).replace(field)
    with pytest.raises(ConfigError, match=r"^train\.offload_\w+: these devices reach no pinned host memory"):
        programs.check_offload(config, {"device", "unpinned_host"})
    programs.check_offload(config, {"device", "pinned_host"})


def compiled(*overrides: str) -> Any:
    """Sizes of the step compiled for one H200, at one size where saved activations are much."""
    size = [
        "model.num_layers=16",
        "model.embed_dim=512",
        "model.num_heads=4",
        "model.max_length=512",
        "model.dtype=bfloat16",
        "data.sequence_length=512",
    ]
    config = Config.model_validate(FIELDS).replace(*size, *overrides)
    with without_cache():
        return compile_step(config, devices("h200", 1)).memory_analysis()


def on_device(sizes: Any) -> int:
    changed = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + changed


@pytest.mark.full
@pytest.mark.skipif(not has_plugin(), reason="compiling for GPUs needs the extra plan")
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_what_is_offloaded_leaves_the_device_in_the_compiled_step():
    plain, optimizer, activations = compiled(), compiled(OPTIMIZER), compiled(ACTIVATIONS)
    moments = 2 * 4 * (16 * 12 * 512**2 + 512 * 768)
    assert optimizer.host_argument_size_in_bytes == pytest.approx(moments, rel=0.01)
    assert optimizer.host_alias_size_in_bytes == optimizer.host_argument_size_in_bytes, "in place"
    assert optimizer.host_temp_size_in_bytes == 0
    assert on_device(optimizer) < on_device(plain) - 0.9 * moments
    inputs = 16 * 8 * 512 * 512 * 2
    assert activations.host_temp_size_in_bytes == inputs
    assert on_device(activations) < on_device(plain)

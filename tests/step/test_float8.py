"""Training in 8 bits: which products, what is looked back on, and that nothing else changes."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import records, run, saved_state

from stack import Config, StackError
from stack.config import ConfigError
from stack.doctor.numerics import ONE_DEVICE, config_of, example_batch
from stack.parallel import mesh as meshes
from stack.step import float8
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import eval_step, loss_gradient, train_step

FP8 = "kernels.matmul=fp8"
DELAYED = (FP8, "kernels.fp8.scaling=delayed", "kernels.fp8.history=3")
SPLIT = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "train.accumulation=2")
TINY = ("model.num_layers=1", "checkpoint.every=4", "eval.every=4")


def tiny(*overrides: str, family: Any = "llama") -> Config:
    return config_of(ONE_DEVICE, family, "float32").replace(*overrides)


def build(*overrides: str, devices: int = 1, family: Any = "llama") -> programs.Program:
    return programs.build(tiny(*overrides, family=family), jax.devices()[:devices])


def place(program: programs.Program) -> dict[str, jax.Array]:
    places = program.abstract_batch()
    rows = example_batch(program.objective.fields)
    return {name: jax.device_put(values, places[name].sharding) for name, values in rows.items()}


def test_the_layers_matrices_are_in_8_bits_and_nothing_else_is() -> None:
    every = {f"layers.attention.{name}" for name in ("query", "key", "value", "out")}
    every |= {f"layers.mlp.{name}" for name in ("gate", "up", "down")}
    assert set(build(FP8).float8) == every
    assert set(build(FP8, "kernels.fp8.exclude=[layers.attention.*]").float8) == {
        name for name in every if "mlp" in name
    }
    assert {name.split(".")[0] for name in build(FP8, family="t5").float8} == {"encoder", "decoder"}
    assert build().float8 == {}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["kernels.fp8.exclude=[layers.mpl.*]"], "kernels.fp8.exclude: 'layers.mpl.*' is the name of none"),
        (["kernels.fp8.exclude=[layers.*]"], "kernels.fp8 leaves no product in 8 bits; set kernels.matmul"),
        (["kernels.fp8.first_layers=1", "kernels.fp8.last_layers=1"], "leaves no product in 8 bits"),
        (["kernels.fp8.history=3"], "kernels.fp8: history=3 is not read with scaling=current"),
        (["kernels.fp8.scaling=delayed", "kernels.fp8.blocks=channel"], "blocks=channel needs scaling="),
        (["kernels.fp8.scaling=delayed", "kernels.fp8.blocks=block"], "no block has a past; set one of them"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(overrides, line) -> None:
    with pytest.raises(ConfigError) as error:
        build(FP8, *overrides)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_options_of_8_bits_are_not_read_without_them() -> None:
    with pytest.raises(ConfigError, match=r"fp8\.blocks='?channel'? is not read with matmul=xla"):
        tiny("kernels.fp8.blocks=channel")


@pytest.mark.parametrize(
    ("platform", "capability", "line"),
    [
        ("gpu", 8.0, "compute capability 8.0 is below 8.9 and multiplies no float8"),
        ("rocm", None, "on rocm float8 is another format"),
        ("tpu", None, "on tpu float8 is another format"),
    ],
)
def test_a_chip_without_them_is_refused_by_name(platform, capability, line) -> None:
    config = tiny(FP8, "mesh.fsdp=8")
    mesh = meshes.abstract(config.mesh, 8)
    with pytest.raises(ConfigError, match=f"kernels.matmul=fp8 cannot run: {line}"):
        programs.on_mesh(config, mesh, platform, capability)
    assert str(programs.on_mesh(config, mesh, "gpu", 9.0).matmul) == (
        "products: fp8 (current scale per tensor; evaluation, embeddings and head in float32)"
    )


@pytest.mark.parametrize(
    ("blocks", "capability", "told"),
    [
        ("block", 8.9, "8.9 is not 9.0 (H100, H200), for which its kernel is"),
        ("block", 10.0, "10.0 is not 9.0 (H100, H200), for which its kernel is"),
        ("mx", 9.0, "9.0 is not 10.0 to 10.3 (B200, B300), whose tensor cores scale"),
        ("mx", 12.0, "12.0 is not 10.0 to 10.3 (B200, B300), whose tensor cores scale"),
    ],
)
def test_blocks_of_a_sum_run_where_they_were_compiled(blocks, capability, told) -> None:
    config = tiny(FP8, f"kernels.fp8.blocks={blocks}", "mesh.fsdp=8")
    mesh = meshes.abstract(config.mesh, 8)
    line = re.escape(f"kernels.fp8.blocks={blocks} cannot run: compute capability {told}")
    with pytest.raises(ConfigError, match=line + ".*; set it to tensor or channel"):
        programs.on_mesh(config, mesh, "gpu", capability)


@pytest.mark.parametrize(
    ("blocks", "capability", "told"),
    [
        ("block", 9.0, "block: a scale for each 128 of a sum, by mosaic_gpu; "),
        ("mx", 10.3, "mx: a scale for each 32 of a sum, by scaled_matmul; "),
        ("mx", None, "mx: a scale for each 32 of a sum, by reference; "),
    ],
)
def test_what_runs_them_is_told(blocks, capability, told) -> None:
    config = tiny(FP8, f"kernels.fp8.blocks={blocks}", "mesh.fsdp=8")
    mesh = meshes.abstract(config.mesh, 8)
    program = programs.on_mesh(config, mesh, "gpu" if capability else "cpu", capability)
    assert str(program.matmul).startswith(f"products: fp8 ({told}")


def test_a_mesh_that_cuts_blocks_is_refused_by_name() -> None:
    whole = ("model.head_dim=64", "model.mlp_dim=512")
    config = tiny(FP8, "kernels.fp8.blocks=block", "mesh.fsdp=4", "mesh.tensor=2", *whole)
    mesh = meshes.abstract(config.mesh, 8)
    programs.on_mesh(config, mesh, "gpu", 9.0)
    told = r"mesh\.tensor=2 cuts model\.mlp_dim=320 in 160s, which the 128 that share a scale do not divide; "
    with pytest.raises(ConfigError, match=told + "lower mesh.tensor, or set blocks=channel"):
        programs.on_mesh(config.replace("model.mlp_dim=320"), mesh, "gpu", 9.0)


def types(program: programs.Program, function: Any) -> str:
    with meshes.use(program.mesh):
        state, batch = states.abstract(program), program.abstract_batch()
        return str(jax.make_jaxpr(partial(function, program))(state, batch))


def test_a_step_multiplies_in_8_bits_and_an_evaluation_does_not() -> None:
    program = build(FP8)
    step = types(program, train_step)
    assert "f8_e4m3fn" in step
    assert "f8_e5m2" in step
    evaluation = types(program, lambda program, state, batch: eval_step(program, state["params"], batch))
    assert "f8_" not in evaluation
    state = states.abstract(program)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["params"])} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state["opt_state"])} == {"float32", "int32"}


def test_remat_dots_keeps_products_in_8_bits_too() -> None:
    def products(remat: str) -> int:
        program = build(FP8, f"train.remat={remat}")
        with meshes.use(program.mesh):
            state, batch = states.abstract(program), program.abstract_batch()
            text = jax.jit(partial(train_step, program)).lower(state, batch).as_text()
        return len(re.findall(r"dot_general.*f8E", text))

    assert products("full") > products("dots") == products("none") > 0


@pytest.mark.full
def test_layers_at_the_ends_stay_in_the_models_dtype() -> None:
    """Of three layers the middle one, which alone is off."""

    def gradient(*overrides: str) -> dict[str, Any]:
        program = build("model.num_layers=3", *overrides)
        with meshes.use(program.mesh):
            compute = jax.jit(lambda *inputs: loss_gradient(program, *inputs)[0])
            return jax.device_get(compute(states.init_params(program), jnp.int32(0), place(program)))

    exact, every = gradient(), gradient(FP8)
    some = gradient(FP8, "kernels.fp8.first_layers=1", "kernels.fp8.last_layers=1")

    def error(tree: dict[str, Any], layer: int) -> float:
        pair = tree["layers"]["mlp"]["down"]["kernel"][layer], exact["layers"]["mlp"]["down"]["kernel"][layer]
        return float(np.linalg.norm(pair[0] - pair[1]) / np.linalg.norm(pair[1]))

    assert error(every, 2) > 0.03
    assert error(some, 2) < error(every, 2) / 2, "of the gradients of the one, through the other"
    assert error(some, 1) > 0.03


def steps(program: programs.Program, number: int) -> list[Any]:
    step, batch = jax.jit(partial(train_step, program)), place(program)
    with meshes.use(program.mesh):
        state, after = states.init(program), []
        for _ in range(number):
            state, metrics = step(state, batch)
            after.append((state, metrics))
    return after


@pytest.mark.full
def test_what_is_looked_back_on_is_the_largest_of_the_last_steps_on_every_layout() -> None:
    one, split = steps(build(*DELAYED), 4), steps(build(*DELAYED, *SPLIT, devices=8), 4)
    first = jax.device_get(states.init(build(*DELAYED))["float8"]["layers"]["mlp"]["down"])
    assert first.shape == (2, 2, 3)
    np.testing.assert_array_equal(first[..., :2], 0)
    for number, ((state, metrics), (other, _)) in enumerate(zip(one, split, strict=True), 1):
        history, theirs = (jax.device_get(one["float8"]) for one in (state, other))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3), history, theirs)
        leaf = history["layers"]["mlp"]["down"]
        assert (leaf[..., : min(number, 3)] > 0).all()
        assert (leaf < first.max()).all() or number < 3, "the guess is gone"
        assert metrics["float8_excess"] > 0
    latest = jax.device_get(one[-1][0]["float8"]["layers"]["mlp"]["up"])
    before = jax.device_get(one[-2][0]["float8"]["layers"]["mlp"]["up"])
    np.testing.assert_array_equal(latest[..., 1:], before[..., :-1])


def test_a_step_that_is_not_applied_leaves_it() -> None:
    program = build(*DELAYED)
    step, batch = jax.jit(partial(train_step, program)), place(program)
    with meshes.use(program.mesh):
        state, _ = step(states.init(program), batch)
        broken = state | {"params": jax.tree.map(lambda leaf: leaf * jnp.inf, state["params"])}
        after, metrics = step(broken, batch)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((after["float8"], state["float8"])))


@pytest.mark.full
def test_the_first_steps_of_delayed_scaling_are_as_good_as_current_ones() -> None:
    """A gradient is about one over the tokens it is divided by: none of it is lost to the first guess."""

    def gradient(*overrides: str) -> np.ndarray:
        program = build(*overrides)
        with meshes.use(program.mesh):
            params, batch = states.init_params(program), place(program)
            history = float8.init(program) if "delayed" in str(overrides) else None
            found, _ = jax.jit(lambda *arrays: loss_gradient(program, *arrays))(
                params, jnp.int32(0), batch, None, history
            )
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(found)])

    exact = gradient()
    current, delayed = (np.linalg.norm(gradient(*how) - exact) for how in ((FP8,), DELAYED))
    assert delayed < 1.1 * current


@pytest.mark.full
def test_a_run_in_8_bits_goes_on_to_the_same_bytes(tmp_path) -> None:
    run(tmp_path, "whole", *TINY, *DELAYED, "train.steps=8")
    run(tmp_path, "parts", *TINY, *DELAYED, "train.steps=4")
    run(tmp_path, "parts", *TINY, *DELAYED, "train.steps=8")
    assert records(tmp_path, "parts") == records(tmp_path, "whole")
    assert saved_state(tmp_path, "parts") == saved_state(tmp_path, "whole")
    assert any(name.startswith("float8") for name in saved_state(tmp_path, "whole"))


@pytest.mark.full
def test_a_run_that_goes_on_in_8_bits_is_asked_and_begins_a_history(tmp_path) -> None:
    run(tmp_path, "late", *TINY, "train.steps=4")
    with pytest.raises(StackError, match=r"kernels\.matmul xla -> fp8"):
        run(tmp_path, "late", *TINY, *DELAYED, "train.steps=5")
    late = run(tmp_path, "late", *TINY, *DELAYED, "train.steps=5", accept=["kernels"])
    assert late.state is not None
    assert late.state["step"] == 5
    assert "float8" in late.state

"""Tables gathered once a step, at stage 3: the same gradients, fewer gathers and scatters."""

from functools import partial

import jax
import numpy as np
import pytest

from stack.config import Config
from stack.doctor.numerics import LIMIT, ONE_DEVICE, compute, config_of, example_batch, leaf_errors
from stack.hardware import chip as chips
from stack.parallel import mesh as meshes
from stack.parallel.mesh import without_cache
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.compile import compile_step, devices, has_plugin
from stack.planner.compiled.gate import limits
from stack.planner.formula.memory import memory
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import Workload, from_config
from stack.planner.search.layouts import describe
from stack.planner.search.search import apply_layout
from stack.step import program as programs
from stack.step import state as states
from stack.step.step import loss_gradient

FULL = pytest.mark.full
SIZES = [
    pytest.param("gpt", {"data": 2, "fsdp": 2, "tensor": 2}, marks=FULL),
    pytest.param("gpt", {"fsdp": 1, "tensor": 4}, marks=FULL),
    pytest.param("llama", {"fsdp": 8}, marks=FULL),
]


def lay_over(config: Config, *, accumulation: int = 2, once: bool = True, **sizes: int) -> Config:
    tree = config.model_dump(mode="json")
    tree["mesh"] = sizes | {"zero": 3, "tables_once": once}
    tree["train"] |= {"accumulation": accumulation}
    return Config.model_validate(tree)


@pytest.mark.parametrize(("family", "sizes"), SIZES, ids=str)
def test_loss_and_gradients_equal_one_device(family, sizes):
    config = lay_over(config_of(ONE_DEVICE, family, "float32"), **sizes)
    number = int(np.prod(list(sizes.values())))
    program = programs.build(config, jax.devices()[:number])
    reference = compute(ONE_DEVICE, family)
    with meshes.use(program.mesh):
        places = program.abstract_batch()
        batch = {name: jax.device_put(x, places[name].sharding) for name, x in example_batch().items()}
        params = states.init_params(program)
        gradient, sums = jax.jit(partial(loss_gradient, program))(params, np.int32(5), batch)
    assert float(sums["loss"]) == pytest.approx(reference.loss, rel=LIMIT)
    leaves = jax.tree_util.tree_flatten_with_path(gradient)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x) for path, x in leaves}
    errors = leaf_errors(named, reference.gradient)
    assert {name: error for name, error in errors.items() if error > LIMIT} == {}
    for (path, leaf), like in zip(leaves, jax.tree.leaves(program.parameters), strict=True):
        assert leaf.sharding.spec == like.sharding.spec, path


MODEL = {"vocab_size": 5000, "num_layers": 2, "embed_dim": 256, "num_heads": 8, "max_length": 160}
LARGE = Config.model_validate(
    {
        "model": MODEL,
        "kernels": {"attention": "xla"},
        "data": {"sequence_length": 160},
        "train": {"batch_size": 96, "remat": "full"},
    }
)


@FULL
@pytest.mark.skipif(not has_plugin(), reason="compiling for GPUs needs the extra plan")
@pytest.mark.usefixtures("quick_gpu_compiler")
def test_the_compiled_step_gathers_and_scatters_tables_once():
    """In the program of a GPU, by the formula of the layout; without, that is two more of each table."""
    config, plain = (lay_over(LARGE, accumulation=3, once=once, data=2, fsdp=4) for once in (True, False))
    with without_cache():
        text = compile_step(config, devices("h200", 8)).as_text() or ""
    sizes = {"data": 2, "fsdp": 4, "stage": 1, "context": 1, "expert": 1, "tensor": 1}
    needed, without = (
        limits(programs.on_mesh(some, meshes.abstract(some.mesh, 8), "gpu")) for some in (config, plain)
    )
    for kind, size in (("reduce-scatter", 4), ("all-gather", 2)):
        moved = sum(
            c.bytes * c.times for c in collectives(text, sizes) if c.kind == kind and "fsdp" in c.axes
        )
        assert moved == pytest.approx(needed[kind, "fsdp"], rel=0.1)
        tables = size * (5120 + 160) * 256
        assert without[kind, "fsdp"] - needed[kind, "fsdp"] == 2 * tables > 0.2 * moved


def works(accumulation: int) -> list[Workload]:
    """Every micro-batch, and once."""
    chip = chips.load("h100")
    both = [lay_over(LARGE, accumulation=accumulation, once=once, data=2, fsdp=4) for once in (False, True)]
    return [from_config(config, 8, chip) for config in both]


def test_the_planner_weighs_time_against_memory():
    plain, once = works(3)
    moved = [step_time(work, chips.load("h100")).communication["fsdp"].bytes for work in (plain, once)]
    assert moved[1] < moved[0]
    assert memory(once).program > memory(plain).program
    assert apply_layout(LARGE, once).mesh.tables_once
    assert "tables once" in describe(once)


def test_with_one_micro_batch_there_is_nothing_to_gain():
    plain, once = works(1)
    assert step_time(once, chips.load("h100")).total == step_time(plain, chips.load("h100")).total
    assert memory(once).program == memory(plain).program

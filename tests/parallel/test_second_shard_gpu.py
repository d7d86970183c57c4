"""What the compiled GPU step sends between nodes with a second shard: weights once, gradients once.

Compiled for 16 H200 that are not here, in two nodes of eight.
"""

import math
from functools import cache

import jax
import pytest

from stack.config import Config, DataConfig, DecoderConfig, KernelsConfig, MeshConfig, TrainConfig
from stack.parallel import mesh as meshes
from stack.planner.compiled.collectives import Collective, bytes_between_nodes
from stack.planner.compiled.gate import check
from stack.planner.compiled.report import Compiled, compile_plan
from stack.step import program as programs

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_gpu_compiler")]

DEVICES, NODE, LAYERS = 16, 8, 4
FLAT = MeshConfig(fsdp=DEVICES, zero=3)


def second(tensor: int = 1, **fields: str) -> MeshConfig:
    sizes = {"data": DEVICES // NODE, "fsdp": NODE // tensor, "tensor": tensor}
    return MeshConfig.model_validate(sizes | {"zero": 3, "second_shard": True} | fields)


def config(mesh: MeshConfig, accumulation: int) -> Config:
    return Config(
        model=DecoderConfig(vocab_size=1024, num_layers=LAYERS, embed_dim=512, num_heads=4, max_length=160),
        kernels=KernelsConfig(attention="xla"),
        data=DataConfig(sequence_length=160),
        mesh=mesh,
        train=TrainConfig(batch_size=96, accumulation=accumulation, remat="full"),
    )


@cache
def compiled(mesh: MeshConfig, accumulation: int = 1) -> Compiled:
    return compile_plan(config(mesh, accumulation), hardware="h200", devices=DEVICES, schedule=False)


@cache
def elements() -> int:
    """Of all matrices and tables."""
    program = programs.on_mesh(config(FLAT, 1), meshes.abstract(FLAT, DEVICES), "gpu")
    sizes = zip(jax.tree.leaves(program.parameters), jax.tree.leaves(program.roles), strict=True)
    return sum(leaf.size for leaf, role in sizes if role != "vector")


def crossing(mesh: MeshConfig, accumulation: int = 1) -> float:
    """Bytes that come into a node in a step, for each number of a matrix."""
    result = compiled(mesh, accumulation)
    return bytes_between_nodes(result.collectives, result.mesh, NODE) / elements()


def sent(found: Compiled, kind: str, axis: str, dtype: str) -> int:
    """Elements of the larger side, of all collectives of a kind over an axis."""
    return sum(
        math.prod(shape) * one.times * (one.group_size if kind == "reduce-scatter" else 1)
        for one in between(found, axis)
        if one.kind == kind
        for each, shape in one.arrays
        if each == dtype
    )


def between(found: Compiled, axis: str) -> list[Collective]:
    return [one for one in found.collectives if one.axes == (axis,)]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("gather", "scatter"), [("compute", "reduce"), ("int8", "reduce"), ("int8", "int8")])
def test_weights_and_gradients_cross_nodes_once_a_step(gather: str, scatter: str, accumulation: int):
    mesh = second(gather_dtype=gather, scatter_dtype=scatter)
    found = compiled(mesh, accumulation)
    shard = elements() // NODE
    narrow = {"compute": ("bf16", "s8"), "int8": ("s8", "bf16")}[gather]
    assert [sent(found, "all-gather", "data", dtype) for dtype in narrow] == [shard, 0]
    if scatter == "int8":
        assert sent(found, "all-to-all", "data", "s8") == shard
        assert sent(found, "reduce-scatter", "data", "f32") == 0
    else:
        assert sent(found, "reduce-scatter", "data", "f32") == shard
    # What remains of the sums over nodes is vectors and scalars.
    assert all(one.elements < 32 * 1024 for one in found.collectives if one.kind == "all-reduce")
    # Layers are gathered in a node, forward and backward, and their gradients summed there in float32.
    layers = elements() - (1024 + 160) * 512
    assert sent(found, "all-gather", "fsdp", "bf16") == (elements() + layers) * accumulation
    assert sent(found, "reduce-scatter", "fsdp", "f32") == elements() * accumulation
    assert check(found, config(mesh, accumulation)) == []


def test_three_times_less_crosses_than_with_one_shard():
    """Of one micro-batch only if gradients are in 8 bits as well, of several with float32 gradients too."""
    both = second(gather_dtype="int8", scatter_dtype="int8")
    weights = second(gather_dtype="int8")
    assert crossing(FLAT) == pytest.approx(4, rel=0.05)  # bfloat16 twice and float32 once, half of each
    assert crossing(FLAT) / crossing(both) > 3.5
    assert 1.5 < crossing(FLAT) / crossing(weights) < 1.7
    assert crossing(FLAT, 3) / crossing(weights, 3) > 4.5
    assert crossing(FLAT, 3) / crossing(both, 3) > 10


def test_tensor_parallelism_stays_in_the_node():
    mesh = second(tensor=2, gather_dtype="int8", scatter_dtype="int8")
    found = compiled(mesh)
    assert {one.axes for one in found.collectives if "data" in one.axes and one.elements > 32 * 1024} == {
        ("data",)
    }
    assert crossing(mesh) == pytest.approx(
        crossing(second(gather_dtype="int8", scatter_dtype="int8")), rel=0.1
    )
    assert check(found, config(mesh, 1)) == []

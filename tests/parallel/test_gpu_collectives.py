"""What the compiled GPU step communicates is what the ZeRO stage says, and nothing else.

XLA:CPU forms no reduce-scatter, so the step is compiled for 16 H200 that are not here.
"""

import math
import re
from collections.abc import Iterator

import jax
import pytest

from stack.config import (
    Config,
    DataConfig,
    DecoderConfig,
    KernelsConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from stack.parallel.mesh import without_cache
from stack.planner.compiled.collectives import Collective, collectives
from stack.planner.compiled.compile import compile_step, devices
from stack.step import program as programs

pytestmark = pytest.mark.usefixtures("quick_gpu_compiler")

BATCH, LENGTH = 96, 160  # Numbers no other dimension has.
NUM_LAYERS = 4
MODEL = DecoderConfig(
    vocab_size=1000,
    num_layers=NUM_LAYERS,
    embed_dim=256,
    num_heads=8,
    max_length=LENGTH,
)


@pytest.fixture(autouse=True)
def no_cache() -> Iterator[None]:
    """A cache hit compiles nothing, and so proves nothing."""
    with without_cache():
        yield


def config(mesh: MeshConfig, accumulation: int, remat: str = "full") -> Config:
    return Config(
        model=MODEL,
        kernels=KernelsConfig(attention="xla"),
        data=DataConfig(sequence_length=LENGTH),
        mesh=mesh,
        optimizer=OptimizerConfig(schedule=ScheduleConfig(warmup_steps=1)),
        train=TrainConfig(batch_size=BATCH, accumulation=accumulation, remat=remat, steps=10),
    )


def traffic(
    mesh: MeshConfig, accumulation: int, remat: str = "full"
) -> tuple[list[Collective], dict[str, int]]:
    """Collectives of the compiled step, and the numbers of elements they are held to."""
    whole = config(mesh, accumulation, remat)
    targets = devices("h200", mesh.data * mesh.fsdp * mesh.tensor)
    program = programs.build(whole, targets)
    leaves = jax.tree_util.tree_flatten_with_path(program.parameters)[0]
    sizes = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.size for path, leaf in leaves}
    matrices = {name: size for name, size in sizes.items() if name.endswith(("kernel", "table"))}
    text = compile_step(whole, targets).as_text()
    assert text
    found = collectives(text, dict(program.mesh.shape))
    return found, {
        "matrices": sum(matrices.values()),
        "layers": sum(size for name, size in matrices.items() if name.startswith("layers")),
        "smallest": min(matrices.values()) // NUM_LAYERS,
        "vectors": sum(sizes.values()) - sum(matrices.values()),
    }


def total(found: list[Collective], kind: str, axis: str, dtype: str | None = None) -> int:
    """Elements per step that collectives of a kind move over one axis."""
    return sum(
        c.elements * c.times
        for c in found
        if c.kind == kind and axis in c.axes and (dtype is None or {d for d, _ in c.arrays} == {dtype})
    )


STAGES = [
    pytest.param(zero, data, accumulation, id=f"zero {zero}, data {data}, {accumulation} micro-batches")
    for zero, data, accumulation in (
        *((zero, 2, 3) for zero in (0, 1, 2, 3)),
        (1, 1, 1),
        (2, 1, 1),
        # With one micro-batch stage 3 adds up over `data` layer by layer.
        (3, 2, 1),
        (3, 1, 3),
    )
]


@pytest.mark.full
@pytest.mark.parametrize(("zero", "data", "accumulation"), STAGES)
def test_gradients_come_back_as_the_stage_says(zero, data, accumulation):
    fsdp = 16 // data
    found, sizes = traffic(MeshConfig(data=data, fsdp=fsdp, zero=zero), accumulation)
    small = sizes["vectors"] * accumulation + 1000  # norms, biases, sums: reduced whole, in float32
    if zero == 0:
        assert total(found, "reduce-scatter", "fsdp") == total(found, "all-gather", "fsdp") == 0
        assert sizes["matrices"] <= total(found, "all-reduce", "fsdp") <= sizes["matrices"] + small
    else:
        scatters = {1: 1, 2: accumulation, 3: accumulation}[zero]
        assert total(found, "reduce-scatter", "fsdp", "f32") == sizes["matrices"] * scatters
        assert total(found, "reduce-scatter", "fsdp") == sizes["matrices"] * scatters
        assert total(found, "all-reduce", "fsdp") <= small
        # Stage 3 gathers every layer for the forward pass and again for the backward pass.
        gathered = sizes["matrices"] + sizes["layers"] if zero == 3 else sizes["matrices"]
        gathers = accumulation if zero == 3 else 1
        assert total(found, "all-gather", "fsdp") == gathered * gathers
        # Replicas exchange shards only, once, however many micro-batches there are.
        shards = sizes["matrices"] // fsdp if data > 1 else 0
        assert shards <= total(found, "all-reduce", "data") <= shards + small
    for collective in found:
        if collective.kind in ("all-reduce", "reduce-scatter"):
            assert {dtype for dtype, _ in collective.arrays} <= {"f32", "s32"}, collective
    assert_nothing_holds_the_global_batch(found)


@pytest.mark.full
@pytest.mark.parametrize("remat", ["none", "dots", "save_qkv_proj"])
def test_stage_3_never_keeps_gathered_layers_for_the_backward_pass(remat):
    found, sizes = traffic(MeshConfig(data=1, fsdp=16, zero=3), 1, remat)
    assert total(found, "all-gather", "fsdp") == sizes["matrices"] + sizes["layers"]


@pytest.mark.full
def test_sequence_parallel_gathers_and_scatters_activations():
    found, sizes = traffic(MeshConfig(data=2, fsdp=4, tensor=2, zero=3, sequence_parallel=True), 1)
    residual = (BATCH // 8) * LENGTH * MODEL.embed_dim
    big = [c for c in found if c.kind == "all-reduce" and "tensor" in c.axes and c.elements >= residual]
    # The one all-reduce left is the gradient of the hidden states from the loss, chunk by chunk.
    assert sum(c.elements * c.times for c in big) <= residual
    layers = [
        c for c in found if c.kind == "reduce-scatter" and "tensor" in c.axes and c.elements == residual
    ]
    # Two a layer forward, two again when it is computed anew, two backward; less what is not needed.
    assert NUM_LAYERS * 4 <= sum(c.times for c in layers) <= NUM_LAYERS * 6 + 2
    assert 2 * total(found, "reduce-scatter", "fsdp", "f32") == sizes["matrices"] + position_rows()
    assert_nothing_holds_the_global_batch(found)


def position_rows() -> int:
    """The position table is not split over `tensor`."""
    return LENGTH * MODEL.embed_dim


@pytest.mark.full
def test_parameters_are_gathered_as_they_lie():
    """The compiler would copy whole stacks of weights into another layout before the loop over layers."""
    mesh = MeshConfig(fsdp=8, tensor=2, zero=3)
    text = compile_step(config(mesh, accumulation=2), devices("h200", 16)).as_text()
    assert text
    step = text[text.index("\nENTRY") :]
    assert re.search(r"fusion\(%param", step)
    assert re.findall(r"transpose\S* = f32\S* fusion\(%param[^,)]*\)", step) == []


def assert_nothing_holds_the_global_batch(found: list[Collective]) -> None:
    for collective in found:
        for _, shape in collective.arrays:
            assert BATCH not in shape, collective
            assert math.prod(shape) != BATCH * LENGTH, collective

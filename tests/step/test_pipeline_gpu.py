"""What a pipeline's compiled GPU step sends and holds is what its table says."""

from functools import cache
from typing import NamedTuple

import pytest

from stack.config import Config, DataConfig, DecoderConfig, KernelsConfig, MeshConfig, TrainConfig
from stack.planner.compiled.gate import check
from stack.planner.compiled.report import Compiled, compile_plan
from stack.planner.formula.memory import memory
from stack.planner.formula.workload import from_config

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_gpu_compiler")]

EMBED, LENGTH, LAYERS = 256, 320, 12  # No other dimension is as long as rows are.
ACTIVATION = LENGTH * EMBED * 2
"""Bytes of a micro-batch of one row, in bfloat16."""


def config(micro_batches: int, **mesh: object) -> Config:
    sizes = MeshConfig.model_validate({"fsdp": 1, "zero": 1} | mesh)
    return Config(
        model=DecoderConfig(
            vocab_size=512,
            num_layers=LAYERS,
            embed_dim=EMBED,
            num_heads=4,
            max_length=3 * LENGTH,
            norm="rmsnorm",
            qkv_bias=False,
        ),
        kernels=KernelsConfig(attention="xla"),
        data=DataConfig(sequence_length=LENGTH),
        mesh=sizes,
        train=TrainConfig(
            batch_size=micro_batches * sizes.data * sizes.fsdp, accumulation=micro_batches, remat="full"
        ),
    )


@cache
def compiled(micro_batches: int, **mesh: object) -> Compiled:
    whole = config(micro_batches, **mesh)
    number = whole.mesh.data * whole.mesh.fsdp * whole.mesh.stage * whole.mesh.tensor
    return compile_plan(whole, hardware="h200", devices=number, schedule=False)


class Bytes(NamedTuple):
    """Of a device."""

    compiled: float
    planned: float


def sizes(micro_batches: int, **mesh: object) -> Bytes:
    whole = config(micro_batches, **mesh)
    found = compiled(micro_batches, **mesh)
    return Bytes(found.memory.temporaries, memory(from_config(whole, found.devices)).program)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"stage": 4, "fsdp": 2}, id="fsdp"),
        pytest.param({"stage": 4, "tensor": 2, "sequence_parallel": True}, id="sequence parallel"),
        # Of sizes that 3 does not divide.
        pytest.param({"stage": 3, "tensor": 2}, id="uneven"),
        pytest.param({"stage": 4, "data": 2, "fsdp": 2}, id="16 devices"),
    ],
)
def test_one_activation_goes_each_way_in_a_tick_and_nothing_is_moved_besides(mesh: dict):
    micros = 8
    found, whole = compiled(micros, **mesh), config(micros, **mesh)
    ticks = (micros + mesh["stage"] - 1) * 4
    permutes = [one for one in found.collectives if one.kind == "collective-permute"]
    share = mesh.get("tensor", 1) if mesh.get("sequence_parallel") else 1
    assert [(one.axes, one.times, one.elements) for one in permutes] == [
        (("stage",), ticks, LENGTH * EMBED // share)
    ] * 2
    assert {dtype for one in permutes for dtype, _ in one.arrays} == {"bf16"}
    gathered = [array for one in found.collectives if one.kind == "all-gather" for array in one.arrays]
    activations = [shape for dtype, shape in gathered if dtype in ("bf16", "f32") and LENGTH in shape]
    assert bool(activations) == (share > 1), "only sequence parallelism gathers them, over tensor"
    assert check(found, whole) == []


@pytest.mark.parametrize("stages", [4, 8])
def test_memory_is_that_of_the_micro_batches_that_wait(stages: int):
    """1F1B holds as many as there are stages, however many there are; GPipe holds all of them.

    And so says the plan.
    """
    few, many = (sizes(number, stage=stages) for number in (8, 32))
    tokens = 4 * 4 * LENGTH * 24  # The numbers of a batch are whole on every device.
    assert abs(many.compiled - few.compiled) <= tokens + 2**20
    assert many.planned == few.planned
    few_gpipe, many_gpipe = (sizes(number, stage=stages, schedule="gpipe") for number in (8, 32))
    # An input of each layer of a stage; and what the last stage has made, of which 1F1B keeps one.
    layers = -(-LAYERS // stages)
    waiting = ((8 - stages) * layers + 7) * ACTIVATION
    assert few_gpipe.compiled - few.compiled == pytest.approx(waiting, rel=0.05)
    growth = 24 * (layers + 1) * ACTIVATION
    assert many_gpipe.compiled - few_gpipe.compiled == pytest.approx(growth, rel=0.05, abs=tokens)
    assert many_gpipe.planned - few_gpipe.planned == pytest.approx(growth, rel=0.05)

"""What a pipeline's compiled GPU step sends and holds is what its table says."""

from functools import cache

import pytest

from stack.config import Config, DataConfig, DecoderConfig, KernelsConfig, MeshConfig, TrainConfig
from stack.planner.compiled.gate import check
from stack.planner.compiled.report import Compiled, compile_plan

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
            max_length=LENGTH,
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


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"stage": 4, "fsdp": 2}, id="fsdp"),
        pytest.param({"stage": 4, "tensor": 2, "sequence_parallel": True}, id="sequence parallel"),
        # Of sizes that 3 does not divide.
        pytest.param({"stage": 3, "tensor": 2}, id="uneven"),
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
    assert check(found, whole) == []


def test_memory_is_that_of_the_micro_batches_that_wait():
    """1F1B holds as many as there are stages, however many there are; GPipe holds all of them."""
    few, many = compiled(8, stage=4), compiled(32, stage=4)
    tokens = 4 * 4 * LENGTH * 24  # The numbers of a batch are whole on every device.
    assert abs(many.memory.temporaries - few.memory.temporaries) <= tokens + 2**20
    gpipe = compiled(8, stage=4, schedule="gpipe")
    # Four more inputs of each of three layers; and what the last stage has made, of which 1F1B keeps one.
    waiting = (4 * LAYERS // 4 + 7) * ACTIVATION
    assert gpipe.memory.temporaries - few.memory.temporaries == pytest.approx(waiting, rel=0.05)

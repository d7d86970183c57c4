"""The compiled step of an encoder with hidden words moves what its layout needs and nothing else."""

import pytest

from stack.config import (
    Config,
    DataConfig,
    EncoderConfig,
    KernelsConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    UniLmConfig,
)
from stack.planner.compiled import gate
from stack.planner.compiled.report import compile_plan

pytestmark = pytest.mark.usefixtures("quick_gpu_compiler")

BATCH, LENGTH = 48, 160  # Numbers no other dimension has.
MODEL = EncoderConfig(
    vocab_size=1000,
    num_layers=4,
    embed_dim=256,
    num_heads=8,
    max_length=LENGTH,
    norm_placement="post",
    mlp="gelu",
    num_types=4,
)
LAYOUTS = {
    "zero 3, sequence parallel": (
        MeshConfig(data=2, fsdp=2, tensor=2, zero=3, sequence_parallel=True),
        TrainConfig(batch_size=BATCH, steps=10, remat="full"),
    ),
    "zero 2 of two micro-batches": (
        MeshConfig(data=2, fsdp=4, zero=2),
        TrainConfig(batch_size=BATCH, steps=10, accumulation=2),
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_encoder_moves_what_its_layout_needs_and_nothing_else(layout):
    mesh, train = LAYOUTS[layout]
    config = Config(
        model=MODEL,
        kernels=KernelsConfig(attention="xla"),
        objective=UniLmConfig(),
        data=DataConfig(sequence_length=LENGTH),
        mesh=mesh,
        optimizer=OptimizerConfig(schedule=ScheduleConfig(warmup_steps=1)),
        train=train,
    )
    report = compile_plan(config, hardware="h200", devices=8, schedule=False)
    assert gate.check(report, config) == []
    assert {collective.kind for collective in report.collectives} >= {"all-gather", "reduce-scatter"}

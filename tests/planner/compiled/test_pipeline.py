"""The memory of pipelines by formula is that of their compiled steps."""

import pytest

from stack.config import Config, DataConfig, DecoderConfig, KernelsConfig, MeshConfig, TrainConfig
from stack.planner.compiled.report import compile_plan
from stack.planner.formula.memory import memory
from stack.planner.formula.workload import from_config

EMBED, LENGTH = 1024, 2048


def config(mesh: dict, remat: str, micro_batches: int = 8) -> Config:
    sizes = MeshConfig.model_validate({"fsdp": 1, "zero": 1} | mesh)
    return Config(
        model=DecoderConfig(
            vocab_size=8000,
            num_layers=16,
            embed_dim=EMBED,
            num_heads=8,
            mlp_dim=4 * EMBED,
            max_length=LENGTH,
            norm="rmsnorm",
            mlp="swiglu",
            position="rotary",
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            tied_embeddings=False,
        ),
        kernels=KernelsConfig(attention="xla_chunked"),
        data=DataConfig(sequence_length=LENGTH),
        mesh=sizes,
        train=TrainConfig.model_validate(
            {"batch_size": micro_batches * sizes.fsdp, "accumulation": micro_batches, "remat": remat}
        ),
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        pytest.param({"stage": 4, "fsdp": 2}, "full", id="1f1b"),
        pytest.param({"stage": 4, "tensor": 2, "schedule": "zero_bubble"}, "none", id="zero_bubble"),
        pytest.param({"stage": 2, "schedule": "interleaved", "virtual_stages": 2}, "dots", id="interleaved"),
        # Of sizes that 3 does not divide: what is worst is the update, of whole gradients.
        pytest.param({"stage": 3}, "full", id="uneven"),
    ],
)
def test_the_formula_is_within_5_percent_of_the_compiler(mesh, remat):
    whole = config(mesh, remat)
    number = whole.mesh.fsdp * whole.mesh.stage * whole.mesh.tensor
    planned = memory(from_config(whole, number))
    compiled = compile_plan(whole, hardware="h200", devices=number, schedule=False)
    assert planned.total - planned.reserve == pytest.approx(compiled.memory.total, rel=0.05)


def test_what_the_optimizer_and_an_average_hold_is_counted():
    whole = config({"stage": 4, "fsdp": 2}, "full")
    plain = memory(from_config(whole, 8))
    averaged = memory(from_config(whole.replace("optimizer.ema_decay=0.99"), 8))
    assert averaged.optimizer - plain.optimizer == pytest.approx(plain.optimizer / 2)
    factored = memory(from_config(whole.replace("optimizer.kind=adafactor"), 8))
    assert factored.optimizer < 0.01 * plain.optimizer

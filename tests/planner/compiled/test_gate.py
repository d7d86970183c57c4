"""The gate: a compiled step communicates what its layout needs by formula, and known mistakes are caught."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from stack.config import (
    Config,
    DataConfig,
    DecoderConfig,
    EncoderDecoderConfig,
    KernelsConfig,
    MeshConfig,
    OptimizerConfig,
    ScheduleConfig,
    SpansConfig,
    TrainConfig,
    load,
)
from stack.hardware import chip as chips
from stack.kernels.attention import KERNELS, cudnn
from stack.layers.mlp import Mlp
from stack.parallel import mesh as meshes
from stack.parallel import zero
from stack.planner.compiled import gate
from stack.planner.compiled.findings import Finding
from stack.planner.compiled.report import Compiled, compile_plan
from stack.step import program as programs

pytestmark = pytest.mark.usefixtures("quick_gpu_compiler")

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
BATCH, LENGTH = 48, 160  # Numbers no other dimension has.
MODEL = DecoderConfig(vocab_size=1000, num_layers=4, embed_dim=256, num_heads=8, max_length=LENGTH)
FSDP = MeshConfig(data=2, fsdp=4, zero=2)
TENSOR = MeshConfig(fsdp=4, tensor=2, zero=1)
SEQUENCE = MeshConfig(data=2, fsdp=2, tensor=2, zero=3, sequence_parallel=True)
VECTORS = 4 * (MODEL.num_layers * 13 + 2) * MODEL.embed_dim
"""Bytes of the scales and biases, 13 widths a layer: the compiler sums some once a step, the formula every
micro-batch."""


def config(mesh: MeshConfig, *, attention: str = "xla", rows: int = BATCH, **train: object) -> Config:
    return Config(
        model=MODEL,
        kernels=KernelsConfig(attention=attention),
        data=DataConfig(sequence_length=LENGTH),
        mesh=mesh,
        optimizer=OptimizerConfig(schedule=ScheduleConfig(warmup_steps=1)),
        train=TrainConfig(batch_size=rows, steps=10, **train),
    )


def two_stacks(mesh: MeshConfig, *, remat: str = "none") -> Config:
    """A small T5, whose stacks differ in depth and rows in length."""
    lean = config(mesh, remat=remat)
    model = EncoderDecoderConfig(
        **{name: getattr(MODEL, name) for name in ("vocab_size", "num_layers", "embed_dim", "num_heads")},
        num_decoder_layers=3,
        max_length=LENGTH,
        norm="rmsnorm",
        mlp="geglu",
        position="relative",
        attention_scale=1.0,
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias"), False),
    )
    return lean.model_copy(update={"model": model, "objective": SpansConfig(target_length=56)})


def compiled(config: Config) -> Compiled:
    return compile_plan(config, hardware="h200", devices=8, schedule=False)


def caught(config: Config) -> list[Finding]:
    return gate.check(compiled(config), config)


def kinds(findings: list[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


LAYOUTS = [
    pytest.param(config(FSDP, accumulation=2), id="zero 2 of two micro-batches"),
    pytest.param(config(SEQUENCE, remat="full"), id="zero 3, sequence parallel", marks=pytest.mark.full),
    pytest.param(config(SEQUENCE, remat="dots"), id="zero 3, matmuls saved", marks=pytest.mark.full),
    pytest.param(
        config(TENSOR, remat="dots", accumulation=3), id="zero 1, tensor parallel", marks=pytest.mark.full
    ),
    pytest.param(config(MeshConfig(data=2, fsdp=4, zero=0)), id="zero 0", marks=pytest.mark.full),
    pytest.param(
        two_stacks(SEQUENCE, remat="full"), id="t5, zero 3, sequence parallel", marks=pytest.mark.full
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_moves_what_its_layout_needs_and_nothing_else(layout):
    report = compiled(layout)
    assert gate.check(report, layout) == []
    # The formula is tight: nine tenths of it would refuse this step.
    need = gate.limits(programs.on_mesh(layout, meshes.abstract(layout.mesh, 8), "gpu"))
    assert need
    for (kind, axis), size in need.items():
        traffic = sum(c.bytes * c.times for c in report.collectives if c.kind == kind and axis in c.axes)
        fewer = VECTORS * (layout.train.accumulation - 1) if kind == "all-reduce" else 0
        assert traffic > 0.9 * size - gate.SCALARS - fewer, (kind, axis)


@pytest.mark.full
def test_a_gradient_summed_in_bfloat16_is_caught():
    findings = caught(config(FSDP, grad_reduce_dtype="bfloat16"))
    assert kinds(findings) == {"reduced precision"}
    assert any(finding.source.startswith("stack/parallel/zero.py") for finding in findings)


GATHER, SCATTER = zero.gather_weight, zero.scatter_gradient


def reshard(weight, layout, names, role):
    """A matrix gathered the plain way: its gradient is summed whole, with no error and no warning.

    A table so gathered is an error at once: what its gradient is summed over is not in its type.
    """
    if role != "matrix":
        return GATHER(weight, layout, names, role)
    return jax.reshard(weight.astype(layout.dtype), layout.whole_spec(names))


@pytest.mark.full
def test_a_weight_gathered_by_a_plain_reshard_is_caught(monkeypatch):

    def scatter(cotangent, layout, names, role, **options):
        if role != "matrix":
            return SCATTER(cotangent, layout, names, role, **options)
        return cotangent.astype(jnp.float32)

    monkeypatch.setattr(zero, "gather_weight", reshard)
    monkeypatch.setattr(zero, "scatter_gradient", scatter)
    findings = caught(config(MeshConfig(fsdp=8, zero=1)))
    assert any(f.kind == "traffic" and f.text.startswith("all-reduce over fsdp") for f in findings), findings


@pytest.mark.full
def test_a_custom_call_outside_shard_map_is_caught(monkeypatch):
    """cuDNN's outputs are typed whole, so every device gathers and computes the batch of all."""

    def attend(query, key, value, mask, layout, **_):
        query, key, value, mask = jax.tree.map(lambda x: jax.reshard(x, P()), (query, key, value, mask))
        y = cudnn._attend_local(query, key, value, mask)
        return jax.reshard(y, layout.spec("batch", None, "heads"))

    monkeypatch.setitem(KERNELS, "cudnn", dataclasses.replace(KERNELS["cudnn"], attend=attend))
    findings = caught(config(SEQUENCE, attention="cudnn"))
    assert {"traffic", "global batch"} <= kinds(findings)


@pytest.mark.full
def test_an_activation_laid_out_whole_is_caught(monkeypatch):
    mlp = Mlp.__call__

    def whole(self, x, layout):
        mixture = jnp.flip(jax.reshard(mlp(self, x, layout), P()), axis=0)
        return layout.shard(mixture, "batch", "residual_length", "embed")

    monkeypatch.setattr(Mlp, "__call__", whole)
    findings = caught(config(FSDP))
    assert {"traffic", "global batch"} <= kinds(findings)


@pytest.mark.full
def test_a_step_under_automatic_sharding_that_the_compiler_must_repair_is_caught(monkeypatch):
    """It makes the array whole on every device and says so only in its log."""
    mlp = Mlp.__call__

    def automatic(self, x, layout):
        constrain = jax.lax.with_sharding_constraint

        @partial(jax.sharding.auto_axes, axes=("data", "fsdp"), out_sharding=P(("data", "fsdp")))
        def turn(y):
            y = constrain(y, P("fsdp", None, "data"))
            return constrain(jnp.sin(y), P(None, ("data", "fsdp"), None))

        return turn(mlp(self, x, layout))

    monkeypatch.setattr(Mlp, "__call__", automatic)
    findings = caught(config(FSDP))
    repairs = [finding for finding in findings if finding.kind == "involuntary rematerialization"]
    assert repairs
    assert any(finding.source.startswith(__file__) for finding in repairs), repairs


@pytest.mark.full
def test_a_step_that_does_not_fit_is_caught():
    layout = config(FSDP)
    small = dataclasses.replace(chips.load("h200"), name="small", memory_bytes=2.0**20)
    findings = gate.check(compile_plan(layout, hardware=small, devices=8, schedule=False), layout)
    assert kinds(findings) == {"memory"}
    assert "on each device, which has 0.00 GiB" in findings[0].text


@pytest.mark.full
@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_compiled_for_its_target_passes(recipe):
    config = load(recipe)
    target = config.target
    assert target is not None
    report = compile_plan(config, hardware=target.hardware, devices=target.devices, schedule=False)
    assert gate.check(report, config) == []
    assert 0 < report.memory.total < report.memory.device

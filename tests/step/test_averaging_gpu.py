"""Compiled for GPUs, a period says nothing between instances, and its end sends every parameter once."""

import math

import jax
import pytest

from stack.config import AverageConfig, Config, DataConfig, DecoderConfig, MeshConfig, TrainConfig
from stack.parallel.mesh import without_cache
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.compile import compile_lowered, devices
from stack.planner.compiled.gate import check
from stack.planner.compiled.report import compile_plan
from stack.step.averaging import AveragedSteps
from stack.step.program import build

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("quick_gpu_compiler")]


# No other dimension is as long as rows are.
def config(**average: object) -> Config:
    return Config(
        model=DecoderConfig(vocab_size=512, num_layers=4, embed_dim=256, num_heads=4, max_length=320),
        data=DataConfig(sequence_length=320, heldout_fraction=0),
        mesh=MeshConfig(data=4, fsdp=4),
        average=AverageConfig.model_validate(average),
        train=TrainConfig(batch_size=16),
    )


def test_nothing_goes_between_instances_within_a_period():
    apart = compile_plan(config(every=50), hardware="h200", devices=16, schedule=False)
    assert {axis for one in apart.collectives for axis in one.axes} == {"fsdp"}
    assert check(apart, config(every=50)) == []
    plain = compile_plan(config(), hardware="h200", devices=16, schedule=False)
    assert "data" in {axis for one in plain.collectives for axis in one.axes}


@pytest.mark.parametrize("outer", ["none", "nesterov"])
def test_an_average_sends_every_parameter_once_in_float32(outer):
    program = build(config(every=50, outer=outer), absent := devices("h200", 16))
    assert program.instances is not None
    with without_cache():
        text = compile_lowered(AveragedSteps(program, {}).lower_average(), absent[0]).as_text() or ""
    found = collectives(text, dict(program.instances.mesh.shape))
    assert {(one.kind, one.axes) for one in found} == {("all-reduce", ("instance",))}
    leaves = jax.tree.leaves(program.parameters)
    assert sum(one.elements for one in found) == sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves
    )
    assert {dtype for one in found for dtype, _ in one.arrays} == {"f32"}

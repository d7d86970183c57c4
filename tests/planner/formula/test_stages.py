"""The time of a pipeline: idle as its table is, sending what the executor sends."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stack.config import Config, DataConfig, DecoderConfig, MeshConfig, TrainConfig
from stack.hardware.chip import load
from stack.parallel import mesh as meshes
from stack.parallel.pipeline.pipeline import Pipeline
from stack.planner.compiled.gate import limits
from stack.planner.formula.links import exchange_seconds, ring_seconds
from stack.planner.formula.memory import memory, policy
from stack.planner.formula.pipeline import plan_of
from stack.planner.formula.time import published_time, step_time
from stack.planner.formula.workload import Workload, from_config
from stack.step import program as programs
from stack.step.program import costs_of

H100 = load("h100")
MODEL = DecoderConfig(
    vocab_size=50304, max_length=2048, num_layers=24, embed_dim=2048, num_heads=16, position="rotary"
)


def work(**changes: Any) -> Workload:
    sizes: dict[str, Any] = {
        "model": MODEL.model_copy(update={"num_layers": changes.pop("layers", 24)}),
        "length": 2048,
        "batch": 64 * changes.pop("micro_batches", 8),
        "micro_batch": 8,
        "fsdp": 8,
        "zero": 1,
    }
    return Workload(**(sizes | changes))


def whole_table(w: Workload) -> Pipeline:
    """What the executor makes of it, of all its micro-batches."""
    return Pipeline.of(
        w.schedule,
        (w.model.num_layers,),
        stages=w.stage,
        micro_batches=w.accumulation,
        chunks=w.virtual_stages,
        costs=costs_of(policy(w)),
    )


@st.composite
def pipelines(draw: st.DrawFn) -> Workload:
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero_bubble"]))
    stages = draw(st.integers(2, 8))
    micro_batches, parts = draw(st.integers(1, 5 * stages)), 1
    layers = draw(st.integers(stages, 4 * stages))
    if schedule == "interleaved":
        parts = draw(st.integers(1, 4))
        micro_batches, layers = stages * draw(st.integers(1, 5)), stages * parts * draw(st.integers(1, 4))
    return work(
        schedule=schedule,
        stage=stages,
        virtual_stages=parts,
        layers=layers,
        micro_batches=micro_batches,
        remat=draw(st.sampled_from(["none", "dots", "full"])),
    )


def busy_seconds(w: Workload) -> float:
    """Of all layers that the stage with most of them has, all micro-batches, by steps without a pipeline."""
    alone = work(fsdp=1, batch=w.micro_batch, micro_batch=w.micro_batch, remat=w.remat)
    one, two = (
        step_time(dataclasses.replace(alone, model=MODEL.model_copy(update={"num_layers": layers})), H100)
        for layers in (1, 2)
    )
    layer = sum(
        getattr(two, name) - getattr(one, name) for name in ("matmul", "attention", "memory_bound", "host")
    )
    return layer * whole_table(w).layers.sum(axis=0).max() * w.accumulation


@given(pipelines())
def test_a_plan_is_idle_for_the_share_of_time_that_its_table_is(w):
    """Of the time for layers: that for the head, which is the last stage's, is in no table."""
    bubble, table = step_time(w, H100).bubble, whole_table(w).table
    assert w.accumulation == table.shape.micro_batches
    assert bubble / (bubble + busy_seconds(w)) == pytest.approx(table.bubble, rel=1e-6)


@given(pipelines())
def test_few_micro_batches_tell_the_slots_of_many(w):
    assert plan_of(w).slots == whole_table(w).slots


@settings(deadline=None)  # A layer is traced when its memory is first asked for.
@given(pipelines())
def test_gpipe_is_never_better_than_1f1b(w):
    """So the search leaves it out."""
    assume(w.schedule == "gpipe")
    other = dataclasses.replace(w, schedule="1f1b")
    assert step_time(w, H100).bubble == pytest.approx(step_time(other, H100).bubble)
    assert memory(w).total >= memory(other).total


def test_interleaved_in_one_part_is_1f1b():
    one, other = (
        step_time(work(stage=4, schedule=name, remat="full"), H100) for name in ("interleaved", "1f1b")
    )
    assert one == other


def test_parts_divide_the_bubble_and_multiply_what_is_sent():
    one, three = (
        step_time(work(stage=2, schedule="interleaved", virtual_stages=parts), H100) for parts in (1, 3)
    )
    assert one.bubble / three.bubble == pytest.approx(3)
    sent = [step.communication["stage"].bytes for step in (one, three)]
    ticks = [(8 * parts + 1) * 3 for parts in (1, 3)]
    activation = 8 * 2048 * 2048 * 2
    assert sent[1] - sent[0] == pytest.approx(2 * (ticks[1] - ticks[0]) * activation)


@pytest.mark.parametrize(
    "mesh",
    [
        {"stage": 2, "fsdp": 4, "schedule": "zero_bubble"},
        {"stage": 4, "tensor": 2, "sequence_parallel": True},
        {"stage": 3, "fsdp": 2},  # Which 8 layers do not divide over.
    ],
    ids=["fsdp", "sequence parallel", "uneven"],
)
def test_stages_send_what_the_gate_lets_them(mesh):
    """Of each collective a device keeps its own share: what is moved is (p - 1) / p of the larger side."""
    config = Config(
        model=MODEL.model_copy(update={"num_layers": 8, "vocab_size": 50304}),
        data=DataConfig(sequence_length=2048),
        mesh=MeshConfig.model_validate({"zero": 1, "fsdp": 1} | mesh),
        train=TrainConfig(batch_size=48, accumulation=12, remat="full"),
    )
    devices = math.prod(mesh.get(axis, 1) for axis in ("stage", "fsdp", "tensor"))
    program = programs.on_mesh(config, meshes.abstract(config.mesh, devices), "gpu")
    allowed = {kind: size for (kind, axis), size in limits(program).items() if axis == "stage"}
    sent = allowed.pop("collective-permute")
    share = (config.mesh.stage - 1) / config.mesh.stage
    # Numbers of the batch and vectors besides, which the plan leaves out.
    summed = 2 * allowed.pop("all-reduce", 0.0)
    weights = summed + sum(allowed.values())
    planned = step_time(from_config(config, devices), H100).communication["stage"].bytes
    assert planned == pytest.approx(sent + share * weights, rel=0.01)


def test_stages_go_at_the_pace_of_their_slowest_link():
    """Four stages of four devices: two are in a node of eight, and wait for those that are not."""
    within, across = (
        step_time(work(stage=4, tensor=ways, fsdp=1, batch=64), H100).communication["stage"]
        for ways in (2, 4)
    )
    ticks, activation = (8 + 3) * 3, 8 * 2048 * 2048 * 2
    assert across.exposed > 2 * ticks * activation / (H100.network_bandwidth * H100.efficiency.link)
    assert within.exposed < across.exposed / 4


def test_others_bubble_is_that_of_1f1b():
    """(p - 1) / m of the work on the layers (arXiv 2104.04473, section 2.2)."""
    w = work(fsdp=1, stage=4, micro_batch=4, batch=64, zero=0)
    assert published_time(w, H100).bubble == pytest.approx(3 / 16 * busy_seconds(w), rel=1e-6)


def test_others_interleaving_divides_the_bubble_and_is_in_two_parts_at_least():
    one = published_time(work(fsdp=1, stage=4), H100).bubble
    two, three = (
        published_time(work(fsdp=1, stage=4, schedule="interleaved", virtual_stages=parts), H100).bubble
        for parts in (1, 3)
    )
    assert (one / two, one / three) == pytest.approx((2, 3))


def test_all_parts_of_an_exchange_cross_by_their_own_network():
    chip = dataclasses.replace(H100, domain_latency=1e-15, network_latency=1e-15, domain_bandwidth=1e15)
    gathered = ring_seconds(8e9, 16, 1, chip)
    assert exchange_seconds(8e9, 16, 1, chip) == pytest.approx(8 * gathered)
    assert exchange_seconds(8e9, 2, 8, chip) == pytest.approx(ring_seconds(8e9, 2, 8, chip))
    assert exchange_seconds(8e9, 1, 1, chip) == 0
    within = 8e9 * 7 / 8 / (H100.domain_bandwidth * H100.efficiency.link)
    assert exchange_seconds(8e9, 8, 1, H100) == pytest.approx(within, rel=1e-3)

"""Bytes per device of a pipeline's step, by its table: each device has the slots of the fullest stage."""

from functools import cache

from stack.models import model_cost
from stack.models.cost import Axis
from stack.parallel.pipeline.pipeline import Pipeline
from stack.parallel.pipeline.table import Costs
from stack.parallel.rules import TABLE
from stack.planner.formula import memory as whole
from stack.planner.formula.result import Memory
from stack.planner.formula.workload import Workload
from stack.step.program import costs_of

_EXTRA_LATE = 2
"""Slots of what is put off besides those that wait: one for what is not used, one that the compiler cuts out
whole before the loop over its layers. Of what the backward passes keep it cuts out a layer at a time."""


def pipeline_memory(w: Workload) -> Memory:
    """Bytes per device of a workload with several stages.

    At rest parameters and moments are split over `fsdp` and `stage`. In the loop over ticks a device has the
    layers of its stage, and all that is in none, in the compute dtype and as sums of gradients; what waits,
    in slots; and what a layer's backward pass, or the loss, works on. After it the gradients lie as the
    parameters do, beside their sums.
    """
    plan = plan_of(w)
    most, slots = plan.most[0], plan.slots
    parts, compute = w.parameters, 4 if w.model.dtype == "float32" else 2
    layer = sum(part.shard(tensor=w.tensor) for part in parts.layers if part.is_matrix) / w.model.num_layers
    rest = sum(part.shard(tensor=w.tensor) for part in parts.ends if part.is_matrix)
    here = layer * most * plan.chunks + rest
    moments = 4 * whole.optimizer_numbers(w)
    shards = sum(p.itemsize * p.shard(fsdp=w.fsdp, stage=w.stage, tensor=w.tensor) for p in parts)
    hidden = w.micro_tokens * w.model.embed_dim * compute
    activation = hidden / (w.tensor if w.sequence_parallel else 1)
    waiting = (slots.input + slots.gradient + 5) * activation  # And three that are under way, two unused.
    kept = (slots.live + 1) * most * w.micro_batch * whole.layer_residuals(w).per_layer(w.tensor)
    late = (slots.late + _EXTRA_LATE) * most * _put_off(w, compute) if slots.late else 0.0
    always = {
        "parameters": shards,
        "gradients": w.reduce_bytes * here,
        "optimizer": (0.0 if w.offload_optimizer else moments) + w.ema * shards,
        "reserve": whole.RESERVE,
        "host": moments if w.offload_optimizer else 0.0,
    }
    always |= dict.fromkeys(("activations", "logits", "temporaries", "collectives"), 0.0)
    loop = {"parameters": shards + compute * here, "activations": kept + late + waiting}
    phases = (
        loop | {"logits": whole.logits(w), "temporaries": 2 * hidden},
        loop | {"temporaries": whole.layer_temporaries(w) + compute * layer},
        {"gradients": w.reduce_bytes * here + shards},
    )
    return Memory(**max((always | phase for phase in phases), key=lambda phase: sum(phase.values())))


def plan_of(w: Workload) -> Pipeline:
    """The table of a workload's step, or of as few micro-batches as wait and hold what more would.

    That is once the pipeline has filled: idle ticks and slots are then those of any number.
    """
    micro_batches = w.accumulation
    if w.schedule != "gpipe":
        micro_batches = min(micro_batches, w.stage * (2 if w.schedule == "interleaved" else 1))
    costs = costs_of(whole.policy(w))
    return _plan(w.schedule, w.model.num_layers, w.stage, micro_batches, w.virtual_stages, costs)


@cache
def _plan(schedule: str, layers: int, stages: int, micro_batches: int, chunks: int, costs: Costs) -> Pipeline:
    return Pipeline.of(
        schedule, (layers,), stages=stages, micro_batches=micro_batches, chunks=chunks, costs=costs
    )


def _put_off(w: Workload, compute: int) -> float:
    """What the gradients of a layer's weights need, beside what is kept anyway.

    The gradients of what its products give; and what enters them, where that is computed again.
    """
    (stack,) = model_cost(w.model).stacks
    again = w.remat != "none"

    def width(axis: Axis) -> float:
        name, size = axis
        return size / (w.tensor if "tensor" in TABLE[name] else 1)

    widths = (width(product.inner) * again + width(product.columns) for product in stack.products)
    return w.micro_tokens * compute * sum(widths)

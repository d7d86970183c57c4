"""What a pipeline adds to the time of a step: who waits, and what goes from stage to stage."""

import dataclasses
from collections.abc import Iterable

from stack.hardware.chip import Hardware
from stack.planner.formula.links import exchange_seconds, ring_seconds, send_seconds
from stack.planner.formula.pipeline import plan_of
from stack.planner.formula.result import Communication
from stack.planner.formula.shapes import Parameter
from stack.planner.formula.workload import Workload

_BYTES = 2
"""Of an activation, and of a weight as it is used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stages:
    """The slowest stage of a pipeline, or all there is."""

    layers: float
    """That it runs."""
    idle: float
    """How long it does nothing, in the time that its layers take for a micro-batch."""
    ends: float
    """The share of what is in no layer that it gathers."""
    beside: float
    """Layers whose arithmetic, of one micro-batch, runs beside the gathers and sums of a whole step."""
    communication: Communication
    """A step's, from stage to stage."""


def own_stages(work: Workload, chip: Hardware) -> Stages:
    """The stages of Stack's own pipeline, by the table that it runs.

    In every tick an activation goes on and a gradient back, whether or not they are of use. Before the
    first and after the last, with nothing beside them, weights and gradients go between their place at
    rest, which is split over stages, and the stage that has the layer; what is in no layer, to all stages.
    What no number of stages divides is whole on all of them, and its gradient summed.
    """
    if work.stage == 1:
        return _one_stage(work)
    plan, parts, stride = plan_of(work), work.parameters, work.tensor * work.context
    shape, busy = plan.table.shape, plan.table.busy
    layers = plan.most[0] * plan.chunks
    idle = plan.table.ticks - busy
    ticks = idle + busy / shape.micro_batches * work.accumulation
    size = _activation(work)
    send = send_seconds(size, inside=work.stage * stride <= chip.domain_size, chip=chip)
    dealt = _split(work, parts.layers) * layers / work.model.num_layers
    gathered = _split(work, parts.ends)
    whole = elements(work, parts, trained=False) / work.fsdp - _split(work, parts)
    both = _BYTES + work.reduce_bytes
    moved = (dealt + gathered) * both + 2 * whole * work.reduce_bytes
    moved = 2 * ticks * size + moved * (work.stage - 1) / work.stage
    seconds = 2 * ticks * send + 2 * ring_seconds(whole * work.reduce_bytes, work.stage, stride, chip)
    for each in (_BYTES, work.reduce_bytes):
        seconds += exchange_seconds(dealt * each, work.stage, stride, chip)
        seconds += ring_seconds(gathered * each, work.stage, stride, chip)
    return Stages(
        layers=layers,
        idle=idle * shape.micro_batches / busy,
        ends=1.0,
        beside=0.0,
        communication=Communication(bytes=moved, seconds=seconds, exposed=seconds),
    )


def published_stages(work: Workload, chip: Hardware) -> Stages:
    """Those of other projects, as arXiv 2104.04473 has them (section 2.2).

    One transfer each way for each micro-batch and part. 1F1B waits for its neighbours at each turn;
    interleaved, there is other work meanwhile. How many parts is not always recorded: two are the fewest.
    """
    if work.stage == 1:
        return _one_stage(work)
    interleaved = work.schedule == "interleaved"
    parts = max(2, work.virtual_stages) if interleaved else 1
    size, layers = _activation(work), work.model.num_layers / work.stage
    one = send_seconds(size, inside=2 * work.tensor * work.context <= chip.domain_size, chip=chip)
    times, hidden = 2 * parts * work.accumulation, chip.efficiency.overlap if interleaved else 0.0
    return Stages(
        layers=layers,
        idle=(work.stage - 1) / parts,
        ends=0.5,  # The word table is on the first stage, the head on the last.
        beside=layers,
        communication=Communication(
            bytes=size * times,
            seconds=one * times,
            exposed=one * times * (1 - hidden) + 2 * (work.stage - 1) * one,
        ),
    )


def elements(work: Workload, parts: Iterable[Parameter], *, trained: bool) -> float:
    """Of the matrices among some parameters, split over `tensor`: all, or those that are trained."""
    return sum(p.shard(tensor=work.tensor) for p in parts if p.is_matrix and (p.trained or not trained))


def _split(work: Workload, parts: Iterable[Parameter]) -> float:
    """Elements of the matrices that lie split over stages too, on all stages together."""
    ways = {"fsdp": work.fsdp, "tensor": work.tensor}
    both = [(p.shard(**ways), p.shard(**ways, stage=work.stage)) for p in parts if p.is_matrix]
    return sum(number for number, split in both if split < number)


def _one_stage(work: Workload) -> Stages:
    layers, nothing = float(work.model.num_layers), Communication(bytes=0.0, seconds=0.0, exposed=0.0)
    return Stages(layers=layers, idle=0.0, ends=1.0, beside=layers, communication=nothing)


def _activation(work: Workload) -> float:
    """Bytes of a micro-batch between two stages."""
    ways = work.tensor if work.sequence_parallel else 1
    return work.micro_tokens * work.model.embed_dim * _BYTES / ways

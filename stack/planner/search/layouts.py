"""Every layout of a model over some devices, and why the others cannot be.

Layouts that only repeat another are left out: `zero: 0` with `fsdp` above 1 is plain data parallelism
over both axes; stages 1 and 2 without `fsdp` split nothing; stage 2 is stage 1 where there is one
micro-batch; a model without experts has nothing for `expert` to split. Of pipelines those are left out that
another is no slower and no larger than: GPipe has the bubble of 1F1B and holds more, interleaved in one part
is 1F1B; replicas split weights over `fsdp` as far as it goes, and `data` takes the rest; and fewer
micro-batches than stages are taken where there are not as many rows.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal

from stack.config.model import ModelConfig
from stack.planner.formula.shapes import parameters
from stack.planner.formula.workload import Remat, Schedule, Workload

REMATS: tuple[Remat, ...] = ("full", "save_qkv_proj", "dots", "none")
"""From the least memory to the least arithmetic."""

SHORTEST_CONTEXT = 1024
"""Tokens: a sequence is split into no shorter parts, whose attention could not hide the exchange."""

_WITH_OFFLOAD = ("full", "save_qkv_proj")
"""What goes with `offload_activations`."""

Unit = Literal["meshes", "layouts"]


@dataclasses.dataclass(kw_only=True)
class Rejection:
    """What one reason has ruled out."""

    unit: Unit
    """`meshes`: sizes of the axes, with all that could be done on them; `layouts`: one by one."""
    count: int
    example: str


class Rejections(dict[str, Rejection]):
    """Reasons, how many each has ruled out, and the first of them."""

    def add(self, reason: str, example: str, *, unit: Unit, count: int = 1) -> None:
        """Counts what a reason rules out."""
        entry = self.setdefault(reason, Rejection(unit=unit, count=0, example=example))
        entry.count += count


@dataclasses.dataclass(frozen=True, kw_only=True)
class Space:
    """What of a layout is free to choose."""

    axes: Sequence[str] = ("tensor", "stage", "context", "fsdp")
    """Axes that may be more than 1 beside `data`, which takes what they leave."""
    zero: Sequence[int] = (0, 1, 2, 3)
    sequence_parallel: Sequence[bool] = (False, True)
    overlapped_tensor_parallel: Sequence[bool] = (False,)
    schedules: Sequence[Schedule] = ("1f1b", "interleaved", "zero_bubble")
    accumulation: int | None = None
    """Micro-batches per step; None: any number that divides."""
    remat: Sequence[Remat] = REMATS


def meshes(start: Workload, devices: int, space: Space, rejections: Rejections) -> Iterator[Workload]:
    """The sizes of the axes that divide what they split, data x fsdp x stage x context x tensor = devices.

    Args:
      start: the model, the length and the global batch.
      devices: how many.
      space: the axes that may be used.
      rejections: counts, by reason, the meshes that are left out.
    """
    order = [axis for axis in ("tensor", "stage", "context", "fsdp") if axis in space.axes]

    def split(sizes: dict[str, int], remainder: int, axes: list[str]) -> Iterator[Workload]:
        if not axes:
            fields: dict[str, Any] = _ONE | sizes | {"data": remainder, "micro_batch": 1}
            fields |= {"zero": 1} if sizes.get("stage", 1) > 1 else {}
            work = dataclasses.replace(start, **fields)
            if why := _batch_obstacle(work, space.accumulation):
                rejections.add(*why, unit="meshes")
            else:
                yield work
            return
        axis, *rest = axes
        possible = divisors(remainder)
        for size in possible:
            why = _obstacle(start, axis, size, sizes)
            is_pipelined = axis == "fsdp" and sizes.get("stage", 1) > 1
            larger = (
                other
                for other in possible
                if is_pipelined and other > size and remainder // other % start.instances == 0
            )
            if not why and any(not _obstacle(start, axis, other, sizes) for other in larger):
                why = "a pipeline splits over fsdp what it can", f"fsdp={size} of {remainder} replicas"
            if why:
                rejections.add(*why, unit="meshes", count=_factorizations(remainder // size, len(rest) + 1))
            else:
                yield from split(sizes | {axis: size}, remainder // size, rest)

    return split({}, devices, order)


def variants(mesh: Workload, space: Space) -> Iterator[list[Workload]]:
    """All that can be done on one mesh, in lists that differ in the micro-batch alone, smallest first."""
    rows = mesh.batch // mesh.replicas
    micro_batches = [rows // space.accumulation] if space.accumulation else divisors(rows)
    if not space.accumulation:
        micro_batches = [size for size in micro_batches if rows // size >= min(mesh.stage, rows)]
    split = mesh.tensor > 1
    parallel = split and mesh.length // mesh.context % mesh.tensor == 0
    choices = {
        "zero": _stages(mesh.fsdp, space.zero) if mesh.stage == 1 else (1,),
        "tables_once": (False, True) if mesh.fsdp > 1 and mesh.stage == 1 else (False,),
        "sequence_parallel": space.sequence_parallel if parallel else (False,),
        "overlapped_tensor_parallel": space.overlapped_tensor_parallel if split else (False,),
        "schedule": list(_schedules(mesh, space)),
        "remat": [remat for remat in space.remat if remat in _WITH_OFFLOAD or not mesh.offload_activations],
    }
    for values in itertools.product(*choices.values()):
        choice: dict[str, Any] = dict(zip(choices, values, strict=True))
        choice["schedule"], choice["virtual_stages"] = choice["schedule"]
        works = [dataclasses.replace(mesh, **choice, micro_batch=size) for size in micro_batches]
        yield [work for work in works if not _repeats(work, space)]


def describe(work: Workload) -> str:
    """A layout in one phrase: `data 8 x fsdp 16 x tensor 4, zero 1, remat full, micro-batch 2 x 4`."""
    axes = ("data", "fsdp", "stage", "context", "expert", "tensor")
    sizes = [f"{axis} {getattr(work, axis):,}" for axis in axes if getattr(work, axis) > 1]
    parts = [" x ".join(sizes) or "one device", f"zero {work.zero}"]
    if work.tables_once:
        parts.append("tables once")
    if work.split_data > 1:
        parts.append("second shard")
    if work.sequence_parallel:
        parts.append("sequence parallel")
    if work.overlapped_tensor_parallel:
        parts.append("overlapped tensor parallel")
    if work.stage > 1:
        virtual = f", {work.virtual_stages} virtual stages" if work.virtual_stages > 1 else ""
        parts.append(f"{work.schedule}{virtual}")
    parts += [f"remat {work.remat}", f"micro-batch {work.micro_batch} x {work.accumulation}"]
    parts += ["optimizer in host memory"] * work.offload_optimizer
    parts += ["activations in host memory"] * work.offload_activations
    return ", ".join([*parts, work.precision] if work.precision == "float8" else parts)


@cache
def divisors(number: int) -> list[int]:
    """Of a number, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


_ONE = {"fsdp": 1, "stage": 1, "context": 1, "expert": 1, "tensor": 1}


def _obstacle(start: Workload, axis: str, size: int, sizes: dict[str, int]) -> tuple[str, str] | None:
    """Why an axis cannot have a size: the reason, and this case of it. None: it can."""
    if size == 1:
        return None
    model = start.model
    if axis == "tensor":
        for name, whole in _split_by_tensor(model).items():
            if whole % size:
                return f"tensor does not divide the {name}", f"tensor={size} does not divide {whole} {name}"
    elif axis == "stage":
        if why := dataclasses.replace(start, stage=size, zero=1).why_no_pipeline():
            return "no pipeline of so many stages", why
    elif axis == "context":
        tokens = start.length / size
        if start.length % (size * sizes.get("tensor", 1)) or tokens < SHORTEST_CONTEXT:
            return (
                f"context leaves parts that tensor cannot split, or under {SHORTEST_CONTEXT:,} tokens",
                f"context={size} of {start.length:,} tokens",
            )
    elif axis == "fsdp":
        tensor = sizes.get("tensor", 1)
        for part in parameters(model):
            if part.is_matrix and part.shard(fsdp=size, tensor=tensor) == part.shard(tensor=tensor):
                shape = " x ".join(f"{name} {extent}" for name, extent in part.axes)
                return "fsdp leaves a matrix whole", f"fsdp={size} splits no axis of {shape}"
    return None


def divides_by_tensor(model: ModelConfig, tensor: int) -> bool:
    """Whether heads, MLP and vocabulary split over `tensor`."""
    return not any(whole % tensor for whole in _split_by_tensor(model).values())


def nothing_divides(start: Workload, devices: int, accumulation: int = 1) -> str:
    """Why there is no layout at all, with the nearest numbers of devices and rows that have one."""
    tensors = [tensor for tensor in divisors(start.model.num_heads) if divides_by_tensor(start.model, tensor)]
    replicas = divisors(start.batch // accumulation)
    stages = [
        stage
        for stage in range(1, start.model.num_layers + 1)
        if not dataclasses.replace(start, stage=stage, zero=1).why_no_pipeline()
    ]
    possible = sorted(set(map(math.prod, itertools.product(tensors, stages, replicas))))
    fewer = max((number for number in possible if number < devices), default=None)
    more = min((number for number in possible if number > devices), default=None)
    near = " or ".join(f"{number:,}" for number in (fewer, more) if number)
    rows = accumulation * min(devices // tensor for tensor in tensors if devices % tensor == 0)
    pieces = f" and {accumulation} micro-batches" if accumulation > 1 else ""
    return (
        f"no layout splits train.batch_size={start.batch} over {devices:,} devices{pieces}; "
        f"use {near} devices, or a train.batch_size that is a multiple of {rows:,}"
    )


def _split_by_tensor(model: ModelConfig) -> dict[str, int]:
    return {
        "heads": model.num_heads,
        "kv heads": model.kv_heads,
        "MLP channels": model.mlp_width,
        "words of the padded vocabulary": model.padded_vocab_size,
    }


def _batch_obstacle(work: Workload, accumulation: int | None) -> tuple[str, str] | None:
    ways = work.replicas * (accumulation or 1)
    if work.data % work.instances:
        told = f"{work.instances} instances on data={work.data}"
        return "data is no multiple of the instances that are averaged", told
    if work.batch % ways == 0:
        return None
    text = f"{work.replicas} replicas" + (f" x {accumulation} micro-batches" if accumulation else "")
    return "the batch does not divide over the replicas", f"{work.batch} rows over {text}"


def _repeats(work: Workload, space: Space) -> bool:
    """Whether a layout is another one by a different name, or its schedule cannot be."""
    broken = work.why_no_pipeline() is not None
    # Stage 2 is stage 1 where there is one micro-batch.
    unread = work.tables_once and not work.holds_tables
    return broken or unread or (work.zero == 2 and work.accumulation == 1 and 1 in space.zero)


def _schedules(mesh: Workload, space: Space) -> Iterator[tuple[Schedule, int]]:
    """Schedules of a mesh, each with the parts of the model on a stage."""
    if mesh.stage == 1:
        yield "1f1b", 1
        return
    for schedule in space.schedules:
        if schedule != "interleaved":
            yield schedule, 1
        elif mesh.model.num_layers % mesh.stage == 0:
            yield from (("interleaved", parts) for parts in divisors(mesh.model.num_layers // mesh.stage)[1:])


def _stages(fsdp: int, choices: Sequence[int]) -> list[int]:
    """The ZeRO stages that differ from one another; one of those wanted in any case."""
    distinct = [zero for zero in choices if zero in ((0, 3) if fsdp == 1 else (1, 2, 3))]
    return distinct or [choices[0]]


@cache
def _factorizations(number: int, axes: int) -> int:
    """In how many ways a number is a product of so many ordered factors."""
    return 1 if axes == 1 else sum(_factorizations(number // d, axes - 1) for d in divisors(number))

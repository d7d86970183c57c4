"""What to change when a step does not fit: computed to fit before it is said."""

import dataclasses
import math
from collections.abc import Iterator

from stack.hardware.chip import Hardware
from stack.planner.formula.memory import memory
from stack.planner.formula.result import Memory
from stack.planner.formula.workload import Remat, Workload
from stack.planner.search.layouts import divides_by_tensor, divisors

MARGIN = 0.05
"""What the formula may be wrong by: 93% of the compiled steps of its grid are within (docs/planner.md)."""

MOST_DEVICES = 16384

_COMPUTED_AGAIN: tuple[Remat, ...] = ("save_qkv_proj", "full")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change that makes a step fit."""

    overrides: tuple[str, ...]
    """As a user writes them."""
    devices: int
    bytes_per_device: float
    """By formula, with the reserve."""

    def describe(self, hardware: Hardware, devices: int) -> str:
        """It in words, for a step on so many devices."""
        changes = " ".join(self.overrides)
        of = f"{size_text(self.bytes_per_device)} of {size_text(hardware.memory_bytes)} by formula"
        if self.devices == devices:
            return f"set {changes}: {of}"
        here = "one device does not hold it" if devices == 1 else f"no layout of {devices:,} devices holds it"
        return f"{here}; {self.devices:,} do with {changes}: {of}"


def fits(need: Memory, hardware: Hardware) -> bool:
    """Whether a step is within a device's memory by formula, whatever the formula is wrong by."""
    return need.program * (1 + MARGIN) + need.reserve <= hardware.memory_bytes


def find_remedy(work: Workload, hardware: Hardware) -> Remedy | None:
    """The least change with which a step fits, by formula and with its margin.

    First of what changes speed alone, on the same devices: smaller micro-batches, then more computed
    again, then more split, then several of these. Else the fewest devices that hold it, more of them over
    `fsdp`. None where 16,384 devices do not.

    Args:
      work: the step that does not fit.
      hardware: the chip.
    """
    for changed in _changes(work):
        if changed.why_no_pipeline():
            continue
        need = memory(changed)
        if fits(need, hardware):
            overrides = _overrides(work, changed)
            return Remedy(overrides=overrides, devices=changed.devices, bytes_per_device=need.total)
    return None


def _changes(work: Workload) -> Iterator[Workload]:
    """Steps that differ from one, the nearest first."""
    remats: list[Remat] = [work.remat] if work.remat == "full" else [work.remat, *_COMPUTED_AGAIN]
    stages = [work.zero] if work.zero == 3 or work.fsdp == 1 or work.stage > 1 else [work.zero, 3]
    settings = [
        dataclasses.replace(work, remat=remat, zero=zero)
        for zero in stages
        for remat in dict.fromkeys(remats)
    ]
    each_replica = divisors(work.batch // work.replicas)
    rows = [rows for rows in reversed(each_replica) if rows <= work.micro_batch]
    yield from (dataclasses.replace(work, micro_batch=each) for each in rows)
    yield from settings
    yield from (dataclasses.replace(one, micro_batch=each) for one in settings for each in rows)
    devices = work.devices
    while (devices := 2 * devices) <= MOST_DEVICES:
        for tensor in _tensor_ways(work):
            fsdp = devices // (work.data * work.stage * work.context * work.expert * tensor)
            replicas = work.data * fsdp * work.expert
            if fsdp:
                yield dataclasses.replace(
                    work,
                    fsdp=fsdp,
                    tensor=tensor,
                    zero=3 if work.stage == 1 else work.zero,
                    remat="full",
                    micro_batch=1,
                    batch=math.ceil(work.batch / replicas) * replicas,
                )


def _tensor_ways(work: Workload) -> list[int]:
    """The step's own, and more within a node."""
    more = [ways for ways in (2, 4, 8) if ways > work.tensor and divides_by_tensor(work.model, ways)]
    return [work.tensor, *more]


def _overrides(before: Workload, after: Workload) -> tuple[str, ...]:
    changes = {
        "mesh.fsdp": (before.fsdp, after.fsdp),
        "mesh.tensor": (before.tensor, after.tensor),
        "mesh.zero": (before.zero, after.zero),
        "train.remat": (before.remat, after.remat),
        "train.batch_size": (before.batch, after.batch),
        "train.accumulation": (before.accumulation, after.accumulation),
    }
    told = [f"{name}={new}" for name, (old, new) in changes.items() if old != new]
    if after.remat != "none" and before.remat == "none" and before.model.scan_unroll > 1:
        told.append("model.scan_unroll=1")
    return tuple(told)


def size_text(number: float) -> str:
    """Bytes with three digits and the unit that fits."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= size:
            return f"{number / size:,.3g} {unit}" if number < 1e12 else f"{number / size:,.0f} {unit}"
    return f"{number:.0f} bytes"

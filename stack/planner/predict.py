"""The plan of a run on the devices it is about to run on."""

import dataclasses
import os
from collections.abc import Sequence

import jax

from stack.config import Config, StackError
from stack.hardware.chip import Hardware
from stack.planner.formula.memory import memory
from stack.planner.formula.result import Memory, Time
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import Workload, from_config
from stack.planner.remedy import MARGIN, find_remedy, size_text
from stack.planner.search import auto
from stack.planner.search.layouts import describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """The plan of a run on the chip it runs on."""

    work: Workload
    chip: Hardware
    time: Time
    memory: Memory

    @property
    def figures(self) -> dict[str, float]:
        """Seconds of a step, and bytes its program holds on each device."""
        return {"planned_step_seconds": self.time.total, "planned_memory_bytes": self.memory.program}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPlan:
    """Why there is none."""

    reason: str


def predict(config: Config, devices: Sequence[jax.Device], *, of_cpu: bool = False) -> Planned | NoPlan:
    """The plan of a run; it never raises, since a run does not need one.

    Args:
      config: with its layout resolved.
      devices: those it runs on.
      of_cpu: plan a CPU too, whose figures only rank layouts.
    """
    kind = devices[0].device_kind
    try:
        chip = auto.chip_of(config, devices[0])
        if chip is None:
            return NoPlan(reason=f"{kind} is not in the table of chips")
        if chip.name == "cpu" and not of_cpu:
            return NoPlan(reason="no two CPUs are alike; `stack doctor --calibrate` measures this one")
        work = from_config(config, len(devices), chip)
        return Planned(work=work, chip=chip, time=step_time(work, chip), memory=memory(work))
    except Exception as error:  # A model it cannot count, a chip's file that is wrong, a fault of its own.
        return NoPlan(reason=f"{type(error).__name__}: {error}".splitlines()[0])


HOST_SHARE = 1.5
"""A step may plan for this many times a CPU's memory: the formula is of GPUs."""


def check_memory(config: Config, devices: Sequence[jax.Device]) -> None:
    """Refuses a run that the memory of its devices cannot hold, before anything is compiled.

    Args:
      config: with its layout resolved.
      devices: those it runs on.

    Raises:
      StackError: by formula, and whatever the formula may be wrong by, it does not fit; with what does.
    """
    planned = predict(config, devices, of_cpu=True)
    if isinstance(planned, NoPlan):
        return
    if devices[0].platform == "cpu":
        here = sum(device.process_index == jax.process_index() for device in devices)
        limit, most = _host_bytes() / here, HOST_SHARE
        need, place = planned.memory.program, "this machine has for each device"
    else:
        limit, most = auto.memory_limit(planned.chip, devices), 1 + MARGIN
        need, place = planned.memory.total, f"each {planned.chip.title} has"
    if need > most * limit:
        chip = dataclasses.replace(planned.chip, memory_bytes=limit)
        remedy = find_remedy(planned.work, chip)
        told = remedy.describe(chip, len(devices)) if remedy else "take a smaller model or shorter rows"
        sizes = f"{size_text(need)} of the {size_text(limit)} that {place}"
        raise StackError(f"{config.name} needs {sizes}, by formula; {told}")


def _host_bytes() -> float:
    """Of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def line(config: Config, num_devices: int, planned: Planned | NoPlan, *, chosen: bool) -> str:
    """The plan in one line, or why there is none; it never raises either.

    Args:
      config: with its layout resolved.
      num_devices: it runs on.
      planned: of `predict`.
      chosen: whether the planner chose the layout.
    """
    parts = [f"{_layout(config, num_devices)}, chosen by the planner"] if chosen else []
    if isinstance(planned, NoPlan):
        return "; ".join([*parts, f"no plan: {planned.reason}"])
    chip = planned.chip
    need = size_text(planned.memory.program)
    memory_text = f"{need} of {size_text(chip.memory_bytes)} on each {chip.title}"
    return "; ".join([*parts, f"{planned.time.total:.4g} s a step, {memory_text}"])


def _layout(config: Config, num_devices: int) -> str:
    try:
        return describe(from_config(config, num_devices))
    except Exception:  # The chip that is not asked for here may be why it runs.
        return "a layout"

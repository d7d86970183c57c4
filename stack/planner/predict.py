"""The plan of a run on the devices it is about to run on."""

import dataclasses
from collections.abc import Sequence

import jax

from stack.config import Config
from stack.hardware.chip import Hardware
from stack.planner.formula.memory import memory
from stack.planner.formula.result import Memory, Time
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import Workload, from_config
from stack.planner.remedy import size_text
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

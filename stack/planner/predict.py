"""The plan of a run on the devices it is about to run on."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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
    limit, need, most = _limit(planned, devices)
    if need > most * limit:
        raise StackError(
            f"{config.name} needs {size_text(need)} a device, of {size_text(limit)}, by formula;"
            f" {_remedy_text(planned, limit)}"
        )


@contextmanager
def explain_exhaustion(config: Config, devices: Sequence[jax.Device]) -> Iterator[None]:
    """Says in one line what to do where a device has no memory left.

    Raises:
      StackError: in place of the error of the runtime.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        planned = predict(config, devices, of_cpu=True)
        if isinstance(planned, NoPlan):
            told = "raise train.accumulation or set train.remat=full"
            raise StackError(f"{config.name}: a device has no memory left; {told}") from error
        limit, need, _ = _limit(planned, devices)
        # Where the formula thought it fits, only what needs less than it did can help.
        told = _remedy_text(planned, min(limit, 0.9 * need))
        raise StackError(
            f"{config.name}: a device has no memory left; planned {size_text(need)} of {size_text(limit)};"
            f" {told}"
        ) from error


def _limit(planned: Planned, devices: Sequence[jax.Device]) -> tuple[float, float, float]:
    """Bytes a device has, bytes it needs by formula, and how many times as many it may need."""
    if devices[0].platform != "cpu":
        return auto.memory_limit(planned.chip, devices), planned.memory.total, 1 + MARGIN
    here = sum(device.process_index == jax.process_index() for device in devices)
    return _host_bytes() / here, planned.memory.program, HOST_SHARE


def _remedy_text(planned: Planned, limit: float) -> str:
    reserve = planned.memory.reserve if planned.chip.generation == "cpu" else 0.0  # It needs none.
    chip = dataclasses.replace(planned.chip, memory_bytes=limit + reserve)
    remedy = find_remedy(planned.work, chip)
    if remedy is None:
        return "take a smaller model or shorter rows"
    return remedy.describe(chip, planned.work.devices)


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


def memory_line(config: Config, devices: Sequence[jax.Device]) -> str | None:
    """What a step holds of devices whose time is not planned, in one line; None where that is not known."""
    planned = predict(config, devices, of_cpu=True)
    if isinstance(planned, NoPlan):
        return None
    limit, _, _ = _limit(planned, devices)
    return f"about {size_text(planned.memory.program)} of {size_text(limit)} on each device, by formula"


def _layout(config: Config, num_devices: int) -> str:
    try:
        return describe(from_config(config, num_devices))
    except Exception:  # The chip that is not asked for here may be why it runs.
        return "a layout"

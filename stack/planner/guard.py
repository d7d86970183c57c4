"""The memory of a run: refused before it starts where it cannot fit, explained where it runs out."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax

from stack.config import Config, StackError
from stack.planner.predict import NoPlan, Planned, predict
from stack.planner.remedy import MARGIN, find_remedy, size_text
from stack.planner.search import auto

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
def guard_memory(config: Config, devices: Sequence[jax.Device]) -> Iterator[None]:
    """Runs what is inside if its devices can hold it, and says in one line what to do where they did not.

    Raises:
      StackError: it cannot fit, of `check_memory`; or in place of the runtime's error that nothing is left.
    """
    check_memory(config, devices)
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


def memory_line(config: Config, devices: Sequence[jax.Device]) -> str | None:
    """What a step holds of devices whose time is not planned, in one line; None where that is not known."""
    planned = predict(config, devices, of_cpu=True)
    if isinstance(planned, NoPlan):
        return None
    limit, _, _ = _limit(planned, devices)
    return f"about {size_text(planned.memory.program)} of {size_text(limit)} on each device, by formula"

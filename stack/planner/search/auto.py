"""`mesh: auto` and `remat: auto`: the planner chooses when a run starts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from stack.config import Config, ConfigError, load
from stack.config.instances import with_instances
from stack.config.layout import check_divides
from stack.config.layout import resolve as resolve_mesh
from stack.config.reading import RUN_CONFIG
from stack.hardware import chip as chips
from stack.hardware.chip import Hardware
from stack.planner.formula.workload import Remat, from_config
from stack.planner.search.layouts import REMATS
from stack.planner.search.search import RUNNABLE, apply_layout, fastest_first, rank, release_layout


def resolve(config: Config, devices: Sequence[jax.Device]) -> Config:
    """The config with what it leaves to the planner, or to the mesh, filled in; the same on every process.

    `mesh: auto` takes the fastest mesh and ZeRO stage, `remat: auto` the fastest remat, of those that
    run and fit; nothing else changes. A run that goes on keeps what its folder says, where that still
    fits these devices; that folder is one that all processes see, as its checkpoints are.

    Args:
      config: what to run.
      devices: those it will run on.

    Raises:
      ConfigError: the chip is not known, or no layout divides, runs and fits.
    """
    resolved = _resolve(config, devices)
    return with_instances(resolved, resolve_mesh(resolved.mesh, len(devices))["data"])


def _resolve(config: Config, devices: Sequence[jax.Device]) -> Config:
    if not is_auto(config):
        return config
    if earlier := _earlier(config, len(devices)):
        return earlier
    chip = chip_of(config, devices[0])
    if chip is None:
        raise ConfigError(
            f"mesh and remat cannot be auto on {devices[0].device_kind}, which is not in the table of chips; "
            "describe it in a YAML file (`stack doctor --calibrate` writes one) and set target.hardware to "
            "it, or choose them yourself"
        )
    chip = dataclasses.replace(chip, memory_bytes=memory_limit(chip, devices))
    return _choose(config, chip, len(devices))


def is_auto(config: Config) -> bool:
    """Whether a config leaves something to the planner."""
    return config.mesh.auto or config.train.remat == "auto"


def chip_of(config: Config, device: jax.Device) -> Hardware | None:
    """What is known of a device: the config's target if it names this kind, else the table of chips.

    A CPU is its target where that is measured, and the stand-in `cpu` otherwise.
    """
    kind = device.device_kind
    if config.target:
        target = chips.load(config.target.hardware)
        if kind in target.device_kinds or (device.platform == "cpu" and target.generation == "cpu"):
            return target
    return chips.load("cpu") if device.platform == "cpu" else chips.lookup(kind)


def _choose(config: Config, chip: Hardware, devices: int) -> Config:
    remats: tuple[Remat, ...] = (config.train.remat,) if config.train.remat != "auto" else REMATS
    if not config.mesh.auto:
        return _choose_remat(config, chip, devices, remats)
    space = dataclasses.replace(RUNNABLE, accumulation=config.train.accumulation, remat=remats)
    refusal = None
    for candidate in rank(release_layout(config, chip), hardware=chip, devices=devices, space=space):
        if why := candidate.work.why_modelled():
            raise ConfigError(f"mesh: auto finds nothing that runs on {chip.title}: {why}")
        choice = apply_layout(config, candidate.work)
        choice = config.model_copy(update={"mesh": choice.mesh, "train": choice.train, "model": choice.model})
        try:
            check_divides(choice, dict(resolve_mesh(choice.mesh, devices)))
        except ConfigError as error:  # Only the evaluation's batch may not divide.
            refusal = refusal or error
            continue
        return choice
    assert refusal is not None, "rank gives a layout or raises"
    raise refusal


def _choose_remat(config: Config, chip: Hardware, devices: int, remats: Sequence[Remat]) -> Config:
    """The config with the fastest remat that fits its own mesh."""
    works = []
    for remat in remats:
        train = config.train.model_copy(update={"remat": remat})
        works.append(from_config(config.model_copy(update={"train": train}), devices, chip))
    fastest = fastest_first([[work] for work in works], chip)[0].work
    return _with_remat(config, fastest.remat)


def _with_remat(config: Config, remat: str) -> Config:
    """The config with a remat; layers that are computed again are not unrolled."""
    rolled = () if remat == "none" else ("model.scan_unroll=1",)
    return config.replace(f"train.remat={remat}", *rolled)


def _earlier(config: Config, devices: int) -> Config | None:
    """The config with what the run in its folder chose; None: there is none, or it fits no more."""
    folder = Path(config.output_dir) / config.name
    steps = folder.glob("checkpoints/[0-9]*")
    if next(steps, None) is None or not (folder / RUN_CONFIG).is_file():
        return None
    earlier = load(folder)
    candidate = config.model_copy(update={"mesh": earlier.mesh if config.mesh.auto else config.mesh})
    if config.train.remat == "auto":
        candidate = _with_remat(candidate, earlier.train.remat)
    try:
        check_divides(candidate, resolve_mesh(candidate.mesh, devices))
    except ConfigError:
        return None
    return candidate


def memory_limit(chip: Hardware, devices: Sequence[jax.Device]) -> float:
    """The least that any device may hold: as its allocator says, else as the chip has."""
    here = [device for device in devices if device.process_index == jax.process_index()]
    limits = [float((device.memory_stats() or {}).get("bytes_limit", chip.memory_bytes)) for device in here]
    least = min(limits, default=chip.memory_bytes)
    if jax.process_count() > 1:  # Allocators differ by some megabytes, and all must choose the same.
        least = float(multihost_utils.process_allgather(np.float64(least)).min())
    return least

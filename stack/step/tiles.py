"""Tiles of a program's kernels: those that were tuned on devices like its own, where there are any."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from stack.config import Config
from stack.hardware.defaults import Setting
from stack.kernels import tuned
from stack.kernels.attention import KERNELS, Problem
from stack.parallel import messages
from stack.parallel.rules import Layout
from stack.step.kernels import attention_request, platform_of
from stack.step.program import Program

OPERATION = "attention"
BY_TUNING = "stack kernels tune"

_calls = itertools.count()  # Every process counts alike.


def problem(
    config: Config, layout: Layout, *, platform: str, compute_capability: float | None = None
) -> Problem:
    """What one device attends to at a time in a training step.

    Args:
      config: what is trained.
      layout: over the devices.
      platform: of a device; see `attention_request`.
      compute_capability: of an NVIDIA GPU.
    """
    model, train = config.model, config.train

    def ways(name: str) -> int:
        return math.prod(layout.size(axis) for axis in layout.mesh_axes(name))

    return Problem(
        request=attention_request(config, platform=platform, compute_capability=compute_capability),
        rows=train.batch_size // train.accumulation // ways("batch"),
        heads=model.num_heads // ways("heads"),
        kv_heads=model.kv_heads // ways("kv_heads"),
        window=model.window,
    )


def key_of(device: str, problem: Problem, implementation: str) -> tuned.Key:
    """Under which tiles of an implementation are kept; the device by `tuned.device_name`."""
    return tuned.Key(
        operation=OPERATION, implementation=implementation, device=device, problem=problem.plain()
    )


def with_tuned(program: Program, warn: Callable[[str], None]) -> Program:
    """The program with the tiles that were tuned for exactly its problem on such a device, and what is told.

    Process 0 looks, and all take what it has. The mesh must be of devices that are here: what runs
    elsewhere is planned with the default tiles, so that a plan is the same on every machine.

    Args:
      program: as it was built.
      warn: told in one line of what is in the cache and of no use.
    """
    assert isinstance(program.mesh, Mesh), "tiles are for devices that are here"
    choice, tiling = program.attention, KERNELS[program.attention.kernel].tiling
    device = program.mesh.devices.flat[0]
    platform, capability = platform_of(device)
    asked = problem(program.config, program.layout, platform=platform, compute_capability=capability)
    told = None
    if jax.process_index() == 0:
        told = json.dumps(None if tiling is None else look(asked, device, choice.kernel, warn))
    told = json.loads(messages.broadcast(f"tiles/{next(_calls)}", told))
    if tiling is None or told is None:
        return program
    plain, told_from = told
    tiles = None if plain is None else tiling.read(plain, asked)
    attention = dataclasses.replace(choice, tiles=tiles, tiles_from=told_from)
    return dataclasses.replace(program, attention=attention)


def look(
    asked: Problem, device: jax.Device, implementation: str, warn: Callable[[str], None]
) -> tuple[dict | None, str]:
    """What was tuned for a problem: tiles as JSON holds them, None for the default, and what is told of them.

    Args:
      asked: what a device attends to.
      device: it.
      implementation: of attention, one that has tiles.
      warn: as `with_tuned` takes it.
    """
    tiling = KERNELS[implementation].tiling
    assert tiling is not None
    key = key_of(tuned.device_name(device), asked, implementation)
    entry, reason = tuned.find(key, warn)
    if entry is not None:
        try:
            tiles = tiling.read(entry.tiles, asked)
        except ValueError as error:
            warn(f"{key.path}: tuned tiles are ignored: {error}; `stack kernels tune` writes them anew")
            return None, "default tiles (those tuned here do not fit)"
        if tiles == tiling.default(asked):
            return None, f"default tiles, the fastest that were tried on {entry.device}"
        speed = f", {entry.speed:.3g} times as fast as the default" if entry.speed else ""
        return entry.tiles, f"tiles tuned on {entry.device} ({tiles}){speed}"
    return None, f"default tiles ({reason})" if reason else "default tiles"


def tile_settings(program: Program) -> tuple[Setting, ...]:
    """The tuned tiles of a program, for the record of its run: other tiles round otherwise."""
    choice = program.attention
    if choice.tiles is None:
        return ()
    setting = Setting(
        name=f"{OPERATION}.tiles",
        kind="tiles",
        value=f"{choice.kernel} {choice.tiles}",
        by=BY_TUNING,
        reason=choice.tiles_from,
    )
    return (setting,)

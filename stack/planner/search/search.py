"""The fastest layouts of a model over some devices, among those whose memory fits.

Every layout that the trainer can run is planned. Of those it cannot run yet (split sequences, overlapped
collectives, float8) each mesh is first judged by its likeliest layouts, and only the best meshes are
planned in full: they are shown beside, never taken.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from stack.config import AXES, Config, ConfigError, MeshConfig, StackError, TargetConfig, dump, load
from stack.config.document import Dumper
from stack.config.instances import with_instances
from stack.config.layout import check_divides
from stack.config.paths import expand
from stack.hardware import chip as chips
from stack.hardware.chip import Hardware
from stack.planner.formula.memory import memory
from stack.planner.formula.result import Memory, Time
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import Workload, from_config
from stack.planner.plan import for_devices
from stack.planner.remedy import MARGIN, fits
from stack.planner.search.layouts import (
    REMATS,
    Rejection,
    Rejections,
    Space,
    describe,
    meshes,
    nothing_divides,
    variants,
)

RUNNABLE = Space(axes=("tensor", "stage", "fsdp"))
"""All that the trainer runs."""

_FULLY_MODELLED = 8
"""Meshes that only the model knows and that are planned in full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout, planned."""

    work: Workload
    memory: Memory
    time: Time

    @property
    def tokens_per_second(self) -> float:
        """Of each device."""
        return self.work.tokens / self.time.total / self.work.devices

    @property
    def order(self) -> tuple[float, ...]:
        """The faster first, then the smaller, then the one that splits less."""
        work = self.work
        return (self.time.total, self.memory.total, work.tensor, work.zero, work.sequence_parallel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What a search has found."""

    config: Config
    hardware: Hardware
    devices: int
    own: Candidate | None
    """The config's own layout; None: it is no layout of these devices."""
    own_obstacle: str | None
    """Why the config's own layout cannot run here."""
    best: tuple[Candidate, ...]
    """The fastest that run and fit, one of each kind of layout, fastest first."""
    modelled: tuple[Candidate, ...]
    """The fastest that fit but do not run, or not in the config's precision, where they beat `best`: first in
    the config's precision, then in float8."""
    rejections: dict[str, Rejection]
    """Reasons, how often, with an example."""
    count: int
    """Layouts whose memory was worked out."""


def search(config: Config, *, hardware: Hardware, devices: int, top: int = 8) -> Search:
    """The best layouts of a config for a number of devices; its model, global batch and numbers stay.

    Args:
      config: gives the model, the length, the global batch and the precision.
      hardware: the chip, its memory and its links.
      devices: how many.
      top: layouts to return at most.

    Raises:
      ConfigError: no layout divides the devices and the batch.
    """
    run, start = _Run(hardware=hardware), release_layout(config, hardware)
    every = list(meshes(start, devices, Space(), run.rejections))
    fitting = run.plan((mesh for mesh in every if not mesh.why_modelled()), RUNNABLE)
    if not every:
        raise ConfigError(nothing_divides(start, devices))
    best = _acceptable(config, fitting, top, run.rejections)
    own, obstacle = _own(config, hardware, devices)
    return Search(
        config=config,
        hardware=hardware,
        devices=devices,
        own=own,
        own_obstacle=obstacle,
        best=best,
        modelled=_find_modelled(run, every, best, top),
        rejections=dict(run.rejections),
        count=run.count,
    )


def rank(start: Workload, *, hardware: Hardware, devices: int, space: Space) -> list[Candidate]:
    """All layouts of a space that fit, fastest first.

    Args:
      start: of `release_layout`; gives the model and the batch.
      hardware: the chip.
      devices: how many.
      space: what may be chosen.

    Raises:
      ConfigError: no layout divides the devices and the batch, or none fits.
    """
    every = list(meshes(start, devices, space, Rejections()))
    if not every:
        raise ConfigError(nothing_divides(start, devices, space.accumulation or 1))
    return fastest_first((works for mesh in every for works in variants(mesh, space)), hardware)


def fastest_first(layouts: Iterable[Sequence[Workload]], hardware: Hardware) -> list[Candidate]:
    """Those that fit, fastest first.

    Args:
      layouts: lists that differ in the micro-batch alone, smallest first.
      hardware: the chip.

    Raises:
      ConfigError: none fits.
    """
    run = _Run(hardware=hardware)
    fitting = [candidate for works in layouts for candidate in run.fitting(works)]
    if not fitting:
        raise ConfigError(
            f"no layout fits with the formula's margin of {MARGIN:.0%}; the smallest is {run.smallest[1]};"
            " use more devices, more micro-batches (train.accumulation) or train.offload_optimizer"
        )
    return sorted(fitting, key=_order)


def release_layout(config: Config, hardware: Hardware) -> Workload:
    """The workload of a config with its layout left open: one device, one micro-batch."""
    train = config.train.model_copy(update={"accumulation": 1, "remat": "full"})
    config = with_instances(config, max(1, config.mesh.data))
    return from_config(config.model_copy(update={"mesh": MeshConfig(), "train": train}), 1, hardware)


def apply_layout(config: Config, work: Workload) -> Config:
    """The config with the layout of a workload.

    A batch of the evaluation that would not divide is rounded up; its result does not depend on it.

    Raises:
      ConfigError: the trainer refuses the layout.
    """
    changes: dict[str, Any] = {"mesh.auto": False}
    changes |= {f"mesh.{axis}": getattr(work, axis) for axis in AXES}
    own = ("zero", "sequence_parallel", "tables_once", "second_shard", "gather_dtype", "scatter_dtype")
    changes |= {f"mesh.{name}": getattr(work, name) for name in (*own, "schedule", "virtual_stages")}
    changes |= {"train.accumulation": work.accumulation, "train.remat": work.remat}
    if work.remat != "none":  # Layers that are computed again are not unrolled.
        changes["model.scan_unroll"] = 1
    if rows := config.eval.batch_size:
        changes["eval.batch_size"] = -(-rows // work.replicas) * work.replicas
    layout = config.replace(*(f"{name}={json.dumps(value)}" for name, value in changes.items()))
    check_divides(layout, {axis: getattr(work, axis) for axis in AXES})
    return layout


@dataclasses.dataclass(kw_only=True)
class _Run:
    """Plans layouts on one chip, and counts."""

    hardware: Hardware
    rejections: Rejections = dataclasses.field(default_factory=Rejections)
    count: int = 0
    smallest: tuple[float, str] = math.inf, ""
    """Bytes and layout of the one that needs least of those that do not fit."""

    def plan(self, every: Iterable[Workload], space: Space) -> list[Candidate]:
        """The layouts of these meshes that fit."""
        return [
            candidate
            for mesh in every
            for works in variants(mesh, space)
            for candidate in self.fitting(works)
        ]

    def fitting(self, works: Sequence[Workload]) -> list[Candidate]:
        """Those that fit of layouts that differ in the micro-batch, smallest first.

        What is larger than one that does not fit needs more, but for the last: with one micro-batch there
        are no gradients to add up.
        """
        candidates, example = [], ""
        for work in works:
            if example and work is not works[-1]:
                self.rejections.add("does not fit", example, unit="layouts")
                continue
            self.count += 1
            need = memory(work)
            if not fits(need, self.hardware):
                example = f"{describe(work)}: {_of_memory(need, self.hardware)}"
                self.smallest = min(self.smallest, (need.total, example))
                self.rejections.add("does not fit", example, unit="layouts")
            else:
                candidates.append(Candidate(work=work, memory=need, time=step_time(work, self.hardware)))
        return candidates


def _order(candidate: Candidate) -> tuple[float, ...]:
    return candidate.order


def _acceptable(
    config: Config, candidates: Sequence[Candidate], top: int, rejections: Rejections
) -> tuple[Candidate, ...]:
    """The fastest of each kind of layout that the config's own checks accept, fastest first."""
    best: list[Candidate] = []
    for candidate in _distinct(candidates):
        try:
            apply_layout(config, candidate.work)
        except ConfigError as error:
            rejections.add("the config refuses", f"{describe(candidate.work)}: {error}", unit="layouts")
            continue
        best.append(candidate)
        if len(best) == top:
            break
    return tuple(best)


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The fastest of each kind of layout, fastest first: how `data` and `fsdp` share is no other kind."""
    first: dict[tuple[int, ...], Candidate] = {}
    for candidate in sorted(candidates, key=_order):
        work = candidate.work
        first.setdefault((work.stage, work.context, work.tensor, work.zero), candidate)
    return list(first.values())


def _own(config: Config, hardware: Hardware, devices: int) -> tuple[Candidate | None, str | None]:
    """The config's own mesh and micro-batch with as many micro-batches as its batch takes here.

    Returns:
      None where there is no such layout, and why it cannot run.
    """
    try:
        resized, _ = for_devices(config, devices)
        work = from_config(resized, devices, hardware)
        if config.train.batch_size % (work.replicas * work.micro_batch):
            raise ConfigError(
                f"train.batch_size={config.train.batch_size} does not divide over {work.replicas} replicas "
                f"of {work.micro_batch} rows"
            )
        work = dataclasses.replace(work, batch=config.train.batch_size)
    except ConfigError as error:
        return None, str(error)
    own = Candidate(work=work, memory=memory(work), time=step_time(work, hardware))
    if not fits(own.memory, hardware):
        return own, f"does not fit: {_of_memory(own.memory, hardware)}"
    return own, work.why_modelled()


def _find_modelled(
    run: _Run, every: Sequence[Workload], best: Sequence[Candidate], top: int
) -> tuple[Candidate, ...]:
    """The best of what does not run yet: full plans of the meshes whose likeliest layouts are best."""
    likely = Space(
        zero=(0, 1, 3),
        sequence_parallel=(True,),
        overlapped_tensor_parallel=(True,),
        schedules=("1f1b",),
        remat=("full", "none"),
    )
    quiet = _Run(hardware=run.hardware)
    probes = [
        (min(candidates, key=_order), mesh) for mesh in every if (candidates := quiet.plan([mesh], likely))
    ]
    probes.sort(key=lambda pair: pair[0].order)
    space = dataclasses.replace(likely, zero=(0, 1, 2, 3), schedules=Space.schedules, remat=REMATS)
    candidates = quiet.plan([mesh for _, mesh in probes[:_FULLY_MODELLED]], space)
    candidates = _distinct(candidate for candidate in candidates if candidate.work.why_modelled())
    if not best:
        return tuple(candidates[:top])
    kinds = [candidates]
    if every[0].precision == "bfloat16" and "float8" in run.hardware.peak_flops:
        works = [
            dataclasses.replace(candidate.work, precision="float8")
            for candidate in (*best[:_FULLY_MODELLED], *candidates[:_FULLY_MODELLED])
        ]
        kinds.append(_distinct(candidate for work in works for candidate in quiet.fitting([work])))
    run.count += quiet.count
    faster: list[Candidate] = [best[0]]
    for kind in kinds:
        if kind and kind[0].time.total < faster[-1].time.total:
            faster.append(kind[0])
    return tuple(faster[1:])


def binds(time: Time) -> str:
    """What most of a step goes to: `matrix products 71%, fsdp communication 12%`."""
    largest = sorted(time.parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in largest[:2])


def gains(candidate: Candidate, own: Candidate) -> str:
    """What a layout gains over another: `1.12x: matrix products -0.42 s, kernel launches -0.01 s`."""
    before, after = own.time.parts, candidate.time.parts
    changes = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in before | after}
    least = 0.005 * own.time.total
    largest = sorted((item for item in changes.items() if abs(item[1]) > least), key=lambda item: item[1])
    words = [f"{name} {seconds:+.3g} s" for name, seconds in (*largest[:2], *largest[2:][-1:])]
    return f"{own.time.total / candidate.time.total:.2f}x" + (f": {', '.join(words)}" if words else "")


def lines(result: Search) -> list[str]:
    """A search in print."""
    config, hardware = result.config, result.hardware
    batch = f"{config.train.batch_size:,} rows of {config.data.sequence_length:,} tokens a step"
    text = [
        f"{config.name} on {result.devices:,} x {hardware.title}, {batch}: {result.count:,} layouts planned",
        "memory is by formula; `stack plan --compile` checks a written config against its compiled step",
        "",
    ]
    if result.own is not None:
        text += ["the config's own layout", *_rows(result.own, result.own, hardware)]
    if result.own_obstacle:
        text.append(f"the config's own layout cannot run: {result.own_obstacle}")
    text += ["", "runnable, fastest first" if result.best else "nothing that runs fits"]
    for number, candidate in enumerate(result.best, start=1):
        text += _rows(candidate, result.own, hardware, str(number))
    if result.modelled:
        text += ["", "modelled only, faster"]
        for candidate in result.modelled:
            text += [*_rows(candidate, result.own, hardware), f"    not run: {_why_not(candidate.work)}"]
    text += ["", "ruled out"]
    for reason, rejection in sorted(
        result.rejections.items(), key=lambda item: (item[1].unit, -item[1].count)
    ):
        unit = (
            rejection.unit if rejection.count > 1 else {"meshes": "mesh", "layouts": "layout"}[rejection.unit]
        )
        text.append(f"{rejection.count:>9,} {unit:<7}  {reason}, e.g. {rejection.example}")
    return text


def _rows(candidate: Candidate, own: Candidate | None, hardware: Hardware, label: str = "") -> list[str]:
    time = candidate.time
    figures = (
        f"{time.total:.4g} s a step, {candidate.tokens_per_second:,.0f} tokens/s each, "
        f"{_of_memory(candidate.memory, hardware)}; {binds(time)}"
    )
    rows = [f"{label:>3} {describe(candidate.work)}", f"    {figures}"]
    if own is not None and own is not candidate:
        rows.append(f"    against the config's own {gains(candidate, own)}")
    return rows


def _of_memory(need: Memory, hardware: Hardware) -> str:
    text = f"{need.total / 1e9:.1f} GB of {hardware.memory_bytes / 1e9:.0f}"
    is_tight = need.total <= hardware.memory_bytes and not fits(need, hardware)
    return text + (", within the formula's error" if is_tight else "")


def as_dict(result: Search) -> dict[str, Any]:
    """A search for JSON; seconds, bytes."""
    return {
        "hardware": result.hardware.name,
        "devices": result.devices,
        "layouts_planned": result.count,
        "own": result.own and _candidate_dict(result.own),
        "own_obstacle": result.own_obstacle,
        "runnable": [_candidate_dict(candidate) for candidate in result.best],
        "modelled_only": [_candidate_dict(one, _why_not(one.work)) for one in result.modelled],
        "rejected": {reason: dataclasses.asdict(one) for reason, one in result.rejections.items()},
    }


def _candidate_dict(candidate: Candidate, why_modelled: str | None = None) -> dict[str, Any]:
    work, need = candidate.work, candidate.memory
    layout = {
        field.name: getattr(work, field.name) for field in dataclasses.fields(work) if field.name != "model"
    }
    return {
        "layout": layout | {"accumulation": work.accumulation},
        "step_seconds": candidate.time.total,
        "seconds": candidate.time.parts,
        "tokens_per_second_per_device": candidate.tokens_per_second,
        "memory_bytes": need.total,
        "memory": dataclasses.asdict(need),
        "binds": binds(candidate.time),
        "why_modelled": why_modelled or work.why_modelled(),
    }


def _why_not(work: Workload) -> str:
    """Of a layout that is only modelled; one that runs is in 8 bits where the config is not."""
    return work.why_modelled() or "in float8, as kernels.matmul=fp8 asks for, which changes the numbers"


def write(
    result: Search, path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Config:
    """Writes the fastest layout that runs as a config file, its planned figures in a comment.

    Args:
      result: of `search`.
      path: the file.
      base: the file the config came from, to write only what differs from it; None, or the folder of a
        run: all is written.

    Returns:
      The config that `stack.load(path)` now gives.

    Raises:
      StackError: nothing that runs fits, or the file cannot be written.
    """
    if not result.best:
        raise StackError(
            f"no layout that runs fits {result.devices} x {result.hardware.title}; nothing to write"
        )
    fastest, hardware, path = result.best[0], result.hardware, expand(path)
    config = _with_target(apply_layout(result.config, fastest.work), result)
    if base is None or Path(base).is_dir():
        body = dump(config)
    elif Path(base).resolve() == path.resolve():
        raise StackError(f"{path} is the config that was searched for; write to another file")
    else:
        changes = _difference(load(Path(base)).model_dump(mode="json"), config.model_dump(mode="json"))
        fields = {"base": os.path.relpath(base, path.parent)} | changes
        body = yaml.dump(fields, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)
    comment = [
        f"# The fastest of {result.count:,} layouts planned for {result.devices:,} x {hardware.title}:",
        f"# {describe(fastest.work)};",
        f"# {fastest.time.total:.4g} s a step, {fastest.tokens_per_second:,.0f} tokens/s each,",
        f"# {_of_memory(fastest.memory, hardware)} by formula; {binds(fastest.time)}.",
    ]
    try:
        path.write_text("\n".join([*comment, body]), encoding="utf-8")
    except OSError as error:
        raise StackError(f"cannot write the config to {path}: {error.strerror}") from error
    return config


def _with_target(config: Config, result: Search) -> Config:
    """The config with the target it was chosen for, where a config can name it."""
    name = result.hardware.name
    if name not in chips.names():
        return config
    compile_target = config.target.compile_target if config.target else None
    target = TargetConfig(hardware=name, devices=result.devices, compile_target=compile_target)
    return config.model_copy(update={"target": target})


def _difference(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What of `new` is not in `old`; lists are taken whole."""
    changes: dict[str, Any] = {}
    for name, value in new.items():
        before = old[name]
        if isinstance(value, dict) and isinstance(before, dict):
            if inside := _difference(before, value):
                changes[name] = inside
        elif value != before:
            changes[name] = value
    return changes

"""What the compiler says of the training step on GPUs that are not here: `stack plan --compile`."""

import dataclasses
import math
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from stack.config import Config, StackError
from stack.hardware import chip as chips
from stack.parallel.mesh import without_cache
from stack.planner.compiled import compile as compiling
from stack.planner.compiled.collectives import Collective, collectives, kernels, runs
from stack.planner.compiled.findings import Finding, findings, gib, involuntary, over
from stack.step import program as programs
from stack.step import state as states
from stack.step.options import compiler_options, compiler_settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledMemory:
    """Bytes of the compiled step on each device."""

    arguments: int
    """State and batch; of instances that train apart, the average that is kept beside them too."""
    outputs: int
    """Next state and metrics."""
    aliased: int
    """Outputs that take the place of arguments."""
    temporaries: int
    """At their largest moment."""
    generated_code: int
    host: int
    """In host memory: all of the above that is offloaded."""
    device: float
    """Bytes a device has."""

    @property
    def total(self) -> int:
        """On the device at the worst moment."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.generated_code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind over the same mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    times: int
    """Runs per step."""
    bytes: int
    """Per step, of the larger side."""
    source: str
    """The line that moves most of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompilerSchedule:
    """XLA's own estimate of one step, by which it orders the work: an estimate, not a measurement.

    Its model takes every chip at the peak of its data sheet and links of its own table, and knows no
    efficiency; matrix products are taken as cuBLAS's, because untuned Triton ones would be ten times too
    slow. Loops are multiplied by their trips.
    """

    seconds: float
    """Of a step."""
    exposed: dict[str, float]
    """Seconds that arithmetic does not hide, by kind of collective."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The training step of a config as compiled for devices that are not here."""

    hardware: str
    """The chip that was asked for."""
    target: str
    """The chip that was compiled for."""
    devices: int
    mesh: dict[str, int]
    """Mesh axes and their sizes."""
    memory: CompiledMemory
    collectives: tuple[Collective, ...]
    schedule: CompilerSchedule | None
    """None: not asked for, or the compiler has not told."""
    kernels: dict[str, int]
    """Kernels that are not XLA's own, and how often each runs in one step, before any tuning."""
    attention: str
    """The kernel of attention, and why."""
    findings: tuple[Finding, ...]
    seconds: float
    """To trace and compile."""
    versions: dict[str, str]
    """Of what compiled it."""
    settings: tuple[str, ...] = ()
    """The compiler's options of the step, as the trainer tells them."""

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """The collectives added up by kind and mesh axes, the most bytes first."""
        groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = defaultdict(list)
        for collective in self.collectives:
            groups[collective.kind, collective.axes].append(collective)
        parts = [_traffic(kind, axes, group) for (kind, axes), group in groups.items()]
        return tuple(sorted(parts, key=lambda traffic: -traffic.bytes))


def _traffic(kind: str, axes: tuple[str, ...], group: list[Collective]) -> Traffic:
    by_source: dict[str, int] = defaultdict(int)
    for collective in group:
        by_source[collective.source] += collective.bytes * collective.times
    return Traffic(
        kind=kind,
        axes=axes,
        times=sum(collective.times for collective in group),
        bytes=sum(by_source.values()),
        source=max(by_source, key=lambda source: by_source[source]),
    )


def compile_target(hardware: chips.Hardware, config: Config) -> str:
    """The chip that is compiled for when this one is planned.

    Raises:
      StackError: the compiler knows no such chip and the config names none in its place.
    """
    in_its_place = config.target.compile_target if config.target else None
    target = hardware.compile_target or in_its_place
    if target is None:
        raise StackError(
            f"{hardware.name}: the compiler knows no such chip; name one to compile for in its place with "
            f"target.compile_target: {', '.join(compiling.targets())}"
        )
    return target


def compile_plan(
    config: Config, *, hardware: str | Path | chips.Hardware, devices: int, schedule: bool = True
) -> Compiled:
    """The exact training step, compiled for devices that are not here, and what the compiler says of it.

    Args:
      config: its mesh must fit the devices.
      hardware: a chip, or what `stack.hardware.chip.load` takes.
      devices: how many.
      schedule: also compile for the compiler's estimate of a step, which takes as long again.

    Raises:
      StackError: the compiler knows no such chip, or would abort; the extra `plan` is missing.
      ConfigError: the config does not fit the devices.
    """
    start = time.perf_counter()
    chip = hardware if isinstance(hardware, chips.Hardware) else chips.load(hardware)
    target = compile_target(chip, config)
    with compiling.capture_stderr() as warnings, without_cache():
        absent = compiling.devices(target, devices)
        device = absent[0]
        program = programs.build(config, absent)
        settings = compiler_settings(program)
        lowered = compiling.lower_step(program, compiler_options(settings))
        compiled, estimate = _compile(lowered, device, schedule=schedule)
    text = compiled.as_text() or ""
    mesh = dict(program.mesh.shape)
    operations = tuple(collectives(text, dict(program.instance.mesh.shape)))
    memory = _memory(compiled, chip.memory_bytes, beside=_beside_instances(program))
    return Compiled(
        hardware=chip.name,
        target=target,
        devices=devices,
        mesh=mesh,
        memory=memory,
        collectives=operations,
        schedule=estimate,
        kernels=kernels(text),
        attention=str(program.attention).removeprefix("attention: "),
        findings=(
            *involuntary(warnings, lowered, device),
            *findings(
                program.instance, operations, need=memory.total, memory=memory.device, warnings=warnings
            ),
        ),
        seconds=time.perf_counter() - start,
        versions=_versions(),
        settings=tuple(map(str, settings)),
    )


def _compile(
    lowered: jax.stages.Lowered, device: Any, *, schedule: bool
) -> tuple[jax.stages.Compiled, CompilerSchedule | None]:
    """Both compilations at once: XLA leaves the second core idle for most of one."""
    if not schedule:
        return compiling.compile_lowered(lowered, device), None
    with ThreadPoolExecutor(1) as pool:
        estimate = pool.submit(compiler_schedule, lowered, device)
        return compiling.compile_lowered(lowered, device), estimate.result()


def compiler_schedule(
    lowered: jax.stages.Lowered, device: Any, options: Mapping[str, Any] | None = None
) -> CompilerSchedule | None:
    """The estimate by which XLA's latency-hiding scheduler has ordered a program; None: it has none.

    `options` come on top of the program's own.
    """
    with tempfile.TemporaryDirectory() as folder:
        dump = {
            "xla_gpu_enable_triton_gemm": False,
            "xla_dump_latency_hiding_schedule": True,
            "xla_dump_to": folder,
            "xla_dump_hlo_module_re": "nothing^",
        }
        text = compiling.compile_lowered(lowered, device, dict(options or {}) | dump).as_text() or ""
        dumps = list(Path(folder).glob("*.schedule.txt"))
        return read_schedule(dumps[0].read_text(), runs(text)) if dumps else None


def read_schedule(dump: str, times: Mapping[str, int]) -> CompilerSchedule | None:
    """The schedule in the text that `xla_dump_latency_hiding_schedule` leaves.

    Args:
      dump: a ScheduleProto as text; a computation's cycles are microseconds x cycles_per_microsecond,
        without the loops it calls, which are scheduled as computations of their own.
      times: runs of each computation per step.
    """
    names = {number: name for name, number in _COMPUTATION.findall(dump)}
    total, exposed = 0.0, defaultdict(float)
    for number, body in _SCHEDULED.findall(dump):
        statistics = dict(_STATISTIC.findall(body[body.rindex("scheduler_statistics") :]))
        rate = float(statistics["cycles_per_microsecond"]) * 1e6
        seconds = {name: float(value) / rate * times[names[number]] for name, value in statistics.items()}
        total += seconds["total_cycles"]
        for name, value in seconds.items():
            if name.endswith("_wasted_cycles") and name != "total_wasted_cycles":
                exposed[name.removesuffix("_wasted_cycles").replace("_", "-")] += value
    return CompilerSchedule(seconds=total, exposed=dict(exposed)) if total else None


_COMPUTATION = re.compile(r'^  computations \{\n    name: "([^"]+)"\n.*?\n    id: (\d+)\n', re.M | re.S)
_SCHEDULED = re.compile(r"^computation_schedules \{\n  computation_id: (\d+)\n(.*?)^\}", re.M | re.S)
_STATISTIC = re.compile(r"(\w+): ([-+.e\d]+)")


def _beside_instances(program: programs.Program) -> int:
    """Bytes on each device of what their steps do not touch: the last average, and its momentum."""
    if program.instances is None:
        return 0
    held = {name: part for name, part in states.abstract(program).items() if name != "instances"}
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(held)
    )


def _memory(compiled: jax.stages.Compiled, device: float, *, beside: int) -> CompiledMemory:
    plan: Any = compiled.memory_analysis()
    return CompiledMemory(
        arguments=plan.argument_size_in_bytes + beside,
        outputs=plan.output_size_in_bytes,
        aliased=plan.alias_size_in_bytes,
        temporaries=plan.temp_size_in_bytes,
        generated_code=plan.generated_code_size_in_bytes,
        host=plan.host_argument_size_in_bytes
        + plan.host_output_size_in_bytes
        - plan.host_alias_size_in_bytes
        + plan.host_temp_size_in_bytes,
        device=device,
    )


def _versions() -> dict[str, str]:
    packages = ("jax", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cuda-nvcc")
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def as_dict(compiled: Compiled) -> dict[str, Any]:
    """The report as plain values for JSON; the collectives are added up."""
    fields: dict[str, Any] = dataclasses.asdict(dataclasses.replace(compiled, collectives=()))
    memory = fields["memory"] | {"total": compiled.memory.total}
    traffic = [dataclasses.asdict(part) for part in compiled.traffic]
    return fields | {"memory": memory, "collectives": traffic}


def lines(compiled: Compiled) -> list[str]:
    """The report in print."""
    memory = compiled.memory
    instead = f" as {compiled.target} in its place," * (compiled.hardware != compiled.target)
    tools = ", ".join(f"{package} {number}" for package, number in compiled.versions.items())
    chips_text = f"{compiled.devices:,} {compiled.hardware}"
    sizes = {
        "state and batch": memory.arguments,
        "temporaries": memory.temporaries,
        "new outputs": memory.outputs - memory.aliased,
        "code": memory.generated_code,
        "in host memory": memory.host,
    }
    parts = ", ".join(f"{name} {gib(size)}" for name, size in sizes.items() if size > 2**20)
    text = [
        f"compiled for {chips_text},{instead} in {compiled.seconds:.1f} s ({tools})",
        f"  memory on each device: {gib(memory.total)} of {gib(memory.device)}: {parts}",
        f"  attention: {compiled.attention}",
    ]
    if compiled.settings:
        text.append(f"  set: {', '.join(compiled.settings)}")
    if compiled.kernels:
        kernel_text = ", ".join(f"{name} x {times:,}" for name, times in compiled.kernels.items())
        text.append(f"  kernels a step, before tuning: {kernel_text}")
    text.append("  collectives a step:" + " none" * (not compiled.collectives))
    text += [
        f"    {t.kind:<18} {over(t.axes):<16} {_bytes(t.bytes):>10} in {t.times:>7,}  {t.source}".rstrip()
        for t in compiled.traffic
    ]
    if compiled.schedule:
        exposed = sorted(compiled.schedule.exposed.items(), key=lambda item: -item[1])
        parts = ", ".join(f"{kind} {value:.2g} s" for kind, value in exposed if value > 0)
        text.append(
            f"  the compiler's own estimate of a step, at peak rates: {compiled.schedule.seconds:.3g} s, "
            f"communication it cannot hide: {parts or 'none'}"
        )
    text.append("  findings:" + " none" * (not compiled.findings))
    return text + [f"    {finding}" for finding in compiled.findings]


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"

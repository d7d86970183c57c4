"""A config on a cluster, planned: memory, step time, cost, and what binds."""

import dataclasses
import html
import math
from pathlib import Path
from typing import Any

from stack.config import AXES, Config, ConfigError
from stack.config.arguments import check_type
from stack.config.layout import FLOAT8_BLOCKS, resolve
from stack.hardware import chip as chips
from stack.hardware.chip import Hardware
from stack.models.flops import recomputed_flops_per_token
from stack.planner.formula.memory import memory as memory_of
from stack.planner.formula.result import Memory, Time
from stack.planner.formula.shapes import num_parameters
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import Workload, from_config
from stack.planner.remedy import MOST_DEVICES, find_remedy, fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step of a config takes on a cluster, and the whole run with it."""

    config: Config
    """As planned: the mesh resolved, the global batch that of so many devices."""
    hardware: Hardware
    devices: int
    work: Workload
    total_tokens: int
    """Of the whole run: the config's steps of the config's batch."""
    parameters: int
    """Without the padding of the vocabulary."""
    memory: Memory
    """Bytes per device, by formula."""
    time: Time
    """Seconds of a step, by formula."""
    compiled: Any = None
    """`stack.planner.compiled.report.Compiled`: the exact step compiled for the chip; None: it was not."""
    notes: tuple[str, ...] = ()
    """What the reader must know: what differs from the config, what could not be checked."""

    @property
    def bytes_per_device(self) -> float:
        """The compiled step's where there is one, else the formula's; with the reserve."""
        if self.compiled is not None:
            return self.compiled.memory.total + self.memory.reserve
        return self.memory.total

    @property
    def fits(self) -> bool:
        """Whether that is within the device's memory."""
        return self.bytes_per_device <= self.hardware.memory_bytes

    @property
    def is_tight(self) -> bool:
        """Whether it fits by less than the formula may be wrong by."""
        return self.compiled is None and self.fits and not fits(self.memory, self.hardware)

    @property
    def tokens_per_second_per_device(self) -> float:
        """Tokens trained on, padding included."""
        return self.work.tokens / self.time.total / self.devices

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs of a step over all devices, causal convention (see `stack.models.flops`)."""
        return self.work.tokens * self.work.flops_per_token("causal")

    @property
    def recomputed_flops_per_step(self) -> float:
        """What `remat=full` adds to them; 0 for other policies, whose part is in the time alone."""
        if self.work.remat != "full":
            return 0.0
        return self.work.tokens * recomputed_flops_per_token(self.work.model, self.work.sizes, "causal")

    @property
    def peak_flops(self) -> float | None:
        """Of the precision that is computed in, FLOP/s per device; None: the chip lists none."""
        return self.hardware.peak_flops.get(self.work.precision)

    def mfu(self, convention: Any) -> float | None:
        """Model FLOPs utilisation, `full` or `causal` (arXiv 2204.02311, appendix B)."""
        if self.peak_flops is None:
            return None
        flops = self.work.flops_per_token(convention)
        return self.tokens_per_second_per_device * flops / self.peak_flops

    @property
    def steps(self) -> int:
        """Steps for the tokens of the run; a larger batch than the config's takes fewer."""
        return -(-self.total_tokens // self.work.tokens)

    @property
    def days(self) -> float:
        """Of training without interruption, evaluation or checkpoints."""
        return self.steps * self.time.total / 86400

    @property
    def device_hours(self) -> float:
        """Over all devices."""
        return self.days * 24 * self.devices

    @property
    def cost(self) -> float | None:
        """In the currency of the price; None without one."""
        price = self.hardware.price_per_hour
        return None if price is None else price * self.device_hours

    @property
    def energy_kwh(self) -> float | None:
        """Of the devices at full power, servers and cooling left out; None where it is not known."""
        watts = self.hardware.power_watts
        return None if watts is None else watts * self.device_hours / 1000

    def __str__(self) -> str:
        """It in print, as `stack plan` shows it."""
        from stack.planner.report import lines  # it reads plans

        return "\n".join(lines(self))

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return f"<pre>{html.escape(str(self))}</pre>"

    @property
    def binds(self) -> str:
        """What holds the step back, in one sentence."""
        return _binds(self)


def plan(
    config: Config,
    *,
    hardware: str | Path | Hardware | None = None,
    devices: int | None = None,
    compile_step: bool = False,
    price_per_hour: float | None = None,
) -> Plan:
    """Plans a config's own layout on a cluster; nothing is allocated, nothing need be here.

    The layout of each device stays and `data` becomes what the other axes leave of the devices, so the
    global batch grows with them.

    Args:
      config: what to train.
      hardware: a chip by name, a YAML file of one, or one that was loaded; None: `config.target`'s.
      devices: how many; None: `config.target`'s, or those the mesh names.
      compile_step: compile the exact step for the chip too; needs the extra `plan`.
      price_per_hour: of one chip; None: the chip's file's.

    Raises:
      ConfigError: the chip is not known, or the devices, the mesh and the batch do not fit; the line
        names the nearest that do.
      StackError: compiling was asked for and cannot be.
    """
    example = 'plan(load("configs/llama3_8b.yaml"), hardware="h100", devices=8)'
    check_type("plan", "config", config, Config, example)
    check_type("plan", "hardware", hardware, (str, Path, Hardware, type(None)), example)
    check_type("plan", "devices", devices, (int, type(None)), example)
    chip = find_chip(config, hardware)
    if price_per_hour is not None:
        chip = dataclasses.replace(chip, price_per_hour=price_per_hour)
    resized, notes = for_devices(config, devices)
    count = math.prod(getattr(resized.mesh, axis) for axis in AXES)
    work, rows = from_config(resized, count, chip), config.train.batch_size // config.average.runs
    if work.precision == "float16" and config.model.dtype == "bfloat16":
        notes.append(f"{chip.name} has no bfloat16: planned in float16, which is modelled only")
    elif why := work.why_modelled():
        notes.append(f"modelled only: {why}")
    if config.kernels.matmul == "fp8" and count > 1 and (note := _left_out_in_8_bits(config)):
        notes.append(note)
    if not chip.peak_flops.get(work.precision):
        notes.append(f"{chip.name} lists no peak for {work.precision}: another precision's is used")
    result = Plan(
        config=resized,
        hardware=chip,
        devices=count,
        work=work,
        total_tokens=config.train.steps * rows * config.data.sequence_length,
        parameters=num_parameters(work.model, work.adapter, work.frozen),
        memory=memory_of(work),
        time=step_time(work, chip),
        notes=tuple(notes),
    )
    return add_compiled(result) if compile_step else result


def _left_out_in_8_bits(config: Config) -> str | None:
    """What the time does not know of products in 8 bits on several devices."""
    fp8, start = config.kernels.fp8, "kernels.matmul=fp8: the time"
    if fp8.blocks in FLOAT8_BLOCKS:
        if config.mesh.zero < 3 or config.mesh.fsdp == 1:
            return None
        return f"{start} has weights gathered in 8 bits, also those whose shards cut blocks={fp8.blocks}"
    if fp8.scaling == "delayed":
        return None
    return f"{start} leaves out the all-reduces of each operand's largest number"


def add_compiled(result: Plan) -> Plan:
    """The plan with its exact step compiled for the chip.

    Raises:
      StackError: the compiler is not installed or knows no such chip.
    """
    from stack.planner.compiled.report import compile_plan

    report = compile_plan(result.config, hardware=result.hardware, devices=result.devices)
    return dataclasses.replace(result, compiled=report)


def for_devices(config: Config, devices: int | None) -> tuple[Config, list[str]]:
    """The config laid over so many devices, each of which has as much to do as before.

    Returns:
      The config with every axis of the mesh set, and what changed that the user should know.

    Raises:
      ConfigError: the mesh does not divide the devices; the line names the nearest layout that does.
    """
    if devices is not None and devices < 1:
        raise ConfigError(f"{devices} devices are too few; give at least 1")
    if config.mesh.auto or config.train.remat == "auto":
        raise ConfigError(
            "mesh or train.remat is auto: the layout is the planner's to choose; add --search to see its"
            " choices, or name a layout, for example mesh.fsdp=8 train.remat=full"
        )
    own = resolve(config.mesh, _own_devices(config))
    free = next((axis for axis in AXES if getattr(config.mesh, axis) == -1), "data")
    sizes = dict(own)
    if devices is not None:
        fixed = math.prod(size for axis, size in own.items() if axis != free)
        if devices < 1 or devices % fixed:
            raise ConfigError(_nearest(own, free, devices))
        sizes[free] = devices // fixed
    replicas = own["data"] * own["fsdp"]
    rows = config.train.batch_size
    if rows % replicas == 0:
        rows = rows // replicas * sizes["data"] * sizes["fsdp"]
    changes = [f"mesh.{axis}={size}" for axis, size in sizes.items()] + [f"train.batch_size={rows}"]
    if config.eval.batch_size and config.eval.batch_size % (sizes["data"] * sizes["fsdp"]):
        changes.append("eval.batch_size=null")
    notes = []
    if rows != config.train.batch_size:
        each = rows // (sizes["data"] * sizes["fsdp"])
        notes.append(
            f"the global batch is {rows:,} rows, not the config's {config.train.batch_size:,}: each replica"
            f" keeps its {each}. The learning rate is still the config's"
        )
    return config.replace(*changes), notes


def find_chip(config: Config, hardware: str | Path | Hardware | None) -> Hardware:
    """The chip that is named, or the target's.

    Raises:
      ConfigError: none is named, or it is not known.
    """
    if isinstance(hardware, Hardware):
        return hardware
    name = hardware or (config.target.hardware if config.target else None)
    if name is None:
        raise ConfigError(
            f"no hardware is named; give --hardware, one of {', '.join(chips.names())}, or set target"
        )
    return chips.load(name)


def _own_devices(config: Config) -> int:
    """Devices the config itself is laid over: its target's where an axis is open."""
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    fixed = math.prod(size for size in sizes if size > 0)
    if -1 not in sizes:
        return fixed
    if config.target is not None and config.target.devices % fixed == 0:
        return config.target.devices
    return fixed


def _nearest(own: dict[str, int], free: str, devices: int) -> str:
    """The refusal of a number of devices, with the nearest layout and numbers that work."""
    fixed = {axis: size for axis, size in own.items() if axis != free and size > 1}
    product = math.prod(fixed.values())
    text = " x ".join(f"{axis} {size}" for axis, size in fixed.items())
    counts = [
        count for count in (devices // product * product, -(-devices // product) * product) if count > 0
    ]
    remedy = f"use {' or '.join(f'{count:,}' for count in dict.fromkeys(counts))} devices"
    if devices > 0:
        others = math.prod(size for axis, size in fixed.items() if axis not in ("fsdp", free))
        ways = max((d for d in range(1, own["fsdp"] + 1) if devices % (others * d) == 0), default=None)
        if ways and free != "fsdp":
            rest = f"{free} {devices // (others * ways):,}"
            remedy = f"the nearest that does is mesh.fsdp={ways} ({rest}); or {remedy}"
    return f"mesh: {text} = {product:,} does not divide {devices:,} devices; {remedy}"


def _binds(result: Plan) -> str:
    """The largest part of the time, and what would lessen it; or that it does not fit."""
    time, chip, work = result.time, result.hardware, result.work
    if not result.fits:
        over = result.bytes_per_device / chip.memory_bytes
        remedy = find_remedy(work, chip)
        told = remedy.describe(chip, work.devices) if remedy else f"{MOST_DEVICES:,} devices do not hold it"
        return f"memory: it needs {over:.2f} of what {chip.name} has; {told}"
    (name, seconds), (second, next_seconds) = sorted(time.parts.items(), key=lambda part: -part[1])[:2]
    remedies = {
        "matrix products": "as it should be",
        "attention": "a shorter sequence or a faster kernel would help",
        "memory-bound work": "wider layers, or fewer elementwise operations would help",
        "pipeline bubble": "more micro-batches or virtual stages would help",
        "optimizer": "a larger batch, or more shards would help",
        "kernel launches": "a larger micro-batch would help",
    }
    remedy = remedies.get(name, "a larger micro-batch, or this axis within a node would help")
    return (
        f"{name}, {seconds / time.total:.0%} of the step: {remedy};"
        f" next {second}, {next_seconds / time.total:.0%}"
    )

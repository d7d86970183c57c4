"""A plan in print and as JSON."""

import dataclasses
from typing import Any

from stack.config import AXES
from stack.planner.compiled import report as compiled
from stack.planner.plan import Plan
from stack.planner.search.layouts import describe

_MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "temporaries": "temporaries",
    "collectives": "collective buffers",
    "reserve": "runtime and fragmentation",
}


def lines(plan: Plan) -> list[str]:
    """A plan in print, a screenful."""
    work, chip = plan.work, plan.hardware
    flops = f"{plan.flops_per_step:.4g} model FLOPs a step"
    if plan.recomputed_flops_per_step:
        flops += f", {plan.recomputed_flops_per_step:.4g} recomputed"
    rows = f"{work.micro_batch} row{'s' * (work.micro_batch > 1)} a device at a time"
    batch = f"{work.batch:,} rows of {work.length:,} = {work.tokens:,} tokens a step, {rows}"
    parts = work.parameters
    is_tuned = not all(part.trained for part in parts)
    trained = f", {sum(part.size for part in parts if part.trained):,} trained" if is_tuned else ""
    text = [
        f"{plan.config.name} on {plan.devices:,} x {chip.title}",
        f"  {describe(work)}",
        f"  {plan.parameters:,} parameters{trained}; {batch}",
        f"  {flops}",
        "",
        *_side_by_side(_memory_lines(plan), _time_lines(plan)),
        "",
        *_speed_lines(plan),
        f"  binds     {plan.binds}",
    ]
    text += [f"  note      {note}" for note in plan.notes]
    return text if plan.compiled is None else [*text, "", *compiled.lines(plan.compiled)]


def as_dict(plan: Plan) -> dict[str, Any]:
    """A plan for JSON: bytes, seconds, FLOPs; `null` for what is not known."""
    work, time, memory = plan.work, plan.time, plan.memory
    return {
        "name": plan.config.name,
        "hardware": plan.hardware.name,
        "devices": plan.devices,
        "parameters": plan.parameters,
        "mesh": {axis: getattr(work, axis) for axis in AXES},
        "zero": work.zero,
        "sequence_parallel": work.sequence_parallel,
        "remat": work.remat,
        "precision": work.precision,
        "batch_size": work.batch,
        "micro_batch": work.micro_batch,
        "accumulation": work.accumulation,
        "tokens_per_step": work.tokens,
        "runnable": work.why_modelled() is None,
        "memory": dataclasses.asdict(memory) | {"program": memory.program, "total": memory.total},
        "memory_source": "formula" if plan.compiled is None else "compiled",
        "bytes_per_device": plan.bytes_per_device,
        "device_memory_bytes": plan.hardware.memory_bytes,
        "fits": plan.fits,
        "flops_per_step": plan.flops_per_step,
        "trained_parameters": sum(part.size for part in plan.work.parameters if part.trained),
        "recomputed_flops_per_step": plan.recomputed_flops_per_step,
        "time": dataclasses.asdict(time) | {"exposed": time.exposed, "total": time.total},
        "tokens_per_second_per_device": plan.tokens_per_second_per_device,
        "mfu": {"full": plan.mfu("full"), "causal": plan.mfu("causal"), "peak_flops": plan.peak_flops},
        "steps": plan.steps,
        "days": plan.days,
        "device_hours": plan.device_hours,
        "cost": plan.cost,
        "energy_kwh": plan.energy_kwh,
        "binds": plan.binds,
        "notes": list(plan.notes),
        "compiled": None if plan.compiled is None else compiled.as_dict(plan.compiled),
    }


def _memory_lines(plan: Plan) -> list[str]:
    unit, scale = _unit(plan.bytes_per_device - plan.memory.reserve, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)))
    text = [f"memory of a device, {unit}"]
    text += [_row(label, getattr(plan.memory, name) / scale) for name, label in _MEMORY.items()]
    text.append(_row("total by formula", plan.memory.total / scale))
    if plan.compiled is not None:
        text.append(_row("total, compiled", plan.bytes_per_device / scale))
    if plan.memory.host:
        text.append(_row("in host memory", plan.memory.host / scale))
    basis = "by formula, not compiled" if plan.compiled is None else "as compiled"
    if plan.is_tight:
        basis = "by less than the formula may be wrong by: see with --compile"
    size = plan.hardware.memory_bytes / scale
    text.append(f"  {'fits' if plan.fits else 'DOES NOT FIT'} in {size:,.0f} ({basis})")
    return text


def _time_lines(plan: Plan) -> list[str]:
    time = plan.time
    unit, _ = _unit(time.total, (("s", 10.0), ("ms", 1e-3), ("us", 0.0)))
    scale = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
    text = [f"time of a step, {unit}"]
    for name, seconds in time.parts.items():
        if seconds:
            axis = name.removesuffix(" communication")
            part = time.communication.get(axis)
            whole = f"  of {part.seconds * scale:,.1f}" if part else ""
            text.append(_row(f"over {axis}, exposed" if part else name, seconds * scale) + whole)
    return [*text, _row("total", time.total * scale)]


def _unit(value: float, units: tuple[tuple[str, float], ...]) -> tuple[str, float]:
    """The largest unit that a value reaches, else the smallest."""
    return next((unit for unit in units if value >= unit[1]), units[-1])


def _speed_lines(plan: Plan) -> list[str]:
    text = f"  speed     {plan.tokens_per_second_per_device:,.0f} tokens/s per device"
    full, causal = plan.mfu("full"), plan.mfu("causal")
    if full is not None and causal is not None and plan.peak_flops is not None:
        text += (
            f"; MFU {causal:.1%} causal, {full:.1%} full attention,"
            f" of {plan.peak_flops / 1e12:,.3g} TFLOP/s {plan.work.precision}"
        )
    run = (
        f"  run       {plan.steps:,} steps, {_tokens(plan.total_tokens)} tokens: {_days(plan.days)},"
        f" {plan.device_hours:,.0f} device-hours"
    )
    if plan.energy_kwh is not None:
        run += f", {plan.energy_kwh / 1000:,.4g} MWh of devices"
    if plan.cost is not None:
        run += f", cost {plan.cost:,.0f}"
    return [text, run]


def _tokens(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:,.3g}{letter}"
    return f"{number:,}"


def _days(days: float) -> str:
    if days >= 2:
        return f"{days:,.0f} days"
    return f"{days * 24:.1f} hours" if days >= 2 / 24 else f"{days * 1440:.1f} minutes"


def _row(label: str, value: float) -> str:
    return f"  {label:26} {value:10,.2f}"


def _side_by_side(left: list[str], right: list[str]) -> list[str]:
    width = max(map(len, left)) + 4
    rows = max(len(left), len(right))
    left, right = left + [""] * (rows - len(left)), right + [""] * (rows - len(right))
    return [f"  {a:{width}}{b}".rstrip() for a, b in zip(left, right, strict=True)]

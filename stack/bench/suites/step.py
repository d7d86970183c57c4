"""Whole training steps of real models, compiled as the trainer does, beside the plan and the peers."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax

from stack.bench import data
from stack.bench.case import Case, Machine
from stack.bench.models import config
from stack.bench.serve import Ready, is_out_of_memory
from stack.bench.suites import matmul
from stack.bench.timing import temporary_bytes
from stack.config import Config, StackError
from stack.hardware.chip import Hardware, lookup
from stack.models.flops import train_flops_per_token
from stack.parallel.host_memory import keep_freed_memory
from stack.planner.formula.memory import memory
from stack.planner.formula.time import step_time
from stack.planner.formula.workload import from_config
from stack.step import program as programs
from stack.step import state as states
from stack.step.options import compiler_options, compiler_settings
from stack.step.step import train_step

PRECISIONS: dict[str, dict[str, dict[str, Any]]] = {
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "float32": {"model": {"dtype": "float32"}},
    "float8": {"model": {"dtype": "bfloat16"}, "kernels": {"matmul": "fp8"}},
}
"""By name, the fields of a config, by section, that have the products of layers computed so; those that a
device multiplies fast are measured on it."""

_REMATS = ("none", "dots", "full")
"""Those that a peer has too."""
_MOST_TOKENS = 65_536
"""Of a step: beyond it nothing becomes faster."""
_ROOM = 0.92
"""Of a device's memory, what a step may be planned to take."""
_TOO_FAR = 0.5
"""Nats by which the first loss may differ from that of guessing: the logits of a new model are small."""


def cases(machine: Machine, *, tiny: bool) -> list[Case]:
    """GPT and Llama at 2,048 to 16,384 tokens, packed and whole; on a CPU the quickstart and nanoGPT's."""
    cases = [_case("tiny", 32, 2, packed=True, precision="float32")] if tiny else _real(machine)
    chip = lookup(machine.device_kind)
    peaks: dict[str, float] = {**chip.peak_flops} if chip else {}
    return [
        dataclasses.replace(case, spec=case.spec | {"peak_flops": peaks.get(case.spec["precision"])})
        for case in cases
    ]


def _real(machine: Machine) -> list[Case]:
    if machine.is_cpu:
        return [
            _case("quickstart", 128, 12, packed=True, precision="float32", priority=1),
            _case("nanogpt_cpu", 64, 12, packed=False, precision="float32", priority=2),
        ]
    sizes = [
        ("gpt2_1_5b", 2048, False),
        ("gpt2_1_5b", 2048, True),
        ("gpt2_124m", 2048, False),
        ("llama3_3b", 8192, True),
        ("llama3_3b", 8192, False),
        ("gpt2_124m", 2048, True),
        ("llama3_3b", 2048, False),
        ("gpt2_1_5b", 8192, True),
        ("gpt2_124m", 16_384, True),
        ("llama3_3b", 16_384, True),
        ("gpt2_1_5b", 16_384, False),
    ]
    return [
        case
        for place, (name, length, packed) in enumerate(sizes)
        for later, precision in enumerate(matmul.precisions(machine))
        if precision in PRECISIONS
        for case in _tuned(machine, name, length, packed, precision, place=place, later=later)
    ]


def _tuned(
    machine: Machine, name: str, length: int, packed: bool, precision: str, *, place: int, later: int
) -> Iterator[Case]:
    """The two settings of rows and remat that the planner has for the fastest; most second ones come late."""
    priority = 7 + 10 * place + (2 if place else 9) * later
    shapes = {"length": length, "packed": packed, "changes": PRECISIONS[precision]}
    case = partial(_case, name, length, packed=packed, precision=precision)
    chip = lookup(machine.device_kind)
    if chip is None:
        yield case(max(1, 8192 // length), remat="full", priority=priority)
        return

    def plan(rows: int, remat: str) -> tuple[float, float]:
        return _plan(config(name, rows=rows, remat=remat, **shapes), chip)

    limit = min(machine.memory_bytes, chip.memory_bytes) * _ROOM
    settings = []
    for remat in _REMATS:
        rows = _MOST_TOKENS // length
        while rows and plan(rows, remat)[1] > limit:
            rows //= 2
        if rows:
            seconds, need = plan(rows, remat)
            settings.append((seconds / rows, rows, remat, 2.2 * need < machine.memory_bytes))
    for again, (_, rows, remat, together) in enumerate(sorted(settings)[:2]):
        late = again * (100 if place else 8)
        yield case(rows, remat=remat, priority=priority + late, together=together)


def _case(
    name: str,
    length: int,
    rows: int,
    *,
    packed: bool,
    remat: str = "none",
    precision: str = "bfloat16",
    priority: int = 0,
    together: bool = True,
) -> Case:
    spec = {"model": name, "length": length, "rows": rows, "packed": packed, "remat": remat}
    kind = "packed" if packed else "whole"
    return Case(
        suite="step",
        title=f"{name}, {length:,} {kind}, {precision}, {rows} rows, remat {remat}",
        spec=spec | {"precision": precision} | _for_peers(_config(spec | {"precision": precision})),
        priority=priority,
        together=together,
        peers=("torch",),
    )


def _config(spec: dict[str, Any]) -> Config:
    fields = ("length", "rows", "packed", "remat")
    return config(
        spec["model"], **{name: spec[name] for name in fields}, changes=PRECISIONS[spec["precision"]]
    )


def _for_peers(config: Config) -> dict[str, Any]:
    """What a peer must know of the model and the optimizer, which knows no config."""
    model, optimizer, length = config.model, config.optimizer, config.data.sequence_length
    names = ("num_layers", "embed_dim", "num_heads", "kv_heads", "head_width", "mlp_width", "norm", "mlp")
    names += ("position", "qkv_bias", "out_bias", "mlp_bias", "norm_epsilon", "init_std", "vocab_size")
    shapes = {name: getattr(model, name) for name in (*names, "padded_vocab_size", "tied_embeddings")}
    rates = ("learning_rate", "beta1", "beta2", "epsilon", "weight_decay", "clip_norm")
    return {
        "shapes": shapes | {"theta": model.rope.theta},
        "optimizer": {name: getattr(optimizer, name) for name in rates},
        "flops_per_token": {
            convention: train_flops_per_token(model, length, convention) for convention in ("causal", "full")
        },
    }


def _plan(config: Config, chip: Hardware) -> tuple[float, float]:
    """Seconds and bytes."""
    work = from_config(config, 1, chip)
    return step_time(work, chip).total, memory(work).total


def makers(spec: dict[str, Any], peers: list[str]) -> dict[str, Callable[[], Ready]]:
    """Stack's step, with the attention it chooses."""
    del peers
    return {"stack": partial(_prepare, spec)}


def _prepare(spec: dict[str, Any]) -> Ready:
    """The step of as many rows as there is room for: half of them where there is not."""
    if spec["platform"] == "cpu":
        keep_freed_memory()  # As the trainer does.
    while True:
        try:
            return _step(spec)
        except Exception as error:
            if not is_out_of_memory(error) or spec["rows"] == 1:
                raise
        spec = spec | {"rows": spec["rows"] // 2}


def _step(spec: dict[str, Any]) -> Ready:
    settings, device = _config(spec), jax.devices()[0]
    program = programs.build(settings, [device])
    rows, length, words = spec["rows"], spec["length"], settings.model.vocab_size
    mesh = states.concrete(program)
    with jax.set_mesh(mesh):
        state = states.init(program)
        numbers = data.batch(rows, length, words, packed=spec["packed"])
        batch = jax.device_put(numbers, program.layout.sharding("batch"))
        options = compiler_options(compiler_settings(program))
        step = jax.jit(partial(train_step, program), donate_argnums=0, compiler_options=options)
        compiled = step.lower(state, batch).compile()
        state, metrics = compiled(state, batch)
    first = float(metrics["loss"])
    held = {"state": state, "loss": first}

    def run(iterations: int) -> None:
        state, metrics = held["state"], {}
        with jax.set_mesh(mesh):
            for _ in range(iterations):
                state, metrics = compiled(state, batch)
            jax.block_until_ready((state, metrics))
        held["state"], held["loss"] = state, float(metrics["loss"])

    def after() -> dict[str, Any]:
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {"last_loss": held["loss"], "peak_bytes": peak, "ok": math.isfinite(held["loss"])}

    flops = spec["flops_per_token"]
    plan: Any = compiled.memory_analysis()
    facts = {
        "ok": abs(first - math.log(words)) < _TOO_FAR,
        "first_loss": first,
        "rows": rows,
        "remat": spec["remat"],
        "parameters": program.num_parameters,
        "attention": str(program.attention),
        "tokens": rows * length,
        "precision": spec["precision"],
        "peak_flops": spec["peak_flops"],
        "flops_causal": flops["causal"] * rows * length,
        "flops_full": flops["full"] * rows * length,
        "temporary_bytes": temporary_bytes(compiled),
        "compiled_bytes": plan and plan.argument_size_in_bytes + plan.temp_size_in_bytes,
    }
    return Ready(run, facts | _planned(settings, device), after)


def _planned(settings: Config, device: jax.Device) -> dict[str, Any]:
    """Seconds and bytes of the plan, or why there is none."""
    chip = lookup(device.device_kind)
    if chip is None:
        return {"no_plan": f"{device.device_kind} is not in the table of chips"}
    try:
        work = from_config(settings, 1, chip)
        return {"planned_seconds": step_time(work, chip).total, "planned_bytes": memory(work).program}
    except StackError as error:
        return {"no_plan": str(error)}

"""What the compiler's options that Stack sets do to a step, by the compiled program and its own schedule.

    uv run python benchmarks/defaults.py                 # all cases, about 15 minutes on 2 cores
    uv run python benchmarks/defaults.py "8 nodes"       # those with this in their name

Each case is compiled for GPUs that are not here, with XLA's own thresholds, with a layer's, and, where there
is tensor parallelism, with XLA's collective matmul. Seconds are the estimate by which XLA's scheduler orders
the work: not a measurement.
"""

import argparse
import os
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from stack.config import load
from stack.hardware.defaults import XLA_COMBINES
from stack.parallel.mesh import without_cache
from stack.planner.compiled import compile as compiling
from stack.planner.compiled.collectives import collectives
from stack.planner.compiled.report import compiler_schedule
from stack.step import program as programs
from stack.step.options import layer_bytes

SPLIT = ("mesh.sequence_parallel=true",)
CASES: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "llama3_8b, fsdp 8": ("llama3_8b", "h200", 8, ("mesh.fsdp=8",)),
    "llama3_8b, fsdp 8, B200": ("llama3_8b", "b200", 8, ("mesh.fsdp=8",)),
    "llama3_8b, data 2 x fsdp 4": ("llama3_8b", "h200", 8, ("mesh.data=2", "mesh.fsdp=4")),
    "gemma2_2b, fsdp 8": ("gemma2_2b", "h200", 8, ("mesh.fsdp=8",)),
    "gpt2_1_5b, fsdp 8, zero 3": ("gpt2_1_5b", "h200", 8, ("mesh.fsdp=8", "mesh.zero=3")),
    "gpt2_1_5b, fsdp 8, zero 2": ("gpt2_1_5b", "h200", 8, ("mesh.fsdp=8",)),
    "llama3_8b, fsdp 4 x tensor 2": ("llama3_8b", "h200", 8, ("mesh.fsdp=4", "mesh.tensor=2", *SPLIT)),
    "llama3_8b, fsdp 2 x tensor 4": ("llama3_8b", "h200", 8, ("mesh.fsdp=2", "mesh.tensor=4", *SPLIT)),
    "llama3_8b, fsdp 64, 8 nodes": ("llama3_8b", "h200", 64, ("mesh.fsdp=64", "train.accumulation=8")),
    "llama3_8b, fsdp 32 x tensor 2, 8 nodes": (
        *("llama3_8b", "h200", 64),
        ("mesh.fsdp=32", "mesh.tensor=2", "train.accumulation=16", *SPLIT),
    ),
    "llama3_70b, fsdp 8 x tensor 8, 8 nodes": ("llama3_70b", "h200", 64, ()),
}


def main() -> None:
    """Prints a row for each case and choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", default="")
    wanted = parser.parse_args().name
    print("| step | combined up to | collectives a step | estimate, s | exposed, s |")
    print("|---|---|---|---|---|")
    for name, case in CASES.items():
        if wanted in name:
            for row in rows(name, *case):
                print(row, flush=True)


def rows(name: str, recipe: str, target: str, number: int, overrides: tuple[str, ...]) -> list[str]:
    """Of one case."""
    with without_cache(), compiling.capture_stderr():
        absent = compiling.devices(target, number)
        program = programs.build(load(f"configs/{recipe}.yaml", overrides), absent)
        lowered = compiling.lower_step(program)
        size = layer_bytes(program)
        choices: dict[str, dict[str, Any]] = {
            "30 MiB, XLA's own": thresholds(XLA_COMBINES),
            f"{size / 2**20:,.0f} MiB, a layer": thresholds(max(size, XLA_COMBINES)),
        }
        if program.layout.size("tensor") > 1:
            matmul = {"xla_gpu_threshold_for_windowed_einsum_mib": 0}
            choices["30 MiB, and collective matmul"] = thresholds(XLA_COMBINES) | matmul
        return [
            f"| {name} | {choice} | {row(program, lowered, absent[0], options)} |"
            for choice, options in choices.items()
        ]


def thresholds(size: int) -> dict[str, Any]:
    """One for every kind of collective."""
    kinds = ("all_gather", "reduce_scatter", "all_reduce")
    return {f"xla_gpu_{kind}_combine_threshold_bytes": size for kind in kinds}


def row(program: programs.Program, lowered: Any, device: Any, options: dict[str, Any]) -> str:
    """The figures of one compilation."""
    schedule = compiler_schedule(lowered, device, options)
    assert schedule is not None
    text = compiling.compile_lowered(lowered, device, options).as_text() or ""
    times = sum(one.times for one in collectives(text, dict(program.mesh.shape)))
    return f"{times:,} | {schedule.seconds:.2f} | {sum(schedule.exposed.values()):.2f}"


if __name__ == "__main__":
    main()

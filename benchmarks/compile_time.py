"""Time to compile the training step for 8 and for 1,024 devices, with the same work on each device.

    uv run python benchmarks/compile_time.py [--rounds 5] [--variants zero3 tensor] [--devices 8 1024]

A compiled step is the program of one device, so its size, and the time to compile it, should not grow
with the mesh. Virtual CPU devices: every measurement is a process of its own with no compile cache; the
sizes take turns, so that what else the machine does hits both alike. Prints medians of tracing and
compiling, in wall and in CPU time, and the ratios of each round's pair: median, least and most.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import Any

VARIANTS = ("zero3", "tensor")
ROWS_PER_REPLICA = 2


def measure(variant: str, num_devices: int) -> dict[str, float]:
    """Seconds from config to traced step and to compiled step, in this process; `cpu`: of all cores."""
    import jax

    from stack.config import Config
    from stack.step import program as programs
    from stack.step import state as states
    from stack.step.step import train_step

    tensor = 2 if variant == "tensor" else 1
    fsdp = 4
    data = num_devices // (fsdp * tensor)
    tree = {
        "model": {
            "vocab_size": 50_257,
            "num_layers": 12,
            "embed_dim": 1024,
            "num_heads": 16,
        },
        "kernels": {"attention": "xla"},
        "data": {"sequence_length": 1024},
        "mesh": {"data": data, "fsdp": fsdp, "tensor": tensor, "zero": 3},
        "train": {"batch_size": ROWS_PER_REPLICA * data * fsdp, "remat": "full"},
    }
    config = Config.model_validate(tree)
    jax.devices()
    start, start_cpu = time.perf_counter(), time.process_time()
    program = programs.build(config)
    with jax.set_mesh(states.concrete(program)):
        step = jax.jit(partial(train_step, program), donate_argnums=0)
        lowered = step.lower(states.abstract(program), program.abstract_batch())
        traced = time.perf_counter()
        lowered.compile()
    end = time.perf_counter()
    return {
        "trace": traced - start,
        "compile": end - traced,
        "together": end - start,
        "cpu": time.process_time() - start_cpu,
    }


def in_process(variant: str, num_devices: int) -> dict[str, float]:
    """`measure` in a process that has that many devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(num_devices),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, __file__, "--measure", variant, "--devices", str(num_devices)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(variant: str, sizes: list[int], rounds: list[list[dict[str, float]]]) -> None:
    """Medians of each size, and ratios to the first size within each round."""
    for place, size in enumerate(sizes):
        seconds = {name: statistics.median(found[place][name] for found in rounds) for name in rounds[0][0]}
        ratio = {name: [found[place][name] / found[0][name] for found in rounds] for name in seconds}
        print(
            f"{variant:7} {size:5} devices: trace {seconds['trace']:5.2f} s + compile"
            f" {seconds['compile']:6.2f} s, {seconds['cpu']:6.2f} CPU-s; to {sizes[0]} devices: time"
            f" {spread(ratio['together'])}, CPU time {spread(ratio['cpu'])}",
            flush=True,
        )


def spread(ratios: list[float]) -> str:
    """The median and the extremes."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--devices", nargs="+", type=int, default=[8, 1024])
    parser.add_argument("--measure", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.devices[0])))
        return
    sizes: list[int] = arguments.devices
    for variant in arguments.variants:
        rounds: list[list[Any]] = []
        for number in range(arguments.rounds):
            order = sizes if number % 2 == 0 else sizes[::-1]
            found = {size: in_process(variant, size) for size in order}
            rounds.append([found[size] for size in sizes])
        report(variant, sizes, rounds)


if __name__ == "__main__":
    main()

"""Time and memory to compile a recipe's training step for GPUs that are not here.

    uv run python benchmarks/compile_gpu.py configs/turing_nlg_17b.yaml --devices 1024 \
        train.accumulation=2 eval.batch_size=null

Needs the extra `plan`. Prints seconds to trace and compile, the peak memory of this process, and what the
compiled step holds on each GPU.
"""

import argparse
import os
import resource
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax

from stack import load
from stack.plan.compile import compile_step, devices


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--devices", type=int, default=1024)
    arguments = parser.parse_intermixed_args()

    start = time.perf_counter(), time.process_time()
    config = load(arguments.config, arguments.overrides)
    compiled = compile_step(config, devices(arguments.target, arguments.devices))
    seconds, cpu_seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    plan = compiled.memory_analysis()
    assert plan is not None
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{config.name}, {arguments.devices:,} {arguments.target}: {seconds:.1f} s ({cpu_seconds:.1f} CPU-s),"
        f" this process {peak / 1e9:.2f} GB; each device {held / 2**30:.2f} GiB of state and batch,"
        f" {plan.temp_size_in_bytes / 2**30:.2f} GiB besides; jax {jax.__version__}"
    )


if __name__ == "__main__":
    main()

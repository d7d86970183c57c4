"""Time and memory to compile a recipe's training step for GPUs that are not here, and the whole report.

    uv run python benchmarks/compile_gpu.py configs/turing_nlg_17b.yaml --hardware h200 --devices 10000 \
        mesh.data=625 mesh.fsdp=16 mesh.tensor=1 train.batch_size=10000 eval.batch_size=null

Needs the extra `plan`. By default it compiles for the config's own target. Prints what
`stack plan --compile` prints, the CPU time, and the peak memory of this process.
"""

import argparse
import os
import resource
import time

os.environ["JAX_PLATFORMS"] = "cpu"

from stack import load
from stack.config import TargetConfig
from stack.planner.compiled.report import compile_plan, lines


def main() -> None:
    """Compiles and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--hardware")
    parser.add_argument("--devices", type=int)
    parser.add_argument("--no-schedule", action="store_true", help="leave out the compiler's estimate")
    arguments = parser.parse_intermixed_args()

    config = load(arguments.config, arguments.overrides)
    target = config.target or TargetConfig()
    compiled = compile_plan(
        config,
        hardware=arguments.hardware or target.hardware,
        devices=arguments.devices or target.devices,
        schedule=not arguments.no_schedule,
    )
    print("\n".join(lines(compiled)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"this process: {time.process_time():.1f} CPU-s, {peak / 1e9:.2f} GB at most")


if __name__ == "__main__":
    main()

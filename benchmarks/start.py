"""From the start of the process to the end of the first step of the quickstart: wall and CPU time.

    uv run python benchmarks/start.py --rounds 5

`cold`: nothing is kept, neither compiled programs nor tokenized text. `warm`: both are, as at every start but
the first. Rounds alternate. It measures the version in the working directory.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ONE_STEP = (
    *("train.steps=1", "optimizer.schedule.warmup_steps=0", "eval.every=0", "eval.baselines=false"),
    *("sample.at_end=false", "checkpoint.every=0"),
)


def main() -> None:
    """Prints median, least and most of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
    for number in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind, pairs in seconds.items():
                pairs.append(start(arguments.python, Path(folder), f"{kind}{number}"))
    for kind, pairs in seconds.items():
        for what, values in zip(("wall", "CPU"), zip(*pairs, strict=True), strict=True):
            middle = statistics.median(values)
            print(f"{kind} {what:>4}: {middle:.2f} s ({min(values):.2f} to {max(values):.2f})")


def start(python: str, folder: Path, name: str) -> tuple[float, float]:
    """Wall and CPU seconds of the process until its first step is told; then it is ended."""
    command = [python, "-m", "stack", "train", "configs/quickstart.yaml", *ONE_STEP]
    command += [f"output_dir={folder}/{name}", f"data.cache_dir={folder}/text"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
    begin = time.perf_counter()
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/1"):
                wall, cpu = time.perf_counter() - begin, cpu_seconds(process.pid)
                process.kill()
                return wall, cpu
    raise SystemExit(f"ended before its first step, with status {process.returncode}")


def cpu_seconds(process: int) -> float:
    """Of all threads of a process of Linux, in user mode and in the kernel."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()

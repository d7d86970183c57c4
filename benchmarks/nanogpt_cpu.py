"""The GPT of nanoGPT's CPU example, trained side by side by Stack, PyTorch and transformers.

    uv run python benchmarks/nanogpt_cpu.py --torch-python /path/to/python [--rounds 15] [--json]

4 layers, 4 heads, 128 wide, 64 x 12 tokens a step, 65 words, GPT-2's biases, tied embeddings, no
dropout, clipping, AdamW, float32, random tokens. Every contestant is a process of its own that stays
alive; they take turns, a block of steps each, in an order that is shuffled every round, so that what
else the machine does hits all alike; on a busy machine trust the fastest blocks (PyTorch's threads wait
for each other in a loop and suffer most). The torch interpreter needs torch and, for that contestant,
transformers. Without --torch-python only Stack runs.

Prints tokens/s and ms per step (median over blocks), milliseconds of all cores together per step (least
over blocks; the figure that other processes disturb least), time from starting the process to the first loss,
peak memory, and speed relative to the fastest PyTorch.
"""

import argparse
import dataclasses
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "nanogpt"
sys.path.insert(0, str(HERE))

from child import Setting  # noqa: E402 - shared with interpreters that have neither Stack nor a package

STACK_KINDS = {"stack": "unrolled", "stack scanned": "scanned"}
TORCH_KINDS = {
    "torch": "plain",
    "torch kept": "plain",
    "torch compiled": "compiled",
    "transformers": "transformers",
}
# What Stack asks of malloc on a CPU (stack.parallel.host_memory), as glibc reads it from the environment.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
# The first steps after another process had the caches are not counted.
WARMUP_STEPS = 3


class Contestant:
    """A process that runs as many steps as it is asked for."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.command = command
        environment = os.environ | (KEPT_MEMORY if name == "torch kept" else {})
        self.step_seconds: list[float] = []
        self.step_cpu_seconds: list[float] = []
        self.loss = 0.0
        self.peak_bytes = 0
        start = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.first = self._answer()
        self.first_step_seconds = time.perf_counter() - start

    def run(self, steps: int) -> dict[str, float]:
        """Runs steps and returns what the process says of them."""
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.loss, self.peak_bytes = answer["loss"], answer["peak_bytes"]
        return answer

    def measure(self, steps: int) -> None:
        """Runs steps after a few that do not count, and keeps how long one took."""
        self.run(WARMUP_STEPS)
        answer = self.run(steps)
        self.step_seconds.append(answer["seconds"] / steps)
        self.step_cpu_seconds.append(answer["cpu_seconds"] / steps)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        # A framework may print lines of its own; answers are the JSON objects.
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.name} ended with {self.process.wait()}: {' '.join(self.command)}")


def start(arguments: argparse.Namespace) -> list[Contestant]:
    """Starts the contestants one after the other, so that each has the machine for its first step."""
    commands = {
        name: [sys.executable, str(HERE / "stack_child.py"), kind] for name, kind in STACK_KINDS.items()
    }
    if arguments.torch_python:
        for name, kind in TORCH_KINDS.items():
            commands[name] = [arguments.torch_python, str(HERE / "torch_child.py"), kind]
    return [Contestant(name, commands[name]) for name in arguments.only or commands]


def measure(contestants: list[Contestant], *, rounds: int, steps: int) -> None:
    """Lets the contestants take turns."""
    order = list(contestants)
    shuffle = random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for contestant in order:
            contestant.measure(steps)


def results(contestants: list[Contestant], load: float) -> dict[str, Any]:
    """What is printed; `load` is how many processes ran before the benchmark did."""
    setting = Setting()
    medians = {contestant.name: statistics.median(contestant.step_seconds) for contestant in contestants}
    fastest = {contestant.name: min(contestant.step_seconds) for contestant in contestants}
    rows = [
        {
            "name": contestant.name,
            "tokens_per_second": setting.tokens / medians[contestant.name],
            "step_ms": 1e3 * medians[contestant.name],
            "fastest_block_ms": 1e3 * fastest[contestant.name],
            "slowest_block_ms": 1e3 * max(contestant.step_seconds),
            "least_cpu_ms": 1e3 * min(contestant.step_cpu_seconds),
            "first_step_seconds": contestant.first_step_seconds,
            "peak_mb": contestant.peak_bytes / 1e6,
            "speed_against_best_torch": _against_torch(medians, contestant.name),
            "fastest_block_against_best_torch": _against_torch(fastest, contestant.name),
            "parameters": contestant.first["parameters"],
            "first_loss": contestant.first["loss"],
            "last_loss": contestant.loss,
            "versions": contestant.first["versions"],
        }
        for contestant in contestants
    ]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    return {
        "machine": machine,
        "load_before": load,
        "setting": dataclasses.asdict(setting),
        "contestants": rows,
    }


def _against_torch(seconds: dict[str, float], name: str) -> float | None:
    """Speed relative to the fastest PyTorch; None where none ran."""
    peers = [seconds[kind] for kind in TORCH_KINDS if kind in seconds]
    return min(peers) / seconds[name] if peers else None


def show(report: dict[str, Any]) -> None:
    """Prints a table."""
    print(
        f"{report['machine']}, load before: {report['load_before']:.1f}; tokens per step: {Setting().tokens}"
    )
    print(f"{'':16} tokens/s  ms/step (fastest, slowest block)   CPU ms  first step  peak MB  against torch")
    for row in report["contestants"]:
        spread = f"({row['fastest_block_ms']:.1f}, {row['slowest_block_ms']:.1f})"
        ratio, fastest = row["speed_against_best_torch"], row["fastest_block_against_best_torch"]
        against = f"{ratio:.2f} (fastest block {fastest:.2f})" if ratio else ""
        print(
            f"{row['name']:16} {row['tokens_per_second']:8,.0f} {row['step_ms']:8.1f} {spread:25}"
            f" {row['least_cpu_ms']:7.1f} {row['first_step_seconds']:9.1f} s {row['peak_mb']:8.0f}  {against}"
        )
    for row in report["contestants"]:
        losses = f"loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"
        print(f"{row['name']:16} {row['parameters']:,} parameters, {losses}, {row['versions']}")


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-python", help="interpreter that has torch and transformers")
    parser.add_argument("--rounds", type=int, default=15, help="blocks per contestant")
    parser.add_argument("--steps", type=int, default=30, help="steps per block")
    parser.add_argument("--only", nargs="+", choices=[*STACK_KINDS, *TORCH_KINDS], help="contestants")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    load = os.getloadavg()[0]
    contestants = start(arguments)
    measure(contestants, rounds=arguments.rounds, steps=arguments.steps)
    report = results(contestants, load)
    for contestant in contestants:
        contestant.close()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


if __name__ == "__main__":
    main()

"""Nodes of a cluster, on this machine: what a platform starts on each, with what it sets there alone."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

DEVICES = 2
"""On each node."""

OVERRIDES = (
    "name=Two_nodes",
    "output_dir=runs",
    "data.cache_dir=~/.cache/stack/data",
    "mesh={data: 2, fsdp: 2}",
    "train.steps=12",
    "checkpoint.every=0",
)
"""Of a tiny run, where they differ from those of one process; the folders are those of the nodes."""


def start(
    command: Sequence[str], variables: Mapping[str, str], folder: Path, log: Path
) -> subprocess.Popen[str]:
    """One node: starts in a folder, with `stack` on its path and CPUs in the place of GPUs."""
    outer = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "HOME", "PATH")
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES)}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | dict(variables)
    with log.open("w") as file:
        return subprocess.Popen(
            list(command), env=environment, cwd=folder, stdout=file, stderr=subprocess.STDOUT, text=True
        )


def wait(nodes: Sequence[subprocess.Popen[str]], seconds: float = 180) -> list[int]:
    """Their exit statuses; those left are killed when it takes too long."""
    deadline = time.monotonic() + seconds
    try:
        return [node.wait(max(deadline - time.monotonic(), 0.1)) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()


def wait_for_steps(run: Path, number: int, nodes: Sequence[subprocess.Popen[str]]) -> None:
    """Until a run has come so far; returns as soon as a node ends, for `wait` to tell."""
    while steps(run) < number and all(node.poll() is None for node in nodes):
        time.sleep(0.1)


def steps(run: Path) -> int:
    """Lines of a run's history."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0

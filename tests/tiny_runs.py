"""A tiny run, in this process or another."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import yaml

from stack import Config, Trainer
from stack.doctor.faults import runs
from stack.storage.store import Store


def config(folder: Path, name: str, *overrides: str) -> Config:
    changes = (f"name={name}", f"output_dir={folder}/runs", f"data.cache_dir={folder}/cache", *overrides)
    return Config.model_validate(runs.TINY).replace(*changes)


def trainer(folder: Path, name: str, *overrides: str, **options: Any) -> Trainer:
    return Trainer(config(folder, name, *overrides), devices=jax.devices()[:1], **options)


def run(folder: Path, name: str, *overrides: str, **options: Any) -> Trainer:
    made = trainer(folder, name, *overrides, **options)
    made.fit(progress=False)
    return made


def start(folder: Path, name: str, *overrides: str) -> subprocess.Popen[str]:
    """The same by the command line."""
    file = folder / f"{name}.yaml"
    if not file.exists():
        file.write_text(yaml.safe_dump(config(folder, name).model_dump(mode="json")))
    command = [sys.executable, "-m", "stack", "train", str(file), *overrides]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(folder: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    """Until the history has it."""
    path = folder / "runs" / name / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_bytes().splitlines() if path.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
    raise AssertionError(f"ended before step {step}: {process.communicate()}")


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The history, but for what clocks say."""
    return runs.records(folder / "runs" / name)


def saved_state(folder: Path, name: str, place: str | None = None) -> dict[str, bytes]:
    """The bytes of every array of the newest checkpoint."""
    return runs.saved_state(Store(place or folder / "runs" / name / "checkpoints"))

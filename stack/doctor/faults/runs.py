"""Tiny runs in processes of their own, to break and to compare."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import yaml

from stack.config import Config
from stack.config.errors import StackError
from stack.parallel.ports import free_port
from stack.storage.store import Store
from stack.train.checkpoint.manifest import read_manifest, saved_steps
from stack.train.watch.metrics import TIMING, read_history

STEPS = 120
TINY: dict[str, Any] = {
    "model": {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "max_length": 32, "dtype": "float32"},
    "data": {
        "sources": [{"kind": "synthetic", "max_bytes": 40_000}],
        "sequence_length": 32,
        "heldout_fraction": 0.1,
    },
    "optimizer": {"learning_rate": 1e-2, "schedule": {"kind": "constant", "warmup_steps": 2}},
    "train": {"steps": 8, "batch_size": 8, "log_every": 1},
    "sample": {"at_end": False, "length": 4, "temperature": 0},
}
"""A run that takes no time."""
_LONGER = (
    *(f"train.steps={STEPS}", "train.silent_seconds=5", "eval.every=25"),
    *("checkpoint.every=10", "checkpoint.keep_last=3"),
)
_HANGS_SECONDS = 300.0  # Of a machine that has much else to do.
_LEFT_SECONDS = 6.0


@dataclass
class Run:
    """One that is started again and again in one folder, until it is at its end."""

    root: Path
    """Of the folders `runs` and `cache`."""
    name: str
    processes: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    """Of the last start, once it has ended."""
    is_history_lost: bool = False
    """Whether records of it were destroyed, and that was told."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.root / "runs" / self.name

    @property
    def store(self) -> Store:
        """Of its checkpoints."""
        return Store(self.folder / "checkpoints")

    def start(self, *, overrides: Sequence[str] = (), wrapper: Sequence[Any] = ()) -> None:
        """Starts its processes, each behind `wrapper` if there is one."""
        self.root.mkdir(parents=True, exist_ok=True)
        file = self.root / f"{self.name}.yaml"
        if not file.exists():
            file.write_text(yaml.safe_dump(self._config().model_dump(mode="json")))
        address = f"127.0.0.1:{free_port()}"
        self.started, self.statuses = [], []
        for number in range(self.processes):
            several = {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(self.processes),
                "JAX_PROCESS_ID": str(number),
            }
            environment = os.environ | {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_COMPILATION_CACHE_DIR": str(self.root.parent / "compiled"),
                # Several processes compile anew at every start, which is most of it: in half the time.
                "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0",
                **(several if self.processes > 1 else {}),
            }
            command = [*wrapper, sys.executable, "-m", "stack", "train", file, *overrides]
            with self._log(number).open("wb") as log:
                self.started.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    def wait_for_moment(self, chance: random.Random, *, is_training: bool | None = None) -> str:
        """Waits until some moment, before its first step or at one; its name."""
        if is_training is None:
            is_training = chance.random() < 0.7
        if not is_training:
            time.sleep(chance.uniform(0.0, 4.0))
            return "before its first step" if self._step() is None else "at a step"
        begin = self._step() or 0
        target = chance.randint(begin + 1, max(begin + 1, STEPS - 20))
        while self.is_running() and (self._step() or 0) < target:
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.05))
        return "at a step"

    def is_running(self) -> bool:
        """Whether all its processes are."""
        return all(process.poll() is None for process in self.started)

    def wait(self, *, as_launcher: bool = False) -> list[int]:
        """The statuses of its processes when all have ended; one that hangs is killed and has -1000.

        As launchers do, one that another has left alone is ended after a while.
        """
        deadline = time.monotonic() + _HANGS_SECONDS
        if as_launcher:
            while self.is_running() and time.monotonic() < deadline:
                time.sleep(0.05)
            begin = time.monotonic()
            while (
                any(one.poll() is None for one in self.started) and time.monotonic() - begin < _LEFT_SECONDS
            ):
                time.sleep(0.05)
            self.kill()
        statuses = []
        for process in self.started:
            try:
                statuses.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                statuses.append(-1000)
        self.statuses = statuses
        return statuses

    def kill(self) -> None:
        """Ends what is left of it."""
        for process in self.started:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()

    def said(self) -> list[str]:
        """What each process wrote since the last start."""
        return [self._log(number).read_text("utf-8", "replace") for number in range(self.processes)]

    def steps(self) -> list[int]:
        """Of its checkpoints."""
        return saved_steps(self.store)

    def _log(self, number: int) -> Path:
        return self.root / f"{self.name}.{number}.log"

    def _step(self) -> int | None:
        """The last of this start that is in the history; None before the first."""
        try:
            if b"\nstep " not in self._log(0).read_bytes():
                return None
            return int(json.loads((self.folder / "metrics.jsonl").read_bytes().splitlines()[-2])["step"])
        except (OSError, ValueError, IndexError, KeyError):
            return None

    def _config(self) -> Config:
        mesh = [f"mesh.data={self.processes}"] if self.processes > 1 else []
        places = (f"name={self.name}", f"output_dir={self.root}/runs", f"data.cache_dir={self.root}/cache")
        return Config.model_validate(TINY).replace(*_LONGER, *places, *mesh)


def differences(run: Run, unbroken: Run) -> list[str]:
    """In what the end of a run is not that of the unbroken one: bits of the state, records of the history."""
    try:
        state, want = saved_state(run.store), saved_state(unbroken.store)
    except (StackError, IndexError) as error:
        return [f"its last checkpoint cannot be read: {error}"]
    told = [f"the state differs in {name}" for name in want if state.get(name) != want[name]]
    told += [f"the state has {name} beside" for name in state.keys() - want.keys()]
    history, wanted = records(run.folder), records(unbroken.folder)
    if history != wanted and not run.is_history_lost:
        steps = [record["step"] for record in history], [record["step"] for record in wanted]
        lines = [str(new) for new, old in zip(history, wanted, strict=False) if new != old]
        told.append(f"the history differs, {steps[0] == steps[1] = }: {lines[:1]}")
    return told


def records(folder: Path) -> list[dict[str, Any]]:
    """The history of a run, but for what clocks say."""
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_history(folder)]


def saved_state(store: Store) -> dict[str, bytes]:
    """The bytes of every piece of every array of the newest checkpoint."""
    manifest = read_manifest(store, saved_steps(store)[-1])
    pieces = {}
    for name, file in manifest.files.items():
        data = store.read(f"{manifest.step}/{name}")
        for piece in file.pieces:
            dtype = manifest.leaves[piece.leaf][0]
            size = int(np.prod(piece.shape)) * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
            pieces[f"{piece.leaf} {piece.start}"] = data[piece.offset : piece.offset + size]
    return pieces

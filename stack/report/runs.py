"""What a run folder says of a run: where it stands, its losses, its config."""

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stack.config import Config, StackError, load
from stack.config.fields import flatten
from stack.config.paths import expand
from stack.storage.store import Store
from stack.train.best import ended, values_of
from stack.train.checkpoint.manifest import DamagedError, place, read_manifest, saved_steps, unreadable
from stack.train.watch.metrics import FILE, History
from stack.train.weights import origin

_ALIVE_SECONDS = 120.0
"""A run that has written within this time may still be running."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its folder tells of it."""

    folder: Path
    config: Config
    history: History
    checkpoints: tuple[int, ...]
    """Steps of those that are committed, ascending."""
    checkpoint_bytes: int
    """Of all of them that can be read."""
    origin: Mapping[str, Any]
    """Of its first parameters; see `stack.train.weights.origin`."""
    idle_seconds: float | None
    """Since it last wrote its history; None: it never did."""

    @property
    def step(self) -> int:
        """The last one that is recorded."""
        return max((record["step"] for record in self.history.records), default=0)

    @property
    def state(self) -> str:
        """Where it stands, in words."""
        steps = self.config.train.steps
        if self.checkpoints and self.checkpoints[-1] >= steps:
            return f"done, {steps:,} steps"
        if self.checkpoints and self.checkpoints[-1] == self.step and (why := self.ended):
            return f"ended early {why}"
        saved = f"newest checkpoint {self.checkpoints[-1]:,}" if self.checkpoints else "no checkpoint yet"
        if self.idle_seconds is None:
            return f"not begun; {saved}"
        if self.idle_seconds < _ALIVE_SECONDS:
            return f"at step {self.step:,} of {steps:,}, last heard of {self.idle_seconds:.0f} s ago; {saved}"
        return f"stopped at step {self.step:,} of {steps:,}; {saved}"

    @property
    def ended(self) -> str | None:
        """Why it ended early, by its evaluations; None: it did not."""
        logged = [record for record in self.history.records if record["kind"] == "heldout"]
        return ended(values_of({}, logged, self.config.eval.metric), self.config.eval)

    @property
    def loss(self) -> float | None:
        """In training: the mean of the last twentieth of its records, at least one."""
        values = [value for value in self.history.curve("loss")[1] if math.isfinite(value)]
        return statistics.fmean(values[-max(1, len(values) // 20) :]) if values else None

    @property
    def heldout(self) -> tuple[int, float] | None:
        """Step and loss of the last evaluation."""
        steps, values = self.history.curve("loss", "heldout")
        return (steps[-1], values[-1]) if steps else None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation."""
        steps, values = self.history.curve("loss", "heldout")
        finite = [(value, step) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        return min(finite)[::-1] if finite else None

    def median(self, metric: str) -> float | None:
        """The median of a metric of training, None where it has none."""
        values = [value for value in self.history.curve(metric)[1] if math.isfinite(value)]
        return statistics.median(values) if values else None


def read_run(path: str | Path) -> Run:
    """Reads a run folder.

    Raises:
      StackError: it is none, or what it holds cannot be read.
    """
    folder = expand(path)
    if not folder.is_dir():
        raise StackError(f"{folder} is not the folder of a run; give one that `stack train` made")
    config = load(folder)
    history = folder / FILE
    store = place(config, folder)
    saved = saved_steps(store)
    return Run(
        folder=folder,
        config=config,
        history=History.read(folder) if history.is_file() else History(records=[]),
        checkpoints=tuple(saved),
        checkpoint_bytes=sum(_size(store, step) for step in saved),
        origin=_origin(folder / origin.FILE),
        idle_seconds=max(0.0, time.time() - history.stat().st_mtime) if history.is_file() else None,
    )


def _origin(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        origin.describe(told)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StackError(f"{path} is not what was written: {error!r}; restore it, or delete it") from error
    return told


def _size(store: Store, step: int) -> int:
    try:
        return read_manifest(store, step).size
    except DamagedError:
        return 0
    except OSError as error:
        raise unreadable(store, error) from error


def config_differences(configs: Mapping[str, Config]) -> list[tuple[str, list[str]]]:
    """The dotted fields in which configs differ, each with its value in every one of them.

    Names and folders of the runs are left out.
    """
    flat = [dict(flatten(config.model_dump(mode="json"))) for config in configs.values()]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [(name, [one.get(name, "-") for one in flat]) for name in names if name not in _OF_THE_FOLDER]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


_OF_THE_FOLDER = {"name", "output_dir"}

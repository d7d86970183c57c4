"""Where the time of a run goes, across its restarts: how much of it was steps that count."""

import json
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from stack.storage import durable
from stack.train.watch.listeners import Listener

FILE = "goodput.json"
KINDS = ("step", "compile", "data wait", "checkpoint", "evaluation", "restart", "lost", "other")
"""What time is spent on. `compile` is the first step of every start; `restart` all between the last word of
one start and the first step of the next, the first start's loading included; `lost` the steps that were done
after the checkpoint that the next start went on from; `other` the rest, as the sample at the end."""
_EVERY_SECONDS = 10.0  # Between writes of the file.


class Goodput(Listener):
    """Sums the seconds of each kind, keeps them in the run folder, and tells them at the end.

    The trainer tells what a step waited for in its metrics; the rest is the time between what is heard.
    """

    def __init__(self, folder: Path, started: float) -> None:
        """Counts from `started`, seconds since 1970."""
        self._path = folder / FILE
        self._begun = started
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._last = started
        self._written = 0.0
        self._is_first = True
        self._writes = False

    def on_start(self, info: dict[str, Any]) -> None:
        """Goes on with what the starts before have spent."""
        import jax

        self._writes, self._is_first = jax.process_index() == 0, True
        before = self._read()
        if before:
            self._seconds, self._begun = before["seconds"], before["begun"]
            lost = max(0.0, self._seconds["step"] - info.get("kept", {}).get("step_seconds", 0.0))
            self._seconds["step"] -= lost
            self._seconds["lost"] += lost
            self._last = before["time"]
        self._spend("restart")

    def on_metrics(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """`goodput`: the share of steps that count in all time so far."""
        waited = {
            "data wait": metrics.get("data_wait_seconds", 0.0),
            "checkpoint": metrics.get("checkpoint_seconds", 0.0),
        }
        for kind, seconds in waited.items():
            self._seconds[kind] += seconds
        self._spend("compile" if self._is_first else "step", but=sum(waited.values()))
        self._is_first = False
        if self._last - self._written > _EVERY_SECONDS:
            self._write()
        return {"goodput": self._seconds["step"] / max(self._last - self._begun, 1e-9)}

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """The time since the last word was an evaluation."""
        self._spend("evaluation")

    def on_save(self, step: int) -> dict[str, Any]:
        """Has the time of steps kept: what comes after may be lost."""
        self._write()
        return {"step_seconds": self._seconds["step"]}

    def on_end(self, summary: dict[str, Any]) -> dict[str, Any] | None:
        """Writes the sums, and shows them if the run came to its end."""
        self._spend("other")
        self._write()
        if "rows" not in summary:
            return None
        whole = sum(self._seconds.values())
        shares = sorted(((seconds, kind) for kind, seconds in self._seconds.items()), reverse=True)
        told = ", ".join(
            f"{kind} {seconds / whole:.0%}" for seconds, kind in shares if seconds >= 0.005 * whole
        )
        row = ("time", f"{timedelta(seconds=round(whole))} in all: {told}")
        return {"rows": [*summary["rows"], row], "goodput": self._seconds["step"] / whole}

    def _spend(self, kind: str, *, but: float = 0.0) -> None:
        now = time.time()
        self._seconds[kind] += max(0.0, now - self._last - but)
        self._last = now

    def _read(self) -> dict[str, Any] | None:
        try:
            before = json.loads(self._path.read_text("utf-8"))
            before["seconds"] = {kind: float(before["seconds"][kind]) for kind in KINDS}
            before |= {"time": float(before["time"]), "begun": float(before["begun"])}
            if not all(map(math.isfinite, [before["time"], before["begun"], *before["seconds"].values()])):
                raise ValueError("a time that is not finite")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            # It is only an account.
            self.warn(f"{self._path} was damaged, and begins anew: goodput counts from here")
            return None
        return before

    def _write(self) -> None:
        self._written = self._last
        if not self._writes:
            return
        account = {"begun": self._begun, "time": self._last, "seconds": self._seconds}
        try:
            durable.write_text(self._path, json.dumps(account, indent=2) + "\n")
        except OSError as error:
            self._writes = False
            self.warn(f"{self._path}: cannot be written: {error.strerror}; the time is not accounted for")

"""Has Weights & Biases and MLflow told of a run."""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stack.config import Config
from stack.config.errors import StackError
from stack.config.reading import dump
from stack.storage import durable
from stack.train.supervisor import Line
from stack.train.watch.listeners import Listener
from stack.train.watch.metrics import FILE as HISTORY
from stack.train.watch.tracking import follow
from stack.train.watch.tracking.service import ENVIRONMENT, SERVICES, Task

FILE = "tracking.json"
_LOOK_SECONDS = 1.0  # Between looks at what the processes say.
_LAST_SECONDS = {"finished": 60.0, "failed": 10.0}
"""What the end of a run waits for them at most: who stops it may not have long."""
_ABOUT = ("parameters", "devices", "mesh", "attention", "train_tokens", "heldout_tokens")


class Tracking(Listener):
    """Starts a process for each service that the config asks for, on process 0; without one it does nothing.

    A step pays nothing but the look at a clock: the processes read the history from its file.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        """Touches nothing until the run starts."""
        self._config = config
        self._folder = folder
        self._followers: list[Follower] = []
        self._identity: dict[str, str] = {}
        self._looked = 0.0

    def on_start(self, info: dict[str, Any]) -> None:
        """Starts them, to go on with the same curves.

        Raises:
            StackError: a package is missing.
        """
        import jax

        wanted = {
            name: target for name in SERVICES if (target := getattr(self._config.tracking, name)) is not None
        }
        if not wanted or jax.process_index() != 0:
            return
        for name, target in wanted.items():
            if not _is_installed(name):
                raise StackError(
                    f"tracking.{name}={target} needs {name}; install it with: pip install 'stack[{name}]',"
                    f" or set tracking.{name}=null"
                )
        self._identity = self._identify(info)
        about = {name: info[name] for name in _ABOUT if name in info}
        message = {
            "history": str(self._folder / HISTORY),
            "steps": self._config.train.steps,
            "eval_every": self._config.eval.every if info.get("heldout_tokens") else -1,
        }
        for name, target in wanted.items():
            task = Task(
                service=name,
                target=target,
                project=self._config.tracking.project,
                id=self._identity["id"],
                name=self._config.name,
                folder=str(self._folder),
                config=self._config.model_dump(mode="json", exclude={"tracking"}) | {"run": about},
                pid=os.getpid(),
            )
            log = self._folder / f"tracking-{name}.log"
            try:
                self._followers.append(Follower(log, message | {"task": asdict(task)}))
            except OSError as error:
                self.warn(f"{name} is not told: no process can be started for it: {error.strerror}")

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Passes on what they have said, now and then."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            for follower in self._followers:
                for note in follower.notes():
                    self.warn(note)

    def on_save(self, step: int) -> Mapping[str, Any] | None:
        """Has the id of the run kept."""
        return {"tracking": self._identity} if self._identity else None

    def on_end(self, summary: dict[str, Any]) -> None:
        """Waits until they have told all, but not for long."""
        status = "failed" if "error" in summary else "finished"
        shown = {f"final/{key}": one for key, one in summary.items() if isinstance(one, int | float | str)}
        for follower in self._followers:
            follower.say(summary=shown if status == "finished" else None, status=status)
        deadline = time.monotonic() + _LAST_SECONDS[status]
        followers, self._followers = self._followers, []
        for follower in followers:
            for note in follower.end(deadline):
                self.warn(note)

    def _identify(self, info: Mapping[str, Any]) -> dict[str, str]:
        """The id of this run: that of its folder or of its checkpoint, unless those are of another run.

        A copy of a run's folder is another run; so is one that begins anew with another config. Its history
        is sent from the first step.
        """
        digest = hashlib.sha256(dump(self._config).encode()).hexdigest()
        path = self._folder / FILE
        for known in (_read(path), info.get("kept", {}).get("tracking", {})):
            if known.get("name") == self._config.name and (info["step"] > 0 or known["config"] == digest):
                return known
        made = {"id": secrets.token_hex(8), "name": self._config.name, "config": digest}
        try:
            durable.write_text(path, json.dumps(made, indent=2) + "\n")
        except OSError as error:
            self.warn(f"{path} cannot be written: {error.strerror}; the next checkpoint keeps the run's id")
        return made


class Follower:
    """A process that tells one service."""

    def __init__(self, log: Path, message: Mapping[str, Any]) -> None:
        """Starts it; what its libraries print goes to `log`."""
        self._name = message["task"]["service"]
        self._log = log
        self._is_over = False  # It has ended, as it should or not, and that is told.
        root = str(Path(__file__).parents[4])
        environment = ENVIRONMENT | os.environ
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment.pop("WANDB_SERVICE", None)  # That of a user's own run in this process.
        # In a session of its own: what a terminal sends to all is for the trainers.
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", follow.__name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._line = Line(self._process.stdout.fileno(), self._process.stdin.fileno())
        os.set_blocking(self._line.read, False)
        self._line.send(**message)

    def notes(self) -> list[str]:
        """What it has said since, and that it has ended, if it has."""
        said = [str(one["note"]) for one in self._line.receive() or []]
        if not self._is_over and self._process.poll():
            self._is_over = True
            said.append(f"{self._name} is not told any more: its process ended")
        return [f"{text}; see {self._log}" for text in said]

    def say(self, **message: Any) -> None:
        """The last word to it."""
        self._line.send(**message)

    def end(self, deadline: float) -> list[str]:
        """Waits until it has ended, or ends it at a time of the monotonic clock; what it said last."""
        late = []
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            late = [f"{self._name} took too long; what it lacks is sent when the run is started again"]
            self._is_over = True
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        said = self.notes()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return said + late


def _is_installed(package: str) -> bool:
    """Without importing it: that takes seconds."""
    try:
        return find_spec(package) is not None
    except ValueError:  # It is barred in sys.modules.
        return False


def _read(path: Path) -> dict[str, str]:
    """What the file says; nothing, if there is none that is whole."""
    try:
        known = json.loads(path.read_text("utf-8"))
        return {name: str(known[name]) for name in ("id", "name", "config")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}

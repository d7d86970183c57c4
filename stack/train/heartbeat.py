"""Several processes of one run watch over each other: who dies or stands still is named, and all end.

Each process has a supervisor beside it, see `stack.train.supervisor`. A thread tells it once in a while where
the main thread is, another leaves when the supervisor says so.
"""

import faulthandler
import itertools
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

import jax

from stack.config import ConfigError, StackError, TrainConfig
from stack.parallel import messages
from stack.train import supervisor
from stack.train.supervisor import BEATS

_calls = itertools.count()  # Every process counts alike.


class Heartbeat:
    """The threads, and what they know."""

    def __init__(self, config: TrainConfig) -> None:
        """Watches nothing yet; the config says how long is too long."""
        self._timeout = config.silent_seconds
        self._stall = 60 * config.stall_minutes
        self._step = 0
        self._moved: float | None = None  # When it came to its step; None while it is not training.
        self._times: list[tuple[float, float]] = []  # Of each step: all of it, and the wait for data.
        self._notes: list[str] = []
        self._done = threading.Event()
        self._joined = threading.Event()

    def beat(self, step: int, waited: float) -> None:
        """Says that the main thread has come to a step, and the seconds it waited for its data."""
        now = time.monotonic()
        if self._moved is not None:
            self._times.append((now - self._moved, waited))
        self._step, self._moved = step, now

    def notes(self) -> list[str]:
        """What a person should know, told once; on process 0."""
        notes, self._notes = self._notes, []
        return notes

    @contextmanager
    def training(self, step: int) -> Iterator[None]:
        """Says that from here on, after so many steps, one step follows another."""
        self._step, self._moved = step, time.monotonic()
        try:
            yield
        finally:
            self._moved = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Has a supervisor and the threads run; a lone process has nobody to watch."""
        if jax.process_count() == 1:
            yield
            return
        self._done = done = threading.Event()
        self._joined.clear()
        name = f"supervisor/{next(_calls)}"
        process = self._start(name)
        assert process.stdin is not None
        assert process.stdout is not None
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        tasks = ((self._talk, process.stdin, done), (self._listen, process.stdout, done))
        for run, *arguments in tasks:
            threading.Thread(target=run, args=arguments, name="heartbeat", daemon=True).start()
        end: dict[str, Any] = {"end": "done"}
        try:
            self._joined.wait()
            messages.gather(f"{name}/joined", "")  # Else process 0 could be gone before the others have come.
            yield
        except BaseException as error:
            if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _is_broken_off(error):
                # Another process is gone. Who, the supervisors find out, and end this process.
                time.sleep(2 * self._timeout)
            if not getattr(error, "is_of_all", False):
                text = (str(error) or type(error).__name__).splitlines()[0]
                end = {"end": "failed", "text": text[:300], "status": _status(error)}
            raise
        finally:
            done.set()
            with suppress(OSError):
                _send(process.stdin, end | {"step": self._step})
            with suppress(subprocess.TimeoutExpired):
                process.wait(self._timeout)
            faulthandler.unregister(signal.SIGUSR2)
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        """The supervisor, which meets that of process 0 where this says it is."""
        task = {
            "pid": os.getpid(),
            "number": jax.process_index(),
            "count": jax.process_count(),
            "silent": self._timeout,
            "stall": self._stall,
        }
        if jax.process_index() == 0:
            token = secrets.token_hex(16)
            process = _popen(task | {"token": token})
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise StackError("the supervisor of process 0 does not start; what it said stands above")
            place = [messages.address(), json.loads(line)["port"]]
            messages.broadcast(name, json.dumps({"token": token, "address": place}))
            self._joined.set()
            return process
        return _popen(task | json.loads(messages.broadcast(name, None)))

    def _talk(self, pipe: IO[bytes], done: threading.Event) -> None:
        while not done.is_set():
            try:
                _send(pipe, self._state())
            except OSError:
                if not done.is_set():
                    self._notes.append(f"the supervisor of process {jax.process_index()} has ended")
                return
            done.wait(self._timeout / BEATS)

    def _state(self) -> dict[str, Any]:
        times, self._times = self._times, []
        means = [statistics.fmean(values) for values in zip(*times, strict=True)] or [0.0, 0.0]
        return {
            "step": self._step,
            "still": 0.0 if self._moved is None else time.monotonic() - self._moved,
            "step_seconds": means[0],
            "data_seconds": means[1],
        }

    def _listen(self, pipe: IO[bytes], done: threading.Event) -> None:
        for line in pipe:
            message = json.loads(line)
            if "joined" in message:
                self._joined.set()
            elif "note" in message:
                self._notes.append(message["note"])
            elif "leave" in message and not done.is_set():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(message["leave"])
        self._joined.set()  # It has ended, and will not say so any more.


def _popen(task: dict[str, Any]) -> subprocess.Popen[bytes]:
    # In a session of its own: what a terminal sends to all is for the trainers.
    return subprocess.Popen(
        [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(task)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )


def _send(pipe: IO[bytes], message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def _status(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ConfigError) else 1


def _is_broken_off(error: Exception) -> bool:
    """Whether a collective failed as another process no longer takes part."""
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "socket", "peer", "coordination"))

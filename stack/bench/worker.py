"""The parent's side: a process that prepares and times contestants, and what becomes of it."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any


class EndedError(Exception):
    """The process is gone, and why."""


class LateError(Exception):
    """It did not answer in time."""


class Worker:
    """A child that serves contestants; see `stack.bench.serve`."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], deadline: float) -> None:
        """Starts it.

        Args:
            command: that serves.
            environment: of the process.
            deadline: by `time.monotonic`, when it must have answered.

        Raises:
            EndedError: it ended before it named its contestants.
            LateError: it did not in time.
        """
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=dict(environment),
            start_new_session=True,  # It may have children of its own, which end with it.
        )
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.about = self._answer(deadline)
        except BaseException:
            self.close()
            raise

    @property
    def contestants(self) -> list[str]:
        """Whom it serves."""
        return self.about["contestants"]

    def ask(self, deadline: float, **request: str) -> dict[str, Any]:
        """One request and its answer.

        Args:
            deadline: by `time.monotonic`.
            request: `prepare`, `block` or `finish`, and the contestant.

        Raises:
            EndedError: the process is gone.
            LateError: there was no answer in time.
        """
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise EndedError(self._last_words()) from None
        return self._answer(deadline)

    def close(self) -> None:
        """Ends it and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()

    def _read(self) -> None:
        assert self._process.stdout
        with contextlib.suppress(ValueError, OSError):  # It is closed while it is read.
            for line in self._process.stdout:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self, deadline: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(deadline - time.monotonic(), 0.01))
        except queue.Empty:
            raise LateError from None
        if line is None:
            raise EndedError(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        """How it ended, and the last it said."""
        code = self._process.wait()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.readlines()[-40:] if line.strip()]
        return f"{how}: {' | '.join(said[-2:])}"[:400]

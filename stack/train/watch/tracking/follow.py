"""The process that tells one service of a run: it reads metrics.jsonl, and sends what the service lacks.

The file is the history; it holds each step once, whatever ended the run between. So what is lost on the way,
in an outage or with this process, is found again by asking the service for the last step that it has. What a
library does, hang or ask for a key, it does here, away from the steps; this process has an end in any case.
"""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from stack.train.supervisor import Line
from stack.train.watch.tracking.service import SERVICES, Row, Service, Task

TRIES = 20
"""In a row, after which a service is given up until the run is started again."""

_LOOK_SECONDS = 1.0  # Between looks at the file.
_WAIT_SECONDS = 300.0  # Between tries, at most; the first ones come after 1, 2, 4 seconds.
_ALONE_SECONDS = 60.0  # It stays so long after the process that trains.
_BLOCK = 1 << 20


class History:
    """The rows of a file of records, in order, while it is written."""

    def __init__(self, path: Path, *, steps: int, eval_every: int) -> None:
        """Of a run of so many steps; `eval_every` as in its config, -1 where nothing is held out."""
        self._file = path.open("rb")
        self._steps, self._eval_every = steps, eval_every
        self.rewind()

    def rewind(self) -> None:
        """Reads from the beginning again."""
        self._file.seek(0)
        self._rest = b""
        self._rows: dict[int, Row] = {}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def rows(self, *, is_over: bool = False) -> Iterator[list[Row]]:
        """What has come since the last call, some at a time.

        The last row waits for the evaluation of its step, if one is due: a service may take no more of a
        step that it has.

        Args:
          is_over: nothing comes any more.
        """
        while data := self._file.read(_BLOCK):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)
            last = max(self._rows, default=0)
            whole = [step for step, row in self._rows.items() if step < last or self._is_whole(row)]
            yield [self._rows.pop(step) for step in sorted(whole)]
        if is_over:
            yield [self._rows.pop(step) for step in sorted(self._rows)]

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            kind, step, when = record.pop("kind"), int(record.pop("step")), float(record.pop("time"))
            metrics = {f"{kind}/{name}": float(value) for name, value in record.items()}
        except (ValueError, KeyError, TypeError, AttributeError):  # Told by the log, when it goes on.
            return
        known = self._rows.get(step)
        self._rows[step] = Row(step=step, time=when, metrics={**(known.metrics if known else {}), **metrics})

    def _is_whole(self, row: Row) -> bool:
        every = self._eval_every
        is_due = every >= 0 and (row.step == self._steps or (every > 0 and row.step % every == 0))
        return not is_due or any(name.startswith("heldout/") for name in row.metrics)


class Parent:
    """The process that trains: its last word, and what it is told."""

    def __init__(self, line: Line) -> None:
        """At the other end of a line."""
        self._line, self._said = line, _messages(line)
        self._over = threading.Event()
        self.summary: dict[str, float | str] | None = None
        self.status = "killed"

    def task(self) -> dict[str, Any] | None:
        """Its first word; None if it is gone already."""
        return next(self._said, None)

    @property
    def is_over(self) -> bool:
        """Whether it has said its last word, or is gone."""
        return self._over.is_set()

    def wait(self, seconds: float) -> None:
        """So long at most; no longer once it is over."""
        self._over.wait(seconds)

    def tell(self, text: str) -> None:
        """Something that a person should know."""
        self._line.send(note=text)

    def hear(self) -> None:
        """Waits for its last word, gives this process some time, and ends it whatever it is about."""
        if last := next(self._said, None):
            self.summary, self.status = last["summary"], last["status"]
        self._over.set()
        time.sleep(_ALONE_SECONDS)
        os.killpg(0, signal.SIGKILL)


def follow(make: Callable[[], Service], history: History, parent: Parent, name: str) -> None:
    """Tells a service all that the history holds, until the run is over or the service is given up."""
    service, tries, told = None, 0, False
    while True:
        try:
            service = service or make()
            last = service.open()
            history.rewind()
            while True:
                is_over = parent.is_over
                for rows in history.rows(is_over=is_over and parent.status == "finished"):
                    if some := [row for row in rows if row.step > last]:
                        service.send(some)
                        last, tries = some[-1].step, 0
                if is_over:
                    service.close(last, parent.summary, parent.status)
                    return
                parent.wait(_LOOK_SECONDS)
        except Exception as error:
            sys.stderr.write(f"{time.ctime()}: {error!r}\n")
            why = f"{name} is not told: {_first_line(error)}"
            tries += 1
            if parent.is_over or tries == TRIES:
                parent.tell(f"{why}; what it lacks is sent when the run is started again")
                return
            if not told:
                parent.tell(f"{why}; the run goes on, and it is tried again")
                told = True
            parent.wait(min(2.0 ** (tries - 1), _WAIT_SECONDS))


def _messages(line: Line) -> Iterator[dict[str, Any]]:
    while (some := line.receive()) is not None:
        yield from some


def _service(task: Task) -> Service:
    module, _, name = SERVICES[task.service].partition(":")
    return getattr(import_module(module), name)(task)


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:200]


def main() -> None:
    """Serves the process that started this one, and outlives it by a minute at most."""
    # What ends a run ends its trainer, and that is heard here; schedulers signal every process of a job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    line = Line(os.dup(0), os.dup(1))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # Nobody can be asked for a key.
    os.dup2(2, 1)  # The log: what libraries print.
    parent = Parent(line)
    if (message := parent.task()) is None:
        return
    task = Task(**message["task"])
    threading.Thread(target=parent.hear, daemon=True).start()
    with suppress(OSError):  # Of a start that was killed one may still be sending; or there are no locks.
        fcntl.flock(2, fcntl.LOCK_EX)
    os.ftruncate(2, 0)
    path, steps, eval_every = (message[name] for name in ("history", "steps", "eval_every"))
    with closing(History(Path(path), steps=steps, eval_every=eval_every)) as history:
        follow(lambda: _service(task), history, parent, task.service)
    os._exit(0)  # All is sent, or given up; libraries would wait for servers.


if __name__ == "__main__":
    main()

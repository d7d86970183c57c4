"""A folder where runs meet that share nothing else: each leaves what it has, and all take the same of it.

A round is closed once, by whoever comes first to where all are there or long enough was waited; who is in it
is then fixed for everyone, also for those that come later. Files appear in one piece, and on any file system
on which a name can be taken once.
"""

import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stack.config import StackError
from stack.storage import durable

Arrays = dict[str, np.ndarray]

_POLL_SECONDS = 0.05
_CLOSED = "instances.json"
_RESULT = "average.npz"


class Meeting:
    """The folder, as one of the instances sees it."""

    def __init__(self, folder: Path, *, instance: int, instances: int, wait_seconds: float) -> None:
        """Writes nothing yet.

        Args:
          folder: that all of them reach.
          instance: which one this is, from 0.
          instances: how many there are.
          wait_seconds: after which a round is closed without those that are not there.
        """
        self._folder, self._instance, self._instances = folder, instance, instances
        self._wait_seconds = wait_seconds

    def enter(self, name: str, terms: Mapping[str, Any]) -> None:
        """Takes this instance's place, or finds that it has it.

        Args:
          name: of the run.
          terms: what all instances must be alike in, by field.

        Raises:
          StackError: another run has it, or began with other terms; or the folder cannot be written.
        """
        try:
            durable.make_folder(self._folder)
            first = json.loads(self._take("terms.json", json.dumps(dict(terms))))
            owner = self._take(f"instance-{self._instance}.json", json.dumps(name))
        except OSError as error:
            raise StackError(
                f"average.folder={self._folder}: {error.strerror}; name one that can be written"
            ) from error
        for field, value in terms.items():
            if first.get(field) != value:
                raise StackError(
                    f"average.folder={self._folder}: the instances there began with"
                    f" {field}={first.get(field)}, not {value}; give all the same, or name another folder"
                )
        if json.loads(owner) != name:
            raise StackError(
                f"average.folder={self._folder}: the run {json.loads(owner)} is instance {self._instance}"
                " there; set average.instance to another, or go on with that run"
            )

    def send(self, number: int, arrays: Arrays) -> int:
        """Leaves what this instance has for a round; returns its bytes."""
        folder = self._round(number)
        durable.make_folder(folder)
        data = _bytes(arrays)
        durable.write_bytes(folder / f"{self._instance}.npz", data)
        return len(data)

    def sent(self, number: int, instance: int) -> Arrays | None:
        """What an instance has left for a round; None: nothing."""
        return _read(self._round(number) / f"{instance}.npz")

    def close(self, number: int) -> tuple[int, ...]:
        """The instances of a round, which is closed if it was open: waits for all, but not too long."""
        folder, deadline = self._round(number), time.monotonic() + self._wait_seconds
        while (closed := self.closed(number)) is None:
            there = [one for one in range(self._instances) if (folder / f"{one}.npz").is_file()]
            if len(there) == self._instances or (there and time.monotonic() >= deadline):
                self._take(f"{number}/{_CLOSED}", json.dumps(there))
                continue
            time.sleep(_POLL_SECONDS)
        return closed

    def closed(self, number: int) -> tuple[int, ...] | None:
        """The instances of a round; None: it is open."""
        path = self._round(number) / _CLOSED
        return tuple(json.loads(path.read_text())) if path.is_file() else None

    def keep(self, number: int, arrays: Arrays) -> None:
        """Leaves what came of a round, for those that were not in it."""
        durable.write_bytes(self._round(number) / _RESULT, _bytes(arrays))

    def kept(self, number: int) -> Arrays | None:
        """What came of a round; None: it is not there."""
        return _read(self._round(number) / _RESULT)

    def newest(self) -> int | None:
        """The last round of which something came."""
        rounds = [int(path.parent.name) for path in self._folder.glob(f"[0-9]*/{_RESULT}")]
        return max(rounds, default=None)

    def forget(self, before: int) -> None:
        """Removes the rounds before one."""
        for path in self._folder.glob("[0-9]*"):
            if int(path.name) < before:
                shutil.rmtree(path, ignore_errors=True)

    def _round(self, number: int) -> Path:
        return self._folder / str(number)

    def _take(self, name: str, text: str) -> str:
        """Writes a file that none may write again; returns what it holds, whoever wrote it."""
        path = self._folder / name
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        durable.write_text(temporary, text)
        try:
            os.link(temporary, path)
            durable.sync(path.parent)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)
        return path.read_text()


def _bytes(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        allow_pickle=False,
        **{f"{number}": value for number, value in enumerate(arrays.values())},
        names=np.array(list(arrays)),
    )
    return buffer.getvalue()


def _read(path: Path) -> Arrays | None:
    if not path.is_file():
        return None
    with np.load(path) as found:
        return {str(name): found[f"{number}"] for number, name in enumerate(found["names"])}

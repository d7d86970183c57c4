"""A folder where runs meet that share nothing else: each leaves what it has, and all take the same of it.

A round is closed once, by whoever comes first to where all are there or long enough was waited; who is in it
is then fixed for everyone, also for those that come later. What came of it is written once, too, and that is
what all take. Files appear in one piece, and none is written over: names are taken by hard links, which the
file systems of clusters have.
"""

import io
import json
import os
import shutil
import time
import uuid
import zipfile
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


class LeftBehindError(StackError):
    """The others went on, and no longer have what this instance asks for."""


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

    def enter(self, name: str, terms: Mapping[str, Any], ticket: Path) -> None:
        """Takes this instance's place, or finds that it has it.

        Args:
          name: of the run.
          terms: what all instances must be alike in, by field.
          ticket: a file of the run's own, which is written: it says that the place is this run's.

        Raises:
          StackError: another run has it, or began with other terms; or the folder cannot be written.
        """
        place = f"instance-{self._instance}.json"
        mine = _json(ticket, dict) if ticket.is_file() else {"run": name, "id": uuid.uuid4().hex}
        try:
            durable.make_folder(ticket.parent)
            durable.write_text(ticket, json.dumps(mine))
            durable.make_folder(self._folder)
            self._take("terms.json", json.dumps(dict(terms)).encode())
            self._take(place, json.dumps(mine).encode())
        except OSError as error:
            raise StackError(
                f"average.folder={self._folder}: {error.strerror}; name one that can be written, on a file"
                " system with hard links"
            ) from error
        first, owner = (_json(self._folder / name, dict) for name in ("terms.json", place))
        for field, value in terms.items():
            if first.get(field) != value:
                raise StackError(
                    f"average.folder={self._folder}: the instances there began with"
                    f" {field}={first.get(field)}, not {value}; give all the same, or name another folder"
                )
        if owner != mine:
            raise StackError(
                f"average.folder={self._folder}: instance {self._instance} there is another run, of the name"
                f" {owner.get('run')}; go on with that one, set average.instance to another, or name another"
                " folder for a new training"
            )

    def send(self, number: int, arrays: Arrays) -> None:
        """Leaves what this instance has for a round, unless it has left something, or the round is closed.

        Raises:
          LeftBehindError: the others have been through it long ago.
        """
        if self.closed(number) is not None:
            return
        self._check_is_open(number)
        durable.make_folder(self._round(number))
        self._take(f"{number}/{self._instance}.npz", _bytes(arrays))

    def sent(self, number: int, instance: int) -> Arrays:
        """What an instance has left for a round.

        Raises:
          StackError: nothing, or what is damaged.
        """
        return self._arrays(self._round(number) / f"{instance}.npz")

    def close(self, number: int) -> tuple[int, ...]:
        """The instances of a round, which is closed if it was open: waits for all, but not too long.

        Raises:
          LeftBehindError: the others have been through it long ago.
          StackError: the folder was removed.
        """
        deadline = time.monotonic() + self._wait_seconds
        while (closed := self.closed(number)) is None:
            self._check_is_open(number)
            there = [one for one in range(self._instances) if self._file(number, one).is_file()]
            if not there:
                raise StackError(
                    f"{self._round(number)} was removed while instances met there; start them again"
                )
            if len(there) == self._instances or time.monotonic() >= deadline:
                there = [one for one in there if self._is_sound(number, one)]
                self._take(f"{number}/{_CLOSED}", json.dumps(there).encode())
                continue
            time.sleep(_POLL_SECONDS)
        return closed

    def closed(self, number: int) -> tuple[int, ...] | None:
        """The instances of a round; None: it is open, or forgotten."""
        path = self._round(number) / _CLOSED
        return tuple(_json(path, list)) if path.is_file() else None

    def keep(self, number: int, arrays: Arrays) -> Arrays:
        """Writes what came of a round, unless it is there; returns what is there."""
        self._take(f"{number}/{_RESULT}", _bytes(arrays))
        return self._arrays(self._round(number) / _RESULT)

    def kept(self, number: int) -> Arrays | None:
        """What came of a round; None: it is not there."""
        path = self._round(number) / _RESULT
        return self._arrays(path) if path.is_file() else None

    def newest(self, *, within: int, most: int) -> int:
        """The last round up to `most` of which, as of the `within` - 1 before it, something came; else 0."""
        there = {
            int(path.parent.name) for path in self._folder.glob(f"*/{_RESULT}") if _is_round(path.parent)
        }
        whole = [
            number
            for number in there
            if number <= most and all(one in there for one in range(max(1, number - within + 1), number))
        ]
        return max(whole, default=0)

    def last(self) -> int:
        """The last round that is there; 0: none."""
        return max((int(path.name) for path in self._folder.glob("*") if _is_round(path)), default=0)

    def forget(self, before: int) -> None:
        """Removes the rounds before one."""
        for path in self._folder.glob("*"):
            if _is_round(path) and int(path.name) < before:
                shutil.rmtree(path, ignore_errors=True)

    def _check_is_open(self, number: int) -> None:
        last, is_here = self.last(), self._file(number, self._instance).is_file()
        if last > number and not is_here and self.closed(number) is None:
            raise LeftBehindError(
                f"average.folder={self._folder}: the others are {last - number} averages ahead, and no longer"
                " have this one; start this run again, and it goes on from theirs"
            )

    def _file(self, number: int, instance: int) -> Path:
        return self._round(number) / f"{instance}.npz"

    def _is_sound(self, number: int, instance: int) -> bool:
        try:
            self.sent(number, instance)
        except StackError:
            return False
        return True

    def _round(self, number: int) -> Path:
        return self._folder / str(number)

    def _arrays(self, path: Path) -> Arrays:
        try:
            with path.open("rb") as file, np.load(file) as found:
                return {str(name): found[f"{number}"] for number, name in enumerate(found["names"])}
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise StackError(
                f"{path} is damaged or gone; restore it, or start anew in another folder"
            ) from error

    def _take(self, name: str, data: bytes) -> None:
        """Writes a file, unless it is there."""
        path = self._folder / name
        if path.is_file():
            return
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        durable.write_bytes(temporary, data)
        try:
            os.link(temporary, path)
            durable.sync(path.parent)
        except FileExistsError:
            pass
        finally:
            temporary.unlink(missing_ok=True)


def _is_round(path: Path) -> bool:
    return path.name.isdecimal() and len(path.name) < 10 and path.is_dir()


def _json(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, kind):
            raise ValueError(f"it holds no {kind.__name__}")
        return found
    except (OSError, ValueError) as error:
        raise StackError(f"{path} is damaged; restore it, or start anew in another folder") from error


def _bytes(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    numbered = {f"{number}": value for number, value in enumerate(arrays.values())}
    np.savez(buffer, allow_pickle=False, **numbered, names=np.array(list(arrays)))
    return buffer.getvalue()

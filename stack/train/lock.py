"""One writer per run folder."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import jax

from stack.config.errors import StackError
from stack.storage import durable

FILE = "writer.lock"
"""In a run's folder; who holds it is written in it. It stays there, and means nothing by itself."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keeps a run's folder to this run while it trains; readers stay free.

    The system holds the lock and drops it with the process, so one that was killed leaves nothing to clean.
    Process 0 takes it for all of a run. Where a file system has no locks, it is the process named in the
    file, if that is alive on this very machine, that is respected.

    Raises:
        StackError: another run is training there, with its machine, process and start; or the folder cannot
            be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        durable.make_folder(folder)
        file = (folder / FILE).open("a+b", buffering=0)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with file:
        _take(file, folder)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "start": time.time()}
        try:
            file.truncate(0)
            file.write(json.dumps(owner).encode())
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield


def _unwritable(folder: Path, error: OSError) -> StackError:
    return StackError(f"{folder} cannot be written: {error.strerror}; set output_dir to a folder that can")


def _take(file: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES) or _is_alive(_read(file)):
            told = f"{folder}: {_describe(_read(file))}"
            raise StackError(f"{told}; wait for it, or give this run another name") from None


def _read(file: IO[bytes]) -> dict[str, Any]:
    """Who holds the folder, as far as the file tells."""
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except (ValueError, TypeError, RecursionError):
        return {}


def _describe(owner: dict[str, Any]) -> str:
    if not {"host", "pid", "start"} <= owner.keys():
        return "another run is training there"
    start = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner["start"]))
    return f"process {owner['pid']} on {owner['host']} is training there since {start}"


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether the owner that a file names runs on this machine."""
    pid = owner.get("pid")
    # Of a container that was started again this very process may have the number of the one before.
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

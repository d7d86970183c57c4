"""Files and folders that appear whole or not at all."""

import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from stack.config.errors import StackError
from stack.config.paths import expand
from stack.storage import durable


def cache_folder(cache_dir: str | Path) -> Path:
    """The folder `data.cache_dir` names, made if need be."""
    root = expand(cache_dir)
    try:
        durable.make_folder(root)
    except OSError as error:
        raise unwritable(root, error) from error
    return root


def publish_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder of the cache by `write(temporary folder)`, unless it is there.

    A lock makes others that want the same folder wait instead of doing the work too; the system
    drops it with a process that dies. Where a file system has no such locks several may write, each
    into its own temporary folder, and the first to finish wins.

    Raises:
        StackError: no space or no permission in the cache; whatever `write` raises.
    """
    if folder.is_dir():
        return
    prefix = f".{folder.name}.{socket.gethostname()}."
    try:
        with folder.with_name(f".{folder.name}.lock").open("a") as lock:
            alone = _lock(lock)
            if folder.is_dir():
                return
            if alone:  # then what lies here is of a process that was killed
                for left_over in folder.parent.glob(f"{prefix}*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            temporary = folder.with_name(f"{prefix}{uuid.uuid4().hex}")
            temporary.mkdir()
            try:
                write(temporary)
                durable.sync_tree(temporary)
                _rename(temporary, folder)
                durable.sync(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise unwritable(folder.parent, error) from error


def unwritable(folder: Path, error: OSError) -> StackError:
    """What to raise when the cache can not be written."""
    return StackError(
        f"data.cache_dir: cannot write to {folder}: {error.strerror};"
        " set data.cache_dir to a folder with space and permission"
    )


def _lock(file: IO[str]) -> bool:
    """Whether the file system has locks; waits for the lock if it does."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise

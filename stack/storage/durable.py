"""Files and folders of this machine that a loss of power leaves whole.

A file's bytes, its name and the name of its folder reach the disk apart. Each function here returns only
when all of what it made is there, in that order.
"""

import os
import re
import uuid
from pathlib import Path

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are missing. Raises OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:  # Made by another process meanwhile, or no folder.
            if not path.is_dir():
                raise NotADirectoryError(20, os.strerror(20), str(path)) from None
        sync(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file in one piece: readers, and whoever comes after a crash, see the old or the new one.

    Raises OSError, and leaves the old one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that `write_bytes` gives for the time it writes.

    A loss of power may leave it, even beside the file itself: not every disk renames in one piece.
    """
    return _TEMPORARY.fullmatch(name) is not None


def write_text(path: Path, text: str) -> None:
    """The same of text, as UTF-8."""
    write_bytes(path, text.encode())


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """The same of everything in a folder, and of the folder."""
    for path in folder.iterdir():
        if path.is_dir():
            sync_tree(path)
        else:
            sync(path)
    sync(folder)

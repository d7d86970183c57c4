"""Entries of the cache: arrays on disk, every block of which is checked when it is first read."""

import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from stack.config.errors import StackError
from stack.data.atomic import publish_folder

BLOCK = 1 << 16
"""Bytes under one digest: what one place that is read costs at first."""
log = logging.getLogger("stack").warning
"""Who is told of damage where nobody else is named."""

_MANIFEST = "manifest.json"


class DamagedEntryError(StackError):
    """An entry of the cache that is not as it was written; it is gone, and made again when asked for."""


class BlockArray:
    """A one-dimensional array in a file, memory-mapped; what is read of it for the first time is checked."""

    def __init__(self, path: Path, dtype: np.dtype, digests: np.ndarray) -> None:
        """`digests`: [blocks] uint64, XXH3 of each block of the file."""
        self.dtype = dtype
        self._path = path
        self._digests = digests
        self._values = np.memmap(path, dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
        self._per_block = BLOCK // dtype.itemsize
        self._seen = np.zeros(len(digests), bool)

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: Any) -> Any:
        """What an array gives for an integer, a slice or an array of integers.

        Raises:
            DamagedEntryError: it is not what was written.
        """
        if isinstance(key, slice):
            start, stop, _ = key.indices(len(self))
            self._check(np.arange(start // self._per_block, -(-stop // self._per_block)))
        else:
            places = np.asarray(key)
            places = np.flatnonzero(places) if places.dtype == bool else places
            self._check(np.where(places < 0, places + len(self), places).reshape(-1) // self._per_block)
        return np.asarray(self._values[key]) if isinstance(key, slice | np.ndarray) else self._values[key]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it."""
        return np.array(self[:], dtype=dtype, copy=copy)

    def tolist(self) -> list[Any]:
        """All of it, as Python's numbers."""
        return self[:].tolist()

    def _check(self, blocks: np.ndarray) -> None:
        new = np.unique(blocks[~self._seen[blocks]]) if len(blocks) else blocks
        for block in new.tolist():
            data = self._values[block * self._per_block : (block + 1) * self._per_block]
            if xxhash.xxh3_64_intdigest(data.data) != int(self._digests[block]):
                raise damaged(
                    self._path.parent, f"{self._path.name}: its bytes from {block * BLOCK:,} on changed"
                )
            self._seen[block] = True


class BlockWriter:
    """Writes a file of an array, and the digests of its blocks."""

    def __init__(self, path: Path, dtype: Any) -> None:
        """Opens it."""
        self.dtype = np.dtype(dtype)
        self._path = path
        self._file = path.open("wb")
        self._rest = b""
        self._digests = array("Q")

    def write(self, values: np.ndarray) -> None:
        """Adds values, which are made of the file's type."""
        data = np.ascontiguousarray(values, self.dtype).view(np.uint8).reshape(-1)
        self._file.write(data.data)
        start = BLOCK - len(self._rest) if self._rest else 0
        if self._rest:
            self._rest += data[:start].tobytes()
            if len(self._rest) < BLOCK:
                return
            self._digests.append(xxhash.xxh3_64_intdigest(self._rest))
        whole = (len(data) - start) // BLOCK
        for place in range(start, start + whole * BLOCK, BLOCK):
            self._digests.append(xxhash.xxh3_64_intdigest(data[place : place + BLOCK].data))
        self._rest = data[start + whole * BLOCK :].tobytes()

    def close(self) -> dict[str, Any]:
        """Ends it; what the manifest says of it."""
        self._file.close()
        if self._rest:
            self._digests.append(xxhash.xxh3_64_intdigest(self._rest))
        digests = np.frombuffer(self._digests, "=u8").astype("<u8").tobytes()
        self._path.with_suffix(".digests").write_bytes(digests)
        return {
            "dtype": self.dtype.str,
            "bytes": self._path.stat().st_size,
            "digest": xxhash.xxh3_128_hexdigest(digests),
        }

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class EntryWriter:
    """Fills the folder of an entry."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """Takes a folder that is there and empty, and the name it will have: under another it is damaged."""
        self._folder = folder
        self._name = name or folder.name
        self._writers: dict[str, BlockWriter] = {}

    def file(self, name: str, dtype: Any) -> BlockWriter:
        """A file to be written piece by piece."""
        self._writers[name] = BlockWriter(self._folder / f"{name}.bin", dtype)
        return self._writers[name]

    def whole(self, name: str, values: Any) -> None:
        """A file of values that are all here."""
        values = np.asarray(values)
        with self.file(name, values.dtype.newbyteorder("<")) as file:
            file.write(values)

    def finish(self, **about: Any) -> None:
        """Writes the manifest, with what else is to be known of the entry."""
        files = {name: writer.close() for name, writer in self._writers.items()}
        body = json.dumps({"name": self._name, "files": files, "about": about})
        head = xxhash.xxh3_128_hexdigest(body.encode())
        (self._folder / _MANIFEST).write_text(f"{head}\n{body}\n")


def open_entry(
    folder: Path, write: Callable[[EntryWriter], None], *, warn: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, BlockArray]]:
    """What is to be known of an entry, and its arrays; made by `write` if it is not there, or is damaged.

    Args:
        folder: of the entry.
        write: fills it.
        warn: told of damage.

    Raises:
        StackError: no space or no permission in the cache; whatever `write` raises.
    """

    def fill(target: Path) -> None:
        write(EntryWriter(target, folder.name))

    if os.path.lexists(folder) and not folder.is_dir():
        warn(str(damaged(folder, "it is no folder")))
    publish_folder(folder, fill)
    try:
        return _read(folder)
    except DamagedEntryError as error:
        warn(str(error))
    publish_folder(folder, fill)
    return _read(folder)


def read_entry(
    folder: Path, *, warn: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, BlockArray]] | None:
    """The same of an entry that is there and sound; None: it is not, `warn` told of damage.

    Raises:
        StackError: it is damaged and cannot be removed.
    """
    if not folder.is_dir():
        return None
    try:
        return _read(folder)
    except DamagedEntryError as error:
        warn(str(error))
        return None


def remove_entry(folder: Path) -> None:
    """Removes an entry, if it is there.

    Raises:
        StackError: it cannot be removed.
    """
    try:
        if os.path.lexists(folder):
            _remove(folder)
    except OSError as error:
        raise StackError(f"{folder}: cannot be removed: {error.strerror}; check its permissions") from error


def damaged(folder: Path, what: str) -> StackError:
    """Takes an entry off the list, so that it is made again when it is next asked for; what to raise.

    Returns:
        A DamagedEntryError; where the entry cannot be removed, so that it would be met again, another error.
    """
    aside = folder.with_name(f"{folder.name}.damaged")
    told = f"{folder}: a damaged cache entry: {what}"
    try:
        _remove(aside)
        folder.rename(aside)
        _remove(aside)
    except OSError as error:
        return StackError(f"{told}; remove it ({error.strerror})")
    return DamagedEntryError(f"{told}; it is removed, and made again from its source")


def _remove(path: Path) -> None:
    """Whatever it is, and nothing that a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, BlockArray]]:
    path = folder / _MANIFEST
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        if not body.endswith(b"\n") or xxhash.xxh3_128_hexdigest(body[:-1]).encode() != head:
            raise ValueError(f"{_MANIFEST} changed")
        manifest = json.loads(body)
        if manifest["name"] != folder.name:
            raise ValueError(f"{_MANIFEST} is of {manifest['name']}")
        arrays = {}
        for name, file in manifest["files"].items():
            path = folder / f"{name}.digests"
            digests = path.read_bytes()
            if xxhash.xxh3_128_hexdigest(digests) != file["digest"]:
                raise ValueError(f"{path.name} changed")
            path = folder / f"{name}.bin"
            if (size := path.stat().st_size) != file["bytes"]:
                raise ValueError(f"{path.name} has {size:,} of {file['bytes']:,} bytes")
            arrays[name] = BlockArray(path, np.dtype(file["dtype"]), np.frombuffer(digests, "<u8"))
    except OSError as error:  # That of a bad sector does not say which file it is in.
        raise damaged(folder, f"{path.name}: {error.strerror}") from error
    except ValueError as error:
        raise damaged(folder, str(error)) from error
    return manifest["about"], arrays

"""What a checkpoint consists of: the last file that is written, and the first that is read.

Two lines of JSON, the first of which holds a digest of the second: the arrays of the state, the files with a
digest of every block, and where in them each piece of an array lies. A checkpoint without it is none; one
whose files are not exactly as it says is damaged. It needs no JAX: an array is its pieces, C-contiguous and
little-endian.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from stack.config import Config
from stack.config.errors import StackError
from stack.storage.store import Store

NAME = "manifest.jsonl"
BLOCK = 1 << 20
"""Bytes under one digest: what is read at the least."""
_FORMAT = 1
_OLD = "_CHECKPOINT_METADATA"  # Of Orbax, whose format Stack 0.1 began with.
_DIGEST = 16  # Letters of a block's.


class DamagedError(StackError):
    """A checkpoint that is not as it was written."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of an array, and where its bytes lie."""

    leaf: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""


@dataclass(frozen=True, kw_only=True)
class File:
    """Pieces one after another."""

    size: int
    """Bytes."""
    digests: str
    """XXH3 of every block of it, 16 letters each."""
    pieces: tuple[Piece, ...]

    def as_list(self) -> list[Any]:
        """Plain values."""
        return [self.size, self.digests, [[p.leaf, p.start, p.shape, p.offset] for p in self.pieces]]

    @classmethod
    def of_list(cls, values: list[Any]) -> "File":
        """The same back."""
        size, digests, pieces = values
        return cls(
            size=size,
            digests=digests,
            pieces=tuple(
                Piece(leaf=leaf, start=tuple(start), shape=tuple(shape), offset=offset)
                for leaf, start, shape, offset in pieces
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything of a checkpoint but the bytes of its arrays."""

    step: int
    time: float
    """Of its commit, in seconds since 1970."""
    leaves: dict[str, tuple[str, tuple[int, ...]]]
    """dtype and shape by dotted name."""
    files: dict[str, File]
    """By name, within the checkpoint's folder."""
    extra: dict[str, Any]
    """What was saved beside the state."""

    @property
    def size(self) -> int:
        """Bytes of all files but this one."""
        return sum(file.size for file in self.files.values())

    def encode(self) -> bytes:
        """The file."""
        body = json.dumps(
            {
                "step": self.step,
                "time": self.time,
                "leaves": self.leaves,
                "files": {name: file.as_list() for name, file in self.files.items()},
                "extra": self.extra,
            }
        )
        head = json.dumps({"format": _FORMAT, "digest": xxhash.xxh3_128_hexdigest(body.encode())})
        return f"{head}\n{body}\n".encode()

    @classmethod
    def decode(cls, data: bytes) -> "Manifest":
        """The same back.

        Raises:
            ValueError: it is not what was written, or of another version of Stack.
        """
        head, _, body = data.partition(b"\n")
        try:
            head = json.loads(head)
            number, digest = head["format"], head["digest"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ValueError("its first line is not what was written") from None
        if number != _FORMAT:
            raise ValueError(f"its format is {number}, this version of Stack reads {_FORMAT}")
        if not body.endswith(b"\n") or xxhash.xxh3_128_hexdigest(body[:-1]) != digest:
            raise ValueError("it is not what was written")
        values = json.loads(body)
        return cls(
            step=values["step"],
            time=values["time"],
            leaves={name: (dtype, tuple(shape)) for name, (dtype, shape) in values["leaves"].items()},
            files={name: File.of_list(file) for name, file in values["files"].items()},
            extra=values["extra"],
        )


def saved_steps(store: Store) -> list[int]:
    """Steps that have a committed checkpoint, ascending; unread.

    Raises:
        StackError: the store fails, or holds checkpoints of another format.
    """
    try:
        names = store.names()
    except OSError as error:
        raise unreadable(store, error) from error
    steps = set()
    for name in names:
        folder, _, file = name.partition("/")
        if folder.isdecimal() and file == NAME:
            steps.add(int(folder))
        elif folder.isdecimal() and file == _OLD:
            raise StackError(
                f"{store.name}/{folder} is a checkpoint of an earlier format; go on with the version of Stack"
                " that wrote it, or give this run another name"
            )
    return sorted(steps)


def digest_blocks(data: bytes | memoryview) -> str:
    """The digests of a file's blocks, or of some of them from the beginning of one on."""
    return digest_parts([memoryview(data)])


def digest_parts(parts: Iterable[memoryview]) -> str:
    """The same of a file of parts, one after another."""
    digests, block, room = [], xxhash.xxh3_64(), BLOCK
    for part in parts:
        rest = part
        while rest:
            block.update(rest[:room])
            rest, room = rest[room:], room - len(rest[:room])
            if room == 0:
                digests.append(block.hexdigest())
                block, room = xxhash.xxh3_64(), BLOCK
    if room < BLOCK:
        digests.append(block.hexdigest())
    return "".join(digests)


def place(config: Config, folder: Path) -> Store:
    """Where the checkpoints of a run are.

    Args:
        config: of the run.
        folder: of the run.
    """
    chosen = config.checkpoint.folder
    return Store(f"{chosen}/{config.name}" if chosen else folder / "checkpoints")


def read_manifest(store: Store, step: int) -> Manifest:
    """Reads and checks it, and that the files it names are there and no others.

    Raises:
        DamagedError: something is not as it was written.
        OSError: the store fails.
    """
    try:
        manifest = Manifest.decode(store.read(f"{step}/{NAME}"))
    except FileNotFoundError:
        raise DamagedError(f"{store.name}/{step} has no {NAME}: its save did not end") from None
    except ValueError as error:
        raise DamagedError(f"{store.name}/{step}/{NAME} is damaged: {error}") from None
    if manifest.step != step:
        raise DamagedError(f"{store.name}/{step}/{NAME} is damaged: it is of step {manifest.step}")
    there = {name.removeprefix(f"{step}/") for name in store.names(f"{step}/")} - {NAME}
    for problem, names in (
        ("is missing", manifest.files.keys() - there),
        ("was added", there - manifest.files.keys()),
    ):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise DamagedError(f"{store.name}/{step}/{min(names)} {problem}{more}")
    for name, file in manifest.files.items():
        size = store.size(f"{step}/{name}")
        if size is not None and size != file.size:
            raise DamagedError(
                f"{store.name}/{step}/{name} is damaged: it has {size:,} of {file.size:,} bytes"
            )
    return manifest


def read_blocks(
    store: Store, step: int, name: str, file: File, start: int, stop: int
) -> tuple[memoryview, int]:
    """The bytes from `start` to `stop` of a file and those of the blocks around them, checked.

    Returns:
        The bytes, and the place in the file of the first of them.

    Raises:
        DamagedError: they are not what was written.
        OSError: the store fails.
    """
    low, high = start // BLOCK * BLOCK, min(-(-stop // BLOCK) * BLOCK, file.size)
    data = memoryview(bytearray(high - low))
    fill_blocks(store, step, name, file, low, data)
    return data, low


def fill_blocks(store: Store, step: int, name: str, file: File, start: int, target: memoryview) -> None:
    """Fills memory with whole blocks of a file, checked; the last of a file may be shorter.

    Raises:
        DamagedError: they are not what was written.
        OSError: the store fails.
    """
    first, last = start // BLOCK, -(-(start + len(target)) // BLOCK)
    try:
        store.read_into(f"{step}/{name}", start, target)
    except FileNotFoundError:
        raise DamagedError(f"{store.name}/{step}/{name} is missing") from None
    except EOFError:
        told = f"it is shorter than its {file.size:,} bytes"
        raise DamagedError(f"{store.name}/{step}/{name} is damaged: {told}") from None
    want = file.digests[first * _DIGEST : last * _DIGEST]
    got = digest_blocks(target)
    if got != want:
        places = (number for number in range(last - first) if _block(got, number) != _block(want, number))
        told = f"its bytes from {(first + next(places)) * BLOCK:,} on are not what was written"
        raise DamagedError(f"{store.name}/{step}/{name} is damaged: {told}")


def verify(store: Store, step: int) -> Iterator[str]:
    """Reads a checkpoint as a whole; what is wrong with it, a line for each file."""
    try:
        manifest = read_manifest(store, step)
    except DamagedError as error:
        yield str(error)
        return
    for name, file in manifest.files.items():
        try:
            read_blocks(store, step, name, file, 0, file.size)
        except DamagedError as error:
            yield str(error)


def _block(digests: str, number: int) -> str:
    return digests[number * _DIGEST : (number + 1) * _DIGEST]


def unreadable(store: Store, error: OSError) -> StackError:
    """What to raise where a store fails."""
    return StackError(f"{store.name}: {error.strerror}; check the disk or the store, and permissions")

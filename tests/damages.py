"""Random damage of what lies in a folder: of bytes, of files, of folders, and several at once."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ALL = os.environ.get("STACK_TESTS") == "all"
"""Whether ten thousand of each kind of damage and of malformed input are tried, not a quarter of them."""
PARTS = [range(first, first + 2_500) for first in range(0, 10_000 if ALL else 2_500, 2_500)]
seeds_of_damage = pytest.mark.parametrize(
    "seeds", [range(40), *(pytest.param(part, marks=pytest.mark.full) for part in PARTS)], ids=str
)
"""A few every day, thousands in the full tier."""
UNREADABLE = Path("/proc/self/mem")
"""A file whose first byte cannot be read, as of a disk with a bad sector; not even by root."""


def damage(folder: Path, seed: int) -> list[str]:
    """Does one to three of them; what was done, a line each."""
    chance = random.Random(seed)
    told = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = sorted(path for path in folder.rglob("*") if not path.is_symlink())
        files, folders = [p for p in places if p.is_file()], [p for p in places if p.is_dir()]
        if files and folders:
            name = chance.choice(KINDS)
            path, other = chance.choice(files), chance.choice(files)
            if name in OF_FOLDERS:
                path, other = chance.choice(folders), chance.choice(folders)
            told.append(f"{name} {path.relative_to(folder)} {other.relative_to(folder)}")
            {**OF_BYTES, **OF_FILES, **OF_FOLDERS}[name](path, other, chance)
    return told


def remove(path: Path) -> None:
    """Whatever it has become."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _of_bytes(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, Path, random.Random], None]:
    def apply(path: Path, _: Path, chance: random.Random) -> None:
        if data := path.read_bytes():
            path.write_bytes(change(data, chance))

    return apply


def _flip(data: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def _overwrite(data: bytes, chance: random.Random) -> bytes:
    """Some bytes are those of another place, or none."""
    size, start, place = (chance.randrange(len(data)) for _ in range(3))
    some = chance.choice((data[start : start + size], bytes(size)))
    return data[:place] + some[: len(data) - place] + data[place + len(some[: len(data) - place]) :]


def _swap(path: Path, other: Path, _: random.Random) -> None:
    if path in other.parents or other in path.parents or path == other:
        return
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def _replace(make: Callable[[Path, Path], object]) -> Callable[[Path, Path, random.Random], None]:
    def apply(path: Path, other: Path, _: random.Random) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path, other)

    return apply


def _nothing(_path: Path, _other: Path) -> None:
    pass


OF_BYTES = {
    name: _of_bytes(change)
    for name, change in {
        "flip": _flip,
        "overwrite": _overwrite,
        "truncate": lambda data, chance: data[: chance.randrange(len(data))],
        "empty": lambda *_: b"",
        "extend": lambda data, chance: data + chance.choice((bytes(3), b"\n", data)),
        "scramble": lambda data, chance: chance.randbytes(len(data)),
        "JSON": lambda _, chance: chance.choice(
            (b"[]", b"{}", b"null", b"1", b'{"a": [1]}', b'"x"', b"[" * 9999)
        ),
    }.items()
}
OF_FILES = {
    "swap": _swap,
    "remove": _replace(_nothing),
    "copy": lambda path, other, _: shutil.copyfile(other, path) if path != other else None,
    "add": lambda path, _, chance: path.with_name(f"added{chance.randrange(9)}").write_bytes(b"x"),
    "folder instead": _replace(lambda path, _: path.mkdir()),
    "link to nothing": _replace(lambda path, _: path.symlink_to("nothing")),
    "link to itself": _replace(lambda path, _: path.symlink_to(path)),
    "link to another": _replace(lambda path, other: path.symlink_to(other)),
    "link to a folder": _replace(lambda path, _: path.symlink_to(path.parent)),
    "unreadable": _replace(lambda path, _: path.symlink_to(UNREADABLE)),
}
OF_FOLDERS = {
    "swap folders": _swap,
    "remove folder": _replace(_nothing),
    "file instead": _replace(lambda path, _: path.write_bytes(b"x")),
    "link to nothing instead": _replace(lambda path, _: path.symlink_to("nothing")),
    "link to another instead": _replace(
        lambda path, other: path.symlink_to(os.path.relpath(other, path.parent))
    ),
    "add folder": lambda path, *_: (path / "added").mkdir(exist_ok=True),
}
KINDS = (*[*OF_BYTES] * 3, *[*OF_FILES] * 2, *OF_FOLDERS)
"""The usual ones more often."""

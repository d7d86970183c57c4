"""A loss of power: what a disk holds of what a program wrote, if it is cut at some moment.

`record` runs a command under strace. `Disk` replays its calls and keeps, of every file, the bytes and the
names that were synced; what was not synced may have reached the disk or not, as a seed decides. Folders are
journaled: of the names of one folder those that changed earlier are there if a later one is.
"""

import ast
import random
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = (
    "openat,creat,write,writev,pwrite64,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,mkdir,mkdirat,"
    "unlink,unlinkat,rmdir,ftruncate,truncate,close,dup,dup2,dup3,fcntl,copy_file_range,sendfile,link,linkat"
)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One that succeeded."""

    name: str
    arguments: str
    result: int


def strace(trace: Path) -> list[str]:
    """What stands before a command to write what it and its threads ask of the system."""
    # -xx: every letter of a path or of data as a number, so that any can be read back.
    options = ["-f", "-qq", "-y", "-xx", "-s", str(1 << 26), "-e", f"trace={CALLS}"]
    return ["strace", *options, "-o", str(trace)]


def record(command: Sequence[Any], trace: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command and writes what it asks of the system."""
    return subprocess.run([*strace(trace), *command], check=False, capture_output=True, text=True, **options)


def calls(trace: Path) -> Iterator[Call]:
    """The calls of a trace, in the order in which they ended."""
    begun: dict[str, str] = {}
    with trace.open(encoding="ascii", errors="replace") as file:
        yield from _calls(file, begun)


def _calls(lines: Iterable[str], begun: dict[str, str]) -> Iterator[Call]:
    for line in lines:
        process, _, text = line.rstrip("\n").partition(" ")
        text = text.strip()
        if text.endswith("<unfinished ...>"):
            begun[process] = text.removesuffix("<unfinished ...>")
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>", text):
            text = begun.pop(process, "") + text[resumed.end() :]
        if found := re.match(r"(\w+)\((.*)\)\s+= (\d+)(?:<.*>)?$", text):
            yield Call(name=found[1], arguments=found[2], result=int(found[3]))


@dataclass
class Inode:
    """A file, or a folder."""

    data: bytes = b""
    synced: bytes = b""
    """As of its last fsync."""
    names: dict[str, "Inode"] = field(default_factory=dict)
    changes: list[tuple[str, "Inode | None"]] = field(default_factory=list)
    """Of the names since the last fsync: which now is what, or nothing."""
    durable: dict[str, "Inode"] = field(default_factory=dict)
    is_folder: bool = False


@dataclass
class Handle:
    """An open file, and where it is written next."""

    inode: Inode
    place: int


class Disk:
    """What lies below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Inode(is_folder=True)
        self.shown = ""
        """What was written to the screen so far."""
        self._open: dict[int, Handle] = {}  # By descriptor; a duplicate shares it.

    def apply(self, call: Call) -> None:
        """What a call does to what lies there; others are passed over."""
        paths = [
            bytes_of(text).decode(errors="replace") for text in re.findall(r'"((?:\\x..)*)"', call.arguments)
        ]
        descriptor = re.match(r"(\d+)<", call.arguments)
        number = int(descriptor[1]) if descriptor else None
        if number in (1, 2):
            self.shown += written_by(call).decode()
        match call.name:
            case "openat" | "creat":
                self._open.pop(call.result, None)
                if "O_CREAT" in call.arguments or call.name == "creat":
                    inode = self._make(paths[0], is_folder=False)
                else:
                    inode = self._find(paths[0])
                if inode is not None:
                    if "O_TRUNC" in call.arguments:
                        inode.data = b""
                    start = len(inode.data) if "O_APPEND" in call.arguments else 0
                    self._open[call.result] = Handle(inode, start)
            case "write" | "writev" | "pwrite64" if number in self._open:
                assert number is not None
                handle = self._open[number]
                written = b"".join(map(bytes_of, re.findall(r'"((?:\\x..)*)"', call.arguments)))[
                    : call.result
                ]
                if call.name == "pwrite64":
                    start = int(call.arguments.rsplit(",", 1)[1])
                else:
                    start, handle.place = handle.place, handle.place + len(written)
                data = handle.inode.data
                handle.inode.data = data[:start].ljust(start, b"\0") + written + data[start + len(written) :]
            case "dup" | "dup2" | "dup3" | "fcntl" if number in self._open:
                assert number is not None
                if call.name != "fcntl" or "F_DUPFD" in call.arguments:
                    self._open[call.result] = self._open[number]
            case "ftruncate" if number in self._open:
                assert number is not None
                size = int(call.arguments.rsplit(",", 1)[1])
                inode = self._open[number].inode
                inode.data = inode.data[:size].ljust(size, b"\0")
            case "fsync" | "fdatasync" if number in self._open:
                assert number is not None
                inode = self._open[number].inode
                inode.synced, inode.durable, inode.changes = inode.data, dict(inode.names), []
            case "close" if number is not None:
                self._open.pop(number, None)
            case "mkdir" | "mkdirat":
                self._make(paths[-1], is_folder=True)
            case "rename" | "renameat" | "renameat2":
                moved = self._find(paths[0])
                if moved is not None:  # First the new name: a journal never loses both.
                    self._put(paths[1], moved)
                    self._remove(paths[0])
            case "unlink" | "unlinkat" | "rmdir":
                self._remove_at(paths[-1], call.arguments)
            case "copy_file_range" | "sendfile" | "link" | "linkat" | "truncate":
                touched = any(str(self.root) in path for path in paths) or number in self._open
                assert not touched, f"the disk does not know {call.name}"

    def cut(self, seed: int, target: Path) -> None:
        """Writes what is left of it."""
        _write(self.top, target, random.Random(seed))

    def _parts(self, path: str) -> list[str] | None:
        if not path.startswith(f"{self.root}/"):
            return None
        return path[len(str(self.root)) + 1 :].rstrip("/").split("/")

    def _folder(self, parts: list[str]) -> Inode | None:
        inode: Inode | None = self.top
        for part in parts[:-1]:
            inode = inode.names.get(part) if inode else None
        return inode

    def _find(self, path: str) -> Inode | None:
        if path.rstrip("/") == str(self.root):
            return self.top
        parts = self._parts(path)
        folder = self._folder(parts) if parts else None
        return folder.names.get(parts[-1]) if folder and parts else None

    def _make(self, path: str, *, is_folder: bool) -> Inode | None:
        if (found := self._find(path)) is not None:
            return found
        if self._parts(path) is None:
            return None
        made = Inode(is_folder=is_folder)
        self._put(path, made)
        return made

    def _put(self, path: str, inode: Inode) -> None:
        parts = self._parts(path)
        folder = self._folder(parts) if parts else None
        if folder is not None and parts:
            folder.names[parts[-1]] = inode
            folder.changes.append((parts[-1], inode))

    def _remove(self, path: str) -> Inode | None:
        parts = self._parts(path)
        folder = self._folder(parts) if parts else None
        if folder is None or not parts or parts[-1] not in folder.names:
            return None
        folder.changes.append((parts[-1], None))
        return folder.names.pop(parts[-1])

    def _remove_at(self, path: str, arguments: str) -> None:
        base = re.match(r"\d+<((?:\\x..)*)>", arguments)
        if not path.startswith("/") and base:
            path = f"{bytes_of(base[1]).decode()}/{path}"
        self._remove(path)


def _write(inode: Inode, target: Path, chance: random.Random) -> None:
    if not inode.is_folder:
        # Of bytes that were not synced none, some or all are there; a file's length may be, without them.
        choices = (
            inode.synced,
            inode.data,
            inode.synced + bytes(max(0, len(inode.data) - len(inode.synced))),
        )
        same = inode.data == inode.synced
        target.write_bytes(inode.data if same else chance.choice(choices))
        return
    target.mkdir(exist_ok=True)
    names = dict(inode.durable)
    for name, child in inode.changes[: chance.randint(0, len(inode.changes))]:
        if child is None:
            names.pop(name, None)
        else:
            names[name] = child
    for name, child in names.items():
        _write(child, target / name, chance)


def bytes_of(text: str) -> bytes:
    r"""Of letters as `\x61\x62`."""
    return ast.literal_eval(f'b"{text}"')


def written_by(call: Call) -> bytes:
    """What a call has written, or would have."""
    return b"".join(map(bytes_of, re.findall(r'"((?:\\x..)*)"', call.arguments)))

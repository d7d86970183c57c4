"""The files of a source: which are read, and in which order."""

import glob
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.config.paths import expand
from stack.data.hugging_face import dataset_folder
from stack.data.python_library import library_files
from stack.data.text_files import OPENERS

_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "tokens": (".bin", ".npy"),
    "arrayrecord": (".array_record", ".arrayrecord"),
    "text": ("",),
}
_NOT_WRITTEN = (
    *("node_modules", "site-packages", "__pycache__", "venv", "vendor", "third_party", "target", "dist"),
    *("*.min.js", "*.min.css", "*.map", "*.lock", "package-lock.json", "pnpm-lock.yaml", "go.sum"),
)
"""What lies in a tree of source code without having been written there; see `SourceConfig.exclude`."""
_PARTNERS = (".json", ".idx")
"""What lies beside a .bin file of tokens."""


def source_files(source: SourceConfig) -> tuple[Path, ...]:
    """The files of a source, sorted by path; none for `synthetic` and for a dataset of the Hub.

    `path` is a file, a pattern (`**` crosses folders) or a folder, which is searched to its bottom for
    *.jsonl, *.ndjson, *.parquet, *.array_record, *.bin and *.npy in letters of either case, text and JSON
    lines also as *.gz, *.bz2, *.xz and *.zst, or every file of a `text` source; of `code` for those that
    `include` and `exclude` choose. Hidden files are passed over. Links are followed, and what several names
    lead to is read once.
    """
    return list_files(source).read


@dataclass(frozen=True, kw_only=True)
class Files:
    """What lies where a source is."""

    read: tuple[Path, ...]
    """Sorted by path."""
    passed_over: tuple[Path, ...] = ()
    """In its folder and not hidden, but not read: names of another kind, links that lead nowhere."""


def list_files(source: SourceConfig) -> Files:
    """The files of a source, and those in its folder that it does not read; see `source_files`.

    Raises:
        StackError: nothing is there to be read.
    """
    if source.kind == "synthetic":
        return Files(read=())
    if source.kind == "python":
        return Files(read=library_files())
    if source.kind == "hf":
        folder = dataset_folder(source)
        return Files(read=() if folder is None else _once(_files_below(folder)))
    path = expand(source.path or "")
    if source.kind == "code":
        return Files(read=_code_files(source, path))
    if path.is_file():
        return Files(read=(path,))
    suffixes = _SUFFIXES[source.kind]
    if source.kind in ("jsonl", "text"):
        suffixes += tuple(suffix + packed for suffix in suffixes for packed in OPENERS)
    if path.is_dir():
        inside = [file for folder in _folders([path]) for file in _entries(folder)]
        files = [file for file in inside if _has_suffix(file, suffixes) and file.is_file()]
        known = {*files}
        if source.kind == "tokens":
            known |= {file.with_suffix(partner) for file in files for partner in _PARTNERS}
        others = [file for file in inside if file not in known and not file.is_dir()]
        wanted = " or ".join(f"*{suffix}" for suffix in _SUFFIXES[source.kind])
        if not files:
            raise StackError(
                f"data.sources: folder {path} holds no file {wanted}{_instead(others)}; check path and kind"
            )
        return Files(read=_once(files), passed_over=tuple(sorted(others)))
    files = [file for file in _match(path) if file.is_file()]
    if not files and glob.has_magic(str(path)):
        raise StackError(f"data.sources: no file matches {path}; check path")
    if not files:
        raise StackError(f"data.sources: {path} does not exist; check path")
    return Files(read=_once(files))


def describe_names(files: Sequence[Path]) -> str:
    """A few of the names of files, and how many there are beside these."""
    names = ", ".join(file.name for file in files[:3])
    return f"{names} and {len(files) - 3:,} more" if len(files) > 3 else names


def _has_suffix(file: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a name ends so, or so before the number of a shard, as `.array_record-00001-of-00010`."""
    name = file.name.lower()
    return name.endswith(suffixes) or re.sub(r"-\d+-of-\d+$", "", name).endswith(suffixes)


def _files_below(folder: Path) -> list[Path]:
    return [entry for inside in _folders([folder]) for entry in _entries(inside) if entry.is_file()]


def _code_files(source: SourceConfig, root: Path) -> tuple[Path, ...]:
    """The files of a tree that `include` names, and `exclude` does not."""
    if not root.is_dir():
        raise StackError(f"data.sources: {root} is no folder; give a source of kind code the root of a tree")
    excluded = _matcher(_NOT_WRITTEN if source.exclude is None else source.exclude, root)
    included = _matcher(source.include or ("*",), root)
    entries = (entry for folder in _folders([root], excluded) for entry in _entries(folder))
    files = [file for file in entries if file.is_file() and included(file) and not excluded(file)]
    if not files:
        raise StackError(f"data.sources: no file in {root} is chosen; check path, include and exclude")
    return _once(files)


def _matcher(patterns: Sequence[str], root: Path) -> Callable[[Path], bool]:
    """Whether one of the patterns names what lies below a root, or a folder that it is in."""
    # Without a slash a pattern is one of a name, wherever it lies; with one it begins at the root.
    wanted = [tuple(pattern.strip("/").split("/")) for pattern in patterns]
    wanted = [parts if len(parts) > 1 else ("**", *parts) for parts in wanted]

    def is_named(path: Path) -> bool:
        parts = path.relative_to(root).parts
        heads = [parts[:end] for end in range(1, len(parts) + 1)]
        return any(_matches(head, pattern) for head in heads for pattern in wanted)

    return is_named


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _instead(others: Sequence[Path]) -> str:
    return f" (it holds {describe_names(sorted(others))})" if others else ""


def _entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise StackError(
            f"data.sources: folder {folder} cannot be read: {error.strerror}; check path and permissions"
        ) from error


def _folders(roots: Iterable[Path], is_left_out: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """These folders and those below them that are not left out, each once, however many links lead to it."""
    seen, waiting = set(), list(roots)
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield folder
            below = (entry for entry in _entries(folder) if entry.is_dir())
            waiting += [entry for entry in below if is_left_out is None or not is_left_out(entry)]


def _match(pattern: Path) -> Iterator[Path]:
    """What a pattern names; unlike `glob`, `**` enters each folder once, so a circle of links ends."""
    parts = pattern.parts
    crossing = parts.index("**") if "**" in parts else None
    if crossing is None:
        yield from map(Path, glob.glob(str(pattern)))
        return
    rest = parts[crossing + 1 :]
    roots = [folder for folder in map(Path, glob.glob(str(Path(*parts[:crossing])))) if folder.is_dir()]
    for folder in _folders(roots or ([Path()] if not crossing else [])):
        yield from _match(folder / Path(*rest)) if rest else _entries(folder)


def _once(files: Iterable[Path]) -> tuple[Path, ...]:
    """Files sorted by path, of several names of one file the first."""
    unique: dict[tuple[int, int], Path] = {}
    for file in sorted(set(files)):
        status = file.stat()
        unique.setdefault((status.st_dev, status.st_ino), file)
    return tuple(unique.values())

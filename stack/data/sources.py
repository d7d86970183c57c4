"""Documents, read one after another from where they lie; never more than a few in memory."""

import bz2
import codecs
import glob
import gzip
import importlib
import io
import itertools
import json
import lzma
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.config.paths import expand
from stack.data.synthetic import synthetic_documents

if TYPE_CHECKING:
    import pyarrow.parquet

TEXT_DOCUMENT_CHARACTERS = 1 << 24
"""Longer text files are read as several documents, so that no file need fit in memory."""
SYNTHETIC_BYTES = 1 << 20
"""Size of a synthetic source without `max_bytes`."""

_BYTE_ORDER_MARK = "\ufeff"
"""What some editors put before a text; it is not part of it."""
_UNREADABLE = (UnicodeError, LookupError, OSError, EOFError, lzma.LZMAError, zlib.error)
_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
    "tokens": (".bin", ".npy"),
    "text": ("",),
}
_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""How a compressed file of text is read."""
# Not text a person wrote to be read: test suites, generated tables, how the interpreter was built.
# pydoc_data is read through its topics, not as source.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


def read_documents(source: SourceConfig, *, seed: int = 0) -> Iterator[str]:
    """The texts of a source in a fixed order, empty and null ones left out, until `max_bytes` of UTF-8.

    A document is never cut by `max_bytes`: the one that reaches it is the last. `seed` is read by
    `synthetic` alone. Not for `tokens`: see `stack.data.token_files`.

    Raises:
        StackError: a missing path, a folder or pattern without files, bytes that are not text in
            `encoding`, a broken record, a missing field; each with the file and the place in it.
    """
    return (text for text in until(raw_documents(source, seed), source) if text)


def raw_documents(source: SourceConfig, seed: int) -> Iterator[str | None]:
    """All texts of a source, empty and null ones too; see `read_documents`."""
    match source.kind:
        case "python":
            return _python_documents()
        case "synthetic":
            return synthetic_documents(seed)
        case "tokens":
            raise ValueError("a tokens source holds token ids, not text")
    return itertools.chain.from_iterable(read_file(source, path) for path in source_files(source))


def read_file(source: SourceConfig, path: Path) -> Iterator[str | None]:
    """The texts of one file of a source of kind text, jsonl or parquet."""
    match source.kind:
        case "text":
            return _read_text(path, source.encoding)
        case "jsonl":
            return _read_jsonl(path, source.field, source.encoding)
        case "parquet":
            return read_row_groups(source, path)
    raise ValueError(f"a source of kind {source.kind} has no files of text")


def until(documents: Iterable[str | None], source: SourceConfig) -> Iterator[str | None]:
    """Documents, with and without text, to the one that reaches `max_bytes` of UTF-8."""
    limit = source.max_bytes or (SYNTHETIC_BYTES if source.kind == "synthetic" else None)
    total = 0
    for text in documents:
        yield text
        if limit is not None and text:
            total += len(text.encode())
            if total >= limit:
                return


def is_packed(path: Path) -> bool:
    """Whether what a file of text holds is compressed."""
    return path.suffix.lower() in _OPENERS


def source_files(source: SourceConfig) -> tuple[Path, ...]:
    """The files of a source, sorted by path; none for `synthetic`.

    `path` is a file, a pattern (`**` crosses folders) or a folder, which is searched to its bottom for
    *.jsonl, *.ndjson, *.parquet, *.bin and *.npy in letters of either case, text and records also as *.gz,
    *.bz2 and *.xz, or every file of a `text` source; hidden files are passed over. Links are followed, and
    what several names lead to is read once.
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
        return Files(read=(*_topics_file(), *_library_files()))
    path = expand(source.path or "")
    if path.is_file():
        return Files(read=(path,))
    suffixes = _SUFFIXES[source.kind]
    if source.kind in ("jsonl", "text"):
        suffixes += tuple(suffix + packed for suffix in suffixes for packed in _OPENERS)
    if path.is_dir():
        inside = [file for folder in _folders([path]) for file in _entries(folder)]
        files = [file for file in inside if file.name.lower().endswith(suffixes) and file.is_file()]
        known = {*files, *(file.with_suffix(".json") for file in files if source.kind == "tokens")}
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


def _folders(roots: Iterable[Path]) -> Iterator[Path]:
    """These folders and all below them, each once, however many links lead to it."""
    seen, waiting = set(), list(roots)
    while waiting:
        folder = waiting.pop()
        status = folder.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield folder
            waiting += [entry for entry in _entries(folder) if entry.is_dir()]


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


def _topics_file() -> tuple[Path, ...]:
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    return (path,) if path.is_file() else ()


def _library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))

    def wanted(path: Path) -> bool:
        parts = path.relative_to(root).parts
        return _SKIPPED_FOLDERS.isdisjoint(parts) and not any(
            part.startswith(_SKIPPED_PREFIXES) for part in parts
        )

    files = (path for suffix in ("py", "txt") for path in root.rglob(f"*.{suffix}"))
    return sorted((path for path in files if wanted(path)), key=lambda path: path.relative_to(root).parts)


def _python_documents() -> Iterator[str]:
    """The language reference that `help()` shows, then the standard library's files."""
    if _topics_file():
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (topics[name] for name in sorted(topics))
    for path in _library_files():
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError:  # a distribution may ship files in other encodings
            continue


def _open(path: Path, encoding: str, newline: str) -> io.TextIOBase:
    """A file of text, decompressed where its name says so."""
    opener = _OPENERS.get(path.suffix.lower(), open)
    return cast("io.TextIOBase", opener(path, "rt", encoding=encoding, newline=newline))


def _read_text(path: Path, encoding: str) -> Iterator[str]:
    try:
        with _open(path, encoding, newline="") as file:
            mark = _BYTE_ORDER_MARK
            while text := file.read(TEXT_DOCUMENT_CHARACTERS):
                if len(text) == TEXT_DOCUMENT_CHARACTERS:
                    text += file.readline(TEXT_DOCUMENT_CHARACTERS)
                yield text.removeprefix(mark)
                mark = ""
    except _UNREADABLE as error:
        raise _unreadable(path, encoding, error) from error


def _read_jsonl(path: Path, field: str, encoding: str) -> Iterator[str | None]:
    try:
        with _open(path, encoding, newline="\n") as file:
            for number, line in enumerate(file, start=1):
                record = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
                if record.strip():
                    yield _json_text(record, field, lambda number=number: f"{path}:{number}")
    except _UNREADABLE as error:
        raise _unreadable(path, encoding, error) from error


def read_lines(source: SourceConfig, path: Path, start: int, stop: int) -> Iterator[str | None]:
    """The texts of a jsonl file's lines that begin in some of its bytes, in an encoding of whole bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, start - 1))
            if start:  # The line that reaches into these bytes is another's, unless it ends before them.
                file.readline()
            while (place := file.tell()) < stop:
                record = file.readline().decode(source.encoding)
                record = record.removeprefix(_BYTE_ORDER_MARK) if place == 0 else record
                if record.strip():
                    yield _json_text(
                        record, source.field, lambda place=place: f"{path}:{_line_number(path, place)}"
                    )
    except _UNREADABLE as error:
        raise _unreadable(path, source.encoding, error) from error


def _line_number(path: Path, place: int) -> int:
    """Of the line that begins at a byte."""
    number = 1
    with path.open("rb") as file:
        while place > 0:
            block = file.read(min(place, 1 << 20))
            number += block.count(b"\n")
            place -= len(block)
    return number


def _json_text(line: str, field: str, where: Callable[[], str]) -> str | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise StackError(
            f"{where()}: not JSON at column {error.colno}: {error.msg}; mend or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
        raise StackError(f"{where()}: JSON that is {what} to be read; mend or remove the line") from None
    if not isinstance(record, dict):
        raise StackError(f"{where()}: a JSON {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        present = ", ".join(record) or "none"
        raise StackError(
            f"{where()}: no field {field!r}; fields present: {present}; set field to one of them"
        )
    text = record[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise StackError(
            f"{where()}: field {field!r} holds a {type(text).__name__}, not text; set field to a text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StackError(
            f"{where()}: field {field!r} holds half of a surrogate pair at character {error.start};"
            " mend the line"
        ) from error
    return text


def read_row_groups(
    source: SourceConfig, path: Path, groups: Sequence[int] | None = None
) -> Iterator[str | None]:
    """The texts of a Parquet file, or of some of its groups of rows."""
    with _open_parquet(source, path) as file:
        for batch in file.iter_batches(batch_size=1024, columns=[source.field], row_groups=groups):
            yield from batch.column(0).to_pylist()


def row_group_bytes(source: SourceConfig, path: Path) -> list[int]:
    """The size of each group of rows of a Parquet file: of its texts, unpacked."""
    with _open_parquet(source, path) as file:
        column = file.schema_arrow.names.index(source.field)
        groups = (file.metadata.row_group(number) for number in range(file.num_row_groups))
        return [group.column(column).total_uncompressed_size for group in groups]


@contextmanager
def _open_parquet(source: SourceConfig, path: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise StackError(
            f"{path}: reading Parquet needs pyarrow; install the extra: pip install 'stack[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            _check_column(file, path, source.field)
            yield file
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise StackError(f"{path}: not a whole Parquet file ({reason}); write or copy it again") from error


def _check_column(file: "pyarrow.parquet.ParquetFile", path: Path, column: str) -> None:
    schema = file.schema_arrow
    if column not in schema.names:
        present = ", ".join(schema.names) or "none"
        raise StackError(
            f"{path}: no column {column!r}; columns present: {present}; set field to one of them"
        )
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise StackError(
            f"{path}: column {column!r} holds {kind}, not strings; set field to a column of text"
        )


def _unreadable(path: Path, encoding: str, error: Exception) -> StackError:
    packed = path.suffix.lower() in _OPENERS
    match error:
        case UnicodeError() if packed:
            return StackError(
                f"{path}: holds bytes that are not {encoding}; set encoding of this source to the file's"
            )
        case EOFError() | gzip.BadGzipFile() | lzma.LZMAError() | zlib.error():
            return StackError(f"{path}: not a whole {path.suffix} file ({error}); copy or pack it again")
        case UnicodeError():
            return StackError(
                f"{path}: the byte at offset {_first_undecodable(path, encoding)} is not {encoding};"
                " set encoding of this source to the file's, or mend the file"
            )
        case LookupError():
            return StackError(
                f"data.sources: no encoding {encoding!r}; set encoding to one Python knows, as utf-8"
            )
        case OSError():
            return StackError(f"{path}: cannot be read: {error.strerror}; check path and permissions")
    return StackError(f"{path}: {error}")


def _first_undecodable(path: Path, encoding: str) -> int:
    """Offset in bytes: the text layer only knows the place inside its own buffer."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = 0
    with path.open("rb") as file:
        while True:
            block = file.read(1 << 16)
            pending = len(decoder.getstate()[0])  # bytes of a character cut by the last block
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                return offset - pending + error.start
            if not block:
                return offset
            offset += len(block)

"""A source cut into parts, each of which one worker tokenizes.

What can be read from its middle is told by its place, and read by whoever tokenizes it, on this machine or
another that shares the file system: small files together, ranges of lines, groups of rows. All else is read
here, one document after another: what is packed or has to be decoded from its beginning, what this very
interpreter holds, and a source that ends after `max_bytes`.
"""

import codecs
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.array_records import read_array_records, record_count
from stack.data.files import source_files
from stack.data.parquet_files import read_row_groups, row_group_bytes
from stack.data.records import read_lines
from stack.data.sources import raw_documents, read_file, until
from stack.data.text_files import is_packed
from stack.data.token_files import read_token_documents
from stack.data.tokenizer import Tokenizer

_BYTES = 1 << 20  # of a part, about
_MOST = 4096  # documents or files in a part
_LARGE_GROUP = 1 << 24  # bytes of a group of rows that is too large for one worker's memory
_LINE_BY_LINE = ("utf-8", "ascii", "iso8859-1")  # encodings in which the byte 10 ends a line and nothing else


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents that were read."""

    name: str
    """Of their source."""
    documents: list
    """Texts, or ids without bos and eos."""
    left_out: int
    """Documents without text among them."""

    def read(self) -> tuple[list, int]:
        """The documents, and how many without text were left out."""
        return self.documents, self.left_out


@dataclass(frozen=True, kw_only=True)
class File:
    """A file as it was when its source was cut."""

    path: Path
    size: int
    changed_ns: int

    @classmethod
    def at(cls, path: Path) -> "File":
        """The file that lies there now."""
        status = path.stat()
        return cls(path=path.absolute(), size=status.st_size, changed_ns=status.st_mtime_ns)

    def check(self) -> None:
        """Refuses to read another one."""
        told, remedy = f"{self.path}: {socket.gethostname()}", "a file system that all workers share"
        try:
            now = File.at(self.path)
        except OSError as error:
            raise StackError(f"{told} cannot read it: {error.strerror}; put sources on {remedy}") from None
        if now != self:
            another = f"{now.size:,} and not {self.size:,} bytes, or of another time"
            raise StackError(
                f"{told} has another file of that name ({another}); put sources on {remedy}, and change none"
                " while it is read"
            )


@dataclass(frozen=True, kw_only=True)
class Range:
    """Documents where they lie."""

    source: SourceConfig
    files: tuple[File, ...]
    start: int = 0
    """The byte in which the first line begins, or the first group of rows or record; of one file alone."""
    stop: int | None = None
    """The same of what comes after the last; None: these files are read whole."""

    @property
    def name(self) -> str:
        """Where it lies."""
        first, *others = self.files
        if self.stop is not None:
            unit = {"jsonl": "bytes", "parquet": "row groups"}.get(self.source.kind, "records")
            return f"{first.path}, {unit} {self.start:,} to {self.stop:,}"
        return f"{first.path} and {len(others):,} files after it" if others else str(first.path)

    def read(self) -> tuple[list, int]:
        """The documents, and how many without text were left out."""
        texts = list(self._read())
        documents = [text for text in texts if text]
        return documents, len(texts) - len(documents)

    def _read(self) -> Iterator[str | None]:
        for file in self.files:
            file.check()
            if self.stop is None:
                yield from read_file(self.source, file.path)
            elif self.source.kind == "jsonl":
                yield from read_lines(self.source, file.path, self.start, self.stop)
            elif self.source.kind == "arrayrecord":
                yield from read_array_records(self.source, file.path, self.start, self.stop)
            else:
                yield from read_row_groups(self.source, file.path, range(self.start, self.stop))


Part = Texts | Range


def cut(source: SourceConfig, tokenizer: Tokenizer, seed: int) -> Iterator[Part]:
    """The parts of a source, in order; small, so that many can be worked on at once.

    Raises:
        StackError: what the source raises, when its turn comes.
    """
    name = source.path or source.kind
    if source.kind == "tokens":
        yield from _texts(name, read_token_documents(source, tokenizer))
    elif source.kind in ("python", "synthetic", "hf") or source.max_bytes is not None:
        yield from _texts(name, until(raw_documents(source, seed), source))
    else:
        yield from _together(source, map(_file, source_files(source)))


def _together(source: SourceConfig, files: Iterable[File]) -> Iterator[Part]:
    """Small files together; larger ones in ranges, or read here."""
    small: list[File] = []
    size = 0
    for file in files:
        alone = None if _is_small(source, file) else _alone(source, file)
        if small and (alone is not None or size + file.size > _BYTES or len(small) == _MOST):
            yield Range(source=source, files=tuple(small))
            small, size = [], 0
        if alone is not None:
            yield from alone
        else:
            small.append(file)
            size += file.size
    if small:
        yield Range(source=source, files=tuple(small))


def _is_small(source: SourceConfig, file: File) -> bool:
    # What is packed may hold any amount.
    if source.kind in ("parquet", "arrayrecord") or is_packed(file.path):
        return False
    return file.size <= _BYTES


def _alone(source: SourceConfig, file: File) -> Iterator[Part]:
    """The parts of one file."""
    if source.kind == "jsonl" and not is_packed(file.path) and _has_lines(source.encoding):
        for start in range(0, file.size, _BYTES):
            yield Range(source=source, files=(file,), start=start, stop=min(start + _BYTES, file.size))
        return
    if source.kind == "arrayrecord":
        count = record_count(file.path)
        step = min(_MOST, max(1, count * _BYTES // file.size))
        for start in range(0, count, step):
            yield Range(source=source, files=(file,), start=start, stop=min(start + step, count))
        return
    sizes = row_group_bytes(source, file.path) if source.kind == "parquet" else []
    if not sizes or max(sizes) > _LARGE_GROUP:
        yield from _texts(str(file.path), read_file(source, file.path))
        return
    start, size = 0, 0
    for group, more in enumerate(sizes):
        if group > start and size + more > _BYTES:
            yield Range(source=source, files=(file,), start=start, stop=group)
            start, size = group, 0
        size += more
    yield Range(source=source, files=(file,), start=start, stop=len(sizes))


def _texts(name: str, documents: Iterable[str | None] | Iterable[np.ndarray]) -> Iterator[Texts]:
    some, size, left_out = [], 0, 0
    for document in documents:
        if document is None or not len(document):
            left_out += 1
            continue
        some.append(document)
        size += len(document)
        if size >= _BYTES or len(some) == _MOST:
            yield Texts(name=name, documents=some, left_out=left_out)
            some, size, left_out = [], 0, 0
    if some or left_out:
        yield Texts(name=name, documents=some, left_out=left_out)


def _has_lines(encoding: str) -> bool:
    try:
        return codecs.lookup(encoding).name in _LINE_BY_LINE
    except LookupError:
        return False  # It is refused when it is read.


def _file(path: Path) -> File:
    try:
        return File.at(path)
    except OSError as error:
        raise StackError(f"{path}: cannot be read: {error.strerror}; check path and permissions") from error

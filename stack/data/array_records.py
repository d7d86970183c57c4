"""ArrayRecord files: records that are texts, or JSON objects with a text in one of their fields."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.records import Record, json_text

_AT_ONCE = 1024  # records


def read_array_records(
    source: SourceConfig, path: Path, start: int = 0, stop: int | None = None
) -> Iterator[str | None]:
    """The texts of the records of a file, or of some of them by number, counted from 0.

    A record is UTF-8: with a `field` an object of JSON, as in a jsonl file; without one the text itself, a
    `Record`.
    """
    reader = _open(path)
    stop = reader.num_records() if stop is None else stop
    for first in range(start, stop, _AT_ONCE):
        try:
            records = reader.read(first, min(first + _AT_ONCE, stop))
        except RuntimeError as error:
            raise _damaged(path, error) from error
        for number, record in enumerate(records, start=first):
            yield _text(record, source.field, path, number)


def record_count(path: Path) -> int:
    """Records in a file."""
    return _open(path).num_records()


def _text(record: bytes, field: str | None, path: Path, number: int) -> str | None:
    def where() -> str:
        return f"{path}: record {number} (from 0)"

    try:
        text = record.decode()
    except UnicodeDecodeError as error:
        raise StackError(
            f"{where()}: the byte at offset {error.start} is not utf-8; write records of text, or of JSON"
        ) from error
    return Record.at(text, where()) if field is None else json_text(text, field, where)


def _open(path: Path) -> Any:
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader(str(path))
    if not reader.ok():
        try:
            reader.read_all()
        except RuntimeError as error:  # Which says why.
            raise _damaged(path, error) from error
        raise StackError(f"{path}: cannot be read; check path and permissions")
    return reader


def _damaged(path: Path, error: Exception) -> StackError:
    reason = str(error).splitlines()[0]
    return StackError(f"{path}: not a whole ArrayRecord file ({reason}); write or copy it again")

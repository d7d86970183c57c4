"""Records, whole or with a text in one of their fields: the lines of a file, or what else holds JSON."""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.text_files import BYTE_ORDER_MARK, UNREADABLE, open_text, unreadable


class Record(str):
    """A whole record, an object of JSON, and where it lies."""

    __slots__ = ("place",)
    place: str

    @classmethod
    def at(cls, text: str, place: str) -> "Record":
        """The record of this text, that lies there."""
        record = cls(text)
        record.place = place
        return record


def read_jsonl(source: SourceConfig, path: Path) -> Iterator[str | None]:
    """The texts of a jsonl file's lines; None where there is none."""
    try:
        with open_text(path, source.encoding, newline="\n") as file:
            for number, line in enumerate(file, start=1):
                record = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if record.strip():
                    yield json_text(record, source.field, lambda number=number: f"{path}:{number}")
    except UNREADABLE as error:
        raise unreadable(path, source.encoding, error) from error


def read_lines(source: SourceConfig, path: Path, start: int, stop: int) -> Iterator[str | None]:
    """The texts of a jsonl file's lines that begin in some of its bytes, in an encoding of whole bytes."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, start - 1))
            if start:  # The line that reaches into these bytes is another's, unless it ends before them.
                file.readline()
            first, number = file.tell(), -1
            while (place := file.tell()) < stop:
                record, number = file.readline().decode(source.encoding), number + 1
                record = record.removeprefix(BYTE_ORDER_MARK) if place == 0 else record
                if record.strip():
                    yield json_text(record, source.field, partial(_place, path, first, number))
    except UNREADABLE as error:
        raise unreadable(path, source.encoding, error) from error


def _place(path: Path, start: int, lines: int) -> str:
    """Of the line so many lines after the one that begins at a byte."""
    return f"{path}:{_line_number(path, start) + lines}"


@lru_cache
def _line_number(path: Path, place: int) -> int:
    """Of the line that begins at a byte."""
    number = 1
    with path.open("rb") as file:
        while place > 0:
            block = file.read(min(place, 1 << 20))
            number += block.count(b"\n")
            place -= len(block)
    return number


def json_text(line: str, field: str | None, where: Callable[[], str]) -> str | None:
    """The text in a JSON object, see `text_at`; without a field the object itself, a `Record`."""
    try:
        record = json.loads(line.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise StackError(
            f"{where()}: not JSON at column {error.colno}: {error.msg}; mend or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:
        what = "nested too deep" if isinstance(error, RecursionError) else "a number of too many digits"
        raise StackError(f"{where()}: JSON that is {what} to be read; mend or remove the line") from None
    if not isinstance(record, dict):
        wanted = "" if field is None else f" with a field {field!r}"
        raise StackError(
            f"{where()}: a JSON {type(record).__name__}, not an object{wanted}; mend or remove the line"
        )
    return Record.at(line.strip(), where()) if field is None else text_at(record, field, where)


def fields_of(record: str, place: str) -> dict[str, Any]:
    """The fields of a whole record.

    Raises:
        StackError: it is no object of JSON.
    """
    return json.loads(str(json_text(record, None, lambda: place)))


def text_at(
    record: dict[str, object], field: str, where: Callable[[], str], *, setting: str = "field"
) -> str | None:
    """The text that a record holds under a field's name, or at a path of names and list indices, `a.0.b`.

    None where it is null, or what should hold it is.

    Args:
        record: as JSON gives it.
        field: a name the record has goes before a path.
        where: names the record's place.
        setting: what names the field.

    Raises:
        StackError: no such field, or what it holds is no text.
    """
    text = value_at(record, field, where, setting=setting)
    if text is None:
        return None
    if not isinstance(text, str):
        raise StackError(
            f"{where()}: field {field!r} holds a {type(text).__name__}, not text; set {setting} to a text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StackError(
            f"{where()}: field {field!r} holds half of a surrogate pair at character {error.start};"
            " mend the line"
        ) from error
    return text


def value_at(record: dict[str, object], path: str, where: Callable[[], str], *, setting: str) -> object:
    """The same of any value."""
    if path in record:
        return record[path]
    value: object
    value, above = record, ""
    for key in path.split("."):
        if value is None:
            return None
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            raise StackError(
                f"{where()}: no field {path!r}; {_what_is_there(value, above)}; set {setting} to one of them,"
                " or if other lines have it, add it to this one"
            )
        above = f"{above}.{key}" if above else key
    return value


def _what_is_there(value: object, above: str) -> str:
    inside = f" in {above!r}" if above else ""
    if isinstance(value, dict):
        return f"fields present{inside}: {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, list):
        return f"{above!r} is a list of {len(value)}"
    return f"{above!r} holds a {type(value).__name__}"

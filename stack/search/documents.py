"""Documents that are searched: where they lie, and the passages that they are cut in."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.config.paths import expand
from stack.data.files import list_files
from stack.data.records import Record, read_jsonl, text_at
from stack.data.text_files import read_text
from stack.data.tokenizer import Tokenizer

TEXTS = ("txt", "md", "markdown", "rst")
CODE = (
    *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "cu", "cs", "java", "kt", "scala", "go", "rs", "swift"),
    *("js", "jsx", "ts", "tsx", "rb", "php", "pl", "lua", "r", "jl", "hs", "ml", "sh", "sql", "tex"),
    *("html", "css", "yaml", "yml", "toml"),
)
"""Endings of names in a folder that are read."""
LEAST_TOKENS = 16
"""Of a passage, at the least that can be asked for."""
_PIECE = 1 << 20
"""Characters after which a document goes on as another, so that no file need fit in memory."""
_ENDS = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"[.!?。]\s"), re.compile(r"\s"))
"""Where a passage ends best, the best first."""
_WORD, _SPACE = re.compile(r"\S"), re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text, or a piece of a long one, and where it lies."""

    file: str
    """Its path from the folder; of a single file its name."""
    line: int
    """Of its first character, from 1; of a record that of the record."""
    id: str | int | None
    """That a record gives."""
    start: int
    """Characters of the file, or of the record's text, before it."""
    text: str

    @property
    def digest(self) -> str:
        """Of its text."""
        return hashlib.blake2b(self.text.encode(), digest_size=16).hexdigest()


def read(path: str, tell: Callable[[str], None] = lambda _: None) -> Iterator[Document]:
    """The documents of a folder or a file, in order of their paths.

    Of a folder the files that end as `TEXTS` and `CODE` do, in UTF-8; hidden ones and what was not written
    there are passed over as a source of code passes them over. Of a .jsonl each record, whose text is in its
    field `text`, with its `id` if it has one. A byte order mark is no character of a text; line ends are as
    they are.

    Args:
      path: of a folder, a text or a .jsonl.
      tell: is told what was left out.

    Raises:
      StackError: nothing is there, or a record that cannot be read; with its place.
    """
    root = expand(path)
    found = _records(root, tell) if is_of_records(root) else _texts(root, tell)
    first = next(found, None)
    if first is not None:
        yield first
        yield from found
    else:
        raise StackError(f"--documents {root}: no text is in it; give a folder or a file that has some")


def is_of_records(file: str | Path) -> bool:
    """Whether a file has a document in each line."""
    return ".jsonl" in Path(file).suffixes


def _texts(root: Path, tell: Callable[[str], None]) -> Iterator[Document]:
    if root.is_dir():
        include = tuple(f"*.{end}" for end in (*TEXTS, *CODE))
        try:
            files = list_files(SourceConfig(kind="code", path=str(root), include=include)).read
        except StackError:
            raise StackError(
                f"--documents {root}: no file in it is a text by its name; there are .{', .'.join(TEXTS)} and"
                " those of source code"
            ) from None
    elif root.is_file():
        files = (root,)
    else:
        raise StackError(f"--documents {root}: there is no such folder or file; give the path of one")
    empty = []
    for file in files:
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        try:
            start, line, number = 0, 1, 0
            for text in read_text(SourceConfig(kind="text", path=str(file)), file):
                for piece in _pieces(text):
                    if piece.strip():
                        number += 1
                        yield Document(file=name, line=line, id=None, start=start, text=piece)
                    start, line = start + len(piece), line + piece.count("\n")
        except StackError as error:
            what = str(error).partition(";")[0]
            if not root.is_dir():
                raise StackError(f"--documents {what}; give a text in UTF-8") from error
            tell(f"left out  {what}")
            continue
        if not number:
            empty.append(name)
    if empty:
        more = f" and {len(empty) - 1:,} more files" if len(empty) > 1 else ""
        tell(f"left out  {empty[0]}{more}, without text")


def _records(file: Path, tell: Callable[[str], None]) -> Iterator[Document]:
    if not file.is_file():
        raise StackError(f"--documents {file}: there is no such file; give the path of one")
    empty = 0
    for record in read_jsonl(SourceConfig(kind="jsonl", path=str(file), field=None), file):
        assert isinstance(record, Record)
        place = record.place
        fields: dict[str, Any] = json.loads(record)
        text = text_at(fields, "text", lambda place=place: place, setting="that field")
        name = fields.get("id")
        if name is not None and type(name) not in (str, int):
            raise StackError(f"{place}: its id is a {type(name).__name__}; give a text or a whole number")
        if text is None or not text.strip():
            empty += 1
            continue
        start, line = 0, int(place.rsplit(":", 1)[1])
        for piece in _pieces(text):
            if piece.strip():
                yield Document(file=file.name, line=line, id=name, start=start, text=piece)
            start += len(piece)
    if empty:
        tell(f"left out  {empty:,} records of {file.name}, without text")


def _pieces(text: str) -> Iterator[str]:
    """A text, where it is long in several, each to the end of a line if it has one."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def cut(text: str, tokenizer: Tokenizer, *, tokens: int, overlap: int) -> list[tuple[int, int]]:
    """The passages of a text: their first characters, and the last + 1; none is white space at its ends.

    Each ends with a paragraph, a line, a sentence or a word, the first of these that ends in its second
    half, and the next one begins with a word.

    Args:
      text: of a document.
      tokenizer: of the run.
      tokens: of a passage at most.
      overlap: tokens that the next passage begins before the end of one, at most half of `tokens`.
    """
    passages: list[tuple[int, int]] = []
    starts = np.maximum.accumulate(tokenizer.encode_with_offsets(text)[1][:, 0])

    def character(token: int) -> int:
        return int(starts[token]) if token < len(starts) else len(text)

    place = end = 0
    while word := _WORD.search(text, place):
        start = word.start()
        first = max(int(np.searchsorted(starts, start, side="right")) - 1, 0)
        before, end = end, max(character(first + tokens), start + 1)
        while (beyond := _beyond(text[start:end], tokenizer, tokens)) is not None:
            end = start + beyond
        if end < len(text):
            more = _WORD.search(text, before)  # It reaches further than the one before it.
            end = _good_end(text, max((start + end) // 2, more.end() if more else end), end)
        passages.append((start, start + len(text[start:end].rstrip())))
        if not _WORD.search(text, end):
            break
        # Nothing lies between two passages but white space.
        token = max(int(np.searchsorted(starts, end)) - overlap, 0)
        place = min(max(character(token), start + 1), end)
        if space := _SPACE.search(text, place, end):
            place = space.end()
    return passages


def _beyond(text: str, tokenizer: Tokenizer, tokens: int) -> int | None:
    """Where a text is to be cut, as by itself it has too many tokens; None: it has not."""
    starts = tokenizer.encode_with_offsets(text)[1][:, 0]
    if len(starts) <= tokens or len(text) == 1:
        return None
    return min(max(int(starts[tokens]), 1), len(text) - 1)


def _good_end(text: str, start: int, end: int) -> int:
    """The best end of a passage between two characters."""
    for pattern in _ENDS:
        ends = [match.end() for match in pattern.finditer(text, start, end)]
        if ends:
            return ends[-1]
    return end

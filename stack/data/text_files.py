"""Files of text, compressed or not: opened, read, and what is wrong with them."""

import bz2
import codecs
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from stack.config import SourceConfig
from stack.config.errors import StackError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXT_DOCUMENT_CHARACTERS = 1 << 24
"""Longer text files are read as several documents, so that no file need fit in memory."""
BYTE_ORDER_MARK = "\ufeff"
"""What some editors put before a text; it is not part of it."""
UNREADABLE = (UnicodeError, LookupError, OSError, EOFError, lzma.LZMAError, zlib.error, zstd.ZstdError)
"""What `open_text`, and reading from it, raise: see `unreadable`."""


def _open_zstd(path: Path, _: str, *, encoding: str, newline: str) -> io.TextIOBase:
    # What was packed with `zstd --long=31`, as many corpora are, needs more memory than it takes by default.
    wide: dict[int, int] = {zstd.DecompressionParameter.window_log_max: 31}
    return io.TextIOWrapper(zstd.ZstdFile(path, options=wide), encoding=encoding, newline=newline)


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
"""How a compressed file of text is read."""


def is_packed(path: Path) -> bool:
    """Whether what a file of text holds is compressed."""
    return path.suffix.lower() in OPENERS


def open_text(path: Path, encoding: str, newline: str) -> io.TextIOBase:
    """A file of text, decompressed where its name says so."""
    opener = OPENERS.get(path.suffix.lower(), open)
    return cast("io.TextIOBase", opener(path, "rt", encoding=encoding, newline=newline))


def read_text(source: SourceConfig, path: Path) -> Iterator[str]:
    """The text of a file, in several documents where it is long."""
    try:
        with open_text(path, source.encoding, newline="") as file:
            mark = BYTE_ORDER_MARK
            while text := file.read(TEXT_DOCUMENT_CHARACTERS):
                if len(text) == TEXT_DOCUMENT_CHARACTERS:
                    text += file.readline(TEXT_DOCUMENT_CHARACTERS)
                yield text.removeprefix(mark)
                mark = ""
    except UNREADABLE as error:
        raise unreadable(path, source.encoding, error) from error


def unreadable(path: Path, encoding: str, error: Exception) -> StackError:
    """What to raise where a file of text is not one, or not in an encoding."""
    packed = path.suffix.lower() in OPENERS
    match error:
        case UnicodeError() if packed:
            return StackError(
                f"{path}: holds bytes that are not {encoding}; set encoding of this source to the file's"
            )
        case EOFError() | gzip.BadGzipFile() | lzma.LZMAError() | zlib.error() | zstd.ZstdError():
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

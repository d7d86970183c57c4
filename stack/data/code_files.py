"""Files of source code: those that a person wrote, told by what is in them."""

from collections.abc import Iterator
from pathlib import Path

from stack.config import SourceConfig
from stack.data.text_files import BYTE_ORDER_MARK, TEXT_DOCUMENT_CHARACTERS, UNREADABLE, unreadable

_BLOCK = 1 << 16  # characters, after which a binary file is known for one


def read_code(source: SourceConfig, path: Path) -> Iterator[str | None]:
    """The text of a file, or None where it is binary, or hardly written by hand.

    The first is one with a zero byte or bytes that are not text in `encoding`; the second one with a line
    longer than `max_line_characters`, or longer than any text file that is read as one document.
    """
    blocks, size = [], 0
    try:
        with path.open(encoding=source.encoding, newline="") as file:
            while block := file.read(_BLOCK):
                size += len(block)
                if "\0" in block or size > TEXT_DOCUMENT_CHARACTERS:
                    yield None
                    return
                blocks.append(block)
    except UnicodeDecodeError:
        yield None
        return
    except UNREADABLE as error:
        raise unreadable(path, source.encoding, error) from error
    text = "".join(blocks).removeprefix(BYTE_ORDER_MARK)
    longest = max(map(len, text.splitlines()), default=0)
    yield text if longest <= (source.max_line_characters or longest) else None

"""Documents, read one after another from where they lie; never more than a few in memory."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from stack.config import SourceConfig
from stack.data.array_records import read_array_records
from stack.data.code_files import read_code
from stack.data.files import source_files
from stack.data.hugging_face import read_dataset
from stack.data.parquet_files import read_row_groups
from stack.data.python_library import library_documents
from stack.data.records import read_jsonl
from stack.data.synthetic import synthetic_documents
from stack.data.text_files import read_text

SYNTHETIC_BYTES = 1 << 20
"""Size of a synthetic source without `max_bytes`."""

_READERS = {
    "text": read_text,
    "code": read_code,
    "jsonl": read_jsonl,
    "parquet": read_row_groups,
    "arrayrecord": read_array_records,
}
"""The texts of one file of a source, by kind: None where a document has none."""


def read_documents(source: SourceConfig, *, seed: int = 0) -> Iterator[str]:
    """The texts of a source in a fixed order, those that it leaves out aside, until `max_bytes` of UTF-8.

    A document is never cut by `max_bytes`: the one that reaches it is the last. `seed` is read by
    `synthetic` alone. Not for `tokens`: see `stack.data.token_files`.

    Raises:
        StackError: a missing path, a folder or pattern without files, bytes that are not text in
            `encoding`, a broken record, a missing field; each with the file and the place in it.
    """
    return (text for text in until(raw_documents(source, seed), source) if text and has_length(source, text))


def has_length(source: SourceConfig, text: str) -> bool:
    """Whether a text is neither too short nor too long for a source."""
    return (source.min_characters or 0) <= len(text) <= (source.max_characters or len(text))


def raw_documents(source: SourceConfig, seed: int) -> Iterator[str | None]:
    """All texts of a source, empty and null ones too; see `read_documents`."""
    match source.kind:
        case "python":
            return library_documents()
        case "synthetic":
            return synthetic_documents(seed)
        case "hf":
            return read_dataset(source)
        case "tokens":
            raise ValueError("a tokens source holds token ids, not text")
    return itertools.chain.from_iterable(read_file(source, path) for path in source_files(source))


def read_file(source: SourceConfig, path: Path) -> Iterator[str | None]:
    """The texts of one file of a source whose kind has such."""
    return _READERS[source.kind](source, path)


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

"""Documents, read one after another from where they lie; never more than a few in memory."""

import codecs
import glob
import importlib
import itertools
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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

_SUFFIXES = {"jsonl": (".jsonl",), "parquet": (".parquet",), "tokens": (".bin", ".npy"), "text": ("",)}
# Not text a person wrote to be read: test suites, generated tables, how the interpreter was built.
# pydoc_data is read through its topics, not as source.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


def read_documents(source: SourceConfig, *, seed: int = 0) -> Iterator[str]:
    """The texts of a source in a fixed order, empty ones left out, until `max_bytes` of UTF-8.

    A document is never cut by `max_bytes`: the one that reaches it is the last. `seed` is read by
    `synthetic` alone. Not for `tokens`: see `stack.data.token_files`.

    Raises:
        StackError: a missing path, a folder or pattern without files, bytes that are not text in
            `encoding`, a broken record, a missing field; each with the file and the place in it.
    """
    match source.kind:
        case "python":
            documents = _python_documents()
        case "text":
            documents = itertools.chain.from_iterable(
                _read_text(path, source.encoding) for path in source_files(source)
            )
        case "jsonl":
            documents = itertools.chain.from_iterable(
                _read_jsonl(path, source.field, source.encoding) for path in source_files(source)
            )
        case "parquet":
            documents = itertools.chain.from_iterable(
                _read_parquet(path, source.field) for path in source_files(source)
            )
        case "synthetic":
            documents = synthetic_documents(seed)
        case "tokens":
            raise ValueError("a tokens source holds token ids, not text")
    limit = source.max_bytes or (SYNTHETIC_BYTES if source.kind == "synthetic" else None)
    return _until(filter(None, documents), limit)


def source_files(source: SourceConfig) -> tuple[Path, ...]:
    """The files of a source, sorted by path; none for `synthetic`.

    `path` is a file, a pattern (`**` crosses folders) or a folder, which is searched to its bottom for
    *.jsonl, *.parquet, *.bin and *.npy, or every file of a `text` source; hidden files are passed over.
    """
    if source.kind == "synthetic":
        return ()
    if source.kind == "python":
        return (*_topics_file(), *_library_files())
    path = expand(source.path or "")
    if path.is_file():
        return (path,)
    if path.is_dir():
        suffixes = _SUFFIXES[source.kind]
        files = [
            file
            for file in path.rglob("*")
            if file.name.endswith(suffixes)
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        wanted = " or ".join(f"*{suffix}" for suffix in suffixes)
        if not files:
            raise StackError(f"data.sources: folder {path} holds no file {wanted}; check path and kind")
    else:
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
        if not files and glob.has_magic(str(path)):
            raise StackError(f"data.sources: no file matches {path}; check path")
        if not files:
            raise StackError(f"data.sources: {path} does not exist; check path")
    return tuple(sorted(files))


def _until(documents: Iterator[str], max_bytes: int | None) -> Iterator[str]:
    total = 0
    for text in documents:
        yield text
        if max_bytes is not None:
            total += len(text.encode())
            if total >= max_bytes:
                return


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


def _read_text(path: Path, encoding: str) -> Iterator[str]:
    try:
        with path.open(encoding=encoding, newline="") as file:
            while text := file.read(TEXT_DOCUMENT_CHARACTERS):
                if len(text) == TEXT_DOCUMENT_CHARACTERS:
                    text += file.readline(TEXT_DOCUMENT_CHARACTERS)
                yield text
    except (UnicodeError, LookupError, OSError) as error:
        raise _unreadable(path, encoding, error) from error


def _read_jsonl(path: Path, field: str, encoding: str) -> Iterator[str]:
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_text(line, field, f"{path}:{number}")
    except (UnicodeError, LookupError, OSError) as error:
        raise _unreadable(path, encoding, error) from error


def _json_text(line: str, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise StackError(
            f"{place}: not JSON at column {error.colno}: {error.msg}; mend or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise StackError(f"{place}: a JSON {type(record).__name__}, not an object with a field {field!r}")
    if field not in record:
        present = ", ".join(record) or "none"
        raise StackError(f"{place}: no field {field!r}; fields present: {present}; set field to one of them")
    text = record[field]
    if not isinstance(text, str):
        raise StackError(
            f"{place}: field {field!r} holds a {type(text).__name__}, not text; set field to a text"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StackError(
            f"{place}: field {field!r} holds half of a surrogate pair at character {error.start};"
            " mend the line"
        ) from error
    return text


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise StackError(
            f"{path}: reading Parquet needs pyarrow; install the extra: pip install 'stack[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            _check_column(file, path, column)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
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
    match error:
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

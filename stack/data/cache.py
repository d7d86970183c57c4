"""Tokenized corpora on disk, keyed by what was read and by which tokenizer."""

import hashlib
import itertools
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.atomic import cache_folder, publish_folder, replace_text, unwritable
from stack.data.sources import SYNTHETIC_BYTES, read_documents, source_files
from stack.data.split import document_hash
from stack.data.token_files import read_token_documents
from stack.data.tokenizer import Tokenizer

_FORMAT = 3  # raise it when what is written changes: old entries are then not found
_COLUMNS = {"offsets": "<i8", "num_bytes": "<i8", "hashes": "<u8"}
"""What is kept per document, a file each."""
_CHUNK = 1 << 20  # characters or tokens a thread takes at one time
_CHUNK_DOCUMENTS = 4096
_READ_BACK = 1 << 12  # tokens of a chunk that are decoded again
_SETTLED_SECONDS = 2  # a file changed more recently may change again within the clock's resolution


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The tokens of one source; every document is stored as bos, its tokens, eos."""

    key: str
    """Name of its folder in the cache."""
    fingerprint: str
    """Hash of every document's text, in order, and of the tokenizer."""
    tokens: np.ndarray
    """[tokens], memory-mapped, the smallest unsigned type that holds the vocabulary."""
    offsets: np.ndarray
    """[documents + 1] int64: document i is tokens[offsets[i]:offsets[i + 1]]."""
    num_bytes: np.ndarray
    """[documents] int64: UTF-8 bytes of each document's text."""
    hashes: np.ndarray
    """[documents] uint64: `split.document_hash` of each document's text."""
    left_out: int
    """Documents without text."""
    unknown_tokens: int
    """Tokens that stand for words the tokenizer does not know."""
    changed: float
    """Share of the beginnings of documents, one of every chunk, that do not come back from their tokens."""


def open_corpus(
    source: SourceConfig,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    show_progress: bool = True,
) -> Corpus:
    """The corpus of a source, tokenized by `workers` threads unless the cache holds it already.

    The key is made of the content of the source's files, not of their names or dates, of what the
    source says about reading them, and of the tokenizer. Whoever asks for the same key meanwhile, in
    any process, waits and then reads.

    Raises:
        StackError: what the sources raise, a source without text, a cache that can not be written.
    """
    root = cache_folder(cache_dir)
    key = _key(source, tokenizer, root, seed)
    folder = root / f"tokens-{key}"

    def write(target: Path) -> None:
        progress, task = _progress(source, show_progress)
        with progress:
            left_out = itertools.count()
            documents = _documents(source, tokenizer, seed, lambda: next(left_out))
            chunks = _tokenize(documents, tokenizer, workers or os.cpu_count() or 1)
            counted = _counted(chunks, lambda count: progress.advance(task, count))
            if not _write(counted, tokenizer, target, lambda: next(left_out)):
                name = source.path or source.kind
                raise StackError(f"data.sources: {name} holds no text; give it documents that are not empty")

    publish_folder(folder, write)
    return _load(folder, key)


def _key(source: SourceConfig, tokenizer: Tokenizer, root: Path, seed: int) -> str:
    files = source_files(source)
    sidecars = [path.with_suffix(".json") for path in files if source.kind == "tokens"]
    parts = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "seed": seed if source.kind == "synthetic" else None,
        **source.model_dump(include={"kind", "field", "max_bytes", "encoding"}),
        "files": _file_digests([*files, *filter(Path.is_file, sidecars)], root),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _file_digests(paths: Sequence[Path], root: Path) -> list[str]:
    """Content hashes; those of files whose size, inode and time stand as noted are not read again."""
    names = [str(path.absolute()) for path in paths]
    note = root / f"digests-{hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()}.json"
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        known = {}
    entries = {name: _digest(Path(name), known.get(name)) for name in names}
    settled = time.time_ns() - _SETTLED_SECONDS * 10**9
    kept = {name: entry for name, entry in entries.items() if entry[2] < settled}
    if kept != known:
        try:
            replace_text(note, json.dumps(kept))
        except OSError as error:
            raise unwritable(root, error) from error
    return [entries[name][3] for name in names]


def _digest(path: Path, known: list | None) -> list:
    """[size, inode, modification time in ns, content hash]."""
    try:
        status = path.stat()
        stamp = [status.st_size, status.st_ino, status.st_mtime_ns]
        if known and known[:3] == stamp:
            return known
        with path.open("rb") as file:
            return [*stamp, hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()]
    except OSError as error:
        raise StackError(f"{path}: cannot be read: {error.strerror}; check path and permissions") from error


def _documents(
    source: SourceConfig, tokenizer: Tokenizer, seed: int, leave_out: Callable[[], object]
) -> Iterator[str] | Iterator[np.ndarray]:
    if source.kind == "tokens":
        return read_token_documents(source, tokenizer)
    return read_documents(source, seed=seed, leave_out=leave_out)


@dataclass(frozen=True, kw_only=True)
class _Tokenized:
    """Documents one after another, bos and eos included, and per document what `Corpus` keeps."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray
    unknown: int
    """Tokens for words the tokenizer does not know."""
    is_changed: bool
    """Whether the beginning of the first document's text does not come back from its tokens."""


def _tokenize(
    documents: Iterable[str] | Iterable[np.ndarray], tokenizer: Tokenizer, workers: int
) -> Iterator[_Tokenized]:
    """Chunks of documents in order, a bounded number of them in work.

    Threads, not processes: `tokenizers` releases the interpreter lock while it works, so they run side
    by side, need no guarded main module and pickle nothing.
    """
    pending: deque[Future[_Tokenized]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize")
    try:
        for chunk in _chunked(documents):
            pending.append(pool.submit(_tokenize_chunk, chunk, tokenizer))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunked(documents: Iterable[str] | Iterable[np.ndarray]) -> Iterator[list]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= _CHUNK or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenize_chunk(documents: list, tokenizer: Tokenizer) -> _Tokenized:
    if isinstance(documents[0], str):
        texts, ids = documents, tokenizer.encode_batch(documents)
    else:
        texts, ids = [tokenizer.decode(document) for document in documents], documents
    encoded = [text.encode() for text in texts]
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    bos, eos = np.array([tokenizer.bos], dtype), np.array([tokenizer.eos], dtype)
    pieces = [piece for document in ids for piece in (bos, document.astype(dtype), eos)]
    return _Tokenized(
        tokens=np.concatenate(pieces),
        lengths=np.array([len(document) + 2 for document in ids], np.int64),
        num_bytes=np.array([len(text) for text in encoded], np.int64),
        hashes=np.array([document_hash(text) for text in encoded], np.uint64),
        unknown=sum(int((document == tokenizer.unknown).sum()) for document in ids),
        is_changed=isinstance(documents[0], str) and _is_changed(documents[0], ids[0], tokenizer),
    )


def _is_changed(text: str, ids: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether the beginning of a text does not come back from its tokens."""
    if len(ids) <= _READ_BACK:
        return tokenizer.decode(ids) != text
    # The last character may be cut.
    return not text.startswith(tokenizer.decode(ids[:_READ_BACK]).rstrip("\ufffd"))


def _counted(chunks: Iterable[_Tokenized], advance: Callable[[int], None]) -> Iterator[_Tokenized]:
    for chunk in chunks:
        yield chunk
        advance(int(chunk.num_bytes.sum()))


def _write(
    chunks: Iterable[_Tokenized], tokenizer: Tokenizer, target: Path, left_out: Callable[[], int]
) -> bool:
    """Whether there was anything to write."""
    # Written as they come: of a hundred million documents not even the lengths would fit in memory.
    content, end, documents = hashlib.blake2b(digest_size=16), 0, 0
    unknown, changed = 0, []
    with ExitStack() as stack:
        tokens = stack.enter_context((target / "tokens.bin").open("wb"))
        columns = {name: stack.enter_context((target / f"{name}.bin").open("wb")) for name in _COLUMNS}
        columns["offsets"].write(np.zeros(1, _COLUMNS["offsets"]).data)
        for chunk in chunks:
            offsets = end + np.cumsum(chunk.lengths)
            end, documents = int(offsets[-1]), documents + len(offsets)
            unknown += chunk.unknown
            changed.append(chunk.is_changed)
            content.update(chunk.hashes.data)
            tokens.write(chunk.tokens.data)
            for name, values in (
                ("offsets", offsets),
                ("num_bytes", chunk.num_bytes),
                ("hashes", chunk.hashes),
            ):
                columns[name].write(values.astype(_COLUMNS[name], copy=False).data)
    if not documents:
        return False
    content.update(tokenizer.fingerprint.encode())
    manifest = {
        "dtype": str(np.min_scalar_type(tokenizer.vocab_size - 1)),
        "documents": documents,
        "fingerprint": content.hexdigest(),
        "left_out": left_out(),
        "unknown_tokens": unknown,
        "changed": sum(changed) / len(changed),
    }
    (target / "manifest.json").write_text(json.dumps(manifest))
    return True


def _load(folder: Path, key: str) -> Corpus:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        columns = {
            name: np.asarray(np.memmap(folder / f"{name}.bin", dtype, mode="r"))
            for name, dtype in _COLUMNS.items()
        }
        offsets = columns["offsets"]
        for name, values in columns.items():
            if len(values) != manifest["documents"] + (name == "offsets"):
                raise ValueError(f"{name}.bin has {len(values)} entries")
        size = (folder / "tokens.bin").stat().st_size
        if size != offsets[-1] * np.dtype(manifest["dtype"]).itemsize:
            raise ValueError(f"tokens.bin has {size} bytes")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise StackError(
            f"{folder}: a damaged cache entry ({error}); remove the folder and run again"
        ) from error
    return Corpus(
        key=key,
        fingerprint=manifest["fingerprint"],
        left_out=manifest["left_out"],
        unknown_tokens=manifest["unknown_tokens"],
        changed=manifest["changed"],
        tokens=np.asarray(np.memmap(folder / "tokens.bin", manifest["dtype"], mode="r")),
        **columns,
    )


def _progress(source: SourceConfig, show: bool) -> tuple[Progress, TaskID]:
    """A bar over bytes of text; without an end where the amount is not known beforehand."""
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("Tokenizing {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (show and (console.is_terminal or console.is_jupyter)),
    )
    limits = [source.max_bytes] if source.max_bytes else []
    if source.kind == "synthetic" and not limits:
        limits = [SYNTHETIC_BYTES]
    elif source.kind in ("python", "text", "jsonl"):
        limits.append(sum(path.stat().st_size for path in source_files(source)))
    return progress, progress.add_task(source.path or source.kind, total=min(limits, default=None))

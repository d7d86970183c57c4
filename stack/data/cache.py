"""Tokenized corpora on disk, keyed by what was read and by which tokenizer."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
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
from stack.data import minhash
from stack.data.atomic import cache_folder, unwritable
from stack.data.entry import BlockArray, EntryWriter, log, open_entry
from stack.data.examples import Encoder
from stack.data.files import source_files
from stack.data.hugging_face import dataset_identity, pinned
from stack.data.parallel import Threads, Workers
from stack.data.parts import Part, cut
from stack.data.sources import SYNTHETIC_BYTES, has_length
from stack.data.split import document_hash
from stack.data.token_files import partners
from stack.data.tokenizer import Tokenizer
from stack.storage import durable

_FORMAT = 5  # raise it when what is written changes: old entries are then not found
_COLUMNS = {"offsets": "<i8", "num_bytes": "<i8", "hashes": "<u8"}
"""What is kept per document, a file each."""
_OF_KIND = {"code": {"max_line_characters"}, "hf": {"config_name", "split"}}
"""What some kinds of sources say about reading them, beside what all say."""
_READ_BACK = 1 << 12  # tokens of a part that are decoded again
_SETTLED_SECONDS = 2  # a file changed more recently may change again within the clock's resolution


Array = np.ndarray | BlockArray
"""In memory, or on disk."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The tokens of one source; every document is stored as bos, its tokens, eos."""

    key: str
    """Name of its folder in the cache."""
    fingerprint: str
    """Hash of every document's text, in order, and of the tokenizer."""
    tokens: Array
    """[tokens], memory-mapped, the smallest unsigned type that holds the vocabulary."""
    offsets: Array
    """[documents + 1] int64: document i is tokens[offsets[i]:offsets[i + 1]]."""
    num_bytes: Array
    """[documents] int64: UTF-8 bytes of each document's text."""
    hashes: Array
    """[documents] uint64: `split.document_hash` of each document's text."""
    left_out: int
    """Documents without text."""
    outside: int
    """Documents that were left out as too short or too long."""
    unknown_tokens: int
    """Tokens that stand for words the tokenizer does not know."""
    changed: float
    """Share of the beginnings of documents, one of every part, that do not come back from their tokens."""
    marks: Array | None = None
    """[tokens] int32: what an `Encoder` says of each, where documents are records."""
    signatures: Array | None = None
    """[documents * minhash.HASHES] uint32: `minhash.signature` of each document's text, where asked for."""


def open_corpus(
    source: SourceConfig,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    seed: int = 0,
    workers: Workers | None = None,
    show_progress: bool = True,
    sign: bool = False,
    encoder: Encoder | None = None,
    warn: Callable[[str], None] = log,
) -> Corpus:
    """The corpus of a source, tokenized by `workers` (a thread per core) unless the cache holds it already.

    The key is made of the content of the source's files, not of their names or dates, of what the
    source says about reading them, and of the tokenizer. Whoever asks for the same key meanwhile, in
    any process, waits and then reads. What is damaged is made again, and `warn` told. With `sign` it has the
    signatures that near-duplicates are found by. An `encoder` makes the tokens of whole records.

    Raises:
        StackError: what the sources raise, a source without text, a cache that can not be written.
    """
    root = cache_folder(cache_dir)
    source = pinned(source)  # Once: what is read is what the key is of.
    key = _key(source, tokenizer, root, seed, sign, encoder)
    folder = root / f"tokens-{key}"

    def write(target: EntryWriter) -> None:
        progress, task = _progress(source, show_progress)
        with progress:
            parts = cut(source, tokenizer, seed)
            chunks = (workers or Threads()).map(partial(_tokenize, source, tokenizer, encoder, sign), parts)
            counted = _counted(chunks, lambda count: progress.advance(task, count))
            if not _write(counted, tokenizer, target, sign=sign, encoder=encoder):
                raise _without_text(source, encoder)

    about, arrays = open_entry(folder, write, warn=warn)
    return Corpus(
        key=key,
        fingerprint=about["fingerprint"],
        left_out=about["left_out"],
        outside=about.get("outside", 0),
        unknown_tokens=about["unknown_tokens"],
        changed=about["changed"],
        **arrays,
    )


def _without_text(source: SourceConfig, encoder: Encoder | None) -> StackError:
    name = source.path or source.kind
    if encoder is not None:
        return StackError(
            f"data.sources: {name} holds no record with something to predict in data.sequence_length"
            " tokens; raise that, or give it other records"
        )
    if source.min_characters or source.max_characters:
        return StackError(
            f"data.sources: {name} holds no text of the length asked for; look at min_characters and"
            " max_characters"
        )
    return StackError(f"data.sources: {name} holds no text; give it documents that are not empty")


def _key(
    source: SourceConfig, tokenizer: Tokenizer, root: Path, seed: int, sign: bool, encoder: Encoder | None
) -> str:
    files = source_files(source)
    beside = [partner for path in files if source.kind == "tokens" for partner in partners(path)]
    lengths = source.model_dump(include={"min_characters", "max_characters"}, exclude_none=True)
    parts = {
        "format": _FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "seed": seed if source.kind == "synthetic" else None,
        **source.model_dump(include={"kind", "field", "max_bytes", "encoding"}),
        **source.model_dump(include=_OF_KIND.get(source.kind, set())),
        **lengths,
        **({"dataset": dataset_identity(source)} if source.kind == "hf" else {}),
        **({"signatures": minhash.VERSION} if sign else {}),
        **({"encoder": encoder.key} if encoder else {}),
        "files": _file_digests([*files, *beside], root),
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _file_digests(paths: Sequence[Path], root: Path) -> list[str]:
    """Content hashes; those of files whose size, inode and time stand as noted are not read again."""
    names = [str(path.absolute()) for path in paths]
    note = root / f"digests-{hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()}.json"
    known = _noted(note)
    entries = {name: _digest(Path(name), known.get(name)) for name in names}
    settled = time.time_ns() - _SETTLED_SECONDS * 10**9
    kept = {name: entry for name, entry in entries.items() if entry[2] < settled}
    if kept != known:
        try:
            durable.write_text(note, json.dumps(kept))
        except OSError as error:
            raise unwritable(note, error) from error
    return [entries[name][3] for name in names]


def _noted(note: Path) -> dict[str, list]:
    """What is noted of files; of a damaged note what can be read: the rest is looked at anew."""
    try:
        known = json.loads(note.read_text())
        return {name: entry for name, entry in known.items() if [*map(type, entry)] == [int, int, int, str]}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


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


@dataclass(frozen=True, kw_only=True)
class _Tokenized:
    """Documents one after another, bos and eos included, and per document what `Corpus` keeps."""

    tokens: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray
    hashes: np.ndarray
    left_out: int
    """Documents without text among them."""
    outside: int
    """Documents that are too short or too long among them."""
    unknown: int
    """Tokens for words the tokenizer does not know."""
    is_changed: bool
    """Whether the beginning of the first document's text does not come back from its tokens."""
    marks: np.ndarray | None = None
    signatures: np.ndarray | None = None


def _tokenize(
    source: SourceConfig, tokenizer: Tokenizer, encoder: Encoder | None, sign: bool, part: Part
) -> _Tokenized:
    documents, left_out = part.read()
    is_text = bool(documents) and isinstance(documents[0], str)
    texts = documents if is_text else [tokenizer.decode(document) for document in documents]
    wanted = [number for number, text in enumerate(texts) if has_length(source, text)]
    outside = len(texts) - len(wanted)
    texts, documents = ([some[number] for number in wanted] for some in (texts, documents))
    marks = None
    if encoder is not None:
        made = encoder(texts)
        left_out += sum(not parts for parts in made)
        read = [(text, part) for text, parts in zip(texts, made, strict=True) for part in parts]
        texts, ids = [text for text, _ in read], [part.tokens for _, part in read]
        marks = np.concatenate([np.zeros(0, np.int32), *(part.marks for _, part in read)])
    else:
        ids = tokenizer.encode_batch(texts) if is_text and texts else documents
    encoded = [text.encode() for text in texts]
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    bos, eos = np.array([tokenizer.bos], dtype), np.array([tokenizer.eos], dtype)
    pieces = [piece for document in ids for piece in (bos, document.astype(dtype), eos)]
    return _Tokenized(
        tokens=np.concatenate([np.zeros(0, dtype), *pieces]),
        lengths=np.array([len(document) + 2 for document in ids], np.int64),
        num_bytes=np.array([len(text) for text in encoded], np.int64),
        hashes=np.array([document_hash(text) for text in encoded], np.uint64),
        left_out=left_out,
        outside=outside,
        unknown=sum(int((document == tokenizer.unknown).sum()) for document in ids),
        is_changed=encoder is None and is_text and bool(texts) and _is_changed(texts[0], ids[0], tokenizer),
        marks=marks,
        signatures=minhash.signatures(texts) if sign else None,
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
    chunks: Iterable[_Tokenized],
    tokenizer: Tokenizer,
    target: EntryWriter,
    *,
    sign: bool = False,
    encoder: Encoder | None = None,
) -> bool:
    """Whether there was anything to write."""
    # Written as they come: of a hundred million documents not even the lengths would fit in memory.
    content, end, documents = hashlib.blake2b(digest_size=16), 0, 0
    left_out, outside, unknown, changed = 0, 0, 0, []
    with ExitStack() as stack:
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")
        tokens = stack.enter_context(target.file("tokens", dtype))
        columns = {name: stack.enter_context(target.file(name, dtype)) for name, dtype in _COLUMNS.items()}
        columns["offsets"].write(np.zeros(1))
        signatures = stack.enter_context(target.file("signatures", "<u4")) if sign else None
        marks = stack.enter_context(target.file("marks", "<i4")) if encoder else None
        for chunk in chunks:
            left_out += chunk.left_out
            outside += chunk.outside
            if not len(chunk.lengths):
                continue
            offsets = end + np.cumsum(chunk.lengths)
            end, documents = int(offsets[-1]), documents + len(offsets)
            unknown += chunk.unknown
            changed.append(chunk.is_changed)
            content.update(chunk.hashes.data)
            tokens.write(chunk.tokens)
            for name, values in (
                ("offsets", offsets),
                ("num_bytes", chunk.num_bytes),
                ("hashes", chunk.hashes),
            ):
                columns[name].write(values)
            if marks is not None:
                assert chunk.marks is not None
                marks.write(chunk.marks)
            if signatures is not None:
                assert chunk.signatures is not None
                signatures.write(chunk.signatures)
    if not documents:
        return False
    content.update(tokenizer.fingerprint.encode())
    target.finish(
        documents=documents,
        fingerprint=content.hexdigest(),
        left_out=left_out,
        outside=outside,
        unknown_tokens=unknown,
        changed=sum(changed) / len(changed),
    )
    return True


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
    elif source.kind in ("python", "text", "code", "jsonl"):
        limits.append(sum(path.stat().st_size for path in source_files(source)))
    return progress, progress.add_task(source.path or source.kind, total=min(limits, default=None))

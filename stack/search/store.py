"""An index on disk: vectors, the places and the texts of passages, and what they were made with.

    manifest.json     what made it, and the digest of the next; written last
    documents.jsonl   of each document its place and digest, where its passages are, and a digest of their
                      vectors and texts
    vectors.npy       [passages, width] float32, of length 1
    texts             of all passages, UTF-8, one after another

One that is being built lies beside, its documents in order from the first; it is gone on with as far as it is
sound.
"""

import fcntl
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from stack.config.errors import ConfigError, StackError
from stack.search.documents import Document, is_of_records
from stack.storage import durable

MANIFEST, DOCUMENTS, VECTORS, TEXTS = "manifest.json", "documents.jsonl", "vectors.npy", "texts"
_KEY = "key.json"  # Of one that is being built.
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A document in an index."""

    file: str
    line: int
    id: str | int | None
    start: int
    digest: str
    """Of the document."""
    passages: list[list[int]]
    """Of each: first character, and last + 1, of the document; lines before it; bytes of UTF-8."""
    check: str
    """See `check`."""

    @classmethod
    def of(cls, document: Document, passages: list[list[int]], check: str) -> "Entry":
        """Of a document."""
        return cls(
            file=document.file,
            line=document.line,
            id=document.id,
            start=document.start,
            digest=document.digest,
            passages=passages,
            check=check,
        )

    @property
    def bytes(self) -> int:
        """Of the texts."""
        return sum(passage[3] for passage in self.passages)


def places(text: str, passages: Sequence[tuple[int, int]]) -> list[list[int]]:
    """What an index keeps of the places of passages; see `Entry.passages`."""
    told, lines, place = [], 0, 0
    for start, end in passages:
        lines += text.count("\n", place, start)
        place = start
        told.append([start, end, lines, len(text[start:end].encode())])
    return told


def check(vectors: np.ndarray, texts: bytes) -> str:
    """A digest of the vectors and the texts of a document."""
    told = xxhash.xxh3_64(np.ascontiguousarray(vectors).data)
    told.update(texts)
    return told.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A passage, and where it lies."""

    file: str
    """Its path from the folder; of a single file its name."""
    line: int
    """From 1."""
    id: str | int | None
    """That its record gives."""
    start: int
    """Its first character in the file, or in the record's text."""
    end: int
    """Its last one + 1."""
    text: str


class Stored:
    """The files of an index, or of a part of one, in memory that is mapped."""

    def __init__(self, folder: Path, entries: Sequence[Entry], width: int) -> None:
        """Opens them; their sizes are enough for the entries."""
        self.folder = folder
        self.entries = list(entries)
        self.rows = np.cumsum([0, *(len(each.passages) for each in self.entries)])
        """Of `vectors`, where each document begins."""
        self.places = np.cumsum([0, *(each.bytes for each in self.entries)])
        """The same of `texts`."""
        shape = (int(self.rows[-1]), width)
        self.vectors: np.ndarray = np.zeros(shape, np.float32)
        self.texts: np.ndarray = np.zeros(0, np.uint8)
        if shape[0]:
            offset = len(_header(shape))
            self.vectors = np.memmap(folder / VECTORS, np.float32, "r", offset=offset, shape=shape)
            self.texts = np.memmap(folder / TEXTS, np.uint8, "r", shape=(int(self.places[-1]),))

    def of(self, number: int) -> tuple[np.ndarray, bytes]:
        """The vectors and the texts of a document."""
        rows = slice(self.rows[number], self.rows[number + 1])
        return self.vectors[rows], self.texts[self.places[number] : self.places[number + 1]].tobytes()

    def is_sound(self, number: int) -> bool:
        """Whether they are what was written."""
        return check(*self.of(number)) == self.entries[number].check

    @cached_property
    def _ends(self) -> np.ndarray:
        """Of the text of each passage."""
        return np.cumsum([passage[3] for each in self.entries for passage in each.passages])

    def passage(self, number: int) -> Passage:
        """A passage by its number."""
        of = int(np.searchsorted(self.rows, number, side="right")) - 1
        each = self.entries[of]
        start, end, lines, size = each.passages[number - int(self.rows[of])]
        stop = int(self._ends[number])
        return Passage(
            file=each.file,
            line=each.line if is_of_records(each.file) else each.line + lines,
            id=each.id,
            start=each.start + start,
            end=each.start + end,
            text=self.texts[stop - size : stop].tobytes().decode(),
        )


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds anything else, as an index that is built takes the place of all of it.

    Raises:
      ConfigError: it does.
    """
    mine = {MANIFEST, DOCUMENTS, VECTORS, TEXTS, _KEY}
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in sorted(names) if name not in mine and not name.startswith("hnsw-")]
    if others or (folder.exists() and not folder.is_dir()):
        told = f"it holds {others[0]}" if others else "it is a file"
        raise ConfigError(f"--index {folder} is no folder of an index: {told}; give a new one")


def open_index(folder: Path, key: Mapping[str, Any], tell: Callable[[str], None]) -> Stored | None:
    """The index of a folder; None: there is none, or one that other settings made, which is told.

    What is damaged is told by name, and left out of it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise ValueError
        made_with, about = manifest["key"], manifest["about"]
        digest, width = manifest["documents"], int(manifest["width"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        tell(f"{folder / MANIFEST} is damaged; the index is built anew")
        return None
    if made_with != dict(key):
        names = [name for name in key if made_with.get(name) != key[name]]
        of = f"step {about.get('step')} of {about.get('run')}"
        tell(f"the index in {folder} is of {of}, with other {' and '.join(names)}; it is built anew")
        return None
    try:
        content = (folder / DOCUMENTS).read_bytes()
        if xxhash.xxh3_128_hexdigest(content) != digest:
            raise ValueError
        entries = [Entry(**json.loads(line)) for line in content.splitlines()]
    except (OSError, ValueError, TypeError):
        tell(f"{folder / DOCUMENTS} is damaged; the index is built anew")
        return None
    rows = sum(len(each.passages) for each in entries)
    sizes = {
        VECTORS: len(_header((rows, width))) + rows * width * 4,
        TEXTS: sum(each.bytes for each in entries),
    }
    for name, size in sizes.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if there != size:
            tell(f"{folder / name} is damaged: it has {there:,} of {size:,} bytes; the index is built anew")
            return None
    stored = Stored(folder, entries, width)
    damaged = [number for number in range(len(entries)) if not stored.is_sound(number)]
    if damaged:
        some = entries[damaged[0]].file
        more = f" and {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
        tell(f"{folder / VECTORS} or {TEXTS} is damaged in what is of {some}{more}; that is embedded anew")
        for number in damaged:
            entries[number] = replace(entries[number], digest="")
        stored.entries = entries
    return stored


def _header(shape: tuple[int, int]) -> bytes:
    """Of a .npy file; its length does not hang on the number of rows."""
    file = io.BytesIO()
    # NumPy leaves room for the first axis to grow.
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue()


class Building:
    """An index that grows document by document; one that was left unfinished is gone on with."""

    def __init__(self, folder: Path, key: Mapping[str, Any], width: int, about: Mapping[str, Any]) -> None:
        """Opens it beside the folder of the index.

        Raises:
          OSError: it cannot be written.
        """
        self.target = folder
        self.folder = folder.with_name(f"{folder.name}.building")
        self.width = width
        self._key, self._about = dict(key), dict(about)
        note = self.folder / _KEY
        try:
            is_mine = json.loads(note.read_bytes()) == [_FORMAT, self._key, width]
        except (OSError, ValueError):
            is_mine = False
        if not is_mine:
            shutil.rmtree(self.folder, ignore_errors=True)
            durable.make_folder(self.folder)
            durable.write_text(note, json.dumps([_FORMAT, self._key, width]))
        self.entries = self._sound()
        self._files: dict[str, BinaryIO] = {}

    def _sound(self) -> list[Entry]:
        """Of documents that are whole, from the first."""
        try:
            lines = (self.folder / DOCUMENTS).read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        entries: list[Entry] = []
        rows = places = 0
        files = [self.folder / name for name in (VECTORS, TEXTS)]
        there = [file.stat().st_size if file.is_file() else 0 for file in files]
        for line in lines:
            try:
                each = Entry(**json.loads(line)) if line.endswith(b"\n") else None
            except (ValueError, TypeError):
                each = None
            if each is None:
                break
            rows, places = rows + len(each.passages), places + each.bytes
            if len(_header((rows, self.width))) + rows * self.width * 4 > there[0] or places > there[1]:
                break
            entries.append(each)
        stored = Stored(self.folder, entries, self.width)
        sound = [stored.is_sound(number) for number in range(len(entries))]
        return entries[: sound.index(False)] if False in sound else entries

    def begin(self, number: int) -> None:
        """Keeps so many documents of what is there, and opens the files behind them."""
        self.entries = self.entries[:number]
        rows = sum(len(each.passages) for each in self.entries)
        sizes = {
            DOCUMENTS: sum(len(_line(each)) for each in self.entries),
            VECTORS: len(_header((0, self.width))) + rows * self.width * 4,
            TEXTS: sum(each.bytes for each in self.entries),
        }
        for name, size in sizes.items():
            file = (self.folder / name).open("r+b" if (self.folder / name).exists() else "w+b")
            self._files[name] = file
            if name == VECTORS and not rows:
                file.write(_header((0, self.width)))
            file.truncate(size)
            file.seek(size)

    def add(self, each: Entry, vectors: np.ndarray, texts: bytes) -> None:
        """One more document."""
        for name, data in (
            (VECTORS, np.ascontiguousarray(vectors, np.float32).tobytes()),
            (TEXTS, texts),
            (DOCUMENTS, _line(each)),
        ):
            self._files[name].write(data)
            self._files[name].flush()
        self.entries.append(each)

    def close(self) -> None:
        """Closes its files."""
        for file in self._files.values():
            file.close()

    def finish(self) -> None:
        """Puts it in the place of the index."""
        rows = sum(len(each.passages) for each in self.entries)
        self._files[VECTORS].seek(0)
        self._files[VECTORS].write(_header((rows, self.width)))
        self.close()
        digest = xxhash.xxh3_128_hexdigest((self.folder / DOCUMENTS).read_bytes())
        manifest = {
            "format": _FORMAT,
            "key": self._key,
            "about": self._about,
            "width": self.width,
            "documents": digest,
        }
        durable.sync_tree(self.folder)
        durable.write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        # One that is ended in between is finished by the next, from all its documents.
        shutil.rmtree(self.target, ignore_errors=True)
        self.folder.rename(self.target)
        (self.target / _KEY).unlink()
        durable.sync(self.target.parent)


def _line(each: Entry) -> bytes:
    return f"{json.dumps(asdict(each), ensure_ascii=False)}\n".encode()


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """Keeps an index to one that builds it; the system drops the lock with the process.

    Raises:
      StackError: another one builds it, or nothing can be written there.
    """
    try:
        durable.make_folder(folder.parent)
        file = folder.with_name(f"{folder.name}.lock").open("ab")
    except OSError as error:
        raise unwritable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(f"{folder}: another search is building this index; wait for it") from None
        except OSError:  # A file system without locks.
            pass
        yield


def unwritable(folder: Path, error: OSError) -> StackError:
    """Of an index that cannot be written."""
    return StackError(
        f"{folder}: the index cannot be written: {error.strerror}; make room, or give another --index"
    )

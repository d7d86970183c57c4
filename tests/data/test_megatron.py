"""What Megatron-LM tokenized is read where it lies, or what is wrong with it is named.

The files are written here from the published layout, by nothing that Stack reads them with.
"""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data import token_files
from stack.data.cache import open_corpus
from stack.data.files import list_files
from stack.data.token_files import read_token_documents
from stack.data.tokenizer import ByteTokenizer

END = 256
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write(
    path: Path,
    documents: list[list[bytes]],
    *,
    dtype: str = "uint16",
    end: bool = True,
    version: int = 1,
    magic: bytes = b"MMIDIDX\x00\x00",
    modes: bool = False,
) -> Path:
    """Documents of sequences, as `IndexedDatasetBuilder` lays them out; with `end` each is closed."""
    lengths, bounds, ids = [], [0], []
    for document in documents:
        for number, sequence in enumerate(document):
            some = [*sequence, *([END] if end and number == len(document) - 1 else [])]
            lengths.append(len(some))
            ids += some
        bounds.append(len(lengths))
    size = np.dtype(dtype).itemsize
    np.array(ids, dtype).tofile(path)
    pointers = [sum(lengths[:number]) * size for number in range(len(lengths))]
    index = magic + struct.pack("<QBQQ", version, CODES[dtype], len(lengths), len(bounds))
    index += struct.pack(f"<{len(lengths)}i", *lengths)
    index += struct.pack(f"<{len(pointers)}q", *pointers)
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    path.with_suffix(".idx").write_bytes(index + bytes(len(lengths)) * modes)
    return path


def read(path: Path, max_bytes: int | None = None) -> list[bytes]:
    source = SourceConfig(kind="tokens", path=str(path), max_bytes=max_bytes)
    return [bytes(document.astype(np.uint8)) for document in read_token_documents(source, ByteTokenizer())]


DOCUMENTS = [[b"first"], [b"the ", b"second"], [b""], [b"x"]]
TEXTS = [b"first", b"the second", b"x"]


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", "int16"])
def test_documents_are_those_of_the_index_closed_or_not(tmp_path, dtype, end) -> None:
    path = write(tmp_path / "a.bin", DOCUMENTS, dtype=dtype, end=end)
    assert read(path) == TEXTS
    assert read(tmp_path) == TEXTS
    assert list_files(SourceConfig(kind="tokens", path=str(tmp_path))).passed_over == ()
    assert read(path, max_bytes=6) == TEXTS[:2]


def test_an_end_of_document_within_a_document_closes_it_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [[b"one"], [b"two"]])
    content = path.with_suffix(".idx").read_bytes()
    # One document of both sequences.
    head = content[:17] + struct.pack("<BQQ", 8, 2, 2) + content[34 : 34 + 2 * 12]
    path.with_suffix(".idx").write_bytes(head + struct.pack("<2q", 0, 2))
    assert read(path) == [b"one", b"two"]


def test_edges_hold_wherever_blocks_of_the_file_end(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(token_files, "_BLOCK", 3)
    texts = [[bytes([65 + number % 26]) * (number % 7)] for number in range(40)]
    want = [text for (text,) in texts if text]
    assert read(write(tmp_path / "a.bin", texts, end=False)) == want
    assert read(write(tmp_path / "b.bin", texts, end=True)) == want


def test_an_empty_one_holds_nothing(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.bin", [])) == []


def test_the_index_is_part_of_what_the_cache_knows_it_by(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bin", [[b"one"], [b"two"]], end=False)
    source = SourceConfig(kind="tokens", path=str(path))
    two = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    write(path, [[b"one", b"two"]], end=False)
    one = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    assert [two.num_bytes.tolist(), one.num_bytes.tolist()] == [[3, 3], [6]]


def cut_short(path: Path, suffix: str, size: int) -> None:
    write(path, DOCUMENTS)
    file = path.with_suffix(suffix)
    file.write_bytes(file.read_bytes()[:size])


def change(path: Path, offset: int, value: bytes) -> None:
    write(path, DOCUMENTS)
    content = bytearray(path.with_suffix(".idx").read_bytes())
    content[offset : offset + len(value)] = value
    path.with_suffix(".idx").write_bytes(content)


SEQUENCES = 5
BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda path: cut_short(path, ".idx", 0), r"a\.idx: does not begin as an index of Megatron"),
    "another's magic": (
        lambda path: write(path, DOCUMENTS, magic=b"TNTIDX\0\0\0"),
        r"a\.idx: does not begin",
    ),
    "half a head": (lambda path: cut_short(path, ".idx", 20), r"a\.idx: 20 bytes are less than its head"),
    "truncated index": (
        lambda path: cut_short(path, ".idx", 60),
        r"a\.idx: 60 bytes, not the 134 of 5 sequences and 5 bounds of documents; copy it again",
    ),
    "truncated file": (
        lambda path: cut_short(path, ".bin", 10),
        r"a\.bin: 10 bytes, not the 40 that a\.idx names; it is truncated, or of another index",
    ),
    "another version": (lambda path: write(path, DOCUMENTS, version=2), r"a\.idx: is of version 2, not 1"),
    "no whole numbers": (
        lambda path: write(path, [[b"a"]], dtype="float32"),
        r"a\.idx: ids of type 7 are not whole numbers",
    ),
    "images": (lambda path: write(path, DOCUMENTS, modes=True), r"a\.idx: has a mode for every sequence"),
    "pointers elsewhere": (
        lambda path: change(path, 34 + 4 * SEQUENCES + 8, struct.pack("<q", 2)),
        r"a\.idx: its sequences do not follow one another",
    ),
    "bounds that fall": (
        lambda path: change(path, 34 + 12 * SEQUENCES + 8, struct.pack("<q", 4)),
        r"a\.idx: its documents do not follow one another to the end",
    ),
    "another tokenizer": (
        lambda path: (write(path, [[b"ab"]]), path.write_bytes(struct.pack("<3H", 1, 300, END))),
        r"a\.bin: token 1 is 300, the tokenizer has 257 words",
    ),
    "a partner of each kind": (
        lambda path: (write(path, DOCUMENTS), path.with_suffix(".json").write_text('{"dtype": "uint16"}')),
        r"a\.bin: both a\.json and a\.idx lie beside it; remove",
    ),
    "no partner": (
        lambda path: path.write_bytes(b"ab"),
        r"a\.bin: no a\.json beside it; .*, or give a \.bin with the \.idx of Megatron",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_that_names_the_place(tmp_path, name) -> None:
    spoil, message = BAD_FILES[name]
    spoil(tmp_path / "a.bin")
    with pytest.raises(StackError, match=message) as error:
        read(tmp_path / "a.bin")
    assert "\n" not in str(error.value)


def test_an_index_without_its_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.bin", DOCUMENTS).unlink()
    with pytest.raises(StackError, match=r"folder .* holds no file \*\.bin or \*\.npy \(it holds a\.idx\)"):
        read(tmp_path)
    with pytest.raises(StackError, match=r"a\.idx: an index; give the \.bin beside it"):
        read(tmp_path / "a.idx")

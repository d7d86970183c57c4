"""Token files made elsewhere give the documents they were made of, or an error with the place."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stack.config import SourceConfig
from stack.config.errors import StackError
from stack.data.token_files import read_token_documents
from stack.data.tokenizer import ByteTokenizer

DOCUMENTS = [b"first", b"the second", b"x"]
END = 256


def read(path: Path, max_bytes: int | None = None) -> list[bytes]:
    source = SourceConfig(kind="tokens", path=str(path), max_bytes=max_bytes)
    return [bytes(document.astype(np.uint8)) for document in read_token_documents(source, ByteTokenizer())]


def write_bin(path: Path, ids: list[int], dtype: str = "uint16") -> Path:
    np.array(ids, dtype).tofile(path)
    path.with_suffix(".json").write_text(json.dumps({"dtype": dtype}))
    return path


def closed(*, begin: bool) -> list[int]:
    return [token for document in DOCUMENTS for token in [*([END] if begin else []), *document, END]]


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_bin_file_gives_its_documents(tmp_path: Path, dtype: str, begin: bool) -> None:
    assert read(write_bin(tmp_path / "a.bin", closed(begin=begin), dtype)) == DOCUMENTS


def test_npy_file_gives_its_documents_with_or_without_a_last_end(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array(closed(begin=False)[:-1], np.int32))
    assert read(tmp_path / "a.npy") == DOCUMENTS


def test_long_documents_come_out_whole(tmp_path: Path) -> None:
    ids = np.arange(1 << 23, dtype=np.uint16) % END
    ids[[5_000_000, -1]] = END
    ids.tofile(tmp_path / "a.bin")
    (tmp_path / "a.json").write_text('{"dtype": "uint16"}')
    first, second = read(tmp_path / "a.bin")
    assert first == ids[:5_000_000].astype(np.uint8).tobytes()
    assert second == ids[5_000_001:-1].astype(np.uint8).tobytes()


def test_max_bytes_counts_the_text(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "a.bin", closed(begin=False))
    assert read(path, max_bytes=5) == DOCUMENTS[:1]
    assert read(path, max_bytes=6) == DOCUMENTS[:2]


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no sidecar": ("a.bin", lambda path: path.write_bytes(b"ab"), r"a\.bin: no a\.json beside it; write one"),
    "wrong sidecar": (
        "a.bin",
        lambda path: (path.write_bytes(b"ab"), path.with_suffix(".json").write_text("[]")),
        r"a\.json: gives no dtype",
    ),
    "wrong dtype": ("a.bin", lambda path: write_bin(path, [1], "int64"), r"a\.json: dtype 'int64' is not"),
    "truncated": (
        "a.bin",
        lambda path: (write_bin(path, [1, 2]), path.write_bytes(path.read_bytes()[:3])),
        r"a\.bin: 3 bytes are no whole number of uint16",
    ),
    "id out of range": ("a.bin", lambda path: write_bin(path, [1, 2, 300]), r"token 2 is 300, .* 257 words"),
    "negative id": ("a.npy", lambda path: np.save(path, np.array([5, -1])), r"token 1 is -1"),
    "truncated npy": (
        "a.npy",
        lambda path: (np.save(path, np.arange(100)), path.write_bytes(path.read_bytes()[:300])),
        r"a\.npy: not a whole \.npy file",
    ),
    "not a row": ("a.npy", lambda path: np.save(path, np.zeros((2, 2), int)), r"int64 of shape \(2, 2\)"),
    "not integers": ("a.npy", lambda path: np.save(path, np.zeros(2)), r"holds float64"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_that_names_the_place(name: str, tmp_path: Path) -> None:
    file, write, message = BAD_FILES[name]
    write(tmp_path / file)
    with pytest.raises(StackError, match=message) as error:
        read(tmp_path / file)
    assert "\n" not in str(error.value)

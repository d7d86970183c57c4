"""Entries of the cache: whatever is damaged is named when it is first read, and made again."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.config import SourceConfig
from stack.data.cache import Corpus, open_corpus
from stack.data.entry import BLOCK, DamagedEntryError, EntryWriter, _read
from stack.data.tokenizer import ByteTokenizer


def write_texts(folder: Path, texts: dict[str, str]) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return SourceConfig(kind="text", path=str(folder))


def documents(corpus: Corpus) -> list[list[int]]:
    edges = corpus.offsets.tolist()
    return [corpus.tokens[start:end].tolist() for start, end in itertools.pairwise(edges)]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda _: b"",
    "flipped": lambda data: data[:-1] + bytes([data[-1] ^ 4]),
    "first bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "longer": lambda data: data + b"x",
    "removed": lambda _: None,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_named_and_made_again(tmp_path: Path, kind: str) -> None:
    source = write_texts(tmp_path / "text", {"a": "one", "b": "two"})
    corpus = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    want = documents(corpus)
    entry = tmp_path / "cache" / f"tokens-{corpus.key}"
    for file in sorted(path.name for path in entry.iterdir()):
        damaged = DAMAGE[kind]((entry / file).read_bytes())
        if damaged is None:
            (entry / file).unlink()
        else:
            (entry / file).write_bytes(damaged)
        told: list[str] = []
        again = open_corpus(source, ByteTokenizer(), tmp_path / "cache", warn=told.append)
        try:
            for name in ("tokens", "offsets", "num_bytes", "hashes"):
                getattr(again, name)[:]
        except DamagedEntryError as error:  # Only what is read is looked at.
            told.append(str(error))
            again = open_corpus(source, ByteTokenizer(), tmp_path / "cache", warn=told.append)
        (line,) = told
        assert line.startswith(f"{entry}: a damaged cache entry: {file.split('.')[0]}")
        assert documents(again) == want


def test_a_block_is_looked_at_when_it_is_first_read(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": "x" * 200_000})
    corpus = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    tokens = tmp_path / "cache" / f"tokens-{corpus.key}" / "tokens.bin"
    data = bytearray(tokens.read_bytes())
    assert len(data) > 6 * BLOCK
    data[3 * BLOCK + 5] ^= 1
    tokens.write_bytes(data)
    half = BLOCK // 2
    corpus.tokens[: 3 * half]
    corpus.tokens[np.array([0, 3 * half - 1, 4 * half, -1])]
    with pytest.raises(DamagedEntryError, match=r"tokens\.bin: its bytes from 196,608 on changed; it is"):
        corpus.tokens[3 * half : 3 * half + 1]
    assert not tokens.exists()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3 * BLOCK), max_size=6), st.sampled_from(["u1", "<u2", "<i8"]))
def test_blocks_do_not_depend_on_how_a_file_is_written(
    tmp_path_factory, sizes: list[int], dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    values = np.random.default_rng(0).integers(0, 200, sum(sizes)).astype(dtype)
    writer, start = EntryWriter(folder), 0
    with writer.file("pieces", dtype) as file:
        for size in sizes:
            file.write(values[start : start + size])
            start += size
    writer.whole("whole", values)
    writer.finish()
    assert (folder / "pieces.digests").read_bytes() == (folder / "whole.digests").read_bytes()
    _, arrays = _read(folder)
    assert arrays["pieces"][:].tolist() == arrays["whole"].tolist() == values.tolist()
    shutil.rmtree(folder)

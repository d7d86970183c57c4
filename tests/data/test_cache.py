"""A corpus is tokenized once, found again by content, and never half there."""

import multiprocessing
import os
import signal
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from stack.config import DataConfig, SourceConfig
from stack.config.errors import StackError
from stack.data import cache
from stack.data.atomic import publish_folder
from stack.data.cache import Corpus, open_corpus
from stack.data.entry import EntryWriter, _read
from stack.data.parallel import Threads
from stack.data.split import document_hash, heldout_mask, is_heldout
from stack.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe


@dataclass(frozen=True)
class CountingTokenizer(ByteTokenizer):
    """Bytes, and how many texts were tokenized."""

    seen: list[str] = field(default_factory=list)

    def encode_batch(self, texts: Sequence[str], *, marks: bool = False) -> list[np.ndarray]:
        self.seen.extend(texts)
        return super().encode_batch(texts, marks=marks)


class FailingTokenizer(ByteTokenizer):
    def encode_batch(self, texts: Sequence[str], *, marks: bool = False) -> list[np.ndarray]:
        raise MemoryError("in the middle of the work")


def write_texts(folder: Path, texts: dict[str, str]) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text)
    return SourceConfig(kind="text", path=str(folder))


def documents(corpus: Corpus) -> list[bytes]:
    edges = zip(corpus.offsets[:-1], corpus.offsets[1:], strict=True)
    return [bytes(corpus.tokens[start + 1 : end - 1].astype(np.uint8)) for start, end in edges]


def test_each_document_is_stored_between_bos_and_eos_with_its_size_and_hash(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": "one", "b": "zwölf"})
    corpus = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    assert corpus.tokens.tolist() == [256, *b"one", 256, 256, *"zwölf".encode(), 256]
    assert corpus.tokens.dtype == np.uint16
    assert corpus.offsets.tolist() == [0, 5, 13]
    assert corpus.num_bytes.tolist() == [3, 6]
    assert corpus.hashes.tolist() == [document_hash(b"one"), document_hash("zwölf".encode())]


@pytest.mark.parametrize("workers", [1, 5])
def test_documents_keep_their_order_whatever_the_workers(tmp_path: Path, workers: int) -> None:
    source = SourceConfig(kind="synthetic", max_bytes=5_000_000)
    corpus = open_corpus(source, ByteTokenizer(), tmp_path, workers=Threads(workers), seed=3)
    from stack.data.sources import read_documents

    assert documents(corpus) == [text.encode() for text in read_documents(source, seed=3)]


def test_a_second_opening_tokenizes_nothing(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": "one", "b": "two"})
    tokenizer = CountingTokenizer()
    first = open_corpus(source, tokenizer, tmp_path / "cache")
    assert tokenizer.seen == ["one", "two"]
    again = open_corpus(source, tokenizer, tmp_path / "cache")
    assert tokenizer.seen == ["one", "two"]
    np.testing.assert_array_equal(first.tokens, again.tokens)


def test_the_same_text_elsewhere_is_found_and_changed_text_is_not(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "here", {"a": "one", "b": "two"})
    moved = write_texts(tmp_path / "there", {"x": "one", "y": "two"})
    first = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    assert open_corpus(moved, ByteTokenizer(), tmp_path / "cache").key == first.key
    file = tmp_path / "here" / "b"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_text("owt")
    os.utime(file, ns=times)  # the same inode and size, and within the clock's resolution the same time
    changed = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    assert changed.key != first.key
    assert changed.fingerprint != first.fingerprint
    assert documents(changed) == [b"one", b"owt"]


def test_old_files_are_not_read_again_for_the_key(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": "one"})
    file = tmp_path / "text" / "a"
    os.utime(file, (1e9, 1e9))
    first = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    with file.open("r+") as content:  # same inode and size; its time is put back below
        content.write("two")
    os.utime(file, (1e9, 1e9))
    assert open_corpus(source, ByteTokenizer(), tmp_path / "cache").key == first.key


def test_tokenizer_limit_and_seed_are_part_of_the_key(tmp_path: Path) -> None:
    source = SourceConfig(kind="synthetic", max_bytes=20_000)
    bpe = train_bpe(DataConfig(sources=(source,)), 300, tmp_path / "tokenizer.json")
    variants: list[tuple[SourceConfig, Tokenizer, int]] = [
        (source, ByteTokenizer(), 0),
        (source, ByteTokenizer(), 1),
        (source.model_copy(update={"max_bytes": 30_000}), ByteTokenizer(), 0),
        (source, bpe, 0),
    ]
    corpora = [open_corpus(s, tokenizer, tmp_path, seed=seed) for s, tokenizer, seed in variants]
    assert len({corpus.key for corpus in corpora}) == len({corpus.fingerprint for corpus in corpora}) == 4
    again = open_corpus(source, load_tokenizer(str(tmp_path / "tokenizer.json")), tmp_path)
    assert again.key == corpora[3].key


def test_a_token_file_of_the_same_text_has_the_same_fingerprint(tmp_path: Path) -> None:
    written = write_texts(tmp_path / "text", {"a": "one", "b": "two"})
    text = open_corpus(written, ByteTokenizer(), tmp_path / "cache")
    np.save(tmp_path / "tokens.npy", np.array([*b"one", 256, *b"two", 256]))
    source = SourceConfig(kind="tokens", path=str(tmp_path / "tokens.npy"))
    tokens = open_corpus(source, ByteTokenizer(), tmp_path / "cache")
    np.testing.assert_array_equal(tokens.tokens, text.tokens)
    np.testing.assert_array_equal(tokens.num_bytes, text.num_bytes)
    assert tokens.fingerprint == text.fingerprint


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": "one"})
    with pytest.raises(MemoryError):
        open_corpus(source, FailingTokenizer(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*tokens-*/"))
    assert documents(open_corpus(source, ByteTokenizer(), tmp_path / "cache")) == [b"one"]


def write_and_wait(target: Path) -> None:
    (target / "part").write_text("half")
    (target.parent / "started").touch()
    time.sleep(60)


def test_a_killed_writer_leaves_nothing_and_the_next_clears_up(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=publish_folder, args=(tmp_path / "entry", write_and_wait))
    writer.start()
    while not (tmp_path / "started").exists():
        assert writer.is_alive()
        time.sleep(0.01)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    assert not (tmp_path / "entry").exists()
    publish_folder(tmp_path / "entry", lambda target: (target / "whole").touch())
    assert [path.name for path in (tmp_path / "entry").iterdir()] == ["whole"]
    assert not list(tmp_path.glob(".entry.*.*"))


def test_of_many_who_want_an_entry_one_does_the_work(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": "one"})
    tokenizer = CountingTokenizer()
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(open_corpus, source, tokenizer, tmp_path / "cache") for _ in range(8)]
    assert all(documents(job.result()) == [b"one"] for job in jobs)
    assert tokenizer.seen == ["one"]


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": ""})
    with pytest.raises(StackError, match=r"data\.sources: .*text holds no text"):
        open_corpus(source, ByteTokenizer(), tmp_path / "cache")


def test_a_cache_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    source = write_texts(tmp_path / "text", {"a": "one"})
    (tmp_path / "file").touch()
    with pytest.raises(StackError, match=r"data\.cache_dir: cannot write to .*file.*; set data\.cache_dir"):
        open_corpus(source, ByteTokenizer(), tmp_path / "file")


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def write(target: Path) -> None:
        (target / "part").touch()
        Path("/dev/full").write_text("x" * 10_000)

    with pytest.raises(StackError, match=r"No space left on device; set data\.cache_dir"):
        publish_folder(tmp_path / "entry", write)
    assert not list(tmp_path.glob("*entry*/"))


def chunks(number: int) -> Iterator[cache._Tokenized]:
    """So many chunks of a thousand documents of three tokens each."""
    for first in range(0, 1000 * number, 1000):
        lengths = np.full(1000, 3, np.int64)
        hashes = np.arange(first, first + 1000, dtype=np.uint64)
        tokens = np.tile(np.array([256, 7, 256], np.uint16), 1000)
        columns = {"tokens": tokens, "lengths": lengths, "num_bytes": lengths - 2, "hashes": hashes}
        yield cache._Tokenized(**columns, left_out=0, outside=0, unknown=0, is_changed=False)


def test_what_is_kept_per_document_goes_to_disk_as_it_comes(tmp_path: Path) -> None:
    peaks = []
    for number in (10, 300):
        folder = tmp_path / str(number)
        folder.mkdir()
        tracemalloc.start()
        assert cache._write(chunks(number), ByteTokenizer(), EntryWriter(folder))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        _, arrays = _read(folder)
        np.testing.assert_array_equal(arrays["offsets"], 3 * np.arange(1000 * number + 1))
        np.testing.assert_array_equal(arrays["hashes"], np.arange(1000 * number))
        np.testing.assert_array_equal(arrays["num_bytes"], np.ones(1000 * number))
        assert len(arrays["tokens"]) == 3000 * number
    assert peaks[1] < 1.5 * peaks[0], "thirty times the documents"


def test_about_the_asked_for_share_is_held_out_and_more_holds_out_a_superset() -> None:
    hashes = np.array([document_hash(str(i).encode()) for i in range(20_000)], np.uint64)
    small, large = heldout_mask(hashes, 0.01), heldout_mask(hashes, 0.05)
    assert 150 < small.sum() < 250
    assert 900 < large.sum() < 1100
    assert not (small & ~large).any()
    assert not heldout_mask(hashes, 0.0).any()
    assert [is_heldout(str(i).encode(), 0.05) for i in range(1000)] == large[:1000].tolist()

"""Rows hold every prediction once, and say truly where each token comes from."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stack.data.cache import Corpus
from stack.data.packing import PackedRows, best_fit, pack_corpus
from stack.data.split import document_hash

SETTINGS = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

PADDING = {"tokens": 0, "labels": -1, "segments": 0, "positions": 0}


def make_corpus(lengths: list[int]) -> Corpus:
    """Documents whose tokens tell where they stand: token i of the corpus is i."""
    offsets = np.cumsum([0, *lengths])
    return Corpus(
        left_out=0,
        outside=0,
        unknown_tokens=0,
        changed=0.0,
        key=str(lengths),
        fingerprint="",
        tokens=np.arange(offsets[-1], dtype=np.uint32),
        offsets=offsets,
        num_bytes=np.array(lengths) - 2,
        hashes=np.array([document_hash(str(i).encode()) for i in range(len(lengths))], np.uint64),
    )


def pack(
    corpus: Corpus,
    root: Path,
    length: int,
    *,
    packed: bool = True,
    heldout: float = 0.0,
    warn: Callable[[str], None] = print,
) -> tuple[PackedRows, PackedRows]:
    options: dict[str, Any] = {"sequence_length": length, "packed": packed, "heldout_fraction": heldout}
    return pack_corpus(corpus, root, **options, warn=warn)


def predictions(rows: PackedRows) -> list[tuple[int, int]]:
    """(input token, label) of every place that is predicted."""
    batch = rows.read(np.arange(rows.num_rows), PADDING)
    real = batch["labels"] >= 0
    return list(zip(batch["tokens"][real].tolist(), batch["labels"][real].tolist(), strict=True))


LENGTHS = st.lists(st.integers(3, 60), min_size=1, max_size=40)


@SETTINGS
@given(lengths=LENGTHS, length=st.integers(1, 32), packed=st.booleans())
def test_every_token_after_a_documents_first_is_predicted_once_from_the_one_before(
    tmp_path: Path, lengths: list[int], length: int, packed: bool
) -> None:
    corpus = make_corpus(lengths)
    train, _ = pack(corpus, tmp_path, length, packed=packed)
    firsts = set(corpus.offsets[:-1].tolist())
    wanted = [(token - 1, token) for token in corpus.tokens.tolist() if token not in firsts]
    assert sorted(predictions(train)) == wanted
    assert train.num_tokens == len(wanted)
    assert train.num_bytes == sum(lengths) - 2 * len(lengths)


@SETTINGS
@given(lengths=LENGTHS, length=st.integers(1, 32))
def test_segments_are_runs_of_one_document_with_positions_from_zero(
    tmp_path: Path, lengths: list[int], length: int
) -> None:
    corpus = make_corpus(lengths)
    train, _ = pack(corpus, tmp_path, length)
    batch = train.read(np.arange(train.num_rows), PADDING)
    document_of = np.searchsorted(corpus.offsets, np.arange(len(corpus.tokens)), "right")
    for tokens, labels, segments, positions in zip(*batch.values(), strict=True):
        count = segments.max()
        assert (np.diff(segments[segments > 0]) >= 0).all()
        assert (segments[(segments > 0).sum() :] == 0).all()
        assert set(segments[segments > 0]) == set(range(1, count + 1))
        np.testing.assert_array_equal(labels >= 0, segments > 0)
        for segment in range(1, count + 1):
            inside = segments == segment
            np.testing.assert_array_equal(positions[inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(np.diff(tokens[inside]), 1)
            assert len(set(document_of[tokens[inside]])) == 1


def test_unpacked_rows_hold_one_piece_each(tmp_path: Path) -> None:
    train, _ = pack(make_corpus([4, 4, 20]), tmp_path, 8, packed=False)
    batch = train.read(np.arange(train.num_rows), PADDING)
    assert batch["segments"].max() == 1
    assert (batch["segments"] > 0).sum(axis=1).tolist() == [3, 3, 8, 8, 3]


def test_rows_can_be_read_in_any_order_and_twice(tmp_path: Path) -> None:
    train, _ = pack(make_corpus([9, 30, 5, 7, 12]), tmp_path, 10)
    every = train.read(np.arange(train.num_rows), PADDING)
    some = train.read(np.array([3, 0, 3]), PADDING)
    for name in every:
        np.testing.assert_array_equal(some[name], every[name][[3, 0, 3]])
        assert some[name].dtype == np.int32


@SETTINGS
@given(lengths=st.lists(st.integers(1, 6), max_size=60), capacity=st.integers(6, 16))
@example(lengths=[6, 6, 6, 2, 2, 2, 2], capacity=10)
def test_best_fit_equals_the_item_by_item_definition(lengths: list[int], capacity: int) -> None:
    bins = best_fit(np.array(lengths, np.int64), capacity)
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(space) if left >= length]
        chosen = min(fitting, key=lambda i: space[i], default=None)
        if chosen is None:
            space.append(capacity - length)
        else:
            space[chosen] -= length
    filled = np.bincount(bins, lengths, len(space)) if lengths else np.zeros(0)
    assert Counter(filled.tolist()) == Counter(capacity - left for left in space)


def test_a_million_uneven_documents_fill_their_rows() -> None:
    lengths = np.minimum(3 + np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(np.int64), 4096)
    bins = best_fit(lengths, 4096)
    filled = np.bincount(bins, lengths)
    assert filled.max() <= 4096
    assert lengths.sum() / (4096 * len(filled)) > 0.999


def test_train_and_held_out_documents_are_disjoint_and_adding_one_moves_no_other(tmp_path: Path) -> None:
    lengths = [10] * 200
    train, heldout = pack(make_corpus(lengths), tmp_path, 8, heldout=0.2)
    assert sorted(train.documents.tolist() + heldout.documents.tolist()) == list(range(200))
    assert set(predictions(train)).isdisjoint(predictions(heldout))
    assert len(heldout.documents) > 20
    longer_train, longer_heldout = pack(make_corpus([*lengths, 10]), tmp_path, 8, heldout=0.2)
    assert set(train.documents.tolist()) <= set(longer_train.documents.tolist())
    assert set(heldout.documents.tolist()) <= set(longer_heldout.documents.tolist())


def test_the_index_is_made_once(tmp_path: Path) -> None:
    corpus = make_corpus([9, 30, 5])
    pack(corpus, tmp_path, 10)
    (entry,) = tmp_path.glob("rows-*")
    before = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    pack(corpus, tmp_path, 10)
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    pack(corpus, tmp_path, 11)
    assert len(list(tmp_path.glob("rows-*"))) == 2


def test_a_damaged_index_is_named_and_made_again(tmp_path: Path) -> None:
    corpus = make_corpus([9, 30, 5])
    want = pack(corpus, tmp_path, 10)[0].piece_start.tolist()
    (entry,) = tmp_path.glob("rows-*")
    (entry / "train-piece_start.bin").write_bytes(b"")
    told: list[str] = []
    again, _ = pack(corpus, tmp_path, 10, warn=told.append)
    (line,) = told
    assert line.startswith(f"{entry}: a damaged cache entry: train-piece_start.bin has 0 of ")
    assert line.endswith(" bytes; it is removed, and made again from its source")
    assert again.piece_start.tolist() == want

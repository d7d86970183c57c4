"""Two numbers a query say what a mask says, and blocks are skipped only where nobody sees anybody."""

import dataclasses

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from stack.kernels.attention import Mask, row_mask
from stack.kernels.attention.intervals import Intervals, intervals, key_blocks, query_blocks

ROW = 24


@st.composite
def rows(draw) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments, positions and prefixes of a row of documents with padding at its end."""
    lengths = draw(st.lists(st.integers(1, ROW), min_size=1, max_size=8))
    segments, positions, prefix = (np.zeros(ROW, np.int32) for _ in range(3))
    place = 0
    for number, wanted in enumerate(lengths, start=1):
        length = min(wanted, ROW - place)
        document = slice(place, place + length)
        segments[document], positions[document] = number, np.arange(length)
        prefix[place : place + draw(st.integers(0, length))] = 1
        place += length
    return segments, positions, prefix


@st.composite
def masks(draw) -> Mask:
    packed = draw(st.booleans())
    kind = draw(st.sampled_from(["causal", "full", "prefix"]))
    drawn = [draw(rows()) for _ in range(2)]
    segments, positions, prefix = (np.stack(each) for each in zip(*drawn, strict=True))
    if not packed:  # One document, from the beginning on.
        positions = np.where(segments == 1, positions, 0)
        prefix = np.where(segments == 1, prefix, 0)
        segments = np.where(segments == 1, 1, 0)
    mask = row_mask(
        jnp.asarray(segments),
        jnp.asarray(positions),
        packed=packed,
        kind=kind,
        window=draw(st.none() | st.integers(1, ROW)),
        prefix=jnp.asarray(prefix) if kind == "prefix" else None,
    )
    local = draw(st.sampled_from([None, True, False]))
    if mask.window is None or local is None:
        return mask
    return dataclasses.replace(mask, local=jnp.asarray(local))


def counts(mask: Mask) -> np.ndarray:
    """Of queries that are tokens, [batch, queries, 1] bool; what padding sees is nobody's concern."""
    if mask.query_segments is not None:
        return np.asarray(mask.query_segments > 0)[..., None]
    return (np.arange(ROW) < np.asarray(mask.lengths)[:, None])[..., None]


@given(masks())
@settings(max_examples=60, deadline=None)
def test_an_interval_is_the_mask(mask):
    same = np.asarray(intervals(mask).allowed(ROW)) == np.asarray(mask.allowed())
    assert same[np.broadcast_to(counts(mask), same.shape)].all()


@given(rows(), rows())
@settings(max_examples=30, deadline=None)
def test_a_document_sees_its_own_in_another_row(queries, keys):
    (to, places, _), (of, others, _) = (
        tuple(jnp.asarray(each)[None] for each in row) for row in (queries, keys)
    )
    mask = Mask(kind="full", query_positions=places, key_positions=others, query_segments=to, key_segments=of)
    same = np.asarray(intervals(mask).allowed(ROW)) == np.asarray(mask.allowed())
    assert same[np.broadcast_to(counts(mask), same.shape)].all()


@given(
    st.lists(st.tuples(st.integers(0, ROW), st.integers(0, ROW)), min_size=ROW, max_size=ROW),
    st.sampled_from([2, 4, 6, 12]),
    st.sampled_from([2, 4, 8, 12]),
)
@settings(max_examples=60, deadline=None)
def test_blocks_hold_every_pair_and_whole_ones_need_no_mask(bounds, queries, keys):
    ends = np.asarray(bounds, np.int32)[None]
    seen = Intervals(jnp.asarray(ends.min(-1)), jnp.asarray(ends.max(-1)))
    pairs = np.asarray(seen.allowed(ROW))[0].reshape(ROW // queries, queries, ROW // keys, keys)
    some, every = pairs.any((1, 3)), pairs.all((1, 3))
    by_queries = key_blocks(seen, queries=queries, keys=keys, length=ROW)
    by_keys = query_blocks(seen, queries=queries, keys=keys, length=ROW)
    for blocks, met, whole in ((by_queries, some, every), (by_keys, some.T, every.T)):
        numbers = np.arange(met.shape[1])
        first, whole_first, whole_last, last = (np.asarray(side)[0][:, None] for side in blocks)
        assert (first <= whole_first).all()
        assert (whole_first <= whole_last).all()
        assert (whole_last <= last).all()
        inside = (numbers >= first) & (numbers < last)
        assert not (met & ~inside).any()
        # No further than the first and the last that meet.
        ends = [np.flatnonzero(line)[[0, -1]] + [0, 1] for line in met if line.any()]
        np.testing.assert_array_equal(
            np.stack([first, last], 1)[met.any(1), :, 0], np.array(ends).reshape(-1, 2)
        )
        assert (last == first)[~met.any(1)].all()
        assert whole[(numbers >= whole_first) & (numbers < whole_last)].all()


@pytest.mark.parametrize(
    ("documents", "window", "most"),
    [(1, None, 0.53), (8, None, 0.10), (16, None, 0.07), (1, 256, 0.12)],
)
def test_work_is_that_of_the_pairs_that_see_each_other(documents, window, most):
    """Of 4,096 tokens in blocks of 128: one document needs half of the blocks, sixteen a sixteenth of it."""
    length, block = 4096, 128
    columns = np.arange(length, dtype=np.int32)[None]
    segments, positions = 1 + columns // (length // documents), columns % (length // documents)
    mask = row_mask(jnp.asarray(segments), jnp.asarray(positions), packed=True, window=window)
    seen = intervals(mask)
    pairs = float(np.asarray(seen.end - seen.start).sum()) / length**2
    for blocks in (
        key_blocks(seen, queries=block, keys=block, length=length),
        query_blocks(seen, queries=block, keys=block, length=length),
    ):
        visited = float(np.asarray(blocks.last - blocks.first).sum()) * block**2 / length**2
        assert pairs <= visited <= most
        masked = (
            visited - float(np.asarray(blocks.whole_last - blocks.whole_first).sum()) * block**2 / length**2
        )
        assert masked <= 3 * block / length, "only blocks at the edges of what is seen need a mask"

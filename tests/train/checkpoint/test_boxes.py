"""Boxes of arrays: cut into contiguous parts that cover it once, whatever its shape."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stack.train.checkpoint import boxes

SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)


def whole(shape: tuple[int, ...]) -> boxes.Box:
    return tuple((0, size) for size in shape)


@st.composite
def box_in(draw, shape: tuple[int, ...]) -> boxes.Box:
    starts = [draw(st.integers(0, size - 1)) for size in shape]
    return tuple(
        (start, draw(st.integers(start + 1, size))) for start, size in zip(starts, shape, strict=True)
    )


@given(shape=SHAPES, limit=st.integers(1, 50))
def test_parts_cover_a_box_once_and_are_contiguous(shape, limit) -> None:
    values = np.arange(int(np.prod(shape))).reshape(shape)
    parts = [
        values[boxes.within(part, whole(shape))].reshape(-1) for part in boxes.split(whole(shape), limit)
    ]
    assert np.array_equal(np.concatenate(parts), values.reshape(-1)), "in order, so contiguous"
    assert max(map(len, parts)) <= limit


@given(data=st.data(), shape=SHAPES)
def test_a_box_lies_in_the_rows_that_hold_it(data, shape) -> None:
    outer, other = data.draw(box_in(shape)), data.draw(box_in(shape))
    both = boxes.overlap(outer, other)
    values = np.arange(int(np.prod(shape))).reshape(shape)
    index = tuple(slice(*part) for part in outer)
    inner = set(values[index].reshape(-1)) & set(values[tuple(slice(*part) for part in other)].reshape(-1))
    assert boxes.size(both) == len(inner) if both is not None else not inner
    if both is not None:
        piece = values[index].reshape(-1)
        first, last, axis = boxes.rows(both, outer)
        band = (*outer[:axis], both[axis], *outer[axis + 1 :]) if outer else ()
        got = piece[first:last].reshape([stop - start for start, stop in band])[boxes.within(both, band)]
        assert np.array_equal(got, values[tuple(slice(*part) for part in both)])

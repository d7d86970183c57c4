"""Random rows, whole or packed with documents; NumPy alone, for a peer's interpreter too."""

import math

import numpy as np

DOCUMENTS_PER_ROW = 4
"""Of packed rows, on average: rows of 8,192 tokens then hold documents of 2,048."""


def starts(rows: int, length: int, *, packed: bool) -> np.ndarray:
    """Where a document begins, bool [rows, length]; documents of packed rows have random lengths."""
    rng = np.random.default_rng(1)
    first = rng.random((rows, length)) < ((DOCUMENTS_PER_ROW - 1) / length if packed else 0.0)
    first[:, 0] = True
    return first


def segments(rows: int, length: int, *, packed: bool) -> np.ndarray:
    """Number of the document of each token within its row, from 1, int32 [rows, length]."""
    return np.cumsum(starts(rows, length, packed=packed), axis=1, dtype=np.int32)


def positions(rows: int, length: int, *, packed: bool) -> np.ndarray:
    """Place of each token in its document, int32 [rows, length]."""
    place = np.arange(length, dtype=np.int32)
    return place - np.maximum.accumulate(np.where(starts(rows, length, packed=packed), place, 0), axis=1)


def pairs(rows: int, length: int, *, packed: bool) -> int:
    """Queries and keys that see each other, over all rows."""
    return int((positions(rows, length, packed=packed).astype(np.int64) + 1).sum())


def batch(rows: int, length: int, words: int, *, packed: bool) -> dict[str, np.ndarray]:
    """The fields of a causal step; int32 [rows, length], `example` [rows]. No label crosses documents."""
    stream = np.random.default_rng(0).integers(0, words, (rows, length + 1), dtype=np.int32)
    first = starts(rows, length, packed=packed)
    ends = np.concatenate([first[:, 1:], np.ones((rows, 1), bool)], axis=1)
    return {
        "tokens": stream[:, :-1],
        "labels": np.where(ends & packed, -1, stream[:, 1:]).astype(np.int32),
        "segments": segments(rows, length, packed=packed),
        "positions": positions(rows, length, packed=packed),
        "example": np.arange(rows, dtype=np.int32),
    }


def words(tokens: int, number: int) -> np.ndarray:
    """Labels, int32 [tokens]."""
    return np.random.default_rng(2).integers(0, number, tokens, dtype=np.int32)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Numbers of a normal distribution, float32: zeros would multiply faster on a GPU.

    They repeat after 16,777,217, which no row is long, as more would take longer to draw than to measure.
    """
    drawn = min(math.prod(shape), 2**24 + 1)
    return np.resize(np.random.default_rng(seed).standard_normal(drawn, dtype=np.float32), shape)

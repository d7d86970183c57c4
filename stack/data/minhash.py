"""Texts that are nearly equal, found among many: MinHash and locality-sensitive hashing.

As in arXiv 2107.06499 (section 4.2): two texts are as similar as the sets of their runs of five words, whose
share in common (Jaccard) is estimated by the least hashes of each; only texts that agree in a band of these
are compared. Words are runs of letters, digits and underscores, in small letters.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import xxhash
from jaxtyping import Bool, Int64, UInt32

HASHES = 128
"""Of a signature; an estimate of a similarity s is off by sqrt(s (1 - s) / 128), 0.035 at 0.8."""
VERSION = 1
"""Of signatures; raise it when `signature` gives others."""

_RUN = 5  # words
_RECALL = 0.99  # of what is as similar as asked for, in the bands
_AT_ONCE = 1 << 9  # runs of words times HASHES in a cache of the processor
_PAIRS = 1 << 16  # whose signatures are in memory
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: np.ndarray) -> np.ndarray:
    """A permutation of 64 bits that scatters them: the end of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


_DRAW = _mix(np.arange(1, 2 * HASHES + 1, dtype=np.uint64) * _BASE).reshape(2, HASHES)
_FACTORS, _SUMMANDS = _DRAW[0] | np.uint64(1), _DRAW[1]  # Odd factors: of 64 bits, permutations.


def signatures(texts: Sequence[str]) -> UInt32[np.ndarray, "texts hashes"]:
    """The signature of each text."""
    return np.array([signature(text) for text in texts], np.uint32).reshape(len(texts), HASHES)


def signature(text: str) -> UInt32[np.ndarray, " hashes"]:
    """The least of each of 128 hashes over a text's runs of five words; one run where it has fewer words."""
    words = _WORD.findall(text.lower()) or [text]
    hashes = np.fromiter((xxhash.xxh3_64_intdigest(word.encode()) for word in words), np.uint64, len(words))
    run = min(_RUN, len(words))
    runs = np.zeros(len(words) - run + 1, np.uint64)
    for place in range(run):
        runs = runs * _BASE + hashes[place : place + len(runs)]
    runs = np.unique(_mix(runs))
    least = np.full(HASHES, 2**64 - 1, np.uint64)
    for start in range(0, len(runs), _AT_ONCE):
        block = runs[start : start + _AT_ONCE, None] * _FACTORS + _SUMMANDS
        least = np.minimum(least, block.min(axis=0))
    return (least >> np.uint64(32)).astype(np.uint32)


def near_earlier(
    read: Callable[[Int64[np.ndarray, " some"], slice], UInt32[np.ndarray, "some columns"]],
    count: int,
    threshold: float,
) -> Bool[np.ndarray, " count"]:
    """Which of some texts [count] are nearly equal to one before them.

    Of two that are not named none is near the other, as far as they agree in a band; and who is named is
    near an earlier one. With similarity `threshold` 99 in 100 pairs agree in a band.

    Args:
        read: gives some columns of the signatures of texts by number.
        count: of texts.
        threshold: the similarity, as estimated, from which two are nearly equal.
    """
    is_near = np.zeros(count, bool)
    rows = _rows(threshold)
    for start in range(0, HASHES - rows + 1, rows):
        members = np.flatnonzero(~is_near)
        keys = np.concatenate(
            [np.zeros(0, np.uint64)]
            + [
                _fold(read(members[first : first + _PAIRS], slice(start, start + rows)))
                for first in range(0, len(members), _PAIRS)
            ]
        )
        by_key = np.argsort(keys, kind="stable")
        members, keys = members[by_key], keys[by_key]
        while len(members):
            # Those of one key stand together; each is compared with the first, and who is not near it stays.
            is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
            first = members[is_first][np.cumsum(is_first) - 1]
            members, first, keys = members[~is_first], first[~is_first], keys[~is_first]
            near = _are_near(read, members, first, threshold)
            is_near[members[near]] = True
            members, keys = members[~near], keys[~near]
    return is_near


def _are_near(read: Callable, one: np.ndarray, other: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the signatures of texts agree, pair by pair."""
    whole, shares = slice(0, HASHES), [np.zeros(0)]
    for start in range(0, len(one), _PAIRS):
        pair = (read(some[start : start + _PAIRS], whole) for some in (one, other))
        shares.append(np.equal(*pair).mean(axis=1))
    return np.concatenate(shares) >= threshold


def _rows(threshold: float) -> int:
    """The most hashes to a band with which 99 in 100 pairs of this similarity agree in some band."""
    recall = {rows: 1 - (1 - threshold**rows) ** (HASHES // rows) for rows in range(1, HASHES + 1)}
    return max((rows for rows in recall if recall[rows] >= _RECALL), default=1)


def _fold(columns: np.ndarray) -> np.ndarray:
    """One number for the numbers of each row."""
    folded = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        folded = _mix(folded * _BASE + column)
    return folded

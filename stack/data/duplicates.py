"""Documents that are there twice, or nearly: one of them is kept.

What is held out goes first and then the order of the sources and of their documents: of several alike the
first is kept. So nothing that is trained on is equal, or nearly, to what is held out.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool

from stack.data import minhash
from stack.data.cache import Corpus

_VERSION = 1
"""Of which are kept."""


@dataclass(frozen=True, kw_only=True)
class Unique:
    """The documents of one corpus that are kept."""

    key: str
    """Of all that decides."""
    choose: Callable[[], Bool[np.ndarray, " documents"]]
    """Which they are; work, done when it is asked for."""


def unique_documents(
    corpora: Sequence[Corpus],
    heldout: Callable[[], Sequence[Bool[np.ndarray, " documents"]]],
    *,
    likeness: Literal["exact", "near"],
    threshold: float,
    side: Sequence[object],
) -> list[Unique]:
    """Of each corpus the documents that are like none kept, in it and in the others.

    Args:
        corpora: their documents; with signatures where `near`.
        heldout: gives which documents of each are held out, in whole or in part.
        likeness: `exact`: equal texts, by a hash of 64 bits; `near`: nearly equal ones too.
        threshold: see `minhash.near_earlier`.
        side: plain values that decide what is held out.
    """
    done: list[list[np.ndarray]] = []

    def choose(number: int) -> np.ndarray:
        if not done:
            done.append(_choose(corpora, heldout(), threshold if likeness == "near" else None))
        return done[0][number]

    return [
        Unique(
            key=hashlib.blake2b(
                json.dumps(
                    [_VERSION, likeness, threshold, *side, [corpus.key for corpus in corpora], number]
                ).encode(),
                digest_size=16,
            ).hexdigest(),
            choose=lambda number=number: choose(number),
        )
        for number in range(len(corpora))
    ]


def _choose(
    corpora: Sequence[Corpus], heldout: Sequence[np.ndarray], threshold: float | None
) -> list[np.ndarray]:
    """Which documents of each corpus are kept; `threshold`: None where only equal ones are left out."""
    edges = np.cumsum([0, *(len(corpus.num_bytes) for corpus in corpora)])
    # By number over all corpora; the held-out ones first.
    order = np.argsort(~np.concatenate(heldout), kind="stable")
    hashes = np.concatenate([corpus.hashes[:] for corpus in corpora])
    _, first = np.unique(hashes[order], return_index=True)
    order = order[np.sort(first)]
    if threshold is not None:

        def read(places: np.ndarray, columns: slice) -> np.ndarray:
            numbers, wanted = order[places], np.arange(columns.start, columns.stop)
            values = np.empty((len(numbers), len(wanted)), np.uint32)
            for corpus, start, end in zip(corpora, edges[:-1], edges[1:], strict=True):
                here = np.flatnonzero((numbers >= start) & (numbers < end))
                assert corpus.signatures is not None
                rows = (numbers[here] - start)[:, None] * minhash.HASHES + wanted
                values[here] = corpus.signatures[rows]
            return values

        order = order[~minhash.near_earlier(read, len(order), threshold)]
    kept = np.zeros(edges[-1], bool)
    kept[order] = True
    return np.split(kept, edges[1:-1])

"""Which documents are held out."""

import hashlib

import numpy as np
from jaxtyping import Bool, UInt64


def document_hash(text: bytes) -> int:
    """64-bit hash of a document's UTF-8 text, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def heldout_mask(hashes: UInt64[np.ndarray, " documents"], fraction: float) -> Bool[np.ndarray, " documents"]:
    """Which of these documents [documents] (uint64 hashes) are held out.

    The text alone decides: adding, removing or reordering documents moves no other, equal texts fall
    on the same side in every source, and a larger fraction holds out a superset.
    """
    return hashes < np.uint64(int(fraction * 2**64))


def is_heldout(text: bytes, fraction: float) -> bool:
    """`heldout_mask` for one document's UTF-8 text."""
    return document_hash(text) < int(fraction * 2**64)

"""Token files of Megatron-LM: `name.bin` with the index `name.idx`, of version 1 (`IndexedDataset`).

The index, little endian: 9 bytes of magic; its version, uint64; a code for the type of the ids, uint8; the
number of sequences and that of the entries that bound documents, uint64 each; the length of every sequence
[sequences] int32; the byte in the .bin at which it begins [sequences] int64; the sequence with which each
document begins, and the number of sequences at the end [documents + 1] int64; of data of several kinds also
a mode of every sequence [sequences] int8, and such an index is refused.
"""

import struct
from pathlib import Path

import numpy as np

from stack.config.errors import StackError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""By their code; 6 and 7 are of floating point, and no ids."""
_HEAD = struct.Struct("<9sQBQQ")


def open_megatron(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids [tokens] of a .bin, memory-mapped, and the places [documents] where its documents end.

    Raises:
        StackError: an index that is not as described above, or one of another file.
    """
    index = path.with_suffix(".idx")
    try:
        content = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.zeros(0, np.uint8)
        size = path.stat().st_size
    except OSError as error:
        raise StackError(f"{index}: cannot be read: {error.strerror}; check path and permissions") from error
    if content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise StackError(f"{index}: does not begin as an index of Megatron does; give its .idx, or a .json")
    if len(content) < _HEAD.size:
        raise StackError(
            f"{index}: {len(content)} bytes are less than its head; it is truncated: copy it again"
        )
    _, version, code, sequences, bounds = _HEAD.unpack(content[: _HEAD.size].tobytes())
    if version != _VERSION:
        raise StackError(f"{index}: is of version {version}, not {_VERSION}; write it with a newer Megatron")
    if code not in _TYPES:
        raise StackError(f"{index}: ids of type {code} are not whole numbers; it holds no tokens")
    wanted = _HEAD.size + sequences * (4 + 8) + bounds * 8
    if len(content) == wanted + sequences and sequences:
        raise StackError(
            f"{index}: has a mode for every sequence, of text and images; write it with text alone"
        )
    if len(content) != wanted:
        raise StackError(
            f"{index}: {len(content):,} bytes, not the {wanted:,} of {sequences:,} sequences and {bounds:,}"
            " bounds of documents; copy it again"
        )
    dtype = np.dtype(_TYPES[code])
    lengths, pointers, documents = (
        part.view(kind)
        for part, kind in zip(
            np.split(content[_HEAD.size :], np.cumsum([sequences * 4, sequences * 8])),
            ("<i4", "<i8", "<i8"),
            strict=True,
        )
    )
    ends = np.cumsum(lengths, dtype=np.int64)
    if (lengths < 0).any() or not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
        raise StackError(f"{index}: its sequences do not follow one another; write it again")
    if not _bound(documents, sequences):
        raise StackError(f"{index}: its documents do not follow one another to the end; write it again")
    total = int(ends[-1]) if sequences else 0
    if size != total * dtype.itemsize:
        raise StackError(
            f"{path}: {size:,} bytes, not the {total * dtype.itemsize:,} that {index.name} names; it is"
            " truncated, or of another index: copy both again"
        )
    tokens = np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
    return tokens, np.concatenate([[0], ends])[documents[1:]]


def _bound(documents: np.ndarray, sequences: int) -> bool:
    """Whether these numbers of sequences cut all of them into documents."""
    if not len(documents):
        return not sequences
    return documents[0] == 0 and documents[-1] == sequences and bool((np.diff(documents) >= 0).all())

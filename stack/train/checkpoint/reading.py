"""Files to arrays, in any layout: each byte is read once for all processes, as nearly as blocks allow."""

import functools
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stack.storage.store import Store
from stack.train.checkpoint import boxes
from stack.train.checkpoint.budget import Budget
from stack.train.checkpoint.manifest import BLOCK, Manifest, Piece, fill_blocks, read_blocks
from stack.train.checkpoint.writing import THREADS

_CHUNK = 8  # Blocks read at a time, and digested before a processor has forgotten them.
_ALIGNMENT = 64  # Bytes; memory that begins at a multiple is an array of a CPU's as it is.
_WASTE = 1.05
"""A layout that has all processes read this many times as much as another is not read directly."""


class Reader:
    """One checkpoint."""

    def __init__(self, store: Store, manifest: Manifest, *, budget: Budget) -> None:
        """Reads nothing yet."""
        self._store = store
        self._manifest = manifest
        self._budget = budget
        self.bytes_read = 0
        """From the store, by this process."""
        self._pieces: dict[str, list[tuple[str, Piece]]] = {}
        for name, file in manifest.files.items():
            for piece in file.pieces:
                self._pieces.setdefault(piece.leaf, []).append((name, piece))
        # Arrays smaller than a block share one; a lock, or two threads would read it at once.
        self._cached = functools.lru_cache(maxsize=64)(self._read)
        self._lock = threading.Lock()
        self._counting = threading.Lock()

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Arrays by name, each laid out as wanted or, if that would read it several times, over all devices.

        Raises:
            DamagedError: a file is not as it was written.
            OSError: the store fails.
        """
        with ThreadPoolExecutor(THREADS, thread_name_prefix="read checkpoint") as pool:
            shardings = {name: self._sharding(name, like) for name, like in wanted.items()}
            parts = {
                name: [
                    pool.submit(self._read_box, name, like, box, here)
                    for box, devices in boxes.boxes(shardings[name], like.shape).items()
                    if (here := [d for d in devices if d.process_index == jax.process_index()])
                ]
                for name, like in wanted.items()
            }
            try:
                return {
                    name: jax.make_array_from_single_device_arrays(
                        wanted[name].shape, shardings[name], [a for part in some for a in part.result()]
                    )
                    for name, some in parts.items()
                }
            finally:  # After a failure nothing more is read.
                pool.shutdown(cancel_futures=True)

    def _read_box(
        self, name: str, like: jax.ShapeDtypeStruct, box: boxes.Box, devices: list[jax.Device]
    ) -> list[jax.Array]:
        """A box of an array on each device that holds it."""
        held = self._budget.take(boxes.size(box) * like.dtype.itemsize)
        try:
            values = self.read_box(name, box, like.dtype)
            return jax.block_until_ready([jax.device_put(values, _on(like, device)) for device in devices])
        finally:
            self._budget.give(held)

    def read_box(self, name: str, box: boxes.Box, dtype: np.dtype) -> np.ndarray:
        """A box of an array, of the type it was saved in, on this host; raises what `read` does."""
        values = _empty([stop - start for start, stop in box], dtype)
        for file, piece in self._pieces.get(name, ()):
            outer = _box(piece)
            if (both := boxes.overlap(box, outer)) is not None:  # () of a scalar.
                self._read_piece(file, piece, both, values, boxes.within(both, box))
        return values

    def _read_piece(
        self, file: str, piece: Piece, box: boxes.Box, values: np.ndarray, index: tuple[slice, ...]
    ) -> None:
        """Reads a box of a piece into its place in an array."""
        outer = _box(piece)
        first, _, axis = boxes.rows(box, outer)
        band = (*outer[:axis], box[axis], *outer[axis + 1 :]) if outer else ()
        target = values[index] if index else values
        # Into its place, where that is as contiguous as the file; else by way of a copy.
        direct = band == box and target.flags.c_contiguous
        rows = target if direct else np.empty([high - low for low, high in band], values.dtype)
        flat = memoryview(rows.reshape(-1).view(np.uint8))
        self._fill(file, piece.offset + first * values.itemsize, flat)
        if not direct:
            values[index] = rows[boxes.within(box, band)]

    def _fill(self, file: str, start: int, target: memoryview) -> None:
        """Fills memory with bytes of a file, by way of a copy only where they begin or end within a block."""
        checked = self._manifest.files[file]
        place, stop = start, start + len(target)
        whole = stop if stop == checked.size else stop // BLOCK * BLOCK
        while place < stop:
            if place % BLOCK == 0 and place < whole:
                end = min(whole, place + _CHUNK * BLOCK)
                some = target[place - start : end - start]
                fill_blocks(self._store, self._manifest.step, file, checked, place, some)
                self._count(len(some))
            else:
                end = min(stop, (place // BLOCK + 1) * BLOCK)
                with self._lock:
                    data, low = self._cached(file, place // BLOCK)
                target[place - start : end - start] = data[place - low : end - low]
            place = end

    def _read(self, file: str, block: int) -> tuple[memoryview, int]:
        place = block * BLOCK
        files = self._manifest.files
        data, low = read_blocks(self._store, self._manifest.step, file, files[file], place, place + BLOCK)
        self._count(len(data))
        return data, low

    def _count(self, size: int) -> None:
        with self._counting:
            self.bytes_read += size

    def _sharding(self, name: str, like: jax.ShapeDtypeStruct) -> NamedSharding:
        wanted = like.sharding
        assert isinstance(wanted, NamedSharding)
        if jax.process_count() == 1:
            return wanted
        other = over_all_devices(wanted, like.shape)
        cost = [self._cost(name, like, sharding) for sharding in (wanted, other)]
        return wanted if cost[0] <= _WASTE * max(1.0, cost[1]) else other

    def _cost(self, name: str, like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> float:
        """Bytes of the blocks that all processes read, over those of the array."""
        spans: dict[tuple[int, str], list[tuple[int, int]]] = {}
        for box, devices in boxes.boxes(sharding, like.shape).items():
            for file, piece in self._pieces.get(name, ()):
                outer = _box(piece)
                if (both := boxes.overlap(box, outer)) is not None:  # () of a scalar.
                    first, last, _ = boxes.rows(both, outer)
                    low, high = (piece.offset + place * like.dtype.itemsize for place in (first, last))
                    for process in {device.process_index for device in devices}:
                        spans.setdefault((process, file), []).append((low // BLOCK, -(-high // BLOCK)))
        return (
            sum(map(_union, spans.values())) * BLOCK / max(1, int(np.prod(like.shape)) * like.dtype.itemsize)
        )


def _union(spans: list[tuple[int, int]]) -> int:
    """Whole numbers that are in any of the spans."""
    size = end = 0
    for low, high in sorted(spans):
        size += max(0, high - max(low, end))
        end = max(end, high)
    return size


def over_all_devices(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """A layout on the same mesh that splits the first axes over as many devices as divide them."""
    left = [(axis, size) for axis, size in sharding.mesh.shape.items() if size > 1]
    spec: list[tuple[str, ...] | None] = []
    for length in shape:
        names: list[str] = []
        rest = length
        for axis, size in list(left):
            if rest % size == 0:
                names.append(axis)
                left.remove((axis, size))
                rest //= size
        spec.append(tuple(names) or None)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)


def lay_out(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array as it was wanted; every process calls, for the same arrays in the same order."""
    if array.sharding == sharding:
        return array
    return jax.jit(lambda values: jax.sharding.reshard(values, sharding), donate_argnums=0)(array)


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def _on(like: jax.ShapeDtypeStruct, device: jax.Device) -> jax.sharding.Sharding:
    assert like.sharding is not None
    return jax.sharding.SingleDeviceSharding(device, memory_kind=like.sharding.memory_kind)


def _box(piece: Piece) -> boxes.Box:
    return tuple((start, start + size) for start, size in zip(piece.start, piece.shape, strict=True))

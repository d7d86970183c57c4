"""Arrays to files: each process writes what it alone holds, and its share of what others hold too."""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import jax
import numpy as np

from stack.storage.store import Store
from stack.train.checkpoint import boxes
from stack.train.checkpoint.budget import Budget
from stack.train.checkpoint.manifest import BLOCK, File, Piece, digest_parts

_FILE = 64 << 20  # Bytes of a file, about.
THREADS = min(8, os.cpu_count() or 1)
"""That write at one time: more than there are cores, or than a disk takes, only get in each other's way."""


class Writer:
    """Copies arrays to the host and writes them in the background."""

    def __init__(self, store: Store, *, budget: Budget) -> None:
        """Holds at most the budget, and a file for each thread."""
        self._store = store
        self._budget = budget
        self._free: dict[int, list[np.ndarray]] = {}  # Buffers by size: new memory costs more than the copy.
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="write checkpoint")

    def write(self, step: int, leaves: Mapping[str, jax.Array]) -> Callable[[], dict[str, File]]:
        """Returns once everything is copied; longer where the budget is less than what is to be copied.

        Args:
            step: the folder's name.
            leaves: arrays by name.

        Returns:
            A function that waits for the files of this process and tells them by name. It raises OSError
            where one could not be written, or did not come back as it was written.
        """
        pending: dict[str, Future[File]] = {}
        waiting: list[tuple[Piece, np.ndarray]] = []
        amount = held = 0

        def flush() -> None:
            nonlocal waiting, amount, held
            if waiting:
                name = f"{jax.process_index()}/{len(pending)}"
                pending[name] = self._pool.submit(self._write_file, f"{step}/{name}", waiting, held)
                waiting, amount, held = [], 0, 0

        own = list(_own_boxes(leaves))
        ahead = 0
        for leaf, box, _, host in own:  # So many copies at once as there is room for.
            ahead += boxes.size(box) * leaves[leaf].dtype.itemsize
            if ahead > self._budget.limit:
                break
            host.start()
        for leaf, box, outer, host in own:
            size = boxes.size(box) * leaves[leaf].dtype.itemsize
            if waiting and (amount + size > _FILE or held + size > self._budget.limit):
                flush()
            held += self._budget.take(size)
            piece = Piece(
                leaf=leaf,
                start=tuple(start for start, _ in box),
                shape=tuple(stop - start for start, stop in box),
                offset=amount,
            )
            waiting.append((piece, host.copy(boxes.within(box, outer), self._buffer)))
            amount += size
        flush()

        def files() -> dict[str, File]:
            wait(pending.values())  # All of them: what failed is removed, and nothing may come after.
            written = {name: future.result() for name, future in pending.items()}
            self._store.sync_names(f"{step}/{jax.process_index()}")
            return written

        return files

    def close(self) -> None:
        """Waits for what is being written."""
        self._pool.shutdown()

    def _buffer(self, size: int) -> np.ndarray:
        """So many bytes, of an earlier save if there are any: a run saves the same sizes again and again."""
        free = self._free.get(size)
        return free.pop() if free else np.empty(size, np.uint8)

    def _write_file(self, name: str, parts: list[tuple[Piece, np.ndarray]], held: int) -> File:
        try:
            views = [memoryview(values.reshape(-1).view(np.uint8)) for _, values in parts]
            digests, size = digest_parts(views), sum(map(len, views))
            self._store.write_parts(name, views)
            if digest_parts(self._store.chunks(name)) != digests:
                raise OSError(5, "what was written does not come back", name)
            return File(size=size, digests=digests, pieces=tuple(piece for piece, _ in parts))
        finally:
            for _, values in parts:
                self._free.setdefault(values.nbytes, []).append(values.reshape(-1).view(np.uint8))
            self._budget.give(held)


def _own_boxes(
    leaves: Mapping[str, jax.Array],
) -> Iterator[tuple[str, boxes.Box, boxes.Box, "_Host"]]:
    """The boxes this process writes, in order, each with the one of the shard it lies in, and that.

    What several devices hold is cut into as many parts and written by all of them.
    """
    for leaf, array in leaves.items():
        shards = {boxes.box_of(shard.index, array.shape): shard.data for shard in array.addressable_shards}
        for box, devices in boxes.boxes(array.sharding, array.shape).items():
            if box not in shards or not boxes.size(box):
                continue
            share = max(BLOCK, -(-boxes.size(box) * array.dtype.itemsize // len(devices)))
            parts = list(boxes.split(box, max(1, min(_FILE, share) // array.dtype.itemsize)))
            mine = [
                part
                for number, part in enumerate(parts)
                if devices[number % len(devices)].process_index == jax.process_index()
            ]
            if not mine:
                continue
            host = _Host(shards[box])
            for part in mine:
                yield leaf, part, box, host


class _Host:
    """A shard, and its copy on the host."""

    def __init__(self, array: jax.Array) -> None:
        # A wrapper of its own: JAX keeps what an array was read as for as long as the array lives.
        self._array = jax.make_array_from_single_device_arrays(array.shape, array.sharding, [array])
        self._is_here = next(iter(array.devices())).platform == "cpu"

    def start(self) -> None:
        """Begins to copy, and does not wait for it."""
        if not self._is_here:
            self._array.copy_to_host_async()

    def copy(self, index: tuple[slice, ...], buffer: Callable[[int], np.ndarray]) -> np.ndarray:
        """A part of it in a buffer, which nothing overwrites: on a CPU it is the device's memory itself."""
        values = np.asarray(self._array)[index]
        own = buffer(values.nbytes).view(values.dtype).reshape(values.shape)
        np.copyto(own, values)
        return own

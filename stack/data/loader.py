"""Batches as global arrays: each process reads only the rows its own devices hold."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stack.config.errors import StackError
from stack.data.dataset import Dataset
from stack.data.examples import HELDOUT, TRAINING
from stack.data.fields import Field, abstract_batch
from stack.data.mixture import training_order
from stack.data.position import BEGINNING, Position
from stack.parallel.rules import Layout

type Batch = dict[str, jax.Array]
"""The fields of an objective, int32. Of packed rows, tokens, labels, segments and positions are
[batch, length]; example is [batch], the number of a row within the whole batch."""


def training_batches(
    dataset: Dataset,
    *,
    fields: Sequence[Field],
    batch_size: int,
    seed: int,
    shuffle: bool,
    layout: Layout,
    position: Position = BEGINNING,
    audit: Callable[[int, np.ndarray], None] | None = None,
    part: tuple[int, int] = (0, 1),
) -> Callable[[int], Batch]:
    """The function from a step to its batch.

    The global batch depends on the seed and the rows used before it alone: not on the steps asked for
    before, nor on the number of processes and devices.

    Args:
      dataset: the rows.
      fields: what a batch holds.
      batch_size: rows, over all devices.
      seed: of the order.
      shuffle: a new order every epoch; false reads in order.
      layout: how a batch lies on the mesh.
      position: where the run stands.
      audit: told of every step that is read: its number, counted from 1, and those of this process's rows.
      part: which part of how many equal ones of each batch is wanted.

    Raises:
      ValueError: the data has no such field.
    """
    order = training_order(dataset, seed=seed, shuffle=shuffle)
    size = batch_size // part[1]

    def batch(step: int) -> Batch:
        def rows(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            wanted = position.places(position.first(step, batch_size) + places)
            numbers = np.array([order[place] for place in wanted.tolist()], np.int64)
            if audit is not None:
                audit(step + 1, numbers)
            return numbers, _draws(seed, TRAINING, wanted)

        return _assemble(dataset, fields, rows, size, layout, first=part[0] * size)

    return batch


def heldout_batches(
    dataset: Dataset, *, fields: Sequence[Field], batch_size: int, layout: Layout
) -> tuple[Callable[[int], Batch], int]:
    """The function from a number to a batch, and how many there are: every row once, in order.

    What an objective draws at random depends on a row's number alone, so that all evaluations are of one
    and the same text. The last batch is filled up with rows of padding. Every process counts the same
    batches.

    Args:
      dataset: the rows.
      fields: what a batch holds.
      batch_size: rows, over all devices.
      layout: how a batch lies on the mesh.
    """

    def batch(number: int) -> Batch:
        def rows(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            wanted = number * batch_size + places
            return np.where(wanted < dataset.num_rows, wanted, -1), _draws(0, HELDOUT, wanted)

        return _assemble(dataset, fields, rows, batch_size, layout)

    return batch, -(-dataset.num_rows // batch_size)


def heldout_rows(dataset: Dataset, fields: Sequence[Field], numbers: np.ndarray) -> Mapping[str, np.ndarray]:
    """The fields, without `example`, of held-out rows by number, as `heldout_batches` has them."""
    return dataset.examples.read(dataset, numbers, _draws(0, HELDOUT, numbers), fields)


def timed[T](batches: Iterator[T]) -> Iterator[tuple[T, float]]:
    """Each batch with the seconds it was waited for."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - start


def save_batch(path: Path, batch: Batch) -> None:
    """Writes what this process holds of a batch: an .npz with an array of each field.

    Raises:
      StackError: it cannot be written.
    """
    fields: dict[str, Any] = {}
    for name, array in batch.items():
        shards = {str(shard.index): shard for shard in array.addressable_shards}.values()
        rows = {shard.index[0].start or 0: np.asarray(shard.data) for shard in shards}
        fields[name] = np.concatenate([rows[start] for start in sorted(rows)])
    target = path.with_name(f"{path.name}-process-{jax.process_index()}.npz")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target, **fields)
    except OSError as error:
        raise StackError(f"{target}: cannot be written: {error.strerror}; make room on its disk") from error


def prefetch(make: Callable[[int], Batch], numbers: Iterable[int], *, ahead: int = 3) -> Generator[Batch]:
    """make(n) for each n, in order, with up to `ahead` of them made early on a background thread.

    What `make` raises comes out here, at its place in the order. Closing the iterator, or dropping it,
    ends the thread.
    """
    pending: deque[Future[Batch]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        for number in numbers:
            pending.append(pool.submit(make, number))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _draws(seed: int, purpose: int, places: np.ndarray) -> np.ndarray:
    """What the random choices of rows at these places are made of; see `Examples.read`."""
    return np.stack([np.full_like(places, seed), np.full_like(places, purpose), places], axis=1)


def _assemble(
    dataset: Dataset,
    fields: Sequence[Field],
    rows: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    layout: Layout,
    *,
    first: int = 0,
) -> Batch:
    """`rows` maps places in the batch to row numbers and draws; asked only for places of this process.

    Those of the rows that are wanted begin at `first`.
    """
    by_row = layout.sharding("batch")
    indices = by_row.addressable_devices_indices_map((batch_size,)).values()
    everywhere = np.arange(batch_size)
    places = np.unique(np.concatenate([everywhere[index[0]] for index in indices if index]))
    read = dataset.examples.read(dataset, *rows(first + places), fields)
    local = {**read, "example": (first + places).astype(np.int32)}
    axes = (zip(field.axes, local[field.name].shape, strict=True) for field in fields)
    sizes = {axis: size for pairs in axes for axis, size in pairs}
    abstract = abstract_batch(fields, sizes=sizes | {"batch": batch_size}, layout=layout)

    def spread(values: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            which, *columns = index or (slice(None),)
            return values[np.searchsorted(places, everywhere[which])][:, *columns]

        return jax.make_array_from_callback(like.shape, like.sharding, shard, dtype=like.dtype)

    return {name: spread(local[name], like) for name, like in abstract.items()}

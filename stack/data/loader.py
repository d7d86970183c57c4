"""Batches as global arrays: each process reads only the rows its own devices hold."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stack.data.dataset import Dataset
from stack.data.mixture import training_order

type Batch = dict[str, jax.Array]
"""tokens, labels, segments, positions: int32 [batch, length]; example: int32 [batch], the number of a
row within the whole batch."""


def training_batches(
    dataset: Dataset, *, batch_size: int, seed: int, shuffle: bool, sharding: NamedSharding
) -> Callable[[int], Batch]:
    """The function from a step to its batch of `batch_size` rows, laid out by `sharding` [batch, length].

    The global batch depends on (seed, step) alone: not on the steps asked for before, nor on the
    number of processes and devices.
    """
    order = training_order(dataset, seed=seed, shuffle=shuffle)

    def batch(step: int) -> Batch:
        def rows(places: np.ndarray) -> np.ndarray:
            return np.array([order[step * batch_size + place] for place in places.tolist()], np.int64)

        return _assemble(dataset, rows, batch_size, sharding)

    return batch


def heldout_batches(
    dataset: Dataset, *, batch_size: int, sharding: NamedSharding
) -> tuple[Callable[[int], Batch], int]:
    """The function from a number to a batch, and how many there are: every row once, in order.

    The last batch is filled up with rows of padding, whose labels are all -1. Every process counts the
    same batches.
    """

    def batch(number: int) -> Batch:
        def rows(places: np.ndarray) -> np.ndarray:
            wanted = number * batch_size + places
            return np.where(wanted < dataset.num_rows, wanted, -1)

        return _assemble(dataset, rows, batch_size, sharding)

    return batch, -(-dataset.num_rows // batch_size)


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


def _assemble(
    dataset: Dataset, rows: Callable[[np.ndarray], np.ndarray], batch_size: int, sharding: NamedSharding
) -> Batch:
    """`rows` maps places in the batch to row numbers; asked only for places of this process."""
    shape = (batch_size, dataset.sequence_length)
    indices = sharding.addressable_devices_indices_map(shape).values()
    everywhere = np.arange(batch_size)
    places = np.unique(np.concatenate([everywhere[index[0]] for index in indices if index]))
    local = dataset.read(rows(places)) | {"example": places.astype(np.int32)}
    by_row = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))

    def spread(values: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            which, *columns = index or (slice(None),)
            return values[np.searchsorted(places, everywhere[which])][:, *columns]

        target = sharding if values.ndim == 2 else by_row
        return jax.make_array_from_callback((batch_size, *values.shape[1:]), target, shard)

    return {name: spread(values) for name, values in local.items()}

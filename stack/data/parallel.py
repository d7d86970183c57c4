"""Who does work that falls into parts; the results come in the order of the parts, a few at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Workers(Protocol):
    """Threads of this process, or a cluster: see `stack.data.ray_tasks`."""

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """What the function makes of each item, in order.

        Items are asked for as they are worked on, and only so many results wait that memory stays bounded.
        """
        ...


@dataclass(frozen=True)
class Threads:
    """Threads of this process.

    Not processes: `tokenizers` releases the interpreter lock while it works, so they run side by side, need
    no guarded main module and pickle nothing.
    """

    count: int = os.cpu_count() or 1

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """See `Workers`."""
        pending: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(self.count, thread_name_prefix="work")
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * self.count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

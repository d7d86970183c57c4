"""Tokenizing on the workers of a Ray cluster."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from stack.parallel import cluster


@dataclass(frozen=True)
class RayTasks:
    """The cluster that this process is connected to, a task on each CPU of it; see `Workers`.

    Ray does a task again where its worker died.
    """

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """See `Workers`; an item has a name, told when no worker lives to its end."""
        import ray

        task = cluster.Task(function)
        pending: deque[tuple[Any, str]] = deque()
        try:
            for item in items:
                pending.append((task.start(item), item.name))
                if len(pending) > 2 * ray.cluster_resources().get("CPU", 1):
                    yield cluster.result(*pending.popleft())
            while pending:
                yield cluster.result(*pending.popleft())
        finally:
            for reference, _ in pending:
                ray.cancel(reference)

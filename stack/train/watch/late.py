"""Reading metrics without making the devices wait."""

from collections.abc import Callable
from typing import Any


class LateReader:
    """Hands on the metrics of a step once the next one is dispatched.

    Reading an array waits for the device. One step late, the device already has the next step to work
    on, so the host's wait costs nothing.
    """

    def __init__(
        self,
        tell: Callable[[int, dict[str, float]], object],
        read: Callable[[dict[str, Any]], dict[str, float]],
    ) -> None:
        """`tell` gets the number of steps taken and their metrics, as `read` makes numbers of them."""
        self._tell, self._read = tell, read
        self._pending: tuple[int, dict[str, Any]] | None = None

    def push(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of the step just dispatched and hands on those of the one before."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Hands on what is left."""
        pending, self._pending = self._pending, None
        if pending is not None:
            step, metrics = pending
            self._tell(step, self._read(metrics))

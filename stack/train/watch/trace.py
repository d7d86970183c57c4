"""A trace of what host and devices do in some steps, for TensorBoard's and Perfetto's viewers."""

import os
from types import TracebackType
from typing import Any, Self

import jax


class Trace:
    """The trace of steps a to b, b excluded; none if there are no such steps. Only process 0 writes it."""

    def __init__(self, folder: str | os.PathLike[str], steps: tuple[int, int] | None) -> None:
        """Touches nothing yet."""
        self._folder = os.fspath(folder)
        self._steps = range(*steps) if steps and jax.process_index() == 0 else range(0)
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Starts or stops, if need be, when `state` is what `step` is about to get."""
        if (step in self._steps) != self._running:
            jax.block_until_ready(state)  # Whole steps: none from before, none left out.
            self._stop() if self._running else self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._stop()

    def _start(self) -> None:
        jax.profiler.start_trace(self._folder)
        self._running = True

    def _stop(self) -> None:
        self._running = False
        jax.profiler.stop_trace()

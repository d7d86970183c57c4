"""Being asked to stop: by a signal or the clock, on all processes at the same step."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from stack import environment, interrupt
from stack.config.errors import StackError


class StoppedError(StackError):
    """The run has saved and stopped, as it was asked to; started again it goes on.

    The command line prints it and exits with its status.
    """

    status = interrupt.REQUEUE
    is_of_all = True


class InterruptedRun(KeyboardInterrupt):
    """The same after Ctrl-C."""

    is_of_all = True


class Stop:
    """Hears SIGTERM, SIGUSR1, SIGINT and the time limit while a run trains.

    Of several processes each may be told; they agree through JAX's preemption service, which takes SIGTERM
    for its notice and finds the first step that none has passed.
    """

    def __init__(self, limit_minutes: float | None) -> None:
        """Hears nothing yet."""
        self._deadline = None if limit_minutes is None else environment.STARTED + 60 * limit_minutes
        self._limit = limit_minutes
        self._asked: str | None = None
        self._noticed = self._interrupted = False
        self._is_training = False
        self._before: dict[int, Any] = {}

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Takes the signals over; only the main thread can, others leave them as they are."""
        numbers = [signal.SIGUSR1, signal.SIGINT]
        if jax.process_count() == 1:  # Else JAX has taken it.
            numbers.append(signal.SIGTERM)
        with interrupt.taken_over(numbers, self._hear) as self._before:
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """While an interrupt waits for the end of a step; else it is what it was before."""
        self._is_training = True
        try:
            yield
        finally:
            self._is_training = False

    def is_asked(self) -> bool:
        """Whether this process was asked to stop, or its time is over."""
        if self._asked is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self._asked = f"train.stop_after_minutes={self._limit:g}"
        return self._asked is not None

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, which is the same on all processes; called for each, in order."""
        asked = self.is_asked()
        if jax.process_count() == 1:
            return asked
        if asked and not self._noticed:
            self._noticed = True
            os.kill(os.getpid(), signal.SIGTERM)
        return multihost_utils.reached_preemption_sync_point(step)

    def error(self, step: int, folder: str) -> BaseException:
        """What to raise once the step is saved."""
        asked = self._asked or "SIGTERM, here or on another process"
        told = f"stopped at step {step:,} by {asked}; it is saved; go on with: stack train {folder}"
        return InterruptedRun(told) if self._asked == _name(signal.SIGINT) else StoppedError(told)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self._asked = self._asked or _name(number)
            return
        before: Callable[[int, FrameType | None], Any] | Any = self._before.get(number)
        if self._interrupted and callable(before):
            before(number, frame)
        self._interrupted = True
        interrupt.acted_on()
        if not self._is_training:  # All is saved, or nothing is to be; what is on its way is waited for.
            interrupt.raise_interrupt()
        self._asked = self._asked or _name(number)


def _name(number: int) -> str:
    return signal.Signals(number).name

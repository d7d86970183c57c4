"""What the trainer tells whoever listens; it knows no listener by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any


def _nobody(text: str) -> None:
    """Warnings of a listener that no run has taken are for nobody."""


class Listener:
    """Hears a run; every method may be left as it is.

    The trainer calls listeners on every process, in their order, between steps. `metrics` are plain
    Python floats that were read from the devices already: listening never waits for a device. What a
    method returns is added to what the listeners after it hear.
    """

    warn: Callable[[str], None] = staticmethod(_nobody)
    """Tells every listener of the run something that a person should know, in one line."""

    def on_start(self, info: dict[str, Any]) -> Mapping[str, Any] | None:
        """The run begins or goes on. `info`: `step` taken so far, `steps` of the whole run, and more."""

    def on_metrics(self, step: int, metrics: dict[str, float]) -> Mapping[str, float] | None:
        """Metrics of training step `step`, such as `loss` and `tokens_per_second`."""

    def on_eval(self, step: int, metrics: dict[str, float]) -> Mapping[str, float] | None:
        """Metrics of an evaluation after `step` steps, such as `loss`, `perplexity`, `accuracy`."""

    def on_warning(self, text: str) -> None:
        """Something of the run that a person should know, in one line."""

    def on_save(self, step: int) -> Mapping[str, Any] | None:
        """The checkpoint of `step` begins to be saved.

        What is returned is kept with it: a run that goes on from there has it as `kept` of its `info`.
        """

    def sync(self) -> None:
        """Makes durable what was written; called from another thread before a checkpoint counts."""

    def on_checkpoint(self, step: int) -> None:
        """The checkpoint of `step` is saved, and durable."""

    def on_end(self, summary: dict[str, Any]) -> Mapping[str, Any] | None:
        """The run ended; last call. After an error it is called too, with `error` in the summary."""


class Listeners(Listener):
    """Several as one."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        """Takes them, in their order."""
        self._listeners = tuple(listeners)
        for listener in self._listeners:
            listener.warn = self.on_warning
        self.warn = self.on_warning

    def on_start(self, info: dict[str, Any]) -> Mapping[str, Any]:
        """Tells all; returns what they make of it."""
        return self._collect(lambda listener: listener.on_start, info)

    def on_metrics(self, step: int, metrics: dict[str, float]) -> Mapping[str, float]:
        """Tells all; returns what they make of it."""
        return self._collect(lambda listener: partial(listener.on_metrics, step), metrics)

    def on_eval(self, step: int, metrics: dict[str, float]) -> Mapping[str, float]:
        """Tells all; returns what they make of it."""
        return self._collect(lambda listener: partial(listener.on_eval, step), metrics)

    def on_warning(self, text: str) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.on_warning(text)

    def on_save(self, step: int) -> Mapping[str, Any]:
        """Tells all; returns what they want kept."""
        kept: dict[str, Any] = {}
        for listener in self._listeners:
            kept |= listener.on_save(step) or {}
        return kept

    def sync(self) -> None:
        """Asks all."""
        for listener in self._listeners:
            listener.sync()

    def on_checkpoint(self, step: int) -> None:
        """Tells all."""
        for listener in self._listeners:
            listener.on_checkpoint(step)

    def on_end(self, summary: dict[str, Any]) -> Mapping[str, Any]:
        """Tells all; returns what they make of it."""
        return self._collect(lambda listener: listener.on_end, summary)

    def _collect(self, method: Callable[[Listener], Callable[[dict], Any]], values: dict) -> dict:
        for listener in self._listeners:
            values = values | (method(listener)(dict(values)) or {})
        return values

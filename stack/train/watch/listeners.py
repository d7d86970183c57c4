"""What the trainer tells whoever listens; it knows no listener by name."""

from typing import Any


class Listener:
    """Hears a run; every method may be left as it is.

    The trainer calls listeners on every process, in their order, between steps. `metrics` are plain
    Python floats that were read from the devices already: listening never waits for a device.
    """

    def on_start(self, info: dict[str, Any]) -> None:
        """The run begins or goes on. `info`: `step` taken so far, `steps` of the whole run, and more."""

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of training step `step`, such as `loss` and `tokens_per_second`."""

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of an evaluation after `step` steps, such as `loss`, `perplexity`, `accuracy`."""

    def on_warning(self, text: str) -> None:
        """Something of the run that a person should know, in one line."""

    def on_checkpoint(self, step: int) -> None:
        """The checkpoint of `step` is being saved."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """The run ended; last call. After an error it is called too, with `error` in the summary."""

"""A run on the screen: a live bar in a terminal or notebook, a few plain lines in a log."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from stack.train.watch.announce import conclusion, introduction
from stack.train.watch.listeners import Listener

_PLAIN_LINES = 20  # Lines of a whole run in a log.
_SPEEDS = 20  # Steps whose speed is averaged: single ones arrive unevenly.
_PLAIN_SECONDS = 60.0  # A log that says nothing for longer looks like a hang.


class Progress(Listener):
    """Shows step, loss, tokens per second and the time left; only process 0 shows anything.

    Draws only when told something, from the caller's thread. A screen that goes away (a closed pipe,
    a lost terminal) ends the display, never the run.
    """

    def __init__(self, console: Console | None = None) -> None:
        """Shows on a console; None: standard output."""
        self._console = console or _StandardOutput(highlight=False)
        self._shows = True
        self._live: Live | None = None
        self._notebook: Any = None  # IPython's handle of the output that holds the bar.
        self._step = 0
        self._steps = 0
        self._metrics: dict[str, float] = {}
        self._speeds: deque[float] = deque(maxlen=_SPEEDS)
        self._first: tuple[int, float] | None = None  # Step and time the speed is measured from.
        self._printed: tuple[int, float] | None = None  # Step and time of the last line of a log.

    def on_start(self, info: dict[str, Any]) -> None:
        """Introduces the run, if `info` does, and starts the display; reads `step` and `steps`."""
        import jax

        self._step, self._steps = int(info["step"]), int(info["steps"])
        self._metrics, self._first, self._printed = {}, None, None
        self._speeds.clear()
        self._shows = jax.process_index() == 0
        if "name" in info:
            self._safely(lambda: self._console.print(introduction(info), soft_wrap=True))
        self._safely(self._start)

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Moves on; reads `loss` and `tokens_per_second` where there are."""
        self._step, self._metrics = step, metrics
        if "tokens_per_second" in metrics:
            self._speeds.append(metrics["tokens_per_second"])
        # The first step holds the compilation, so the clock starts after it.
        self._first = self._first or (step, time.monotonic())
        self._safely(self._draw)

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Prints a line above the bar."""
        shown = {name.replace("_", " "): value for name, value in metrics.items() if name != "tokens"}
        values = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self._safely(lambda: self._console.print(f"step {step:,}  held-out: {values}", soft_wrap=True))

    def on_warning(self, text: str) -> None:
        """Prints a line above the bar."""
        self._safely(
            lambda: self._console.print(f"warning: {text}", style="yellow", soft_wrap=True, markup=False)
        )

    def on_checkpoint(self, step: int) -> None:
        """Prints a line above the bar."""
        self._safely(lambda: self._console.print(f"step {step:,}  checkpoint", style="dim"))

    def on_end(self, summary: dict[str, Any]) -> None:
        """Leaves the bar as it last was, and concludes the run if it came to its end."""
        if self._live is not None:
            with contextlib.suppress(OSError, ValueError):  # Gives standard output back, come what may.
                self._live.stop()
        self._live = self._notebook = None
        if "rows" in summary:
            self._safely(lambda: self._console.print(conclusion(summary), soft_wrap=True))

    def line(self) -> str:
        """Step, loss, learning rate, gradient norm, speed of late and the time left, as far as known."""
        parts = [f"step {self._step:,}/{self._steps:,}"]
        if not self._metrics:
            parts.append("compiling")
        if "loss" in self._metrics:
            parts.append(f"loss {self._metrics['loss']:.4f}")
        if "learning_rate" in self._metrics:
            parts.append(f"lr {self._metrics['learning_rate']:.2e}")
        if "grad_norm" in self._metrics:
            parts.append(f"grad norm {self._metrics['grad_norm']:.3g}")
        if self._speeds:
            parts.append(f"{_shorten(statistics.harmonic_mean(self._speeds))} tokens/s")
        if (seconds := self._seconds_left()) is not None:
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(parts)

    def _seconds_left(self) -> float | None:
        if self._first is None or self._step <= self._first[0]:
            return None
        step, began = self._first
        return (self._steps - self._step) * (time.monotonic() - began) / (self._step - step)

    def _start(self) -> None:
        if self._console.is_jupyter:
            from IPython.display import display

            self._notebook = display(self._bar(), display_id=True)
        elif self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(get_renderable=self._bar, console=self._console, auto_refresh=False)
            self._live.start(refresh=True)

    def _draw(self) -> None:
        if self._notebook is not None:
            self._notebook.update(self._bar())
        elif self._live is not None:
            self._live.refresh()
        elif self._plain_line_is_due():
            self._printed = self._step, time.monotonic()
            self._console.print(self.line(), soft_wrap=True)

    def _plain_line_is_due(self) -> bool:
        if self._printed is None or self._step >= self._steps:
            return True
        step, printed = self._printed
        return self._step - step >= self._steps / _PLAIN_LINES or time.monotonic() - printed >= _PLAIN_SECONDS

    def _bar(self) -> Table:
        line, bar = self.line(), Table.grid(padding=(0, 1))
        # What is told comes first: the bar has what it leaves of the screen's width.
        width = min(30, self._console.width - len(line) - 3)
        shown = [ProgressBar(total=self._steps, completed=self._step, width=width)] if width >= 5 else []
        bar.add_row(*shown, Text(line, no_wrap=True, overflow="ellipsis"))
        return bar

    def _safely(self, show: Callable[[], object]) -> None:
        """Shows something, or gives up showing anything if the screen is gone."""
        if not self._shows:
            return
        try:
            show()
        except (OSError, ValueError):  # A lost terminal; a closed file.
            self._shows = False


class _StandardOutput(Console):
    """Standard output; Rich's own would end the process when its reader has gone."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()  # Points standard output at nothing, so that exit is clean too.
        except SystemExit:
            raise BrokenPipeError from None


def _shorten(value: float) -> str:
    """1234567 as 1.23M: three digits and a suffix."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"

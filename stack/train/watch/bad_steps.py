"""Steps that were not applied: told, counted, and too many of them in a row are the end."""

from typing import Any

from stack.config import Config
from stack.config.errors import StackError
from stack.train.watch.listeners import Listener


class BadStepsError(StackError):
    """Too many steps in a row could not be applied."""

    is_of_all = True  # Metrics are the same everywhere.

    def __init__(self, first: int, last: int, told: str) -> None:
        """Steps `first` to `last`, counted from 1."""
        super().__init__(told)
        self.first = first
        self.last = last


class BadSteps(Listener):
    """Warns of each, and raises `BadStepsError` at one more in a row than the config allows."""

    def __init__(self, config: Config) -> None:
        """Has seen none."""
        self._config = config
        self._in_row = 0
        self._start = (0, 0)  # Step, and rows used by then.

    def on_start(self, info: dict[str, Any]) -> None:
        """Goes on with the row that the checkpoint saw, if it saw one."""
        self._in_row = int(info.get("kept", {}).get("bad_in_row", 0))
        self._start = int(info["step"]), int(info.get("rows", 0))

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Looks at `skipped` of a step.

        Raises:
            BadStepsError: it is one too many.
        """
        if not metrics.get("skipped"):
            self._in_row = 0
            return
        self._in_row += 1
        batch, (begin, used) = self._config.train.batch_size, self._start
        last = used + (step - begin) * batch
        told = (
            f"step {step:,} is not applied: loss {metrics['loss']:.4g}, gradient norm"
            f" {metrics['grad_norm']:.4g}; its rows are {last - batch:,} to {last - 1:,} of those used"
        )
        self.warn(told)
        most = self._config.stability.most_in_row
        if self._in_row > most:
            raise BadStepsError(
                step - self._in_row + 1,
                step,
                f"{self._in_row} steps in a row, up to step {step:,}, could not be applied, more than"
                f" stability.most_in_row={most}: the last had loss {metrics['loss']:.4g} and gradient norm"
                f" {metrics['grad_norm']:.4g}; lower optimizer.learning_rate, or leave their rows out with"
                " stability.then=roll_back",
            )

    def on_save(self, step: int) -> dict[str, Any]:
        """How many there were in a row."""
        return {"bad_in_row": self._in_row} if self._in_row else {}

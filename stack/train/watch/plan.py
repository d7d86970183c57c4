"""What a run was planned to take, told beside what it takes."""

from collections.abc import Sequence
from typing import Any

import jax

from stack.planner.guard import memory_line
from stack.planner.predict import Planned, line, predict
from stack.step.program import Program
from stack.train.watch.listeners import Listener
from stack.train.watch.planned import Comparison


class Plan(Listener):
    """Adds the plan to the introduction and the metrics, and warns once where the run differs from it."""

    def __init__(self, program: Program, devices: Sequence[jax.Device], *, resolved: bool) -> None:
        """Plans the run; what cannot be planned is told, and keeps nothing from running.

        Args:
          program: of the run.
          devices: it runs on.
          resolved: whether the planner has chosen the layout.
        """
        config = program.config
        self._plan = predict(config, devices)
        planned = self._plan if isinstance(self._plan, Planned) else None
        self._line = line(config, len(devices), self._plan, chosen=resolved)
        self._memory = None if planned else memory_line(config, devices)
        self._figures = planned.figures if planned else {}
        self._comparison = Comparison(planned, program.attention, config)

    def on_start(self, info: dict[str, Any]) -> dict[str, Any]:
        """`planned`, in words, `memory` where that says nothing of it, and the figures of the plan."""
        told = {"planned": self._line, **self._figures}
        return told if self._memory is None else told | {"memory": self._memory}

    def on_metrics(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """The figures of the plan; once there are enough steps, a warning where they differ."""
        if warning := self._comparison.read(metrics):
            self.warn(warning)
        return self._figures

"""The listeners that every run has, before those of whoever started it."""

from collections.abc import Sequence
from pathlib import Path

import jax

from stack.config import Config
from stack.planner.predict import check_memory, explain_exhaustion
from stack.step import state as states
from stack.step.program import Program
from stack.train.watch.listeners import Listener, Listeners
from stack.train.watch.metrics import MetricsLog
from stack.train.watch.plan import Plan
from stack.train.watch.progress import Progress
from stack.train.watch.speed import Speedometer


def check_start(config: Config, devices: Sequence[jax.Device]) -> None:
    """Refuses, before anything is read or compiled, a run that its devices cannot hold.

    Raises:
      StackError: they cannot, with what they can.
    """
    check_memory(config, devices)


explain_errors = explain_exhaustion
"""Says in one line what of the runtime's errors a user can mend."""


def show_progress(listeners: Listeners) -> Listeners:
    """These and one that shows the run, unless one of them does."""
    if any(isinstance(listener, Progress) for listener in listeners):
        return listeners
    return Listeners([*listeners, Progress()])


def standard_listeners(
    program: Program, devices: Sequence[jax.Device], folder: Path, *, resolved: bool
) -> tuple[Listener, ...]:
    """Speed, the planner's comparison, and the log, in this order: each adds to what the next hears.

    Args:
      program: of the run.
      devices: it runs on.
      folder: of the run.
      resolved: whether the planner has chosen the layout.
    """
    config: Config = program.config
    return (
        Speedometer(config, states.concrete(program)),
        Plan(program, devices, resolved=resolved),
        MetricsLog(folder, every=config.train.log_every, tensorboard=config.train.tensorboard),
    )

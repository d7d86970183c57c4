"""The listeners that every run has, before those of whoever started it."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax

from stack import environment
from stack.config import Config
from stack.step import state as states
from stack.step.program import Program
from stack.train.best import Best
from stack.train.watch.bad_steps import BadSteps
from stack.train.watch.goodput import Goodput
from stack.train.watch.kernel_trial import KernelTrial
from stack.train.watch.listeners import Listener, Listeners
from stack.train.watch.metrics import MetricsLog
from stack.train.watch.plan import Plan
from stack.train.watch.progress import Progress
from stack.train.watch.speed import Speedometer
from stack.train.watch.tracking.listener import Tracking


def show_progress(listeners: Sequence[Listener]) -> Listeners:
    """These and one that shows the run, unless one of them does."""
    is_shown = any(isinstance(listener, Progress) for listener in listeners)
    return Listeners(listeners if is_shown else [*listeners, Progress()])


def standard_listeners(
    program: Program, devices: Sequence[jax.Device], folder: Path, best: Best, *, resolved: bool
) -> tuple[Listener, ...]:
    """Each adds to what the next hears.

    Args:
      program: of the run.
      devices: it runs on.
      folder: of the run.
      best: of its evaluations.
      resolved: whether the planner has chosen the layout.
    """
    config: Config = program.config
    return (
        Speedometer(config, states.concrete(program)),
        KernelTrial(program),
        Plan(program, devices, resolved=resolved),
        BadSteps(config),
        Goodput(folder, _begun()),
        MetricsLog(folder, every=config.train.log_every, tensorboard=config.train.tensorboard),
        best,
        Tracking(config, folder),
    )


_followed = False
"""Whether another run of this process counts the time since it began."""


def _begun() -> float:
    """When a run began, seconds since 1970: with its process, or of a later one of it, now."""
    global _followed
    first, _followed = not _followed, True
    return time.time() - (time.monotonic() - environment.STARTED if first else 0.0)

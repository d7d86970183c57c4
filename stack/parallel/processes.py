"""One run in several processes: joining the others, and not keeping them waiting."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from stack import environment
from stack.config.errors import ConfigError


def join(*, initialization_timeout_seconds: int = 300, heartbeat_timeout_seconds: int = 60) -> None:
    """Joins this process to the others of its run, if it was started as one of several.

    It was if `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set, as
    `launch/local.sh` does, or if Slurm's `srun` started more than one task. Call it before anything
    touches a device; calling it again does nothing.

    Args:
        initialization_timeout_seconds: how long to wait for processes that have not started yet.
        heartbeat_timeout_seconds: how long after one process fell silent the others are ended.
    """
    if jax.distributed.is_initialized():
        return
    timeouts = {
        "initialization_timeout": initialization_timeout_seconds,
        "heartbeat_timeout_seconds": heartbeat_timeout_seconds,
    }
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
            **timeouts,
        )
    # Not SLURM_NTASKS, which an allocation's own shell has too, where nothing else was started.
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize(**timeouts)


@contextmanager
def together() -> Iterator[None]:
    """Joins the others for what follows; if it fails here, this process ends without waiting for them.

    They wait for this one in a collective that will never come, and JAX, when a process exits, waits
    for them: five minutes, after which it aborts and the exit status is lost. So a process of several
    that fails exits, with its status, as soon as it has told its error, and whoever started it ends the
    others; failing that, the heartbeat does.
    """
    join()
    environment.devices()
    try:
        yield
    except BaseException as error:
        # Runs before JAX's own, which was registered earlier. An end that all come to needs none.
        if jax.process_count() > 1 and not getattr(error, "is_of_all", False):
            atexit.register(_exit, 2 if isinstance(error, ConfigError) else 1)
        raise


def first() -> bool:
    """Whether this is the process that prints and writes what all have."""
    return jax.process_index() == 0


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""Joining the processes of one run."""

import os

import jax


def join(*, initialization_timeout_seconds: int = 300, heartbeat_timeout_seconds: int = 60) -> None:
    """Joins this process to the others of its run, if it was started as one of several.

    It was if `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set, as
    `launch/local.sh` does, or if Slurm started more than one task. Call it before anything touches a
    device; calling it again does nothing.

    Args:
        initialization_timeout_seconds: how long to wait for processes that have not started yet.
        heartbeat_timeout_seconds: how long after one process went silent the others are ended.
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
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        jax.distributed.initialize(**timeouts)

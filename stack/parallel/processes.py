"""Joining the processes of one run."""

import os

import jax

_INITIALIZATION_TIMEOUT_SECONDS = 300
_HEARTBEAT_TIMEOUT_SECONDS = 60


def join() -> None:
    """Joins this process to the others of its run, if it was started as one of several.

    It was if `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` are set, as
    `launch/local.sh` and the Kubernetes files do, or if Slurm started more than one task. Call it
    before anything touches a device; calling it again does nothing.
    """
    if jax.distributed.is_initialized():
        return
    timeouts = {
        "initialization_timeout": _INITIALIZATION_TIMEOUT_SECONDS,
        "heartbeat_timeout_seconds": _HEARTBEAT_TIMEOUT_SECONDS,
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

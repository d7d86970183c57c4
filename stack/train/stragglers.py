"""Devices that compute more slowly than the others, whom all wait for.

In a step all devices wait for the slowest, so every one of them takes as long. What tells them apart is work
that each does alone: a few products of matrices, now and then while none of them is at a step. On CPUs, whose
virtual devices share their cores, it would say nothing, and is left out.
"""

import socket
import statistics
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from stack.config import MeshConfig
from stack.parallel import mesh as meshes

_SLOWER = 1.2  # Than the median device. Healthy ones of a kind differ by some percent.
_IN_ROW = 2  # Times; once may be chance.
_SIZE = 4096  # Of the matrices; eight products take two milliseconds on an H100.
_PRODUCTS = 8
_TRIES = 3
_LEFT_OUT = ("cpu",)


class Stragglers:
    """Measures the devices of this process, and compares those of all."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        """Measures nothing yet."""
        self._devices = [device for device in devices if device.process_index == jax.process_index()]
        self._is_of_use = len(devices) > 1 and self._devices[0].platform not in _LEFT_OUT
        self._late: dict[tuple[int, int], int] = {}

    def look(self) -> list[str]:
        """What a person should know; every process calls, while its devices rest."""
        if not self._is_of_use:
            return []
        mine = np.array([device_seconds(device) for device in self._devices])
        return self.compare(np.reshape(multihost_utils.process_allgather(mine), (jax.process_count(), -1)))

    def compare(self, seconds: np.ndarray) -> list[str]:
        """Names each device once, when it was slower than the others several times in a row.

        Args:
          seconds: [process, device of the process], what each took for the same work.
        """
        usual = statistics.median(seconds.flat)
        notes = []
        for place, took in np.ndenumerate(seconds):
            process, device = int(place[0]), int(place[1])
            late = self._late.get((process, device), 0) + 1 if took > _SLOWER * usual else 0
            self._late[process, device] = late
            if late == _IN_ROW:
                here = f" on {socket.gethostname()}" if process == jax.process_index() else ""
                notes.append(
                    f"device {device} of process {process}{here} computes {took / usual:.2f} times as long as"
                    " the median device, and all wait for it; look at its clock, heat and errors, or leave it"
                    " out"
                )
        return notes


def device_seconds(device: jax.Device, size: int | None = None) -> float:
    """What some products of matrices [size, size] take on a device, the least of some tries, in seconds."""
    size = size or _SIZE
    mesh = meshes.build(MeshConfig(), [device])
    tries = []
    with meshes.use(mesh):  # A run's own mesh would have all of its devices take part.
        values = jax.device_put(np.ones((size, size), jnp.bfloat16), NamedSharding(mesh, PartitionSpec()))
        multiply(values).block_until_ready()
        for _ in range(_TRIES):
            begin = time.perf_counter()
            multiply(values).block_until_ready()
            tries.append(time.perf_counter() - begin)
    return min(tries)


@jax.jit
def multiply(values: jax.Array) -> jax.Array:
    """Some products of a matrix [size, size] with itself."""
    return jax.lax.fori_loop(0, _PRODUCTS, lambda _, x: (x @ values) / len(values), values)

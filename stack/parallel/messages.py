"""Words between the processes of a run, beside their collectives.

They go through the service that JAX's processes meet at, so a background thread may send them while the
devices are at work. Every process calls with the same, new name.
"""

import functools

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

_FOREVER_MS = 7 * 24 * 3600 * 1000  # A process that dies ends the others, and with them the wait.


def gather(name: str, text: str) -> list[str] | None:
    """The texts of all processes in their order, for process 0; None for the others."""
    if jax.process_count() == 1:
        return [text]
    client = _client()
    if jax.process_index() != 0:
        client.key_value_set(f"stack/{name}/{jax.process_index()}", text)
        return None
    keys = [f"stack/{name}/{process}" for process in range(1, jax.process_count())]
    texts = [text, *(client.blocking_key_value_get(key, _FOREVER_MS) for key in keys)]
    for key in keys:
        client.key_value_delete(key)
    return texts


def broadcast(name: str, text: str | None) -> str:
    """What process 0 says, which alone need say anything."""
    if jax.process_count() == 1:
        assert text is not None
        return text
    if jax.process_index() == 0:
        assert text is not None
        _client().key_value_set(f"stack/{name}", text)
        return text
    return _client().blocking_key_value_get(f"stack/{name}", _FOREVER_MS)


def forget(name: str) -> None:
    """Process 0 takes back what it said, once all have heard it."""
    _client().key_value_delete(f"stack/{name}")


def from_first(number: int) -> int:
    """A number as process 0 has it; between steps only, as it is a collective."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int64(number)))


def all_say(answer: bool) -> bool:
    """Whether every process says yes; between steps only, as it is a collective."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.process_allgather(np.int32(answer)).all())


def address() -> str:
    """The host of process 0, as the others reach it."""
    place = distributed.global_state.coordinator_address
    assert place is not None, "the processes have not joined"
    return place.rsplit(":", 1)[0].strip("[]")


@functools.cache
def _client() -> "distributed._jax.DistributedRuntimeClient":
    client = distributed.global_state.client
    assert client is not None, "the processes have not joined"
    return client

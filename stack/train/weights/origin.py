"""What is kept of where the first parameters of a run came from. It needs no JAX."""

from collections.abc import Mapping
from typing import Any

FILE = "init_from.json"
"""Within a run's folder: source, number of parameter arrays and of those that it had, notes, digest."""


def describe(origin: Mapping[str, Any]) -> str:
    """The same in a line; empty if they came from the seed."""
    if not origin:
        return ""
    taken = f"{origin['taken']} of {origin['parameters']} parameter arrays"
    return f"{taken} from {origin['source']} (digest {origin['digest']})"

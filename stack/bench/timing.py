"""How a JAX function is repeated, and what is read off the compiler."""

from collections.abc import Callable
from typing import Any

import jax


def queued(function: Callable[..., Any], *arrays: Any) -> Callable[[int], None]:
    """Runs a compiled function so many times; the device is waited for at the end, as in training."""

    def run(iterations: int) -> None:
        result = None
        for _ in range(iterations):
            result = function(*arrays)
        jax.block_until_ready(result)

    return run


def temporary_bytes(compiled: Any) -> int | None:
    """What a compiled program holds beside its arguments and results; None: the platform does not say."""
    plan = compiled.memory_analysis()
    return None if plan is None else plan.temp_size_in_bytes

"""What JAX reads from the environment, set before it is imported, and what is wrong there in one line."""

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from stack.config.errors import StackError

if TYPE_CHECKING:
    import jax

STARTED = time.monotonic()
"""When this process began, nearly, by the clock that only runs forward."""

# Linux has the first two, WSL the third.
_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")


def prepare() -> None:
    """Sets what JAX reads when it is imported; what is set already stays.

    Even the compiler alone, which the extra `plan` installs, makes JAX look for a GPU and print a
    traceback when there is no driver. A second start of the same run compiles nothing, but on several CPU
    devices: see `parallel/mesh.py`.
    """
    plugin = any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
    if plugin and not any(map(os.path.exists, _DRIVERS)) and "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # It has read the environment, but may not have looked for devices yet.
            sys.modules["jax"].config.update("jax_platforms", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/stack/jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def import_jax() -> None:
    """Imports JAX.

    Raises:
        StackError: it does not understand a variable of the environment.
    """
    try:
        import_module("jax")
    except (ValueError, TypeError) as error:
        raise StackError(f"JAX does not start: {_first_line(error)}; {_variables()}") from None


def devices() -> "Sequence[jax.Device]":
    """The devices of all processes.

    Raises:
        StackError: JAX is told to run on something that is not here.
    """
    import jax

    try:
        with quiet_discovery():
            return jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that there is one.
        told = _first_line(error) if str(error) else "there is none of the kind that is asked for"
        raise StackError(f"JAX finds no device: {told}; {_variables()}") from None


@contextmanager
def quiet_discovery() -> Iterator[None]:
    """JAX looks for devices, and does not log a page for a plugin without its driver, or for a second one."""
    log = logging.getLogger("jax._src.xla_bridge")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ")


def _variables() -> str:
    names = sorted(name for name in os.environ if name.startswith(("JAX_", "XLA_")) and "CACHE" not in name)
    given = " ".join(f"{name}={os.environ[name]}" for name in names)
    return f"check {given}" if given else "check its installation"

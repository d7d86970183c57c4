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
from stack.environment import programs, xla_flags

if TYPE_CHECKING:
    import jax

STARTED = time.monotonic()
"""When this process began, nearly, by the clock that only runs forward."""

_DRIVERS = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")  # Linux has two of them, WSL one.
_OWN = "STACK_DEFAULTS"  # Names of the variables that Stack has set, for the processes that this one starts.


def prepare() -> None:
    """Sets what JAX reads when it is imported; what is set already stays.

    Even the compiler alone, which the extra `plan` installs, makes JAX look for a GPU and print a
    traceback when there is no driver. A second start of the same run compiles nothing, but on several CPU
    devices: see `parallel/mesh.py`.
    """
    plugin = any(map(find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
    if plugin and not has_driver() and "JAX_PLATFORMS" not in os.environ:
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:  # It has read the environment, but may not have looked for devices yet.
            sys.modules["jax"].config.update("jax_platforms", "cpu")
    programs.configure(set_default)


def has_driver() -> bool:
    """Whether this machine has NVIDIA's driver."""
    return any(map(os.path.exists, _DRIVERS))


def set_default(name: str, value: str) -> None:
    """Sets a variable that no user has set, here and in the processes that this one starts."""
    if name in os.environ:
        return
    os.environ[name] = value
    os.environ[_OWN] = " ".join([*os.environ.get(_OWN, "").split(), name])


def defaults() -> dict[str, str]:
    """The variables that Stack has set, here or in the process that started this one."""
    return {name: os.environ[name] for name in os.environ.get(_OWN, "").split() if name in os.environ}


def given() -> dict[str, str]:
    """The variables that a user has set."""
    own = defaults()
    return {name: value for name, value in os.environ.items() if name not in own and name != _OWN}


def has_devices() -> bool:
    """Whether JAX has looked for devices already: what is read then is read no more."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bool(getattr(bridge, "_backends", None))


def import_jax() -> None:
    """Imports JAX.

    Raises:
        StackError: it, or XLA, does not understand a variable of the environment.
    """
    if "jax" not in sys.modules:
        xla_flags.check()
    programs.check()
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

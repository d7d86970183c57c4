"""An existing Ray cluster: connecting to it, and what its machines must have.

Ray's workers are processes of their own, on any machine of the cluster, with the Stack that is installed
there. Each task says which one it needs, so that a machine with another is named and not worked with.
"""

import logging
import os
import pickle
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from stack.config.errors import ConfigError, StackError
from stack.versions import code_digest, installed_version

LOCAL = "local"
"""The address of a cluster that is started on this machine, and ended with what uses it."""

_PACKAGES = ("stack", "numpy", "tokenizers")
_REACH_SECONDS = 10
_START = "start one with `ray start --head`, or give the address of one, or `local`"


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray is there for what follows.

    Args:
        address: `auto`, the cluster of this machine or of RAY_ADDRESS; `host:port`, of one that this machine
            belongs to; `ray://host:port`, of any; or `local`.

    Raises:
        StackError: Ray is not installed, or no cluster is there.
    """
    if find_spec("ray") is None:
        raise StackError("Ray is not installed; install the extra: pip install 'stack[ray]'")
    _reach(address)
    if address == LOCAL:
        _keep_private()
    import ray

    # Ray asks for it: what GPUs a worker that asks for none sees is then the machine's business.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options["include_dashboard"] = False
    try:
        ray.init(address, **options)
    except Exception as error:  # Of many kinds, by what is missing where.
        told = str(error).splitlines()[0].rstrip(". ") if str(error) else type(error).__name__
        raise StackError(f"no Ray cluster at {address}: {told}; {_START}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _keep_private() -> None:
    """What Ray reads when it is imported, of a cluster that only this process uses."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Or Ray would report it to its makers.
    # Without a token of its own Ray writes one into the home folder, and later clusters ask for it.
    if not any(name.startswith("RAY_AUTH_") for name in os.environ):
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}


def _reach(address: str) -> None:
    """Refuses what Ray itself would wait for, and then end the process over."""
    place = address.removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if place in ("auto", LOCAL):
        return
    if not (colon and host and port.isdecimal() and int(port) < 1 << 16):
        raise ConfigError(f"{address!r} is no address of Ray; give auto, local, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except OSError as error:
        raise StackError(f"no Ray cluster at {address}: {error.strerror or error}; {_START}") from None


@lru_cache(maxsize=1)
def identity() -> dict[str, str | None]:
    """What has to be the same wherever work of one run is done."""
    return {"code of stack": code_digest()} | {name: installed_version(name) for name in _PACKAGES}


class Task:
    """A function of Stack that Ray calls on any machine of the cluster."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        """Gives it to the cluster; it is pickled, and what it is called with too."""
        import ray

        self._call = ray.remote(_portable())
        self._function = ray.put(pickle.dumps(function))

    def start(self, item: Any, **options: Any) -> Any:
        """Calls it; what it gives is asked for by `result`. The options are Ray's, of a task."""
        return self._call.options(**options).remote(self._function, pickle.dumps(item))


def _portable() -> Callable[[bytes, bytes], tuple[str | None, Any]]:
    """What Ray calls: it tells why it could not do its work, or gives what came of it.

    Ray carries its code along, so that it runs where no Stack is, or another, and says so in one line.
    """
    expected = identity()

    def call(function: bytes, item: bytes) -> tuple[str | None, Any]:
        import importlib
        import platform
        import sys

        try:
            work = importlib.import_module("stack.parallel.cluster").work
        except (ImportError, AttributeError):
            told = "has no stack, or an old one; install the launcher's on all machines of the cluster"
            return f"{platform.node()}: {sys.executable} {told}", None
        return work(expected, function, item)

    return call


def work(expected: dict[str, str | None], function: bytes, item: bytes) -> tuple[str | None, Any]:
    """Calls a function with an item, both pickled, if this machine has what is expected."""
    for name, value in expected.items():
        if (own := identity()[name]) != value:
            told = f"{sys.executable} has {own} as {name}, not {value}; install one version on all machines"
            return f"{socket.gethostname()}: {told}", None
    try:
        return None, _unpickled(function)(pickle.loads(item))
    except StackError as error:
        return str(error), None


@lru_cache(maxsize=1)
def _unpickled(function: bytes) -> Callable[[Any], Any]:
    return pickle.loads(function)


def result(reference: Any, name: str) -> Any:
    """What a task gave.

    Args:
        reference: Ray's, of the task.
        name: of what it worked on.

    Raises:
        StackError: why it could not, or that no worker lived to its end.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        told, value = ray.get(reference)
    except RayTaskError:
        raise  # A mistake in Stack, with its place.
    except RayError as error:
        line = str(error).splitlines()[0]
        raise StackError(f"{name}: Ray could not do it: {line}; see the logs of Ray's workers") from error
    if told is not None:
        raise StackError(told)
    return value

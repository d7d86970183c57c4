"""Tiles that were tuned on this machine, in the user's cache: a file for each implementation and problem."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stack.config.errors import StackError
from stack.environment.programs import cache_root, cpu_kind
from stack.storage import durable
from stack.versions import code_digest, installed_version

_VERSIONS = ("jax", "jaxlib")
type _Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Key:
    """What tiles are for."""

    operation: str
    """A folder of `stack/kernels`."""
    implementation: str
    device: str
    """See `device_name`."""
    problem: Mapping[str, Any]
    """Shapes and all else that was timed, as JSON holds it."""

    @property
    def path(self) -> Path | None:
        """Of the file; None: this user has no home for a cache."""
        root = cache_root()
        told = json.dumps([self.device, self.problem], sort_keys=True)
        digest = hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
        return (
            None if root is None else root / "tiles" / f"{self.operation}-{self.implementation}-{digest}.json"
        )


class Entry(BaseModel):
    """The tiles that were the fastest of those that were right."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal[1] = 1
    operation: str
    implementation: str
    device: str
    problem: dict[str, Any]
    versions: dict[str, str]
    """Of the packages and the code that were timed: of others nothing is known."""
    tiles: dict[str, Any]
    seconds: _Seconds
    """Of a pass with gradients."""
    default_seconds: _Seconds | None
    """The same with the default tiles, timed in turns with it; None: they did not run."""

    @property
    def speed(self) -> float | None:
        """How many times as fast as the default tiles."""
        return None if self.default_seconds is None else self.default_seconds / self.seconds


def device_name(device: jax.Device) -> str:
    """What tiles are tuned for: a kind of device; of CPUs, which JAX calls all alike, what they can do."""
    return f"cpu {cpu_kind()}" if device.platform == "cpu" else device.device_kind


def versions(operation: str) -> dict[str, str]:
    """Those that an entry of now has."""
    packages = {name: installed_version(name) or "unknown" for name in _VERSIONS}
    return packages | {"code": code_digest(f"kernels/{operation}")}


def find(key: Key, warn: Callable[[str], None]) -> tuple[Entry | None, str]:
    """The entry of exactly this, or why what there is does not count; both are empty where there is none.

    Args:
      key: what tiles are wanted for.
      warn: told in one line of a file that is damaged; it is ignored, and `keep` writes it anew.
    """
    path = key.path
    if path is None:
        return None, ""
    try:
        entry = Entry.model_validate_json(path.read_bytes())
        if _key(entry) != _key(key):
            raise ValueError("it is of something else")
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        warn(f"{path}: tuned tiles are ignored: {_told(error)}; `stack kernels tune` writes them anew")
        return None, "those tuned here cannot be read"
    now = versions(key.operation)
    changed = [
        "the kernel has changed since" if name == "code" else f"of {name} {entry.versions.get(name)}"
        for name in now
        if entry.versions.get(name) != now[name]
    ]
    if changed:
        return None, f"those tuned here are old: {', '.join(changed)}"
    return entry, ""


def keep(key: Key, tiles: Mapping[str, Any], *, seconds: float, default_seconds: float | None) -> Path:
    """Writes an entry in one piece; of two processes that do, the later one stays.

    Raises:
      StackError: it cannot be written.
    """
    entry = Entry(
        operation=key.operation,
        implementation=key.implementation,
        device=key.device,
        problem=dict(key.problem),
        versions=versions(key.operation),
        tiles=dict(tiles),
        seconds=seconds,
        default_seconds=default_seconds,
    )
    path = key.path
    if path is None:
        raise StackError("tuned tiles cannot be kept: there is no home; set XDG_CACHE_HOME to a folder")
    try:
        durable.make_folder(path.parent)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        durable.write_text(path, entry.model_dump_json(indent=1) + "\n")
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def check_writable(key: Key) -> None:
    """Refuses, before anything is measured, to keep an entry where none can be.

    Raises:
      StackError: it cannot be written.
    """
    if key.path is None:
        raise StackError("tuned tiles cannot be kept: there is no home; set XDG_CACHE_HOME to a folder")
    try:
        durable.make_folder(key.path.parent)
        with tempfile.NamedTemporaryFile(dir=key.path.parent):
            pass
    except OSError as error:
        raise _unwritable(key.path, error) from error


def _unwritable(path: Path, error: OSError) -> StackError:
    return StackError(f"{path} cannot be written: {error.strerror}; set XDG_CACHE_HOME to a folder that can")


def _key(of: Key | Entry) -> tuple[Any, ...]:
    return of.operation, of.implementation, of.device, dict(of.problem)


def _told(error: Exception) -> str:
    """What is wrong with a file, in one line."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return " ".join(f"{place + ': ' if place else ''}{first['msg']}".split())[:200]
    return str(error)

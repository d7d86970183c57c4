"""JAX's persistent cache of compiled programs: where it lies, that it can be written, and its bound."""

import hashlib
import os
import platform
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

MOST_BYTES = 4 * 2**30
"""Above it the programs that were not used for longest are removed."""

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_LEAST_SECONDS = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_CPU = frozenset(
    ("vendor_id", "cpu family", "model", "model name", "stepping", "flags")  # Of x86, then of ARM.
) | {"Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part"}
_ZSTD = b"\x28\xb5\x2f\xfd"  # How its frames begin.
_WRITTEN_SECONDS = 60.0  # No entry takes so long to be written.
_FALSE = ("0", "n", "no", "f", "false", "off")  # As JAX reads them.


def configure(set_default: Callable[[str, str], None]) -> None:
    """Sets where programs are kept, and that all are, whatever they took to compile.

    Args:
        set_default: sets a variable of the environment that no user has set.
    """
    before = set(os.environ)
    if (folder := default_folder()) is not None:
        set_default(_FOLDER, str(folder))
    set_default(_LEAST_SECONDS, "0")
    if "jax" in sys.modules:  # It has read the environment; a user may have said it in Python.
        config = sys.modules["jax"].config
        if _FOLDER not in before and config.jax_compilation_cache_dir is None and folder is not None:
            config.update("jax_compilation_cache_dir", str(folder))
            config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def default_folder() -> Path | None:
    """`stack/jax` in the user's cache, a folder for each kind of CPU; None: there is no home.

    A home may be shared by machines of several kinds, and code of one may stop another: XLA:CPU compiles
    for the very CPU.
    """
    root = cache_root()
    return None if root is None else root / "jax" / cpu_kind()


def cache_root() -> Path | None:
    """`stack` in the user's cache, where what can be made anew is kept; None: there is no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # The XDG Base Directory Specification passes over one that is not.
        root = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "stack" if os.path.isabs(root) else None


def check() -> None:
    """Turns the cache off, and says so, where it cannot be written; removes what is damaged or old."""
    text = os.environ.get(_FOLDER, "")
    is_off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower() in _FALSE
    if not text or "://" in text or is_off:
        return
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        if _is_first():  # Others of the run need not look, too.
            _remove_damaged(folder)
            if folder == default_folder():  # Of one that a user names they decide.
                _remove_oldest(folder)
    except OSError as error:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        if "jax" in sys.modules:
            sys.modules["jax"].config.update("jax_enable_compilation_cache", False)
        if _is_first():
            sys.stderr.write(
                f"warning: {text} cannot be written: {error.strerror}; compiled programs are not kept: set"
                f" {_FOLDER} to a folder that can\n"
            )


def _is_first() -> bool:
    return os.environ.get("JAX_PROCESS_ID", os.environ.get("SLURM_PROCID", "0")) == "0"


def _remove_damaged(folder: Path) -> None:
    """Removes entries whose writer was killed, which JAX would pass over, and never write, for ever.

    Looks at what was written since it last looked, and is not being written now.
    """
    now, mark = time.time(), folder / "looked-at"
    since = mark.stat().st_mtime if mark.exists() else 0.0
    removed = 0
    for path, stat in _entries(folder):
        if since <= stat.st_mtime < now - _WRITTEN_SECONDS and not _is_whole(path):
            path.unlink(missing_ok=True)
            removed += 1
    mark.touch()
    os.utime(mark, (now - _WRITTEN_SECONDS, now - _WRITTEN_SECONDS))
    if removed:
        sys.stderr.write(f"warning: {folder}: {removed} damaged programs are removed, and compiled anew\n")


def _is_whole(path: Path) -> bool:
    """Whether an entry can be unpacked; those of zstd, as other Pythons write, are not tried."""
    try:
        data = path.read_bytes()
        if data.startswith(_ZSTD):
            return True
        zlib.decompress(data)
    except FileNotFoundError:
        return True
    except zlib.error:
        return False
    return True


def _remove_oldest(folder: Path) -> None:
    """JAX's own bound would have every reader of a folder that a thousand processes share lock it."""
    entries = _entries(folder)
    total = sum(stat.st_size for _, stat in entries)
    for path, stat in sorted(entries, key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime)):
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size


def _entries(folder: Path) -> list[tuple[Path, os.stat_result]]:
    entries = []
    for path in folder.glob("*-cache"):
        try:
            entries.append((path, path.stat()))
        except FileNotFoundError:
            continue  # Another process has removed it.
    return entries


def cpu_kind() -> str:
    """A few letters for the kind of CPU and what it can do."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = []
            for line in file:  # All CPUs of a machine are alike, and there may be hundreds.
                if not line.strip():
                    break
                first.append(line)
        pairs = [line.partition(":") for line in first]
        about = [f"{name.strip()}={value.strip()}" for name, _, value in pairs if name.strip() in _CPU]
    except OSError:
        about = []
    text = " ".join(about) or f"{platform.system()} {platform.machine()} {platform.processor()}"
    return hashlib.sha256(f"{platform.machine()} {text}".encode()).hexdigest()[:12]

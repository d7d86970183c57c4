"""XLA_FLAGS, checked before XLA reads them: one that it does not know ends the process from C++."""

import hashlib
import importlib.util
import mmap
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stack.config.errors import StackError

_READ = "from jaxlib import _jax; _jax.CompileOptions()"  # Has XLA read its flags, in a third of a second.
_ONE, _AROUND = b"xla_gpu_all_gather_combine_threshold_bytes", 60_000
_NOT_FLAGS = ("optimization_level", "memory_fitting_level")  # Options that XLA_FLAGS does not take.


def check() -> None:
    """Refuses XLA_FLAGS that the installed XLA would end the process for.

    Another process reads them first; what it took is remembered beside the compiled programs.

    Raises:
        StackError: the flag, and the nearest one that there is.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if not flags:
        return
    note = _note(flags)
    if note is not None and note.exists():
        return
    read = _read(flags)
    if read.returncode:
        raise StackError(_explain(read.stderr, flags))
    if note is not None:
        try:
            note.touch()
        except OSError:
            return  # Nothing is lost but the third of a second.


def nearest(name: str) -> str:
    """`; did you mean xla_gpu_...?`, or what to do where no flag or option of the compiler is like it."""
    import difflib

    for close in difflib.get_close_matches(name, [*_names(), *_NOT_FLAGS], n=3):
        if close in _NOT_FLAGS or "Unknown flag" not in _read(f"--{close}").stderr:
            return f"; did you mean {close}?"
    return "; remove it"


def _names() -> set[str]:
    """Names that stand near that of a flag in XLA's library: flags, nearly all."""
    spec = importlib.util.find_spec("jaxlib")
    folders = [] if spec is None else spec.submodule_search_locations or []
    names: set[str] = set()
    for path in (path for folder in folders for path in Path(folder).glob("libjax_common*")):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            place = -1
            while (place := text.find(_ONE, place + 1)) >= 0:
                around = text[max(0, place - _AROUND) : place + _AROUND]
                names |= {match.decode() for match in re.findall(rb"\bxla_[a-z0-9_]+", around)}
    return names


def jaxlib() -> str:
    """`jaxlib 0.11.2`."""
    try:
        return f"jaxlib {version('jaxlib')}"
    except PackageNotFoundError:
        return "jaxlib"


def given() -> dict[str, str]:
    """Names and values of XLA_FLAGS, without dashes; a flag without a value is `true`."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # The name of a file.
        try:
            flags = Path(flags).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            return {}
    pairs = (flag.lstrip("-").partition("=") for flag in flags.split() if flag.startswith("-"))
    return {name: value.strip("'\"") if equals else "true" for name, equals, value in pairs}


def _read(flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"XLA_FLAGS": flags}
    command = [sys.executable, "-P", "-c", _READ]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )


def _note(flags: str) -> Path | None:
    """The file that stands for flags that were read; None: there is no folder, or they are in a file."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    if not flags.startswith("-") or "://" in folder or not os.path.isdir(folder):
        return None
    digest = hashlib.sha256(f"{jaxlib()} {flags}".encode()).hexdigest()[:16]
    return Path(folder) / f"xla_flags-{digest}"


def _explain(said: str, flags: str) -> str:
    if unknown := re.search(r"Unknown flags? in XLA_FLAGS: (.*)", said):
        first = unknown[1].split()[0]
        name = first.lstrip("-").partition("=")[0]
        return f"XLA_FLAGS: {first} is no flag of the installed XLA ({jaxlib()}){nearest(name)}"
    if value := re.search(r"Couldn't interpret value (.*) for flag (\w+)", said):
        return f"XLA_FLAGS: --{value[2]}={value[1]} is no value of that flag ({jaxlib()}); give another"
    told = re.search(r"^[EF]\d+ .*?\] (.*)", said, re.MULTILINE)
    return f"XLA does not take XLA_FLAGS={flags} ({jaxlib()}): {told[1] if told else 'it ends'}"

"""The text that ships with the interpreter: documents without a download."""

import importlib
import os
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Not text a person wrote to be read: test suites, generated tables, how the interpreter was built.
# pydoc_data is read through its topics, not as source.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "pydoc_data"}
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")


def library_files() -> tuple[Path, ...]:
    """The files of the language reference and of the standard library, as far as they are read."""
    return (*_topics_file(), *_modules())


def library_documents() -> Iterator[str]:
    """The language reference that `help()` shows, then the standard library's files."""
    if _topics_file():
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from (topics[name] for name in sorted(topics))
    for path in _modules():
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError:  # a distribution may ship files in other encodings
            continue


def _topics_file() -> tuple[Path, ...]:
    path = Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py")
    return (path,) if path.is_file() else ()


@cache
def _modules() -> tuple[Path, ...]:
    """The folder is walked once, and not into what is skipped: a run lists its files more than once."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for folder, below, names in os.walk(root):
        below[:] = filter(_wanted, below)
        found += [Path(folder, name) for name in names if name.endswith((".py", ".txt")) and _wanted(name)]
    return tuple(sorted(found, key=lambda path: path.parts))


def _wanted(name: str) -> bool:
    return name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)

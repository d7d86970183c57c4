"""Paths as users write them."""

import os
import tempfile
from pathlib import Path

from stack.config.errors import ConfigError, StackError
from stack.config.explain import shown


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with `~` as the home folder; the same for every path of a config or a command.

    Raises:
        ConfigError: `~name` of nobody, or a NUL, which no file system takes.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise ConfigError(f"{shown(text)} holds a NUL, which no path may; remove it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{text}: there is no user {Path(text).parts[0][1:]}; write the path out") from None


def check_writable(path: Path) -> None:
    """Refuses, before the work for it is done, a file that could not be written after it; makes its folder.

    Raises:
        StackError: it is a folder, or nothing can be written beside it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise StackError(f"{path}: cannot be written: {error.strerror}; give another path") from error

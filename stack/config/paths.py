"""Paths as users write them."""

import os
from pathlib import Path

from stack.config.errors import ConfigError


def expand(path: str | os.PathLike[str]) -> Path:
    """A path with `~` as the home folder; the same for every path of a config or a command.

    Raises:
        ConfigError: `~name` of nobody, or a NUL, which no file system takes.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise ConfigError(f"{text!r} holds a NUL, which no path may; remove it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(f"{text}: there is no user {Path(text).parts[0][1:]}; write the path out") from None

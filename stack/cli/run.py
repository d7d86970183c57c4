"""The command line as a function: it runs one command and turns errors into lines and statuses."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from stack import environment
from stack.cli.parser import parse
from stack.config.errors import ConfigError, StackError
from stack.interrupt import interruptible


def run(argv: Sequence[str]) -> int:
    """Run one command.

    Args:
        argv: the arguments after `stack`.

    Returns:
        The exit status: 0, 1 for a StackError, 2 for a ConfigError or a bad command line, 75 for a run that
        was asked to stop and has saved or had nothing to save, 130 when interrupted.
    """
    sys.stdout = sys.stdout or io.StringIO()  # One that is closed.
    sys.stderr = sys.stderr or sys.stdout
    for screen in (sys.stdout, sys.stderr):
        if isinstance(screen, io.TextIOWrapper):  # What it cannot show is spelled out, not an error.
            screen.reconfigure(errors="backslashreplace")
    try:
        with interruptible():
            arguments = parse(argv)
            environment.prepare()
            arguments.run(arguments)
            sys.stdout.flush()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StackError as error:
        if status := getattr(error, "status", None):  # It is no error: see StoppedError.
            print(error, file=sys.stderr)
            return status
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # It is an OSError too.
        # Whoever reads our output has enough; nothing more may be flushed to it at exit.
        _point_at_nothing(sys.stdout)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            raise
        _point_at_nothing(sys.stdout)  # Or exit would fail once more to write what is left.
        place = error.filename or "standard output"
        print(f"error: {place}: {error.strerror}; check its disk and permissions", file=sys.stderr)
        return 1
    return 0


def _point_at_nothing(screen: TextIO) -> None:
    with contextlib.suppress(io.UnsupportedOperation):  # It is no file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), screen.fileno())

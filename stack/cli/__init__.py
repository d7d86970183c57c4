"""The command line."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from stack.interrupt import interruptible, keep_status, stopping_at_once


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; see `stack.cli.run`, which takes half a second to import: signals are heard before.

    Args:
        argv: the arguments after `stack`; None takes those of the process.
    """
    words = sys.argv[1:] if argv is None else argv
    with interruptible(), stopping_at_once() if words[:1] == ["train"] else nullcontext():
        from stack.cli.run import run

        status = run(words)
    if argv is None:
        keep_status()
    return status

"""The command line."""

from stack.cli.main import main

__all__ = ["main"]

"""Prompts as a command line gives them."""

import os
import sys

from stack.config.errors import StackError


def prompt(word: str) -> str:
    """A prompt as it was typed; `-`: what stands on standard input."""
    from stack.config.section import is_text

    if word != "-":
        if is_text(word):
            return word
        try:  # Python reads arguments in the terminal's encoding; what that lacks is kept as it came.
            return os.fsencode(word).decode()
        except UnicodeError:
            told = "holds bytes that are not UTF-8; give it as UTF-8"
            raise StackError(f"prompt {word!a} {told}") from None
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise StackError(
            f"standard input: byte {error.start} is not UTF-8; give the prompt as UTF-8"
        ) from None


def prompt_in(name: str) -> str:
    """What stands in a file."""
    from stack.config.paths import expand

    try:
        return expand(name).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise StackError(f"{name}: byte {error.start} is not UTF-8; give UTF-8") from None
    except OSError as error:
        raise StackError(f"{name}: cannot be read: {error.strerror}; check --file") from None

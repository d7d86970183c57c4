"""One line for a damaged file, without the pages that its other readers write."""

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_readers() -> Iterator[None]:
    """Reads by Orbax, whose readers of other arrays are heard no more once one of them has failed.

    The error of the first is raised. The others end later, on threads of their own, and each writes a
    traceback or has one written when it is dropped; so they are not heard for the rest of the process.
    """
    log, hook, screen = logging.getLogger("asyncio"), sys.unraisablehook, sys.stderr
    level = log.level

    def tell(unraisable: Any) -> None:
        if "orbax" not in repr(getattr(unraisable.object, "cr_code", unraisable.object)):
            hook(unraisable)

    warnings.filterwarnings("ignore", r"coroutine '_read_\w+' was never awaited", RuntimeWarning)
    log.setLevel(logging.CRITICAL)
    sys.stderr, sys.unraisablehook = _OwnThread(screen), tell
    yield
    log.setLevel(level)
    sys.stderr, sys.unraisablehook = screen, hook


class _OwnThread:
    """Standard error for the main thread alone."""

    def __init__(self, screen: Any) -> None:
        """Writes to a screen."""
        self._screen = screen

    def write(self, text: str) -> int:
        """Writes what the main thread has to say."""
        is_main = threading.current_thread() is threading.main_thread()
        return self._screen.write(text) if is_main else len(text)

    def __getattr__(self, name: str) -> Any:
        """All else is the screen's."""
        return getattr(self._screen, name)

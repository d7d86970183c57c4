"""Ctrl-C that is never lost, and children that do not outlive their launcher."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

REQUEUE = 75
"""Exit status of what was asked to stop, has lost nothing, and is to be started again: EX_TEMPFAIL."""
_GRACE_SECONDS = 3.0
_heard = threading.Event()  # An interrupt that somebody acts on: the next leaves at once.
_raised = threading.Event()  # An interrupt that has become an exception: what fails after it, fails by it.
_PR_SET_PDEATHSIG = 1


@contextmanager
def interruptible() -> Iterator[None]:
    """Has an interrupt end the process even where the code it meets swallows it, as imports do at times.

    It raises KeyboardInterrupt, as ever, also where that code makes another error of it. While a library is
    imported it exits with 130 at once, as some abort the process on any exception; so it does where Python
    itself would drop the exception, as in a callback of the garbage collector, if the process is still there
    some seconds later, or at a second interrupt. Only the main thread can have it so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    timer = threading.Timer(_GRACE_SECONDS, _leave)
    timer.daemon = True
    _heard.clear()
    _raised.clear()

    def interrupt(_number: int, frame: FrameType | None) -> None:
        if _heard.is_set() or _is_importing(frame):
            _leave()
        _heard.set()
        timer.start()
        raise_interrupt()

    def tell(lost: Any) -> None:
        if isinstance(lost.exc_value, KeyboardInterrupt):
            _leave()
        tell_before(lost)

    tell_before, sys.unraisablehook = sys.unraisablehook, tell
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if _raised.is_set():
            raise KeyboardInterrupt from error
        raise
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = tell_before


def raise_interrupt() -> NoReturn:
    """Raises KeyboardInterrupt, and has whatever error comes of it be taken for it."""
    _raised.set()
    raise KeyboardInterrupt


def acted_on() -> None:
    """Says that an interrupt was heard and is acted on, however long that takes; one more leaves at once."""
    _heard.set()


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Has SIGTERM and SIGUSR1 end the process with 75, as long as nobody else hears them.

    A run that has not begun, or has ended, has nothing to save; a scheduler that asked it to stop is to
    start it again all the same.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        told = f"stopped by {signal.Signals(number).name} while not training: nothing is lost, start it again"
        os.write(2, f"{told}\n".encode())
        os._exit(REQUEUE)

    with taken_over((signal.SIGTERM, signal.SIGUSR1), stop):
        yield


@contextmanager
def taken_over(
    numbers: Sequence[int], hear: Callable[[int, FrameType | None], None]
) -> Iterator[dict[int, Any]]:
    """Has signals heard by a function, and then by whom they were before; only the main thread can.

    Yields:
        Who heard each before; empty on other threads, which leave them as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        numbers = ()
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, hear)
        yield before
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keep_status() -> None:
    """Has no signal change how a process ends that has only to leave.

    What started several of one job may signal the others as soon as one has left, and takes a death by that
    for a failure. An interrupt ends at once what hangs while it leaves.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def die_with_launcher() -> None:
    """Has the system send SIGTERM when the process that started this one is gone, if it asks for that.

    A launcher that is killed cannot end its processes: it says STACK_LAUNCHER, its own number, beforehand.
    """
    launcher = os.environ.get("STACK_LAUNCHER")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):  # It is gone already.
        os.kill(os.getpid(), signal.SIGTERM)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _leave() -> None:
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h")  # A bar hides the cursor.
    os.write(2, b"interrupted\n")
    os._exit(130)

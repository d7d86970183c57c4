"""What the processes of a run read, they read alike, or not at all."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from stack.config.errors import StackError
from stack.train.checkpoint.manifest import DamagedError


def text_of_first(tell: Callable[[], str]) -> str:
    """What process 0 makes of it, or the error it meets, on every process."""
    if jax.process_count() == 1:
        return tell()
    text, failure = "", None
    if jax.process_index() == 0:
        try:
            text = f" {tell()}"
        except StackError as error:
            text, failure = f"!{error}", error
    size = int(multihost_utils.broadcast_one_to_all(np.int64(len(text.encode()))))
    data = np.frombuffer(text.encode(), np.uint8) if text else np.zeros(size, np.uint8)
    text = bytes(multihost_utils.broadcast_one_to_all(data)).decode()
    if text.startswith("!"):
        raise failure or StackError(text[1:])
    return text[1:]


def all_or_none(read: Callable[[], None]) -> None:
    """Does something on every process; where one fails all raise, the others what it says.

    Raises:
        DamagedError: a file is damaged.
        StackError: another failure.
    """
    failure: StackError | None = None
    try:
        read()
    except StackError as error:
        failure = error
    except OSError as error:
        failure = StackError(f"{error.filename}: {error.strerror}; check the disk or the store")
    if jax.process_count() > 1:
        kinds = multihost_utils.process_allgather(
            np.int32(0 if failure is None else 1 if isinstance(failure, DamagedError) else 2)
        ).reshape(-1)
        if failure is None and kinds.any():
            process = int(np.flatnonzero(kinds)[0])
            kind = DamagedError if kinds[process] == 1 else StackError
            failure = kind(f"process {process} could not read the checkpoint; it says why")
    if failure is not None:
        raise failure

"""Whether the processes of a run are of one mind before they do anything together."""

import itertools
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from stack.config import Config, StackError
from stack.config.fields import flatten
from stack.hardware.defaults import Setting, compared
from stack.parallel import messages
from stack.versions import code_digest

_calls = itertools.count()  # Every process counts alike.


class DifferenceError(StackError):
    """Processes of one run were started with different things."""

    is_of_all = True  # Process 0 stays until the others have heard it, as they do through its service.


def check_same(config: Config, data: Mapping[str, str], settings: Sequence[Setting] = ()) -> None:
    """Compares config, code, data and the compiler's options of all processes.

    Args:
      config: of this one.
      data: `Data.fingerprint` of this one.
      settings: of this one.

    Raises:
      DifferenceError: on every process, with the first that differs from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    name = f"same/{next(_calls)}"
    mine = {"host": socket.gethostname(), "code": code_digest(), "data": dict(data)}
    mine["config"] = dict(flatten(config.model_dump(mode="json")))
    mine["config"] |= compared(settings)
    told = messages.gather(name, json.dumps(mine))
    verdict = None if told is None else _difference([json.loads(text) for text in told])
    verdict = messages.broadcast(name, verdict)
    if verdict:
        raise DifferenceError(verdict)


def _difference(told: list[dict[str, Any]]) -> str:
    first = told[0]
    for number, other in enumerate(told):
        where = f"process {number} on {other['host']} is not of one mind with process 0 on {first['host']}"
        if other["code"] != first["code"]:
            return f"{where}: its code of Stack is {other['code']}, not {first['code']}; install one version"
        names = first["config"].keys() | other["config"].keys()
        for name in sorted(names):
            old, new = first["config"].get(name), other["config"].get(name)
            if old != new:
                return f"{where}: {name} is {new}, not {old}; start all with one config and environment"
        for name in first["data"]:
            if other["data"].get(name) != first["data"][name]:
                what = {"tokenizer": "data.tokenizer", "corpus": "the text of data.sources"}.get(name, name)
                return f"{where}: {what} is another one there; give all the same files"
    return ""

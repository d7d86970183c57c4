"""The child's side of a case: contestants that are prepared and timed when the parent asks.

A peer may run under another interpreter: Python 3.11 and the standard library only.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

WARMUP_ITERATIONS = 2
MOST_ITERATIONS = 1 << 14


@dataclasses.dataclass(frozen=True)
class Ready:
    """A contestant that can be timed."""

    run: Callable[[int], None]
    """Does so many iterations and waits for the last."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What is known of it before it is timed, as JSON; `ok` false: its numbers are wrong."""
    after: Callable[[], dict[str, Any]] = dict
    """What is known of it when it has been timed."""


class UnableError(Exception):
    """What a contestant cannot do by its nature; no failure."""


def refuse(reason: str) -> Ready:
    """A contestant that cannot.

    Raises:
      UnableError: always, with the reason.
    """
    raise UnableError(reason)


def serve(makers: Mapping[str, Callable[[], Ready]], *, block_seconds: float, **about: Any) -> None:
    """Answers the parent until it hangs up.

    Requests and answers are lines of JSON. What the framework itself prints goes to standard error.

    Args:
        makers: by name, what prepares a contestant.
        block_seconds: about how long a block of iterations takes.
        about: told first, beside the names.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ready: dict[str, tuple[Ready, int]] = {}

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer(contestants=list(makers), **about)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if name := request.get("prepare"):
                contestant = makers[name]()
                wrong = not contestant.facts.get("ok", True)
                ready[name] = contestant, 0 if wrong else _iterations(contestant.run, block_seconds)
                answer(facts=contestant.facts, iterations=ready[name][1])
            elif name := request.get("block"):
                contestant, iterations = ready[name]
                contestant.run(1)  # What the others did to the caches is not its fault.
                answer(seconds=_seconds(contestant.run, iterations) / iterations)
            elif name := request.get("finish"):
                answer(facts=ready.pop(name)[0].after())
        except UnableError as error:
            answer(unable=_line(error))
        except Exception as error:
            kind = "large" if is_out_of_memory(error) else "failed"
            answer(**{kind: f"{type(error).__name__}: {_line(error)}"})


def is_out_of_memory(error: Exception) -> bool:
    """Whether JAX or PyTorch raised it for want of device memory."""
    text = f"{type(error).__name__}: {error}"
    return any(sign in text for sign in ("RESOURCE_EXHAUSTED", "Out of memory", "OutOfMemory"))


def _iterations(run: Callable[[int], None], block_seconds: float) -> int:
    """Of a block: as many as take about so long."""
    run(WARMUP_ITERATIONS)
    number = 1
    while (seconds := _seconds(run, number)) < block_seconds / 2 and number < MOST_ITERATIONS:
        number = min(MOST_ITERATIONS, max(2 * number, int(number * block_seconds / max(seconds, 1e-6) / 2)))
    return max(1, min(MOST_ITERATIONS, round(number * block_seconds / max(seconds, 1e-6))))


def _seconds(run: Callable[[int], None], iterations: int) -> float:
    start = time.perf_counter()
    run(iterations)
    return time.perf_counter() - start


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."

"""A process that serves the JAX contestants of one case: `python -m stack.bench.child REQUEST`."""

import dataclasses
import json
import sys
from importlib import import_module
from typing import Any

from stack.bench.serve import serve

SUITES = {
    "ceilings": "matmul",
    "matmul": "matmul",
    "attention": "attention",
    "cross_entropy": "cross_entropy",
    "step": "step",
    "embedding": "embedding",
    "grouped_matmul": "grouped_matmul",
    "parity": "parity",
    "tiles": "tiles",
}
"""The module of `stack.bench.suites` each is in."""


def main(request: dict[str, Any]) -> None:
    """Serves a case, or tells of the machine where there is none."""
    if request["suite"] == "machine":
        from stack.bench.suites.machine import describe

        about: dict[str, Any] = {}
        if "attention_of" in request:
            from stack.bench.suites.tiles import problem_of

            about = problem_of(request["attention_of"], request["devices"])
        serve({}, block_seconds=0.0, machine=dataclasses.asdict(describe()), **about)
        return
    suite = import_module(f"stack.bench.suites.{SUITES[request['suite']]}")
    makers = suite.makers(request["spec"], request["peers"])
    serve(makers, block_seconds=request["block_seconds"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

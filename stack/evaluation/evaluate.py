"""The held-out set, each of its labels once."""

import math
from collections.abc import Callable
from typing import Any

import jax

from stack.config.errors import StackError
from stack.data.dataset import Dataset
from stack.data.loader import heldout_batches, prefetch
from stack.step.program import Program

EvalStep = Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]
"""(params, batch) -> the objective's sums: `stack.step.step.eval_step` of a program, jitted."""


def evaluate(
    program: Program, eval_step: EvalStep, params: dict[str, Any], heldout: Dataset
) -> dict[str, float]:
    """What the program's objective tells of the whole held-out set.

    Args:
      program: of the run; its mesh is in use.
      eval_step: the jitted step.
      params: that lie as `program.parameters`.
      heldout: the rows; the last batch is filled up with rows of padding.

    Raises:
      StackError: nothing is held out.
    """
    if not heldout.num_rows:
        raise StackError("no text is held out to evaluate on; set data.heldout_fraction above 0")
    config, objective = program.config, program.objective
    size = config.eval.batch_size or config.train.batch_size
    make, number = heldout_batches(heldout, fields=objective.fields, batch_size=size, layout=program.layout)
    parts = jax.device_get([eval_step(params, batch) for batch in prefetch(make, range(number))])
    sums = {name: math.fsum(float(part[name]) for part in parts) for name in parts[0]}
    return objective.evaluate(sums, num_bytes=heldout.num_bytes)

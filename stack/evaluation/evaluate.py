"""The held-out set, each of its labels at most once."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.data.dataset import Dataset
from stack.data.loader import heldout_batches, prefetch
from stack.objectives.protocol import Outputs, Sums
from stack.step.program import Program

EvalStep = Callable[[dict[str, Any], dict[str, jax.Array]], tuple[Sums, Outputs]]
"""(params, batch) -> the objective's sums and outputs: `stack.step.step.eval_step` of a program, jitted."""


def evaluate(
    program: Program,
    eval_step: EvalStep,
    params: dict[str, Any],
    heldout: Dataset,
    *,
    every_batch: bool = False,
    batches: int | None = None,
) -> dict[str, float]:
    """What the program's objective tells of the held-out set, or of `eval.batches` of it.

    Args:
      program: of the run; its mesh is in use.
      eval_step: the jitted step.
      params: that lie as `program.parameters`.
      heldout: the rows; the last batch is filled up with rows of padding.
      every_batch: whatever `eval.batches` says.
      batches: of it at most; None: `eval.batches`.

    Raises:
      StackError: nothing is held out.
    """
    if not heldout.num_rows:
        raise StackError("no text is held out to evaluate on; set data.heldout_fraction above 0")
    config, objective = program.config, program.objective
    size, chosen = heldout_numbers(config, heldout, batches)
    make, number = heldout_batches(heldout, fields=objective.fields, batch_size=size, layout=program.layout)
    chosen = list(range(number)) if every_batch else chosen
    made = (eval_step(params, batch) for batch in prefetch(make, chosen))
    parts, outputs = zip(*one_behind(made), strict=True)
    sums = {name: math.fsum(float(part[name]) for part in parts) for name in parts[0]}
    # Of some batches the bytes are not counted; their share of the tokens stands for that of the bytes.
    share = sums.get("tokens", 0) / heldout.num_tokens if len(chosen) < number else 1.0
    return objective.evaluate(
        sums,
        {name: np.concatenate([each[name] for each in outputs]) for name in outputs[0]},
        tokenizer=heldout.tokenizer,
        num_bytes=share * heldout.num_bytes if heldout.is_lossless else None,
    )


def one_behind(made: Iterator[Any]) -> Iterator[Any]:
    """Trees of arrays on the host, each when the next one is under way.

    Were all of them under way at once, so would be the batches they are made of; and on several CPU devices
    programs that exchange something wait for each other for ever (XLA:CPU, jaxlib 0.11.2).
    """
    before: list[Any] = []
    for tree in made:
        yield from map(jax.device_get, before)
        before = [tree]
    yield from map(jax.device_get, before)


def heldout_numbers(config: Config, heldout: Dataset, batches: int | None = None) -> tuple[int, list[int]]:
    """Rows of a batch, and the numbers of the batches that are evaluated, at most so many."""
    size = config.eval.batch_size or config.train.batch_size
    number = -(-heldout.num_rows // size)
    return size, spread(number, batches or config.eval.batches or number)


def spread(number: int, most: int) -> list[int]:
    """At most so many of the numbers from 0 to `number` - 1, evenly spread and always the same."""
    if most >= number:
        return list(range(number))
    return [(2 * place + 1) * number // (2 * most) for place in range(most)]

"""How likely a decoder finds texts: what is asked of it by word perplexity, last words and choices."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from stack.config.errors import StackError
from stack.kernels.linear_cross_entropy import label_nll
from stack.objectives.words import Words
from stack.parallel import mesh as meshes
from stack.parallel.zero import gather_module
from stack.step.program import Program

SHORTEST_ROW = 32
"""Rows are padded to a power of two from here on, so that few lengths are compiled."""


class Continuation(NamedTuple):
    """Tokens whose likelihood is asked for, after others."""

    context: Sequence[int]
    """What is given, a token at least; of more than fits the last."""
    tokens: Sequence[int]
    """What is scored, a token at least."""


class Likelihood(NamedTuple):
    """Of one continuation."""

    nll: float
    """-log of the probability of all its tokens, nats."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest after those before it."""


def likelihoods(
    program: Program,
    params: dict[str, Any],
    continuations: Sequence[Continuation],
    *,
    told: Callable[[int, Likelihood], None] | None = None,
) -> list[Likelihood]:
    """Of each continuation, in order; rows of like length share a batch on the whole mesh.

    Every process of a run asks for the same and gets all.

    Args:
      program: of the run, of a decoder.
      params: that lie as `program.parameters`.
      continuations: of at most `model.max_length` tokens each; contexts may be longer.
      told: hears of each, by its number, as soon as its batch is done.

    Raises:
      StackError: the model is no decoder, or a continuation is empty or too long.
    """
    config = program.config
    if not config.objective.scores_words:
        raise StackError(
            f"objective.kind={config.objective.kind} left the head over words out of this run; likelihoods"
            " are of runs that score words"
        )
    if config.model.shape != "decoder":
        raise StackError(
            f"model.kind={config.model.kind} does not predict the next token; likelihoods are of decoders"
        )
    most = config.model.max_length
    for number, (context, tokens) in enumerate(continuations):
        if not len(context) or not 0 < len(tokens) <= most:
            raise StackError(
                f"continuation {number} has {len(tokens):,} tokens after {len(context):,}; it takes 1 to"
                f" {most:,}, after one at least"
            )
    rows = [_row(each, most) for each in continuations]
    size = config.eval.batch_size or config.train.batch_size
    order = sorted(range(len(rows)), key=lambda number: -len(rows[number].tokens))
    found: dict[int, Likelihood] = {}
    with meshes.use(program.mesh):
        score = jax.jit(partial(_score, program))
        for start in range(0, len(order), size):
            some = order[start : start + size]
            nll, correct = jax.device_get(
                score(params, _batch(program, [rows[number] for number in some], size))
            )
            for place, number in enumerate(some):
                found[number] = Likelihood(float(nll[place]), bool(correct[place]))
                if told is not None:
                    told(number, found[number])
    return [found[number] for number in range(len(rows))]


@dataclass(frozen=True, kw_only=True)
class _Row:
    tokens: np.ndarray
    labels: np.ndarray
    """The token after each where it is scored, else -1."""


def _row(continuation: Continuation, most: int) -> _Row:
    whole = np.array([*continuation.context, *continuation.tokens], np.int32)[-most - 1 :]
    labels = whole[1:].copy()
    labels[: len(labels) - len(continuation.tokens)] = -1
    return _Row(tokens=whole[:-1], labels=labels)


def _batch(program: Program, rows: Sequence[_Row], size: int) -> dict[str, jax.Array]:
    longest = max(len(row.tokens) for row in rows)
    length = min(max(SHORTEST_ROW, 1 << (longest - 1).bit_length()), program.config.model.max_length)
    fields = {name: np.zeros((size, length), np.int32) for name in ("tokens", "segments", "positions")}
    fields["labels"] = np.full((size, length), -1, np.int32)
    for number, row in enumerate(rows):
        here = (number, slice(0, len(row.tokens)))
        fields["tokens"][here], fields["labels"][here] = row.tokens, row.labels
        fields["segments"][here], fields["positions"][here] = 1, np.arange(len(row.tokens))
    sharding = program.layout.sharding("batch", "length")
    return {
        name: jax.make_array_from_callback(values.shape, sharding, partial(_part, values))
        for name, values in fields.items()
    }


def _part(values: np.ndarray, index: Any) -> np.ndarray:
    return values[index]


def _score(
    program: Program, params: dict[str, Any], batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Of each row, [batch] float32 and [batch] bool, on every device."""
    layout, run = program.layout, program.execution()
    model = program.merge(params)
    output = (model if layout.zero == 3 else gather_module(model, layout))(batch, run)
    head, labels = cast("Words", program.objective).head(run), batch["labels"]
    nll, correct = label_nll(output.hidden, output.table, labels, head, output.bias)
    both = nll.sum(1), (correct | (labels < 0)).all(1)
    return layout.everywhere(both)


def windows(tokens: Sequence[int], *, length: int, stride: int) -> Iterator[Continuation]:
    """A text in parts, each token of which is scored once, after those before it.

    Args:
      tokens: the first is only read.
      length: tokens that a row reads.
      stride: tokens that a row scores, but the first, which scores all of its own: each after
        `length` - `stride` tokens at least.
    """
    if not 0 < stride <= length:
        raise ValueError(f"stride={stride} is not from 1 to {length}")
    done = 1
    while done < len(tokens):
        upto = min(len(tokens), length + 1 if done == 1 else done + stride)
        yield Continuation(tokens[max(0, upto - length - 1) : done], tokens[done:upto])
        done = upto


def perplexity(nll: float, count: int) -> float:
    """exp(nll / count); of more than 700 nats exp(700)."""
    return math.exp(min(nll / count, 700.0))

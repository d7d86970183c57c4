"""Schedules: in which order each stage of a pipeline takes up micro-batches.

A schedule is a function of the stages, the micro-batches and the chunks of each stage that gives, for each
stage, its actions one after another; `stack.parallel.pipeline.table` lays them out in time. Chunk c of stage
s holds part c x stages + s of the layers. Adding a schedule is adding a function to `SCHEDULES`.
"""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward", "input_gradient", "weight_gradient"]
"""What a stage does with a micro-batch. A `backward` is an `input_gradient` and a `weight_gradient`."""


class Action(NamedTuple):
    """One thing that a stage does with its layers of one chunk."""

    kind: Kind
    micro_batch: int
    chunk: int = 0


type Orders = list[list[Action]]
"""The actions of each stage, in the order in which it takes them up."""


class Shape(NamedTuple):
    """What a schedule is made for."""

    stages: int
    micro_batches: int
    chunks: int = 1
    """Parts of the model on each stage: virtual stages (arXiv 2104.04473, section 2.2)."""


def gpipe(shape: Shape) -> Orders:
    """All forward passes, then all backward passes (arXiv 1811.06965)."""
    micros = range(shape.micro_batches)
    forward = [Action("forward", micro, chunk) for chunk in range(shape.chunks) for micro in micros]
    backward = [Action("backward", one.micro_batch, one.chunk) for one in reversed(forward)]
    return [forward + backward for _ in range(shape.stages)]


def one_forward_one_backward(shape: Shape) -> Orders:
    """As soon as a micro-batch comes back it is finished (1F1B, arXiv 1806.03377, 2006.09503).

    The stage that is s steps from the end holds s + 1 micro-batches at most. Of several chunks, as those of
    an encoder and of a decoder, it is `interleaved`.
    """
    if shape.chunks > 1:
        return interleaved(shape)
    return [_alternate(shape, ahead=shape.stages - 1 - stage) for stage in range(shape.stages)]


def interleaved(shape: Shape) -> Orders:
    """1F1B over several chunks a stage, which divides the bubble by them (arXiv 2104.04473, section 2.2).

    The micro-batches go round in groups of as many as there are stages.
    """
    stages, chunks = shape.stages, shape.chunks
    ahead = [2 * (stages - 1 - stage) + (chunks - 1) * stages for stage in range(stages)]
    return [_alternate(shape, ahead=ahead[stage]) for stage in range(stages)]


def zero_bubble(shape: Shape) -> Orders:
    """1F1B whose weight gradients wait for the bubble (ZB-H1, arXiv 2401.10241, section 2.2).

    Stage s puts off s of them, so no stage holds more micro-batches than the first one of 1F1B does.
    """
    orders = []
    for stage, order in enumerate(one_forward_one_backward(shape)):
        split: list[Action] = []
        waiting: list[Action] = []
        for action in order:
            if action.kind == "forward":
                split.append(action)
                continue
            split.append(action._replace(kind="input_gradient"))
            waiting.append(action._replace(kind="weight_gradient"))
            if len(waiting) > stage:
                split.append(waiting.pop(0))
        orders.append(split + waiting)
    return orders


def in_halves(orders: Orders) -> Orders:
    """The same with each backward pass in its two halves, one right after the other."""
    return [
        [
            half
            for action in order
            for half in (
                [action]
                if action.kind != "backward"
                else [action._replace(kind="input_gradient"), action._replace(kind="weight_gradient")]
            )
        ]
        for order in orders
    ]


SCHEDULES: Mapping[str, Callable[[Shape], Orders]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zero_bubble": zero_bubble,
}
"""By the name that `mesh.schedule` has for it."""


def _alternate(shape: Shape, *, ahead: int) -> list[Action]:
    """So many forward passes, then one of each in turn, then the backward passes that are left."""
    forward = [Action("forward", *place) for place in _rounds(shape)]
    backward = [Action("backward", micro, shape.chunks - 1 - chunk) for micro, chunk in _rounds(shape)]
    ahead = min(ahead, len(forward))
    order = forward[:ahead]
    for number, one in enumerate(backward):
        order += [*forward[ahead + number : ahead + number + 1], one]
    return order


def _rounds(shape: Shape) -> list[tuple[int, int]]:
    """(micro-batch, chunk) in the order of a ring: as many micro-batches as stages, chunk after chunk."""
    groups = range(0, shape.micro_batches, shape.stages)
    return [
        (micro, chunk)
        for first in groups
        for chunk in range(shape.chunks)
        for micro in range(first, min(first + shape.stages, shape.micro_batches))
    ]

"""A schedule in time: what each stage does in every tick, and where things lie meanwhile.

A tick is as long as the forward pass of one chunk. What a stage has made by the end of a tick is with its
neighbour at the beginning of the next one.
"""

import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from stack.parallel.pipeline.schedules import Action, Kind, Orders, Shape


class Costs(NamedTuple):
    """Ticks of each action."""

    forward: int = 1
    backward: int = 2
    input_gradient: int = 1
    weight_gradient: int = 1


class Entry(NamedTuple):
    """An action and when it begins."""

    tick: int
    action: Action


@dataclass(frozen=True, kw_only=True)
class Table:
    """Who does what and when."""

    shape: Shape
    costs: Costs
    stages: tuple[tuple[Entry, ...], ...]
    """The entries of each stage, in time."""

    @cached_property
    def ticks(self) -> int:
        """From the first action's beginning to the last one's end."""
        return max(self.end(entry) for stage in self.stages for entry in stage)

    def end(self, entry: Entry) -> int:
        """The tick after an entry's last."""
        return entry.tick + getattr(self.costs, entry.action.kind)

    @cached_property
    def busy(self) -> int:
        """Ticks of the stage that works most."""
        return max(sum(self.end(entry) - entry.tick for entry in stage) for stage in self.stages)

    @property
    def bubble(self) -> float:
        """The share of the time in which the stage that works most does nothing."""
        return 1 - self.busy / self.ticks

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The most micro-batches, each of one chunk, that a stage holds at once.

        From the beginning of a forward pass to the end of what needs it last.
        """
        return tuple(max(_count(self._lives(stage))) for stage in self.stages)

    @cached_property
    def put_off(self) -> tuple[int, ...]:
        """The most weight gradients that wait at once on each stage, the one that is made among them."""
        waits = [
            [
                (entry.tick, self.end(last))
                for entry in stage
                if entry.action.kind == "input_gradient"
                for last in stage
                if last.action == entry.action._replace(kind="weight_gradient")
            ]
            for stage in self.stages
        ]
        return tuple(max(_count(spans), default=0) for spans in waits)

    def _lives(self, stage: tuple[Entry, ...]) -> list[tuple[int, int]]:
        first: dict[tuple[int, int], int] = {}
        last: dict[tuple[int, int], int] = {}
        for entry in stage:
            place = entry.action[1:]
            first.setdefault(place, entry.tick)
            last[place] = self.end(entry)
        return [(first[place], last[place]) for place in first]


class ScheduleError(ValueError):
    """A schedule that cannot be."""


def lay_out(orders: Orders, shape: Shape, costs: Costs) -> Table:
    """Begins every action as soon as its stage is free and what it needs is there.

    Raises:
      ScheduleError: actions wait for each other, or one is missing.
    """
    ends: dict[tuple[int, Action], int] = {}
    entries: list[list[Entry]] = [[] for _ in orders]
    free = [0] * len(orders)
    waiting = True
    while waiting:
        waiting = False
        for stage, order in enumerate(orders):
            while len(entries[stage]) < len(order):
                action = order[len(entries[stage])]
                needs = needed(shape, stage, action)
                if not all(need in ends for need in needs):
                    break
                tick = max([free[stage], *(ends[need] for need in needs)])
                free[stage] = ends[stage, action] = tick + getattr(costs, action.kind)
                entries[stage].append(Entry(tick, action))
                waiting = True
    for stage, order in enumerate(orders):
        if len(entries[stage]) < len(order):
            action = order[len(entries[stage])]
            raise ScheduleError(f"stage {stage} waits for ever before {_told(action)}")
    return Table(shape=shape, costs=costs, stages=tuple(map(tuple, entries)))


def needed(shape: Shape, stage: int, action: Action) -> list[tuple[int, Action]]:
    """The actions, with their stages, that must have ended before one begins."""
    kind, micro, chunk = action
    if kind == "weight_gradient":
        return [(stage, action._replace(kind="input_gradient"))]
    if kind == "forward":
        before = chunk - (stage == 0)
        return [((stage - 1) % shape.stages, Action(kind, micro, before))] if before >= 0 else []
    own = (stage, Action("forward", micro, chunk))
    after = chunk + (stage == shape.stages - 1)
    if after == shape.chunks:
        return [own]
    return [own, ((stage + 1) % shape.stages, Action(kind, micro, after))]


def check(table: Table) -> None:
    """Proves a table: everything once, one thing at a time, nothing before what it needs.

    Raises:
      ScheduleError: the first fault, with its stage and tick.
    """
    shape = table.shape
    ends: dict[tuple[int, Action], int] = {}
    for stage, entries in enumerate(table.stages):
        free = 0
        for entry in entries:
            if (stage, entry.action) in ends:
                raise ScheduleError(f"stage {stage} does {_told(entry.action)} twice")
            if entry.tick < free:
                raise ScheduleError(f"stage {stage} does two things in tick {entry.tick}")
            free = ends[stage, entry.action] = table.end(entry)
    for stage, entries in enumerate(table.stages):
        kinds: dict[tuple[int, int], set[Kind]] = defaultdict(set)
        for entry in entries:
            kinds[entry.action[1:]].add(entry.action.kind)
        for where in itertools.product(range(shape.micro_batches), range(shape.chunks)):
            if kinds[where] not in _COMPLETE:
                raise ScheduleError(f"stage {stage} does not finish {_told(Action('forward', *where))}")
    for stage, entries in enumerate(table.stages):
        for entry in entries:
            for need in needed(shape, stage, entry.action):
                if ends.get(need, table.ticks + 1) > entry.tick:
                    raise ScheduleError(
                        f"stage {stage} does {_told(entry.action)} in tick {entry.tick}, before stage "
                        f"{need[0]} has done {_told(need[1])}"
                    )


_COMPLETE: tuple[set[Kind], ...] = (
    {"forward", "backward"},
    {"forward", "input_gradient", "weight_gradient"},
)
"""What is done with a micro-batch on every stage."""


def _told(action: Action) -> str:
    names: Mapping[Kind, str] = {
        "forward": "the forward pass",
        "backward": "the backward pass",
        "input_gradient": "the input gradient",
        "weight_gradient": "the weight gradient",
    }
    return f"{names[action.kind]} of micro-batch {action.micro_batch}, chunk {action.chunk}"


def _count(spans: list[tuple[int, int]]) -> list[int]:
    """How many spans of [begin, end) overlap where each of them begins."""
    return [sum(begin <= at < end for begin, end in spans) for at, _ in spans]

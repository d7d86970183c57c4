"""Where things lie while a table is run: a slot for each activation and gradient that waits.

Every device runs the same program, so each has as many slots as the stage that needs most.
"""

from typing import NamedTuple

import numpy as np

from stack.parallel.pipeline.schedules import Action, Kind
from stack.parallel.pipeline.table import Entry, Table

KINDS: tuple[Kind | None, ...] = (None, "forward", "backward", "input_gradient", "weight_gradient")
"""Of a tick, by number."""


class Rows[Array](NamedTuple):
    """What each stage does in each tick, [ticks, stages] int32 each.

    Where a slot is not used it is the number of slots, one more than the last.
    """

    kind: Array
    """Of `KINDS`."""
    micro_batch: Array
    chunk: Array
    low: Array
    """The first layer of the chunk that is done in this tick."""
    high: Array
    """The one after the last."""
    begins: Array
    """1 in an action's first tick."""
    ends: Array
    """1 in its last."""
    live: Array
    """The slot of what the backward pass needs."""
    late: Array
    """The slot of what a weight gradient needs."""
    input: Array
    """The slot of the activation that a forward pass begins with."""
    gradient: Array
    """The slot of the gradient that a backward pass begins with; of the last part of the model, in its
    forward pass too: there it keeps what it has made."""
    arrived_input: Array
    """Where the activation goes that has come by the beginning of the tick."""
    arrived_gradient: Array


type Spans = dict[tuple[int, int], tuple[int, int]]
"""By micro-batch and chunk, the ticks, both included, in which what belongs to it waits."""


class Slots(NamedTuple):
    """How many there are of each."""

    live: int
    late: int
    input: int
    gradient: int


def place(table: Table, layers: np.ndarray) -> Rows[np.ndarray]:
    """Gives everything that waits a slot.

    Args:
      table: the schedule in time.
      layers: [chunks, stages] int, how many each part of the model has.
    """
    shape = table.shape
    fields = {name: np.zeros((table.ticks, shape.stages), np.int32) for name in Rows._fields}
    found = [{entry.action: entry for entry in entries} for entries in table.stages]
    spans = _spans(table, found)
    taken = {name: [_slots(of_stage) for of_stage in spans[name]] for name in spans}
    slots = _number(spans)
    for name in (*Slots._fields, "arrived_input", "arrived_gradient"):
        fields[name][:] = getattr(slots, name.removeprefix("arrived_"))
    for stage, entries in enumerate(found):
        for action, entry in entries.items():
            where = action[1:]
            end, ticks = table.end(entry), np.arange(entry.tick, table.end(entry))
            of_part = layers[action.chunk, stage]
            fields["kind"][ticks, stage] = KINDS.index(action.kind)
            fields["micro_batch"][ticks, stage], fields["chunk"][ticks, stage] = where
            done = np.ceil(of_part * np.arange(len(ticks) + 1) / len(ticks)).astype(np.int32)
            if action.kind == "forward":
                low, high = done[:-1], done[1:]
            else:
                low, high = of_part - done[1:], of_part - done[:-1]
            fields["low"][ticks, stage], fields["high"][ticks, stage] = low, high
            fields["begins"][entry.tick, stage] = fields["ends"][end - 1, stage] = 1
            for name in Slots._fields:
                if where in taken[name][stage]:
                    fields[name][ticks, stage] = taken[name][stage][where]
            target = _next(table, stage, action)
            if target is not None:
                there, name = target[0], "input" if action.kind == "forward" else "gradient"
                slot = taken[name][there][target[1]]
                fields[f"arrived_{name}"][end, there] = slot
    return Rows(**fields)


def slots_of(table: Table) -> Slots:
    """How many slots `place` gives: as many as things wait at once on the stage where most do."""
    return _number(_spans(table, [{entry.action: entry for entry in entries} for entries in table.stages]))


def _number(spans: dict[str, list[Spans]]) -> Slots:
    return Slots(**{name: max(map(_most, of_stages)) for name, of_stages in spans.items()})


def _most(spans: Spans) -> int:
    """The most spans of [begin, end], both included, that overlap."""
    if not spans:
        return 0
    begins, ends = (np.sort(column) for column in zip(*spans.values(), strict=True))
    over = np.searchsorted(ends, begins, side="left")
    return int((np.arange(1, len(begins) + 1) - over).max())


def _spans(table: Table, found: list[dict[Action, Entry]]) -> dict[str, list[Spans]]:
    """For each kind of slot and stage, when things wait."""
    spans: dict[str, list[Spans]] = {name: [{} for _ in found] for name in Slots._fields}
    for stage, entries in enumerate(found):
        for entry in entries.values():
            _span(table, found, stage, entry, spans)
    return spans


def _span(
    table: Table, found: list[dict[Action, Entry]], stage: int, entry: Entry, spans: dict[str, list[Spans]]
) -> None:
    """The ticks, both included, in which what an action makes or needs waits."""
    action, where = entry.action, entry.action[1:]
    if action.kind == "weight_gradient":
        return
    target = _next(table, stage, action)
    if action.kind != "forward":
        if target is not None:
            there = found[target[0]][action._replace(chunk=target[1][1])]
            spans["gradient"][target[0]][target[1]] = table.end(entry), there.tick
        return
    own = found[stage]
    back = own.get(action._replace(kind="backward")) or own[action._replace(kind="input_gradient")]
    last = own.get(action._replace(kind="weight_gradient"))
    spans["live"][stage][where] = entry.tick, table.end(last or back) - 1
    if last is not None:
        spans["late"][stage][where] = back.tick, table.end(last) - 1
    if target is None:
        spans["gradient"][stage][where] = entry.tick, back.tick
    else:
        there = found[target[0]][action._replace(chunk=target[1][1])]
        spans["input"][target[0]][target[1]] = table.end(entry), there.tick


def _next(table: Table, stage: int, action: Action) -> tuple[int, tuple[int, int]] | None:
    """The stage that goes on with what an action makes, and the micro-batch and chunk there."""
    stages, chunks = table.shape.stages, table.shape.chunks
    if action.kind == "weight_gradient":
        return None
    step = 1 if action.kind == "forward" else -1
    part = action.chunk * stages + stage + step
    if not 0 <= part < stages * chunks:
        return None
    return part % stages, (action.micro_batch, part // stages)


def _slots(spans: Spans) -> dict[tuple[int, int], int]:
    """The first free slot for each, in time."""
    until: list[int] = []
    slots = {}
    for where, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        slot = next((number for number, last in enumerate(until) if last < begin), len(until))
        until[slot : slot + 1] = [end]
        slots[where] = slot
    return slots


def divide(number: int, parts: int) -> list[int]:
    """Layers of each part of a model, as equal as can be; the first and the last part have the fewest."""
    least, more = divmod(number, parts)
    order = sorted(range(parts), key=lambda part: (-min(part, parts - 1 - part), part))
    return [least + (part in order[:more]) for part in range(parts)]

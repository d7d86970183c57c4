"""Schedules as data: complete, in order, one thing at a time, as long and as large as their papers say."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stack.parallel.pipeline.pipeline import Pipeline
from stack.parallel.pipeline.places import KINDS, Rows, divide, place, slots_of
from stack.parallel.pipeline.schedules import SCHEDULES, Action, Shape
from stack.parallel.pipeline.table import Costs, Entry, ScheduleError, Table, check, lay_out

ONE = st.just(1)
COSTS = st.builds(
    Costs, forward=ONE, backward=st.integers(1, 4), input_gradient=st.integers(1, 3), weight_gradient=ONE
)


@st.composite
def tables(draw, names=tuple(SCHEDULES)):
    name, costs = draw(st.sampled_from(names)), draw(COSTS)
    stages, groups = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    chunks = draw(st.integers(1, 3))
    micros = groups * stages if chunks > 1 else draw(st.integers(1, 12))
    shape = Shape(stages, micros, chunks)
    return name, lay_out(SCHEDULES[name](shape), shape, costs)


@given(tables())
def test_every_schedule_is_one(found):
    check(found[1])


@given(tables())
def test_the_time_is_that_of_the_papers(found):
    """(m + p - 1)(F + B), and v chunks divide the bubble: each is a v-th of the work."""
    name, table = found
    stages, micros, chunks = table.shape
    costs = table.costs
    if name == "zero_bubble":
        if micros < stages or chunks > 1:
            return
        work = costs.forward + costs.input_gradient + costs.weight_gradient
        bubble = (stages - 1) * (costs.forward + costs.input_gradient - costs.weight_gradient)
        assert table.ticks == micros * work + bubble
        return
    work = costs.forward + costs.backward
    if name == "gpipe" and chunks > 1 and micros < stages:
        return
    assert table.ticks == chunks * micros * work + (stages - 1) * work
    assert table.bubble == pytest.approx((stages - 1) / (chunks * micros + stages - 1))


@given(tables(("1f1b", "zero_bubble", "gpipe")))
def test_a_stage_holds_no_more_than_it_must(found):
    name, table = found
    stages, micros, chunks = table.shape
    if chunks > 1:
        return
    most = {
        "1f1b": [min(stages - stage, micros) for stage in range(stages)],
        "gpipe": [micros] * stages,
        "zero_bubble": [min(stages, micros)] * stages,
    }[name]
    assert all(live <= limit for live, limit in zip(table.live, most, strict=True))
    if name == "1f1b":
        assert list(table.live) == most


@given(tables())
def test_an_action_too_early_twice_or_missing_is_seen(found):
    table = found[1]
    entries = list(table.stages[-1])
    if table.shape.stages > 1:
        # The last stage begins one tick before the stage before it has made anything.
        early = [Entry(entries[0].tick - 1, entries[0].action), *entries[1:]]
        with pytest.raises(ScheduleError, match="before stage"):
            check(_with_last(table, early))
    with pytest.raises(ScheduleError, match="twice"):
        check(_with_last(table, [*entries, Entry(table.ticks, entries[0].action)]))
    with pytest.raises(ScheduleError, match="does not finish"):
        check(_with_last(table, entries[:-1]))
    both = [Entry(entries[-1].tick, entries[-2].action), entries[-1]]
    with pytest.raises(ScheduleError, match="two things in tick"):
        check(_with_last(table, [*entries[:-2], *both]))


def test_actions_that_wait_for_each_other_are_refused():
    orders = SCHEDULES["1f1b"](Shape(2, 2))
    orders[0].reverse()
    with pytest.raises(
        ScheduleError, match="stage 0 waits for ever before the backward pass of micro-batch 1"
    ):
        lay_out(orders, Shape(2, 2), Costs())


@given(tables(), st.integers(1, 5), st.randoms())
def test_slots_hand_everything_to_who_needs_it(found, most, random):
    """The rows are run with names in the place of arrays: which micro-batch, which part, how many layers."""
    table = found[1]
    stages, micros, chunks = table.shape
    layers = np.array([[random.randint(1, most) for _ in range(stages)] for _ in range(chunks)])
    rows, slots = place(table, layers), slots_of(table)
    assert all(getattr(rows, name).min() >= 0 for name in slots._fields)
    assert all(getattr(rows, name).max() <= getattr(slots, name) for name in slots._fields)
    inputs, gradients, live, late = ([{} for _ in range(stages)] for _ in range(4))
    onward, back, flow = ([None] * stages for _ in range(3))
    done = Counter()
    for tick in range(table.ticks):
        arrived, returned = [*onward[-1:], *onward[:-1]], [*back[1:], *back[:1]]
        onward, back = [None] * stages, [None] * stages
        for stage in range(stages):
            row = Rows[int](*(int(field[tick, stage]) for field in rows))
            inputs[stage][row.arrived_input] = arrived[stage]
            gradients[stage][row.arrived_gradient] = returned[stage]
            part, last = row.chunk * stages + stage, stages * chunks - 1
            if KINDS[row.kind] == "forward":
                assert part == 0 or inputs[stage][row.input] == ("x", row.micro_batch, part - 1)
                assert (row.low, row.high) == (0, layers[row.chunk, stage])
                assert live[stage].get(row.live) is None
                live[stage][row.live] = row.micro_batch, part
                onward[stage] = "x", row.micro_batch, part
                if part == last:
                    assert row.gradient < slots.gradient
                    gradients[stage][row.gradient] = "g", row.micro_batch, part + 1
            if KINDS[row.kind] == "weight_gradient":
                assert live[stage][row.live] == late[stage][row.late] == (row.micro_batch, part)
                assert row.ends
                assert (row.low, row.high) == (0, layers[row.chunk, stage])
                live[stage][row.live] = late[stage][row.late] = None
            if KINDS[row.kind] in ("backward", "input_gradient"):
                assert live[stage][row.live] == (row.micro_batch, part)
                if row.begins:
                    assert gradients[stage][row.gradient] == ("g", row.micro_batch, part + 1)
                    flow[stage] = layers[row.chunk, stage]
                assert row.high == flow[stage]
                flow[stage] = row.low
                if row.ends:
                    assert row.low == 0
                    back[stage] = "g", row.micro_batch, part
                    done[part, row.micro_batch] += 1
                    if KINDS[row.kind] == "backward":
                        live[stage][row.live] = None
                    else:
                        assert late[stage].get(row.late) is None
                        late[stage][row.late] = row.micro_batch, part
    assert done == dict.fromkeys(itertools.product(range(stages * chunks), range(micros)), 1)
    assert slots.live == max(table.live)
    assert slots.late == max(table.put_off)


@given(st.integers(1, 40), st.integers(1, 12))
def test_layers_are_divided_evenly_and_the_ends_have_the_fewest(number, parts):
    sizes = divide(number, parts)
    assert sum(sizes) == number
    assert max(sizes) - min(sizes) <= 1
    assert sizes[0] == min(sizes) or parts == 1 or number % parts == parts - 1
    assert sizes[-1] == min(sizes)


def test_every_layer_of_two_stacks_is_on_one_stage():
    pipeline = Pipeline.of("1f1b", (5, 7), stages=2, micro_batches=4, chunks=2, costs=Costs())
    seen = [
        (stack, int(first[chunk, stage]) + layer)
        for stack in range(2)
        for first, number, _ in [pipeline.chunks_of(stack)]
        for chunk in range(2)
        for stage in range(2)
        for layer in range(number[chunk, stage])
    ]
    assert sorted(seen) == [(0, layer) for layer in range(5)] + [(1, layer) for layer in range(7)]


def _with_last(table: Table, entries: list[Entry]) -> Table:
    return Table(shape=table.shape, costs=table.costs, stages=(*table.stages[:-1], tuple(entries)))


def test_an_action_tells_what_it_is():
    assert Action("forward", 3) == Action("forward", 3, 0)

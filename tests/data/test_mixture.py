"""The order of rows under weights that change: in closed form, and true to their integral."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stack.config import Config, ConfigError, SourceConfig, Weight
from stack.config.fields import flatten
from stack.data.mixture import SCHEDULE_VERSION, VERSION, Schedule, training_order, version
from stack.data.position import Position


@dataclass(frozen=True)
class Part:
    num_rows: int


@dataclass(frozen=True)
class Sizes:
    """What the order of a dataset depends on."""

    parts: tuple[Part, ...]
    weights: tuple[Weight, ...]


def order(sizes: list[int], weights: list[Weight], *, seed: int = 0, shuffle: bool = True):
    dataset = cast("Any", Sizes(tuple(map(Part, sizes)), tuple(weights)))
    return training_order(dataset, seed=seed, shuffle=shuffle)


weight_values = st.one_of(st.just(0.0), st.floats(1e-3, 1e3))
points = st.dictionaries(st.integers(0, 150), weight_values, min_size=1, max_size=4)
schedules = st.lists(points.map(lambda some: tuple(sorted(some.items()))), min_size=1, max_size=4)


def shares(weights: list[Weight], row: np.ndarray) -> np.ndarray:
    """As the field's description says: shares at the points, straight lines between them."""
    lines = [weight if isinstance(weight, tuple) else ((0, weight),) for weight in weights]
    rows = sorted({at for line in lines for at, _ in line})
    at_rows = np.array([np.interp(rows, *np.array(line).T) for line in lines])
    at_rows /= at_rows.sum(axis=0)
    return np.array([np.interp(row, rows, some) for some in at_rows])


@settings(max_examples=10, deadline=None)
@given(schedules)
def test_the_rows_drawn_up_to_any_place_follow_the_integral_and_any_can_be_asked_for(lines) -> None:
    weights: list[Weight] = [((0, 1.0),), *lines]  # One is always there.
    schedule = Schedule.of(weights)
    found = [schedule.find(place) for place in range(200)]
    counts = np.cumsum([np.eye(len(weights))[source] for source, _ in found], axis=0)
    for place, (source, number) in enumerate(found):
        assert number == counts[place, source] - 1, "each of a source once, in its order"
    integral = np.cumsum(shares(weights, np.arange(200) + 0.5), axis=1).T  # No point lies within a row.
    np.testing.assert_allclose(counts, integral, atol=1 + len(weights) / 4)
    assert [Schedule.of(weights).find(place) for place in (3, 199, 0)] == [found[3], found[199], found[0]]


@pytest.mark.parametrize("sources", [2, 8, 9])
def test_sources_that_are_due_together_come_one_after_another(sources: int) -> None:
    schedule = Schedule.of([((0, 1.0),)] * sources)
    found = [schedule.find(place) for place in range(5 * sources)]
    assert found == [(place % sources, place // sources) for place in range(5 * sources)]


def test_the_integral_is_exact_after_a_trillion_rows() -> None:
    schedule = Schedule.of((((0, 1.0), (10**12, 0.0)), 1.0))
    numerator, denominator = schedule.due(0, 10**12)
    assert numerator * 4 == denominator * 10**12, "from a half to nothing: a quarter"
    assert schedule.find(10**15) == (1, 10**15 - 10**12 // 4)


def test_a_source_without_weight_gives_no_row() -> None:
    schedule = Schedule.of((((100, 0.0), (200, 1.0), (300, 0.0)), 2.0))
    drawn = np.array([schedule.find(place)[0] for place in range(500)])
    assert (drawn[:100] == 1).all()
    assert (drawn[300:] == 1).all()
    assert (drawn[100:300] == 0).sum() == pytest.approx(200 / 6, abs=1)


def test_each_row_of_a_source_comes_once_in_each_epoch_of_its_own_in_a_new_order() -> None:
    sizes: list[int] = [128, 128]
    weights: list[Weight] = [((0, 3.0), (2000, 0.5)), 1.0]
    rows = order(sizes, weights)
    drawn = [rows[place] for place in range(1200)]
    assert [rows[place] for place in (1199, 5, 250)] == [drawn[1199], drawn[5], drawn[250]]
    for low, high in ((0, 128), (128, 256)):
        mine = [row for row in drawn if low <= row < high]
        epochs = [
            mine[start : start + high - low] for start in range(0, len(mine) - (high - low), high - low)
        ]
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(low, high)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    other = order(sizes, weights, seed=1)
    assert drawn[:200] != [other[place] for place in range(200)]


def test_another_batch_size_goes_on_in_the_same_order() -> None:
    rows = order([500, 300], [((0, 1.0), (100, 0.1)), ((50, 0.2), (90, 1.0))])

    def batch(position: Position, step: int, size: int) -> list[int]:
        places = position.places(position.first(step, size) + np.arange(size))
        return [rows[place] for place in places.tolist()]

    start = Position()
    one = [row for step in range(12) for row in batch(start, step, 8)]
    changed = start.at(4, 8)
    two = [row for step in range(4) for row in batch(start, step, 8)]
    two += [row for step in range(4, 8) for row in batch(changed, step, 16)]
    assert two == one


def test_the_order_under_a_schedule_is_the_recorded_one() -> None:
    """Where this fails, raise `mixture.SCHEDULE_VERSION` and record anew."""
    assert SCHEDULE_VERSION == 1
    rows = order([3, 4, 2], [((0, 1.0), (10, 0.0)), 1.0, ((5, 0.0), (15, 2.0))], shuffle=False)
    assert [rows[place] for place in range(20)] == RECORDED


RECORDED = [3, 0, 4, 1, 5, 6, 2, 3, 7, 4, 8, 5, 7, 6, 8, 7, 3, 8, 7, 4]


def test_constant_weights_are_ordered_as_before_and_so_is_a_lone_source() -> None:
    assert version([1.0, 2.0]) == version([((0, 1.0), (9, 2.0))]) == str(VERSION)
    assert version([1.0, ((0, 1.0), (9, 2.0))]) == f"{VERSION}.{SCHEDULE_VERSION}"
    alone, constant = order([90], [((0, 1.0), (9, 2.0))]), order([90], [1.0])
    assert [alone[place] for place in range(30)] == [constant[place] for place in range(30)]


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (-1.0, "weight: -1.0 is no weight; write a number from 0 on"),
        ("2", "weight: '2' is no weight"),
        (True, "weight: true is no weight"),
        ([], "weight: [] is no list of points; write [[row, weight], ...]"),
        ([1, 2], "weight: [1, 2] is no list of points"),
        ([[0, 1.0], [0, 2.0]], "weight: the rows of its points, 0, 0, do not rise; order them"),
        ([[0.5, 1.0]], "weight: 0.5 is no row of a point [row, weight]"),
        ([[-1, 1.0]], "weight: -1 is no row of a point"),
        ([[0, float("nan")]], "is no weight"),
    ],
)
def test_a_weight_that_is_none_is_one_line(weight, told) -> None:
    with pytest.raises(ConfigError) as error:
        SourceConfig(weight=weight)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_all_vanish_somewhere_are_refused_with_the_row() -> None:
    sources = [{"weight": [[0, 1], [10, 0]]}, {"weight": [[5, 0], [20, 1]]}, {"weight": [[0, 0], [30, 0]]}]
    assert Config.model_validate({"data": {"sources": sources[:2]}})
    with pytest.raises(ConfigError, match=r"every source has weight 0 at row 10; give one of them"):
        Config(data={"sources": [sources[0], {"weight": [[10, 0], [20, 1]]}]})  # pyrefly: ignore
    assert len(Config.model_validate({"data": {"sources": sources}}).data.read_sources) == 2


def test_points_are_read_from_a_file_and_written_back() -> None:
    config = Config().replace("data.sources.0.weight=[[0, 1], [1000, 0.5]]")
    assert config.data.sources[0].weight == ((0, 1), (1000, 0.5))
    written = dict(flatten(config.model_dump(mode="json")))
    assert written["data.sources.0.weight"] == "[[0, 1.0], [1000, 0.5]]"

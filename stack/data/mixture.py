"""Which row comes when: a function of the seed and the place in the training sequence."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import numpy as np

from stack.config import Weight, weight_at

if TYPE_CHECKING:
    from stack.data.dataset import Dataset

VERSION = 1
"""Of the order of rows; raise it when `training_order` gives another: runs that began with the old one are
then told so, and not gone on with."""
SCHEDULE_VERSION = 1
"""The same of the order under weights that change."""

_WHOLE = 1 << 32
"""Shares are whole numbers of this many parts: all that follows from them is exact, on every machine."""


@runtime_checkable
class Order(Protocol):
    """Row numbers by place."""

    def __getitem__(self, place: int) -> int:
        """The row at a place."""
        ...


def times(weight: Weight, factor: float) -> Weight:
    """A weight, or each of its points, times a number."""
    if isinstance(weight, tuple):
        return tuple((row, value * factor) for row, value in weight)
    return weight * factor


def version(weights: Sequence[Weight]) -> str:
    """Which order of rows weights have."""
    changing = any(isinstance(weight, tuple) for weight in weights)
    return f"{VERSION}.{SCHEDULE_VERSION}" if changing and len(weights) > 1 else str(VERSION)


def training_order(dataset: "Dataset", *, seed: int, shuffle: bool) -> Order:
    """Row numbers of `dataset` by place, without end: order[i] is the row trained on at place i.

    Grain's random-access datasets: each source is permuted as a whole, anew in every epoch of its own,
    and the sources are interleaved evenly by weight, which Grain rounds down to hundredths of the
    smallest; by `Schedule` where weights change. No state: any place can be asked for at once.
    """
    import grain  # Which imports JAX; who prepares data needs neither.

    parts, start = [], 0
    for number, part in enumerate(dataset.parts):
        rows = grain.MapDataset.range(start, start + part.num_rows)
        if shuffle:
            rows = rows.seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0])).shuffle()
        parts.append(rows.repeat())
        start += part.num_rows
    if len(parts) == 1:
        return cast("Order", parts[0])
    constant = [weight for weight in dataset.weights if not isinstance(weight, tuple)]
    if len(constant) == len(parts):
        return cast("Order", grain.MapDataset.mix(parts, constant))
    return _Scheduled(parts=cast("list[Order]", parts), schedule=Schedule.of(dataset.weights))


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Shares of sources that change along the training sequence, in closed form.

    The share of source k is a piecewise linear function of the place; S_k, its integral from 0, is the
    number of rows that are due from it, and C_k(t) = floor(S_k(t) + 1/2) whole ones. In the t-th tick, from
    t - 1 to t, every source whose C_k rises gives a row, in the order of the sources; a row's place is the
    number of rows before it. The sum of C_k(t) differs from t by at most half the number of sources, so the
    tick of a place is found among few. Everything is a ratio of whole numbers, and computed as such.
    """

    rows: tuple[int, ...]
    """Places [points] at which some source has a point, ascending, the first 0."""
    shares: tuple[tuple[int, ...], ...]
    """[sources, points]: share there, in parts of `_WHOLE`, to which they add up."""
    before: tuple[tuple[int, ...], ...]
    """[sources, points]: S_k there, in parts of 2 x `_WHOLE`."""

    @classmethod
    def of(cls, weights: Sequence[Weight]) -> "Schedule":
        """From the weight of every source; see `SourceConfig.weight`."""
        changing = [weight for weight in weights if isinstance(weight, tuple)]
        rows = sorted({0, *(row for points in changing for row, _ in points)})
        shares = [_parts([weight_at(weight, row) for weight in weights]) for row in rows]
        before = [[0] * len(weights)]
        for number in range(1, len(rows)):
            length = rows[number] - rows[number - 1]
            ends = zip(before[-1], shares[number - 1], shares[number], strict=True)
            before.append([sum_ + length * (low + high) for sum_, low, high in ends])
        return cls(
            rows=tuple(rows),
            shares=tuple(zip(*shares, strict=True)),
            before=tuple(zip(*before, strict=True)),
        )

    def due(self, source: int, tick: int) -> tuple[int, int]:
        """S of a source at a tick, as numerator and denominator."""
        here = bisect_right(self.rows, tick) - 1
        sum_, share, steps = self.before[source][here], self.shares[source][here], tick - self.rows[here]
        if here == len(self.rows) - 1:
            return sum_ + 2 * share * steps, 2 * _WHOLE
        length = self.rows[here + 1] - self.rows[here]
        change = self.shares[source][here + 1] - share
        return (sum_ + 2 * share * steps) * length + change * steps**2, 2 * _WHOLE * length

    def count(self, source: int, tick: int) -> int:
        """C of a source at a tick: its rows by then."""
        numerator, denominator = self.due(source, tick)
        return (2 * numerator + denominator) // (2 * denominator)

    def find(self, place: int) -> tuple[int, int]:
        """The source of the row at a place, and how many rows of that source come before it."""
        sources = range(len(self.shares))

        def total(tick: int) -> int:
            return sum(self.count(source, tick) for source in sources)

        slack = len(sources) // 2 + 1
        low = max(0, place - slack)
        ticks = range(low, place + slack + 2)
        tick = ticks[bisect_left(ticks, place + 1, key=total)]  # The first by whose end the row has come.
        before = [self.count(source, tick - 1) for source in sources]
        rising = [source for source in sources if self.count(source, tick) > before[source]]
        source = rising[place - sum(before)]
        return source, before[source]


@dataclass(frozen=True, kw_only=True)
class _Scheduled:
    """The rows of several sources by a schedule."""

    parts: Sequence[Order]
    schedule: Schedule

    def __getitem__(self, place: int) -> int:
        source, number = self.schedule.find(place)
        return self.parts[source][number]


def _parts(weights: Sequence[float]) -> list[int]:
    """Weights as whole parts of `_WHOLE`: what rounding down leaves goes to the largest."""
    largest = max(weights)  # The sum of large ones may be infinite.
    total = sum(weight / largest for weight in weights)
    parts = [int(weight / largest / total * _WHOLE) for weight in weights]
    parts[parts.index(max(parts))] += _WHOLE - sum(parts)
    return parts

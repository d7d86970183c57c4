"""Where a run stands in its data: in rows, so that another batch size goes on at the same place."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, kw_only=True)
class Position:
    """The rows that a run has used by some step, and the places of the training sequence it leaves out."""

    step: int = 0
    """Optimizer steps taken."""
    rows: int = 0
    """Rows used up by then."""
    skipped: tuple[tuple[int, int], ...] = ()
    """Ranges of places, the second of each excluded, ascending and apart."""

    def first(self, step: int, batch_size: int) -> int:
        """The number, among the rows used, of the first row of a step from here on."""
        return self.rows + (step - self.step) * batch_size

    def at(self, step: int, batch_size: int) -> "Position":
        """The same at another step."""
        return Position(step=step, rows=self.first(step, batch_size), skipped=self.skipped)

    def places(self, rows: Int64[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
        """Places in the training sequence of rows [rows] by their number among those used."""
        for start, stop in self.skipped:
            rows = np.where(rows >= start, rows + (stop - start), rows)
        return rows

    def leave_out(self, low: int, high: int) -> "Position":
        """The same without the places from `low` up to, not with, `high`."""
        ranges: list[tuple[int, int]] = []
        for start, stop in sorted([*self.skipped, (low, high)]):
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = ranges[-1][0], max(stop, ranges[-1][1])
            else:
                ranges.append((start, stop))
        return Position(step=self.step, rows=self.rows, skipped=tuple(ranges))


BEGINNING = Position()
"""Of a run."""

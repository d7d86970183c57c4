"""What becomes of steps whose numbers are bad."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from stack.config.condition import Condition
from stack.config.section import Section


class StabilityConfig(Section):
    """A step whose loss or gradient is not finite is never applied, and is told; more is asked for here."""

    conditions = (Condition(fields=("spike_window",), other="spike_deviations", unless=0),)

    spike_deviations: float = Field(default=0.0, ge=0.0)
    """A step is not applied either whose loss or gradient norm is this many standard deviations above the
    median of the last ones, both measured robustly (1.4826 times the median absolute deviation); 0: never."""
    spike_window: PositiveInt = Field(default=128, ge=8)
    """Applied steps that a spike is measured against; none is one before half of them are known."""
    most_in_row: PositiveInt = 10
    """Steps in a row that may go unapplied; at one more the run does as `then` says."""
    then: Literal["stop", "roll_back"] = "stop"
    """`stop` with an error; or `roll_back` to the newest checkpoint and leave the rows of those steps out."""
    save_batches: bool = False
    """Write the batch of every step that is not applied to `skipped` in the run folder, as NumPy arrays."""
    recompute_every: NonNegativeInt = 0
    """Steps between those whose gradient is computed once more, on other devices of the process, and
    compared bit for bit: what differs is broken hardware. Holds the parameters twice. 0: never."""

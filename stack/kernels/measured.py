"""The table of what was measured on devices, `measured.yaml`."""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

type _Text = Annotated[str, Field(min_length=1)]


class Measured(BaseModel):
    """One implementation on one device, at a class of shapes: its numerics passed, and it was timed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    implementation: _Text
    device: _Text
    """As JAX calls it."""
    device_class: _Text
    """What it counts for: `cpu`, or the compute capability of NVIDIA GPUs, as `9.0`."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...]
    numerics: _Text
    """What was compared, and how far apart it was."""
    timed: _Text
    seconds: Annotated[float, Field(gt=0)]
    xla_seconds: Annotated[float, Field(gt=0)]
    """Of the same with `xla`."""
    commit: _Text
    command: _Text
    versions: _Text

    @property
    def speed(self) -> float:
        """How many times as fast as `xla`."""
        return self.xla_seconds / self.seconds


class MeasuredAttention(Measured):
    """The shapes that a measurement of attention counts for."""

    head_dims: tuple[int, int]
    """Least and most."""
    rows: tuple[Literal["whole", "packed"], ...]
    kinds: tuple[Literal["causal", "full", "prefix"], ...]
    extras: tuple[Literal["window", "softcap", "dropout", "bias", "cross"], ...]
    """What of these was in use; a request with another of them does not fit."""
    length_from: int
    """Keys of a row, at least."""


class MeasuredGroups(Measured):
    """The shapes that a measurement of `grouped_matmul` counts for, forward and backward together."""

    groups_from: int
    """Groups, at least."""
    tokens_from: int
    """Tokens of one device, at least."""
    widths: tuple[int, int]
    """Least and most numbers of a token and of a result."""


class Table(BaseModel):
    """All that was measured, by operation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: tuple[MeasuredAttention, ...] = ()
    grouped_matmul: tuple[MeasuredGroups, ...] = ()


@cache
def measured() -> Table:
    """All that was measured."""
    text = files("stack.kernels").joinpath("measured.yaml").read_text("utf-8")
    return Table.model_validate(yaml.safe_load(text))


def fastest(entries: Iterable[Measured]) -> tuple[str, str] | None:
    """The implementation that gains most over `xla`, and the reason to take it; None: none gains."""
    timed = [entry for entry in entries if entry.speed > 1]
    if not timed:
        return None
    best = max(timed, key=lambda entry: entry.speed)
    return best.implementation, f"measured on {best.device}: {best.speed:.3g} times as fast as xla"

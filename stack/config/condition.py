"""Fields that are read only beside some value of another field, and the line that refuses them elsewhere.

A value that nothing reads is a wish that nobody grants: a user who tunes `epsilon` under Lion should hear
of it before the run, not wonder after it. So a section states its conditions as data, and such a field
keeps its default wherever its condition is not met.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pydantic import BaseModel

from stack.config.explain import shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """When some fields of a section are read; all names are dotted from the section that states it."""

    fields: tuple[str, ...]
    """The fields that are read under the condition alone. A section among them stands for all it holds."""
    other: str
    """The field that decides."""
    values: tuple[str | bool | int, ...] = ()
    """With which of its values they are read; empty where `unless` says it."""
    unless: int | None = None
    """The one value of a number with which they are not read; null, or below those with which they are."""

    def is_met(self, section: BaseModel) -> bool:
        """Whether the fields are read in this section."""
        value = attrgetter(self.other)(section)
        return value in self.values if self.values else value != self.unless

    @property
    def remedy(self) -> str:
        """What makes the fields read, as a user would set it."""
        if not self.values:
            return self.other if self.unless is None else f"{self.other} > {self.unless}"
        *others, last = map(_word, self.values)
        return f"{self.other}=" + " or ".join([", ".join(others), last] if others else [last])


def describe_unread(section: BaseModel, conditions: tuple[Condition, ...]) -> str | None:
    """One line for the fields of the first unmet condition that are not at their defaults.

    All of them are told at once, so that a recipe under an override is mended in one go.
    """
    for condition in conditions:
        if condition.is_met(section):
            continue
        changes = [change for name in condition.fields for change in _changes(section, name)]
        if changes:
            *others, last = changes
            names = " and ".join([", ".join(others), last] if others else [last])
            be, them = ("are", "them") if others else ("is", "it")
            here = f"{condition.other}={_word(attrgetter(condition.other)(section))}"
            return f"{names} {be} not read with {here}; remove {them}, or set {condition.remedy}"
    return None


def describe_changes(section: BaseModel) -> str:
    """`name=value` of the first field of a section that is not at its default; empty: all are."""
    changes = (change for name in type(section).model_fields for change in _changes(section, name))
    return next(changes, "")


def _changes(section: Any, name: str) -> Iterator[str]:
    """`name=value` for a field that is not at its default; for a section, for each such field inside."""
    *owners, leaf = name.split(".")
    for owner in owners:
        section = getattr(section, owner)
    yield from _differences(name, getattr(section, leaf), type(section).model_fields[leaf].default)


def _differences(name: str, value: Any, default: Any) -> Iterator[str]:
    if value == default:
        return
    if isinstance(value, BaseModel) and type(value) is type(default):
        for inner in type(value).model_fields:
            yield from _differences(f"{name}.{inner}", getattr(value, inner), getattr(default, inner))
    else:
        yield f"{name}={shown(value)}"


def _word(value: Any) -> str:
    """A value that decides: a word without quotes, as on the command line."""
    return value if isinstance(value, str) else shown(value)

"""A reader of Hugging Face's config.json that knows which keys it was asked for."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stack.config.errors import StackError


class ConfigReader:
    """A reader of one mapping, in which every key is read with its type, allowed or refused.

    It remembers what it was asked for, so `refuse_the_rest` cannot drift from what the code reads. A key
    without a default must be there. Every method raises StackError: one line with the key, its value and
    what it should be.
    """

    def __init__(self, values: Any, *, aliases: Mapping[str, str] | None = None, path: str = "") -> None:
        """Takes a mapping of JSON values.

        Args:
            values: the mapping.
            aliases: key -> its other name; where both are there, they must agree.
            path: the key of the mapping, "" at the top.
        """
        if not isinstance(values, Mapping):
            raise StackError(
                f"Hugging Face config: {path or 'the config'}={_shown(values)} must be a mapping"
            )
        self._values = values
        self._aliases = aliases or {}
        self._path = f"{path}." if path else ""
        self._known: set[str] = set()

    def integer(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._value(key, default)
        if _is_whole(value, least):
            return value
        raise self.error(key, f"must be a whole number of at least {least}")

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """A whole number of at least 1, or null."""
        value = self._value(key, default)
        if value is None or _is_whole(value, 1):
            return value
        raise self.error(key, "must be a whole number of at least 1 or null")

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # NaN is within no limits, and a whole number too large for a float is compared exactly.
        if is_number and -sys.float_info.max <= value <= sys.float_info.max:
            return float(value)
        raise self.error(key, "must be a finite number")

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A finite number, or null."""
        return None if self._value(key, default) is None else self.number(key, default)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._value(key, default)
        if isinstance(value, bool):
            return value
        raise self.error(key, "must be true or false")

    def word(self, key: str, choices: Sequence[str], default: str | None = None) -> str:
        """One of a few words."""
        value = self._value(key, default)
        if value in choices:
            return value
        raise self.error(key, f"is not supported; Stack has {', '.join(map(_shown, choices))}")

    def words(self, key: str, choices: Sequence[str]) -> list[str] | None:
        """A list of such words; None where the key is null or absent."""
        value = self._value(key, None)
        if value is None:
            return None
        if isinstance(value, list | tuple) and all(word in choices for word in value):
            return list(value)
        raise self.error(key, f"is not supported; Stack has lists of {', '.join(map(_shown, choices))}")

    def section(self, key: str, *, aliases: Mapping[str, str] | None = None) -> "ConfigReader | None":
        """The mapping at a key; None where it is null, empty or absent."""
        value = self._value(key, None)
        if value is None or value == {}:
            return None
        return ConfigReader(value, aliases=aliases, path=self._path + key)

    def require(self, key: str, *values: Any) -> None:
        """Allows a key at these values only, and absent."""
        value = self._value(key, values[0])
        if not any(_same(value, allowed) for allowed in values):
            raise self.error(key, f"is not supported; Stack has {' or '.join(map(_shown, values))}")

    def allow(self, keys: Iterable[str]) -> None:
        """Allows keys at any value."""
        self._known.update(keys)

    def has(self, key: str) -> bool:
        """Whether the key is there, under its own name or the other one."""
        return self._entry(key)[0] in self._values

    def refuse_the_rest(self) -> None:
        """Refuses every key that was neither read nor allowed."""
        rest = [key for key in self._values if key not in self._known]
        if rest:
            more = f" (nor are {_shown(rest[1:])})" if len(rest) > 1 else ""
            raise self.error(
                rest[0],
                f"is not a key that Stack reads here{more}; "
                "remove it if the model's numbers do not depend on it",
            )

    def error(self, key: str, problem: str) -> StackError:
        """The error to raise for a key: its value and the problem, or that it is missing."""
        name, value = self._entry(key)
        label = self._path + json.dumps(str(name))[1:-1]
        if name not in self._values:
            problem = "is missing; take the model's own config.json"
        else:
            label += f"={_shown(value)}"
        return StackError(f"Hugging Face config: {label} {problem}")

    def _value(self, key: str, default: Any) -> Any:
        name, value = self._entry(key)
        return value if name in self._values else default

    def _entry(self, key: str) -> tuple[str, Any]:
        """The name a key has in this config, and its value; None where it is absent."""
        names = dict.fromkeys((key, self._aliases.get(key, key)))
        self._known.update(names)
        present = [name for name in names if name in self._values] or [key]
        values = [self._values.get(name) for name in present]
        if len(present) > 1 and not _same(*values):
            one, other = (f"{self._path}{n}={_shown(v)}" for n, v in zip(present, values, strict=True))
            raise StackError(f"Hugging Face config: {one} and {other} name one thing; keep the right one")
        return present[0], values[0]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _same(one: Any, other: Any) -> bool:
    """Equality of JSON values, in which true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _shown(value: Any) -> str:
    """A value as JSON writes it, on one line, cut to a readable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."

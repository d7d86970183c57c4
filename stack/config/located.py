"""Plain values that remember where they were written."""

from dataclasses import dataclass
from typing import Any, Self

type Keys = tuple[str | int, ...]
"""Way to a value in the tree, for example `("data", "sources", 0, "kind")`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a value comes from; of two layers that set a value, the higher wins."""

    text: str
    """As printed: `configs/quickstart.yaml:12` or `override 'train.steps=10'`."""
    layer: int = 0
    """0 is the innermost base file; files built on it and then overrides follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A mapping of names to `Located`, a list of `Located`, or a scalar, with its place."""

    value: Any
    place: Place

    @classmethod
    def of(cls, value: Any, place: Place) -> Self:
        """Everything in a plain value is given one place."""
        if isinstance(value, dict):
            value = {name: cls.of(item, place) for name, item in value.items()}
        elif isinstance(value, list):
            value = [cls.of(item, place) for item in value]
        return cls(value=value, place=place)

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {name: item.plain() for name, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def find(self, path: Keys) -> Self | None:
        """The value at `path`, None where the path ends early."""
        if not path:
            return self
        try:
            return self.value[path[0]].find(path[1:])
        except (KeyError, IndexError, TypeError):
            return None

    def nearest_place(self, path: Keys) -> Place:
        """Where the value at `path` was written, or the innermost mapping around it that was."""
        while (part := self.find(path)) is None:
            path = path[:-1]
        return part.place


def merge(low: Located, high: Located) -> Located:
    """Mappings are joined name by name; anything else in `high` takes the place of what is in `low`.

    So does an objective of another kind, which has other fields.
    """
    if not (isinstance(low.value, dict) and isinstance(high.value, dict)):
        return high
    joined = low.value | {
        name: merge(low.value[name], item) if name in low.value and not _is_other(name, low, high) else item
        for name, item in high.value.items()
    }
    return Located(value=joined, place=high.place)


def _is_other(name: str, low: Located, high: Located) -> bool:
    """Whether a name is that of an objective, and of another kind in each."""
    sides = [side.value[name].value for side in (low, high)]
    if name != "objective" or not all(isinstance(side, dict) for side in sides) or "kind" not in sides[1]:
        return False
    first = sides[0]["kind"].value if "kind" in sides[0] else "causal"
    return first != sides[1]["kind"].value

"""A line that is broken on purpose."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One line that is broken, and the tests that must see it."""

    name: str
    file: str
    old: str
    new: str
    tests: str

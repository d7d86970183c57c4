"""What a function of the library was given, where that is not what it takes."""

from typing import Any

from stack.config.errors import ConfigError


def check_type(function: str, name: str, value: Any, kinds: type | tuple[type, ...], example: str) -> None:
    """Refuses a value of another type.

    Args:
        function: that was called, as its caller knows it.
        name: of its argument.
        value: that was given.
        kinds: any of these; `bool` is no `int`.
        example: of a call that is right.

    Raises:
        ConfigError: it is of none of them.
    """
    if not isinstance(value, kinds) or isinstance(value, bool):
        kind = type(value).__name__
        raise ConfigError(f"{function}: {name} cannot be a {kind}; write for example {example}")

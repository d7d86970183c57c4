"""The base of every part of the config tree."""

from typing import Any, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from stack.config.errors import ConfigError
from stack.config.explain import explain


class _Reported(type(BaseModel)):
    """Turns what pydantic says of `ModelConfig(num_layer=4)` into one line.

    pydantic builds nested sections without calling the class, so errors inside them still reach the
    outermost one with their full path.
    """

    def __call__(cls, *args: Any, **fields: Any) -> Any:
        try:
            return super().__call__(*args, **fields)
        except ValidationError as error:
            raise ConfigError(explain(error, cast("type[BaseModel]", cls))) from None


class Section(BaseModel, metaclass=_Reported):
    """A frozen, typed, keyword-only record that knows no key but its own fields.

    Every field carries its unit and the reason of its default in the string below it, which is also
    what the JSON schema and `stack config schema` show. Types are strict (`true` is no number, `"3"`
    neither); a list stands for a tuple where a field says `strict=False`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

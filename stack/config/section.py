"""The base of every part of the config tree."""

from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError

from stack.config.errors import ConfigError
from stack.config.explain import explain, kind_of


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


def one_of(first: type[Section], *others: type[Section]) -> Any:
    """The type of a field that holds one of several sections, told apart by their `kind`.

    Args:
        first: taken where no kind is given.
        others: their classes, each with a literal field `kind` of its own.
    """
    classes = (first, *others)
    default = kind_of(first)

    def kind(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)

    members = [Annotated[section, Tag(kind_of(section))] for section in classes]
    union: Any = members[0]
    for member in members[1:]:
        union |= member
    return Annotated[union, Discriminator(kind)] if others else first

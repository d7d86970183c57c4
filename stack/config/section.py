"""The base of every part of the config tree."""

from typing import Annotated, Any, ClassVar, Self, cast, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, ValidationError, model_validator

from stack.config.condition import Condition, describe_unread
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

    conditions: ClassVar[tuple[Condition, ...]] = ()
    """Which of its fields are read only beside some value of another; refused elsewhere, first to last."""

    large: ClassVar[frozenset[str]] = frozenset()
    """Fields that may be larger than an array may be long."""

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for name, value in self:
            if isinstance(value, str) and not is_text(value):
                raise ValueError(
                    f"{name} holds bytes or half a character that are not text; write it in UTF-8"
                )
            bits = 63 if name in self.large else 31
            if isinstance(value, int) and abs(value) >= 2**bits:
                raise ValueError(f"{name}={value} must be below 2^{bits}; lower it")
        return self

    @model_validator(mode="after")
    def _check_read(self) -> Self:
        if line := describe_unread(self, self.conditions):
            raise ValueError(line)
        return self


def is_text(value: str) -> bool:
    """Whether it can be written in UTF-8: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_of(union: Any) -> Any:
    """The type of a field that holds one of several sections, told apart by their `kind`.

    Args:
        union: a named type: a union of their classes, each with a literal field `kind` of its own, of
            which the first is taken where no kind is given; or a single class.
    """
    classes = get_args(union.__value__) or (union.__value__,)
    default = kind_of(classes[0])

    def kind(value: Any) -> Any:
        return value.get("kind", default) if isinstance(value, dict) else getattr(value, "kind", default)

    members = [Annotated[section, Tag(kind_of(section))] for section in classes]
    joined: Any = members[0]
    for member in members[1:]:
        joined |= member
    return Annotated[joined, Discriminator(kind)] if len(classes) > 1 else classes[0]

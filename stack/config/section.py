"""The base of every part of the config tree."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen, typed, keyword-only record that knows no key but its own fields.

    Every field carries its unit and the reason of its default in the string below it, which is also
    what the JSON schema and `stack config schema` show.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=False,
        use_attribute_docstrings=True,
        validate_default=True,
    )

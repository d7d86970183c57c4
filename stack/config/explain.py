"""One line for everything that can be wrong with a config: what, where, and the nearest valid name."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from stack.config.located import Keys, Located

EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a group of fields",
    "dict_type": "a group of fields",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "mapping_type": "a group of fields",
    "model_type": "a group of fields",
    "string_type": "text",
    "tuple_type": "a list",
}
"""pydantic's error type -> what should have been there, where its own words speak of Python."""

RENAMED = {
    ("train", "loss_chunk"): "write objective.logits_bytes, tokens x padded vocabulary x 4, or leave it out",
}
"""Fields that are no more -> what to write in their place, where no field has their name."""


def explain(error: ValidationError, root: type[BaseModel], located: Located | None = None) -> str:
    """The first error in one line: `place: name=value must be ...; did you mean ...? (and 2 more)`.

    Args:
        error: what pydantic found.
        root: the class that was built.
        located: the values it was built from; None when they come from Python.
    """
    errors = error.errors(include_url=False)
    first = _without_tags(errors[0], root)
    line = _describe(first, root)
    where = root.__name__ if located is None else _where(first, root, located)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return (f"{where}: " if where else "") + line + more


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The name a user is most likely to have meant, None if all are far from it."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


def dotted(path: Keys) -> str:
    """A path as it is written on the command line."""
    return ".".join(map(str, path))


def shown(value: Any, length: int = 60) -> str:
    """A value as it would be written in YAML, cut to a readable length in characters."""
    try:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    except ValueError:  # Python writes no number of over 4300 digits
        text = "a number too long to show"
    return text if len(text) <= length else text[: length - 3] + "..."


def annotation_at(root: Any, path: Keys) -> Any:
    """The type at a path (`null` aside), None where there is no such field."""
    here = _without_null(root)
    for key in path:
        here = _inside(here, key)
    return here


def kind_of(section: Any) -> str:
    """The kind of a section that stands in a union; empty for any other."""
    field = section.model_fields.get("kind")
    return str(field.default) if field else ""


def _inside(annotation: Any, key: str | int) -> Any:
    """The type of what a type holds under a key, None if it holds nothing there."""
    for section in sections_of(annotation):
        if field := section.model_fields.get(str(key)):
            return _without_null(field.annotation)
    inside = get_args(annotation)
    return inside[0] if inside and str(key).isdigit() else None


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The section that a type is, or those that it is one of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    members = (get_args(member)[0] if get_args(member) else member for member in get_args(annotation))
    return [one for one in members if isinstance(one, type) and issubclass(one, BaseModel)]


def _without_tags(error: Any, root: Any) -> dict[str, Any]:
    """An error whose path names fields only: pydantic puts the kind of a union's member into it too."""
    here, path = _without_null(root), []
    for key in error["loc"]:
        kinds = {kind_of(section): section for section in sections_of(here)}
        if len(kinds) > 1 and key in kinds:
            here = kinds[key]
        else:
            path.append(key)
            here = _inside(here, key)
    if error["type"] != "union_tag_invalid":
        return error | {"loc": tuple(path)}
    kinds = ", ".join(kind_of(section) for section in sections_of(here))
    kind = error["input"].get("kind") if isinstance(error["input"], dict) else error["input"]
    return {"loc": (*path, "kind"), "type": "literal_error", "input": kind, "msg": f"one of {kinds}"}


def field_names(root: type[BaseModel]) -> Iterator[Keys]:
    """Paths of all fields, sections included; the fields of a list of sections are under index 0."""
    for name, field in root.model_fields.items():
        yield (name,)
        inside = _without_null(field.annotation)
        index: Keys = ()
        if getattr(inside, "__origin__", None) is tuple:
            inside, index = get_args(inside)[0], (0,)
        below = dict.fromkeys(rest for section in sections_of(inside) for rest in field_names(section))
        yield from ((name, *index, *rest) for rest in below)


def _without_null(annotation: Any) -> Any:
    """`T | None` -> T; anything else as it is."""
    kinds = get_args(annotation)
    if type(None) in kinds:
        return next(kind for kind in kinds if kind is not type(None))
    return annotation


def _describe(error: Any, root: type[BaseModel]) -> str:
    """What is wrong, without the place."""
    path, kind, value = error["loc"], error["type"], error["input"]
    name = dotted(path)
    if kind == "extra_forbidden":
        return f"{name} is not a field; {_meant(path, root)}"
    if kind == "value_error":  # from our own validators: already one line with its remedy
        return f"{name}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    if kind == "missing":
        return f"{dotted(path[:-1])} has too few entries"
    if kind == "too_long":
        return f"{name} has more than {error['ctx']['max_length']} entries"
    expected = EXPECTED.get(kind) or error["msg"].removeprefix("Input should be ")
    return f"{name}={shown(value)} must be {expected}{_remedy(kind, value, _choices(root, path))}"


def _remedy(kind: str, value: Any, choices: list[str]) -> str:
    if kind == "literal_error" and (choice := nearest(str(value), choices)):
        return f"; did you mean {choice}?"
    if value == "None":
        return "; write null"
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _choices(root: type[BaseModel], path: Keys) -> list[str]:
    """What a field that holds one of several words may hold."""
    *owner, name = path or ("",)
    sections = sections_of(annotation_at(root, tuple(owner)))
    if name == "kind" and len(sections) > 1:
        return [kind_of(section) for section in sections]
    return [str(choice) for choice in get_args(annotation_at(root, path))]


def _meant(path: Keys, root: type[BaseModel]) -> str:
    """The same name elsewhere in the tree, else the closest name beside it, else the closest of all."""
    if path in RENAMED:
        return RENAMED[path]
    *owner, leaf = path
    names = list(field_names(root))
    if path in names:
        having = [
            kind_of(one) for one in sections_of(annotation_at(root, tuple(owner))) if leaf in one.model_fields
        ]
        return f"it is one of {dotted((*owner, 'kind'))}={' or '.join(having)}"
    elsewhere = [other for other in names if other[-1] == leaf]
    if elsewhere:
        best = max(elsewhere, key=lambda other: len({*other} & {*path}))
        return f"did you mean {dotted(best)}?"
    parent = annotation_at(root, tuple(owner))
    beside_it = [name for section in sections_of(parent) for name in section.model_fields]
    if beside := nearest(str(leaf), beside_it):
        return f"did you mean {dotted((*owner, beside))}?"
    if anywhere := nearest(dotted(path), [dotted(other) for other in names]):
        return f"did you mean {anywhere}?"
    return "`stack config schema` lists every field"


def _where(error: Any, root: type[BaseModel], located: Located) -> str:
    """The place of the value; of an incompatible pair, of the one that was set last."""
    path = error["loc"]
    candidates = [path]
    if error["type"] == "value_error":
        fields = {name for section in sections_of(annotation_at(root, path)) for name in section.model_fields}
        words = re.findall(r"[a-z_][a-z_0-9]*(?:\.[a-z_0-9]+)*", str(error["ctx"]["error"]))
        keys = [
            [int(key) if re.fullmatch("[0-9]{1,9}", key) else key for key in word.split(".")]
            for word in words
        ]
        mentioned = [(*path, *some) for some in keys if some[0] in fields]
        candidates = [other for other in mentioned if located.find(other)] or candidates
    places = [located.nearest_place(candidate) for candidate in candidates]
    return max(places, key=lambda place: place.layer).text

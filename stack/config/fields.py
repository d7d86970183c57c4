"""Every field of a config, with its type, default and meaning, for people."""

import json
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from stack.config.explain import dotted, kind_of, nearest, sections_of, shown
from stack.config.tree import Config


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field."""

    name: str
    """Dotted, as in overrides."""
    type: str
    """What it may hold, in words."""
    default: str
    """In YAML; empty for a section."""
    description: str
    """On one line."""


def fields(pattern: str = "") -> list[Field]:
    """The fields whose dotted name, or description, holds a text, in the order of the tree.

    Args:
        pattern: the text, in letters of either case; empty: all fields.
    """
    wanted = pattern.lower()
    every = list(_walk(Config, ()))
    by_name = [field for field in every if wanted in field.name.lower()]
    return by_name or [field for field in every if wanted in field.description.lower()]


def flatten(tree: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names of what is below a tree of plain values, and each value as it is written in YAML."""
    if isinstance(tree, dict) and (tree or not name):
        for key, value in tree.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        for number, item in enumerate(tree):
            yield from flatten(item, f"{name}.{number}")
    else:
        yield name, tree if isinstance(tree, str) else json.dumps(tree)


def suggest(pattern: str) -> str | None:
    """The field whose name is nearest to a text that none holds."""
    names = [field.name for field in _walk(Config, ())]
    # Of its last part, and of the words in that.
    parts = {word: name for name in reversed(names) for word in name.rsplit(".", 1)[-1].split("_")}
    parts |= {name.rsplit(".", 1)[-1]: name for name in reversed(names)}
    match = nearest(pattern, names) or nearest(pattern, list(parts))
    return parts.get(match, match) if match else None


def lines(some: list[Field], width: int = 100) -> list[str]:
    """Fields for a terminal: name, default and type, and below it what it means."""
    text = []
    for field in some:
        default = f" = {field.default}" if field.default else ""
        text.append(f"{field.name}{default}  ({field.type})")
        text += textwrap.wrap(field.description, width, initial_indent="    ", subsequent_indent="    ")
    return text


_INTRODUCTION = """\
Written by `stack config fields --markdown`; `stack config fields PATTERN` explains some in a terminal. In a
file a section's fields stand below its name; on the command line and in Python a field is named as here. What
a file leaves out has its default."""


def page() -> str:
    """All fields as a page of documentation, a table for each section."""
    text = ["# Every field of a config", "", _INTRODUCTION]
    section = None
    for field in fields():
        owner = field.name.rpartition(".")[0]
        if not field.default:
            continue
        if owner != section:
            section = owner
            text += ["", f"## {owner or 'The run'}", "", "| field | default | holds | |", "|---|---|---|---|"]
        cells = [f"`{field.name}`", f"`{field.default}`", field.type, field.description]
        text.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(text) + "\n"


def _walk(root: type[BaseModel], path: tuple[str, ...]) -> Iterator[Field]:
    """The fields of a section and of those below it; plain ones first, so that a table is of one section."""
    below = []
    names: set[str] = set()
    seen: set[tuple[str, str, str]] = set()
    for name, field in root.model_fields.items():
        here = (*path, name)
        description = " ".join((field.description or "").split())
        inside, sections = _inside(field.annotation)
        if not sections:
            words, default = _words(field.annotation), shown(_plain(field.default))
            yield Field(name=dotted(here), type=words, default=default, description=description)
            continue
        words = "a list of sections" if inside else "a section"
        yield Field(name=dotted(here), type=words, default="", description=description)
        below.append(((*here, "0") if inside else here, sections))
    for here, sections in below:
        kinds = ", ".join(kind_of(section) for section in sections)
        for section in sections:
            for field in _walk(section, here):
                if (about := (field.name, field.default, field.description)) in seen:
                    continue
                seen.add(about)
                if field.name in names:  # Another kind's, which has the name for something else.
                    description = f"With kind={kind_of(section)}: {field.description}"
                    yield replace(field, description=description)
                    continue
                names.add(field.name)
                is_kind = len(sections) > 1 and field.name == dotted((*here, "kind"))
                yield replace(field, type=kinds) if is_kind else field


def _inside(annotation: Any) -> tuple[bool, list[type[BaseModel]]]:
    """Whether a type is a list, and the sections it holds."""
    members = [member for member in get_args(annotation) if member is not type(None)]
    if get_origin(annotation) in (types.UnionType, Union) and len(members) == 1:
        annotation = members[0]
    if get_origin(annotation) is tuple:
        return True, sections_of(get_args(annotation)[0])
    return False, sections_of(annotation)


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


def _words(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (types.UnionType, Union):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is tuple:
        kinds = dict.fromkeys(_words(argument) for argument in arguments if argument is not Ellipsis)
        if len(kinds) > 1:
            return f"[{', '.join(kinds)}]"
        (inner,) = kinds
        return f"list of {inner}" if inner.startswith("[") else f"list of {inner}s"
    if origin is Mapping:
        return "values by name"
    if hasattr(annotation, "__metadata__"):
        return _words(arguments[0])
    return _WORDS.get(annotation, str(annotation))

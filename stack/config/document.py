"""YAML files as values that know their lines; a file may be built on another."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from stack.config.errors import ConfigError
from stack.config.explain import dotted, nearest, shown
from stack.config.located import Keys, Located, Place, merge
from stack.config.paths import expand

type PlaceOfLine = Callable[[int], Place]
type FileOfName = Callable[[str], Path | None]


_DEEPEST = 50
"""Values inside each other; a config has five. Composing them recurs, and would end in the interpreter."""
_MOST_BYTES = 1 << 20
"""Of a config file: some kilobytes are usual, and what is larger is something else."""


class _Loader(yaml.SafeLoader):
    """YAML without anchors, and with the scalars of YAML 1.2.

    `3e-4` is a number; `on`, `no`, `010`, `1:30` and dates are text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's way to declare them)
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem="aliases are not read; share fields by `base:`", problem_mark=mark
            )
        if self.depth == _DEEPEST:
            raise yaml.MarkedYAMLError(problem="nested too deep to be read", problem_mark=mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9_]*)",
    "float": r"[-+]?([0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)


_HEAD = "# The whole config of a run, up to the line: "
_END = "# end"


def framed(text: str) -> str:
    """A config's text with a first and a last line, by which a part of it is told from the whole."""
    return f"{_HEAD}{_END}\n{text}{_END}\n"


class Dumper(yaml.SafeDumper):
    """Writes text in quotes wherever this reader, or one of YAML 1.1, would take it for something else."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)
for _first, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _pattern in _resolvers:
        Dumper.add_implicit_resolver(_tag, _pattern, _first and [_first])


def read_file(path: Path, above: tuple[Path, ...] = (), named: FileOfName | None = None) -> Located:
    """Read a YAML file and, below it, the file its `base:` names, relative to its own folder.

    Args:
        path: the file.
        above: the files that are built on this one, outermost first.
        named: the file of a `base:` that is a name and not a path; None for a path.

    Raises:
        ConfigError: a file is missing, unreadable or no mapping, or the bases go round in a circle.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"{path}: it is longer than {_MOST_BYTES:,} bytes; is this a YAML file?")
        text = data.decode()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_beside(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; is this a YAML file?") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if text.startswith(_HEAD) and text.rstrip().rpartition("\n")[2] != _END:
        raise ConfigError(
            f"{path}: its end is missing, it was cut: restore it, or train with the file it was made from; if"
            f" it is whole, end it with the line: {_END}"
        )
    return read_text(text, where=str(path), folder=path.parent, above=(*above, path), named=named)


def read_text(
    text: str, *, where: str, folder: Path, above: tuple[Path, ...] = (), named: FileOfName | None = None
) -> Located:
    """Read the text of a YAML file; `where` names it in errors, `base:` is relative to `folder`."""

    def place(line: int) -> Place:
        return Place(text=f"{where}:{line}", layer=base.place.layer + 1 if base else 0)

    base = None
    node = _compose(text, place)
    if node is None:
        raise ConfigError(f"{where}: the file is empty; write fields as `name: value`")
    if not isinstance(node, yaml.MappingNode):
        instead = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{place(_line(node)).text}: expected fields as `name: value`, not {instead}")
    base = _read_base(node, where, folder, above, named)
    fields = _locate_fields(node, (), place)
    fields.pop("base", None)
    own = Located(value=fields, place=Place(text=where, layer=place(1).layer))
    return merge(base, own) if base else own


def read_value(text: str, place: Place) -> Located:
    """Read one YAML value; all of it has the given place."""
    node = _compose(text, lambda _: place)
    return Located(value=None, place=place) if node is None else _locate(node, (), lambda _: place)


def _read_base(
    node: yaml.MappingNode, where: str, folder: Path, above: tuple[Path, ...], named: FileOfName | None
) -> Located | None:
    """What the file is built on; None if it has no `base:`."""
    for key, value in node.value:
        if key.value != "base":
            continue
        place = f"{where}:{_line(key)}"
        if value.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{place}: base must be the path of another config file")
        path = folder / expand(value.value)
        if named is not None:
            path = named(value.value) or path
        if path.resolve() in [other.resolve() for other in above]:
            circle = " -> ".join(str(other) for other in (*above, path))
            raise ConfigError(f"{place}: base goes round in a circle: {circle}")
        if not path.is_file():
            raise ConfigError(f"{place}: base {path}: no such file{_beside(path)}")
        return read_file(path, above, named)
    return None


def _compose(text: str, place: PlaceOfLine) -> yaml.Node | None:
    """The nodes of a YAML text, with their lines; None if there are none."""
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "").split())
        raise ConfigError(f"{place(mark.line + 1 if mark else 1).text}: bad YAML: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{place(line).text}: bad YAML: {error.reason}") from None


def _locate(node: yaml.Node, path: Keys, place: PlaceOfLine) -> Located:
    """The value of a node and of all below it."""
    here = place(_line(node))
    if isinstance(node, yaml.MappingNode):
        return Located(value=_locate_fields(node, path, place), place=here)
    if isinstance(node, yaml.SequenceNode):
        items = [_locate(item, (*path, i), place) for i, item in enumerate(node.value)]
        return Located(value=items, place=here)
    try:
        value = _Loader("").construct_object(node)
        if isinstance(value, str):  # An escape may give the two halves of a character.
            value = value.encode("utf-16", "surrogatepass").decode("utf-16")
        return Located(value=value, place=here)
    # A tag that does not fit the text has PyYAML fail in ways of its own.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f"{here.text}: {dotted(path)}: {shown(node.value)} cannot be a {node.tag}"
        ) from None


def _locate_fields(node: yaml.MappingNode, path: Keys, place: PlaceOfLine) -> dict[str, Located]:
    """The fields of a mapping; the place of a field is that of its name."""
    fields: dict[str, Located] = {}
    for key, item in node.value:
        here = place(_line(key))
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{here.text}: the name of a field must be plain text")
        name = key.value
        if name in fields:
            first = fields[name].place.text
            raise ConfigError(f"{here.text}: {dotted((*path, name))} is given twice, first at {first}")
        if "." in name:
            section, _, rest = name.partition(".")
            raise ConfigError(
                f"{here.text}: {name}: dotted names are for overrides; write {rest} under {section}:"
            )
        fields[name] = Located(value=_locate(item, (*path, name), place).value, place=here)
    return fields


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _beside(path: Path) -> str:
    """Configs near a missing one: the closest name, else what its folder holds."""
    folders = [folder for folder in (Path("configs"), path.parent) if folder.is_dir()]
    files = {file.name: file for folder in folders for file in sorted(folder.glob("*.yaml"))}
    if match := nearest(f"{path.stem}.yaml", list(files)):
        return f"; did you mean {files[match]}?"
    if files:
        return f"; there are {', '.join(map(str, list(files.values())[:20]))}"
    return ""

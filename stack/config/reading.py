"""Configs from YAML files, overrides and back."""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stack.config.arguments import check_type
from stack.config.document import Dumper, read_file, read_text, read_value
from stack.config.errors import ConfigError
from stack.config.explain import annotation_at, explain, shown
from stack.config.located import Keys, Located, Place, merge
from stack.config.paths import expand
from stack.config.tree import Config

RUN_CONFIG = "config.yaml"
"""The resolved config in a run folder."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, or the config of a run folder, and apply overrides.

    Args:
        path: a YAML file; fields it leaves out come from the file its `base:` names, else from the
            defaults. Or a run folder: the config it was trained with, set to that very folder, so
            that a run that was moved goes on where it now lies.
        overrides: `name=value` each, the name dotted (`model.num_layers=4`,
            `data.sources.0.kind=text`), the value in YAML; a later one wins.

    Raises:
        ConfigError: in one line what is wrong, where, and the nearest valid name.
    """
    check_type("load", "path", path, (str, Path), 'load("configs/quickstart.yaml")')
    path = expand(path)
    if not path.is_dir():
        return _build(read_file(path), overrides)
    if not (path / RUN_CONFIG).is_file():
        raise ConfigError(f"{path} is neither a config file nor a run: it holds no {RUN_CONFIG}")
    config = _build(read_file(path / RUN_CONFIG))
    folder = path.resolve()
    return replace(
        config.model_copy(update={"output_dir": str(folder.parent), "name": folder.name}), *overrides
    )


def parse(text: str, overrides: Sequence[str] = (), *, where: str = "config") -> Config:
    """The same for YAML text, for example that saved with a checkpoint; `where` names it in errors."""
    return _build(read_text(text, where=where, folder=Path()), overrides)


def replace(config: Config, *overrides: str) -> Config:
    """A config with some fields changed, all checked anew."""
    return _build(Located.of(config.model_dump(mode="json"), Place(text="")), overrides)


def dump(config: Config) -> str:
    """The whole config, defaults included, as YAML that `parse` reads back to an equal config."""
    tree = config.model_dump(mode="json")
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1000)


def schema() -> dict[str, Any]:
    """JSON schema of a config file: names, types, limits, defaults and descriptions, for editors."""
    tree = _for_editors(Config.model_json_schema())
    tree["properties"]["base"] = {
        "type": "string",
        "description": "Another config file, relative to this one, that gives what this one leaves out.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | tree


def _build(located: Located, overrides: Sequence[str] = ()) -> Config:
    if isinstance(overrides, str):
        raise ConfigError(
            f"overrides must be a list, not the text {shown(overrides)}; write [{shown(overrides)}]"
        )
    check_type("overrides", "they", overrides, Sequence, '["train.steps=100"]')
    located = _moved(located)
    for override in overrides:
        check_type("overrides", "one of them", override, str, '["train.steps=100"]')
        located = _moved(_override(located, override))
    try:
        return Config.model_validate(located.plain())
    except ValidationError as error:
        raise ConfigError(explain(error, Config, located)) from None


def _moved(located: Located) -> Located:
    """`model.attention`, as it was called once, stands where it does now; of both, the later layer counts."""
    old, new = located.find(("model", "attention")), located.find(("kernels", "attention"))
    if old is None:
        return located
    fields, model = dict(located.value), located.value["model"]
    rest = {name: value for name, value in model.value.items() if name != "attention"}
    fields["model"] = Located(value=rest, place=model.place)
    if new is not None and new.place.layer >= old.place.layer:
        _tell(f"{old.place.text}: model.attention is not read beside kernels.attention; remove it")
    else:
        _tell(f"{old.place.text}: model.attention is kernels.attention now, and is read as such")
        kernels = Located(value={"attention": old}, place=old.place)
        fields["kernels"] = merge(fields["kernels"], kernels) if "kernels" in fields else kernels
    return Located(value=fields, place=located.place)


@cache
def _tell(line: str) -> None:
    """Once, beside what a command prints."""
    sys.stderr.write(f"{line}\n")


def _for_editors(tree: Any) -> Any:
    """The schema with every description on one line, and one of several sections as any of them.

    pydantic's `oneOf` holds for exactly one of them, but a section without `kind` fits each: an editor
    would mark every recipe that leaves it out.
    """
    if isinstance(tree, list):
        return [_for_editors(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    inside = {"anyOf" if name == "oneOf" else name: _for_editors(item) for name, item in tree.items()}
    if isinstance(text := inside.get("description"), str):
        inside["description"] = " ".join(text.split())
    return inside


def _override(located: Located, override: str) -> Located:
    """The values with one of them changed."""
    name, equals, text = override.partition("=")
    place = Place(text=f"override {shown(override, 200)}", layer=located.place.layer + 1)
    if not (equals and name):
        raise ConfigError(f"{place.text}: expected name=value, for example train.steps=100")
    keys = tuple(name.split("."))
    changed = _change(located, keys, _value(text, keys, place), Config().model_dump(mode="json"))
    return Located(value=changed.value, place=Place(text=located.place.text, layer=place.layer))


def _value(text: str, keys: Keys, place: Place) -> Located:
    """A value in YAML; for a field that holds text, the text as it was typed, unless it is quoted."""
    if annotation_at(Config, keys) is str and text not in ("null", "~") and text[:1] not in ("'", '"'):
        return Located(value=text, place=place)
    return read_value(text, place)


def _change(old: Located | None, keys: Keys, new: Located, default: Any) -> Located:
    """`old` with `new` merged in at `keys`; a list that no file gives starts as the default's."""
    if not keys:
        return merge(old, new) if old else new
    if old is None:
        old = Located.of(default if isinstance(default, list) else {}, new.place)
    key, *rest = keys
    if isinstance(old.value, list):
        index = _index(str(key), len(old.value), new.place)
        changed = _change(old.find((index,)), tuple(rest), new, None)
        return Located(value=[*old.value[:index], changed, *old.value[index + 1 :]], place=old.place)
    fields, place = (old.value, old.place) if isinstance(old.value, dict) else ({}, new.place)
    inner = default.get(key) if isinstance(default, dict) else None
    return Located(value=fields | {key: _change(fields.get(key), tuple(rest), new, inner)}, place=place)


def _index(key: str, length: int, place: Place) -> int:
    if not (key.isdecimal() and int(key) <= length):
        raise ConfigError(
            f"{place.text}: a list is changed by index, 0 to {length} ({length} appends), not {shown(key)}"
        )
    return int(key)

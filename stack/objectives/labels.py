"""Labels of records by name: as they are written, and as a run finds them where none are named."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stack.config import Config
from stack.config.errors import ConfigError, StackError
from stack.config.multi_task import MultiTaskConfig
from stack.config.section import is_text
from stack.config.tasks import LabelledConfig
from stack.data.records import fields_of
from stack.data.sources import read_documents

_MOST = 1000
"""Labels that are found; more are no labels."""


def label_name(value: object, place: str, field: str) -> str:
    """A label as a config names it; 1.0 is 1, as tables write whole numbers beside a missing one.

    Raises:
      StackError: it is no text, number, true or false.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise StackError(f"{place}: field {field!r} is {value}, not a label; give it a text or a number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (str, int, float)) and str(value).strip() and is_text(str(value)):
        return str(value)
    if isinstance(value, str) and not is_text(value):
        raise StackError(f"{place}: field {field!r} holds half of a surrogate pair; mend the line")
    what = "empty" if value == "" else f"a {type(value).__name__}" if value is not None else "null"
    raise StackError(f"{place}: field {field!r} is {what}, not a label; give it a text or a number")


def label_number(name: str, labels: Sequence[str], place: str) -> int:
    """The place of a label among those of a config.

    Raises:
      StackError: it is none of them.
    """
    try:
        return labels.index(name)
    except ValueError:
        raise StackError(
            f"{place}: label {name!r} is none of objective.labels ({', '.join(labels)}); mend or remove the"
            " line, or train with that label"
        ) from None


def check_labels(labels: Sequence[str]) -> Sequence[str]:
    """The labels, of which there must be some by now.

    Raises:
      ConfigError: none are named.
    """
    if not labels:
        raise ConfigError("objective.labels is empty: name them, or give records in which they are found")
    return labels


def with_labels(config: Config) -> Config:
    """The config with labels, and weights, that it leaves to the records; reads all of them once.

    Raises:
      StackError: there are fewer than two labels, far too many, one of a single record, or a record without.
    """
    objective = config.objective
    if isinstance(objective, MultiTaskConfig):
        tasks = tuple(
            named.model_copy(update={"objective": _found(config, named.objective, named.name)})
            for named in objective.tasks
        )
        return config.model_copy(update={"objective": objective.model_copy(update={"tasks": tasks})})
    return config.model_copy(update={"objective": _found(config, objective, None)})


def _found(config: Config, objective: Any, task: str | None) -> Any:
    """A task with its labels, and weights."""
    if not isinstance(objective, LabelledConfig):
        return objective
    balances = getattr(objective, "class_weights", "none") == "balanced"
    if objective.labels and not balances:
        return objective
    found, places = _count(config, objective, task)
    names = list(objective.labels) or sorted(found)
    if not objective.labels:
        _check_found(found, places)
    changed: dict[str, Any] = {"labels": tuple(names)}
    if balances:
        total = sum(found[name] for name in names)
        if absent := [name for name in names if not found[name]]:
            raise ConfigError(
                f"objective.class_weights=balanced: no record has the label {absent[0]!r}; give numbers"
            )
        changed["class_weights"] = tuple(total / (len(names) * found[name]) for name in names)
    return type(objective)(**(objective.model_dump() | changed))


def _count(config: Config, objective: Any, task: str | None) -> tuple[Counter[str], dict[str, str]]:
    from stack.models import implementation

    reader = implementation(objective)(config.model_copy(update={"objective": objective})).reader()
    found: Counter[str] = Counter()
    places: dict[str, str] = {}
    for source in config.data.read_sources:
        if source.task != task:
            continue
        for record in read_documents(source, seed=config.seed):
            place = getattr(record, "place", "a record")
            for name in set(reader.names(fields_of(record, place), place)):
                found[name] += 1
                places[name] = place
    return found, places


def _check_found(found: Counter[str], places: dict[str, str]) -> None:
    for name, number in sorted(found.items()):
        if number == 1:
            raise StackError(
                f"{places[name]}: label {name!r} is that of this record alone, which is too few to learn"
                " from; add records of it, remove the line, or name objective.labels"
            )
    if len(found) < 2:
        only = f"all records have the label {next(iter(found))!r}" if found else "no record has a label"
        raise StackError(f"objective.labels: {only}, so there is nothing to choose; give records of others")
    if len(found) > _MOST:
        raise StackError(
            f"objective.labels: the records have {len(found):,} labels, of which at most {_MOST:,} are found;"
            " look whether the field holds labels, or name them"
        )

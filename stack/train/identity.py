"""What a run is: the model whose state its checkpoints hold."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stack.config import Config, StackError
from stack.config.explain import shown

_FREE = {"model.attention", "model.scan_unroll"}
"""Fields of a model that change how it runs and nothing of what it is."""


def check_model(config: Config, recorded: Mapping[str, Any], folder: Path) -> None:
    """Refuses to go on with another model, or another optimizer, than a run began with.

    Args:
      config: of now.
      recorded: the config that was saved with the checkpoint, as plain values.
      folder: of the run.

    Raises:
      StackError: they differ.
    """
    now = config.model_dump(mode="json")
    changes = [
        *differences(recorded.get("model", {}), now["model"], "model"),
        *differences(
            {"kind": recorded.get("optimizer", {}).get("kind")},
            {"kind": now["optimizer"]["kind"]},
            "optimizer",
        ),
    ]
    told = [f"{name} {shown(old)} -> {shown(new)}" for name, old, new in changes if name not in _FREE]
    if told:
        more = f" and {len(told) - 4} more" if len(told) > 4 else ""
        raise StackError(
            f"{folder} holds a run of another model: {', '.join(told[:4])}{more};"
            " give the new one another name: name=..."
        )


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, old and new value of what two trees of plain values differ in.

    What only one of them has counts as no difference: a field that is new in this version has a default
    that changes nothing.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() & new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new

"""What a run is: the model whose state its checkpoints hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stack.config import Config, StackError
from stack.config.fields import flatten

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
    now, then = (dict(flatten(tree)) for tree in (config.model_dump(mode="json"), recorded))
    # A field that is new in this version has a default that changes nothing.
    told = [
        f"{name} {then[name]} -> {value}"
        for name, value in now.items()
        if name in then and then[name] != value and _is_identity(name)
    ]
    if told:
        more = f" and {len(told) - 4} more" if len(told) > 4 else ""
        raise StackError(
            f"{folder} holds a run of another model: {', '.join(told[:4])}{more};"
            " give the new one another name: name=..."
        )


def _is_identity(name: str) -> bool:
    return name == "optimizer.kind" or (name.startswith("model.") and name not in _FREE)

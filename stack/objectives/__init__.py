"""Objectives: from a model and a batch to a loss."""

from typing import TYPE_CHECKING, cast

from stack.models import implementation

if TYPE_CHECKING:
    from stack.config import Config
    from stack.objectives.protocol import Objective


def build(config: "Config") -> "Objective":
    """The objective that a config's section names."""
    return cast("Objective", implementation(config.objective)(config))

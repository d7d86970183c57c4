"""Models: composed of layers, only maths."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from stack.config import ModelConfig
    from stack.models.cost import Cost
    from stack.models.protocol import Model


def model_class(config: "ModelConfig") -> "type[Model]":
    """The class that a model's section names."""
    return cast("type[Model]", implementation(config))


def model_cost(config: "ModelConfig") -> "Cost":
    """What a forward pass of a model costs; see `stack.models.cost`."""
    return model_class(config).cost(config)


def implementation(section: Any) -> type:
    """The class a section of the config names as `module:class`, which config itself cannot import."""
    module, name = section.implementation.split(":")
    return getattr(import_module(module), name)

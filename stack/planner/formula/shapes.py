"""The parameters of a model, read from the model itself, and what each device holds of them."""

import dataclasses
import math
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import jax
from flax import nnx

from stack.config import MeshConfig
from stack.config.model import ModelConfig
from stack.models import model_class
from stack.parallel import mesh as meshes
from stack.parallel.rules import Layout, Role
from stack.parallel.zero import is_variable

Axes = tuple[tuple[str, int], ...]
"""Logical axes and their sizes."""

_LAYERS, _LENGTH = 7919, 7907
"""A number of layers and of positions that no other axis of a model is as long as: they tell what there is
once for each. A model is then built once, whatever its depth and length."""

_HEAD = ("final_norm", "head")
"""What of a model its last pipeline stage holds, by the names that the model gives; what else is in no layer
is in front of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter, or the same one of every layer."""

    axes: Axes
    """Of one layer's."""
    role: Role
    copies: int = 1
    """Layers that have one."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is split over `fsdp` and used in the compute dtype, as tables are too."""
        return self.role != "vector"

    @cached_property
    def size(self) -> int:
        """Elements, of all copies."""
        return self.copies * math.prod(size for _, size in self.axes)

    def shard(self, *, fsdp: int = 1, tensor: int = 1) -> float:
        """Elements on each device, of all copies.

        Args:
          fsdp: ways it is split at rest; 1 also for what is gathered.
          tensor: ways of tensor parallelism.
        """
        return self.size / _ways(self.axes, self.role, fsdp, tensor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameters:
    """Those of a model, where the planner has to tell them apart."""

    layers: tuple[Parameter, ...]
    embedding: tuple[Parameter, ...]
    """The word table, and learned positions."""
    head: tuple[Parameter, ...]
    """The final norm, and the output table where it is not the word table."""

    def __iter__(self) -> Iterator[Parameter]:
        """All of them."""
        yield from self.embedding
        yield from self.layers
        yield from self.head

    @property
    def words(self) -> Parameter:
        """The table that embeds words."""
        return next(part for part in self.embedding if "vocab" in dict(part.axes))


def num_parameters(model: ModelConfig) -> int:
    """All parameters of a model, the padding of the vocabulary left out."""
    return sum(
        part.copies * math.prod(model.vocab_size if name == "vocab" else size for name, size in part.axes)
        for part in parameters(model)
    )


@cache
def parameters(model: ModelConfig) -> Parameters:
    """All parameters of a model, as its class declares them; nothing is allocated."""
    parts = _parts(model.model_copy(update={"num_layers": _LAYERS, "max_length": _LENGTH}))

    def resolve(part: Parameter) -> Parameter:
        longer = model.max_length - _LENGTH
        axes = tuple((name, size + longer * (name == "length")) for name, size in part.axes)
        copies = model.num_layers if part.copies == _LAYERS else part.copies
        return dataclasses.replace(part, axes=axes, copies=copies)

    return Parameters(
        layers=tuple(map(resolve, parts.layers)),
        embedding=tuple(map(resolve, parts.embedding)),
        head=tuple(map(resolve, parts.head)),
    )


@cache
def _parts(model: ModelConfig) -> Parameters:
    """The parameters of an abstract model, 0.1 s of tracing."""
    abstract = nnx.eval_shape(lambda: model_class(model)(model, rngs=nnx.Rngs(0)))
    layers, embedding, head = [], [], []
    for name, module in vars(abstract).items():
        variables: Any = filter(is_variable, jax.tree.leaves(module, is_leaf=is_variable))
        for variable in variables:
            axes = tuple(zip(variable.axes, variable.shape, strict=True))
            if axes[0][0] == "layers":
                layers.append(Parameter(axes=axes[1:], role=variable.role, copies=axes[0][1]))
            else:
                place = head if name in _HEAD else embedding
                place.append(Parameter(axes=axes, role=variable.role))
    return Parameters(layers=tuple(layers), embedding=tuple(embedding), head=tuple(head))


@cache
def _ways(axes: Axes, role: Role, fsdp: int, tensor: int) -> int:
    """Devices that a parameter is split over, by the rule of the trainer."""
    mesh = MeshConfig(fsdp=fsdp, tensor=tensor, zero=1)
    layout = Layout.of(meshes.abstract(mesh, fsdp * tensor), mesh)
    names, shape = zip(*axes, strict=True)
    spec = layout.parameter_spec(names, shape, role)
    return math.prod(layout.size(axis) for axis in _mesh_axes(spec))


def _mesh_axes(spec: jax.sharding.PartitionSpec) -> Iterator[str]:
    for entry in spec:
        if entry is not None:
            yield from entry if isinstance(entry, tuple) else (entry,)

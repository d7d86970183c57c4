"""The parameters of a model, read from the model itself, and what each device holds of them."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator
from functools import cache, cached_property
from typing import Any

import jax
from flax import nnx

from stack.config import AdapterConfig, MeshConfig
from stack.config.model import ModelConfig
from stack.layers.linear import linears, sizes, use_adapters
from stack.models import model_class
from stack.models.flops import Untrained
from stack.parallel import mesh as meshes
from stack.parallel.rules import ELEMENTWISE, Layout, Role
from stack.step import adapter as adapters
from stack.step import groups

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
    trained: bool = True
    itemsize: int = 4
    """Bytes of an element at rest."""

    @property
    def is_matrix(self) -> bool:
        """Whether it is split over `fsdp` and used in the compute dtype, as tables are too."""
        return self.role != "vector"

    @cached_property
    def size(self) -> int:
        """Elements, of all copies."""
        return self.copies * math.prod(size for _, size in self.axes)

    def shard(self, *, fsdp: int = 1, data: int = 1, stage: int = 1, tensor: int = 1) -> float:
        """Elements on each device, of all copies.

        Args:
          fsdp: ways it is split at rest; 1 also for what is gathered.
          data: the same, where there is a second shard.
          stage: the same, of a pipeline's stages.
          tensor: ways of tensor parallelism.
        """
        return self.size / _ways(self.axes, self.role, fsdp, data, stage, tensor)


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
    def ends(self) -> tuple[Parameter, ...]:
        """Those in no layer."""
        return (*self.embedding, *self.head)

    @property
    def reaches_layers(self) -> bool:
        """Whether anything is trained in the layers or below them, so that gradients go back through them."""
        return any(part.trained for part in (*self.embedding, *self.layers))

    @property
    def added(self) -> tuple[Parameter, ...]:
        """Those of adapters in the layers, A and B of each by turns."""
        return tuple(part for part in self.layers if "rank" in dict(part.axes))

    @property
    def untrained(self) -> Untrained:
        """What of the matrix products is not trained, and what adapters add to them."""
        head = [part for part in self.head if part.is_matrix]
        if self.scores is self.words:
            head.append(self.words)
        return Untrained(
            layers=sum(part.size for part in self.layers if part.is_matrix and not part.trained),
            head=sum(part.size for part in head if not part.trained),
            added=sum(part.size for part in self if "rank" in dict(part.axes)),
            reaches_layers=self.reaches_layers,
        )

    @property
    def words(self) -> Parameter:
        """The table that embeds words."""
        return next(part for part in self.embedding if "vocab" in dict(part.axes))

    @property
    def scores(self) -> Parameter:
        """The table that scores them."""
        return next((part for part in self.head if "vocab" in dict(part.axes) and part.is_matrix), self.words)


def num_parameters(
    model: ModelConfig, adapter: AdapterConfig | None = None, frozen: tuple[str, ...] = ()
) -> int:
    """All parameters of a model, the padding of the vocabulary left out; see `parameters`."""
    return sum(
        part.copies * math.prod(model.vocab_size if name == "vocab" else size for name, size in part.axes)
        for part in parameters(model, adapter, frozen)
    )


@cache
def parameters(
    model: ModelConfig, adapter: AdapterConfig | None = None, frozen: tuple[str, ...] = ()
) -> Parameters:
    """All parameters of a model, as its class declares them; nothing is allocated.

    Args:
      model: the shapes.
      adapter: what is added to it, and trained in its place.
      frozen: patterns of names that are not trained (`optimizer.frozen`).

    Raises:
      ConfigError: the adapter does not fit the model.
    """
    parts = _parts(model.model_copy(update={"num_layers": _LAYERS, "max_length": _LENGTH}), adapter, frozen)

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
def _parts(model: ModelConfig, adapter: AdapterConfig | None, frozen: tuple[str, ...]) -> Parameters:
    """The parameters of an abstract model, 0.1 s of tracing."""
    variables = named_variables(abstract_model(model, adapter))
    fixed = names_of_frozen(variables, adapter, frozen)
    layers, embedding, head = [], [], []
    for name, variable in variables.items():
        axes = tuple(zip(variable.axes, variable.shape, strict=True))
        narrow = adapter is not None and adapter.base_dtype == "bfloat16" and name in fixed
        is_layer = axes[0][0] == "layers"
        part = Parameter(
            axes=axes[1:] if is_layer else axes,
            role=variable.role,
            copies=axes[0][1] if is_layer else 1,
            trained=name not in fixed,
            itemsize=2 if narrow and variable.role not in ELEMENTWISE else 4,
        )
        (layers if is_layer else head if name.partition(".")[0] in _HEAD else embedding).append(part)
    return Parameters(layers=tuple(layers), embedding=tuple(embedding), head=tuple(head))


def abstract_model(model: ModelConfig, adapter: AdapterConfig | None) -> Any:
    """A model with its adapters; nothing is allocated.

    Raises:
      ConfigError: they do not fit it.
    """

    def make() -> Any:
        made: Any = model_class(model)(model, rngs=nnx.Rngs(0))
        if adapter is not None:
            own = {name: sizes(linear) for name, linear in linears(made)}
            use_adapters(made, adapters.choose(adapter, own), seed=0)
        return made

    return nnx.eval_shape(make)


def named_variables(model: Any) -> dict[str, Any]:
    """The parameters of an abstract model, by their dotted names."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))}


def names_of_frozen(
    names: Collection[str], adapter: AdapterConfig | None, frozen: tuple[str, ...]
) -> set[str]:
    """Those of a model that are not trained; patterns for the head of a task, which it has not, are left out.

    Raises:
      ConfigError: a pattern that fits none.
    """

    def own(patterns: Iterable[str]) -> list[str]:
        return [one for one in patterns if not one.startswith("task")]

    fixed = {name for one in own(frozen) for name in groups.matching(one, names, field="optimizer.frozen")}
    if adapter is not None:
        fixed |= adapters.frozen(adapter.model_copy(update={"train": tuple(own(adapter.train))}), names)
    return fixed


@cache
def _ways(axes: Axes, role: Role, fsdp: int, data: int, stage: int, tensor: int) -> int:
    """Devices that a parameter is split over, by the rule of the trainer."""
    second = data > 1
    mesh = MeshConfig(
        data=data, fsdp=fsdp, stage=stage, tensor=tensor, zero=3 if second else 1, second_shard=second
    )
    layout = Layout.of(meshes.abstract(mesh, data * fsdp * stage * tensor), mesh)
    names, shape = zip(*axes, strict=True)
    spec = layout.parameter_spec(names, shape, role)
    return math.prod(layout.size(axis) for axis in _mesh_axes(spec))


def _mesh_axes(spec: jax.sharding.PartitionSpec) -> Iterator[str]:
    for entry in spec:
        if entry is not None:
            yield from entry if isinstance(entry, tuple) else (entry,)

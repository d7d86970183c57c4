"""The parameters of a model, by shape, and what each device holds of them."""

import dataclasses
import math
from collections.abc import Iterator
from functools import cache

from stack.config.model import ModelConfig
from stack.parallel.rules import TABLE

Axes = tuple[tuple[str, int], ...]
"""Logical axes and their sizes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter, or the same one of every layer."""

    axes: Axes
    matrix: bool
    """Used in a matrix product or a look-up; all others are never split over `fsdp`."""
    copies: int = 1
    """Layers that have one."""

    @property
    def size(self) -> int:
        """Elements, of all copies."""
        return self.copies * math.prod(size for _, size in self.axes)

    def shard(self, *, fsdp: int = 1, tensor: int = 1) -> float:
        """Elements on each device, of all copies, split as `Layout.parameter_spec` splits them."""
        split = ["tensor" in TABLE[name] for name, _ in self.axes]
        whole = (size for (_, size), n in zip(self.axes, split, strict=True) if not n)
        ways = fsdp if self.matrix and any(size % fsdp == 0 for size in whole) else 1
        return self.size / ways / (tensor if any(split) else 1)


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


def num_parameters(model: ModelConfig) -> int:
    """All parameters of a model, the padding of the vocabulary left out."""
    tables = 1 if model.tied_embeddings else 2
    padding = tables * (model.padded_vocab_size - model.vocab_size) * model.embed_dim
    return sum(part.size for part in parameters(model)) - padding


@cache
def parameters(model: ModelConfig) -> Parameters:
    """All parameters of a model."""
    embed, rows = ("embed", model.embed_dim), ("vocab", model.padded_vocab_size)
    table = Parameter(axes=(rows, embed), matrix=True)
    positions = Parameter(axes=(("length", model.max_length), embed), matrix=True)
    return Parameters(
        layers=_layers(model),
        embedding=(table, positions) if model.position == "learned" else (table,),
        head=_norm(embed, model.norm) + (() if model.tied_embeddings else (table,)),
    )


def _layers(model: ModelConfig) -> tuple[Parameter, ...]:
    embed, mlp, width = ("embed", model.embed_dim), ("mlp", model.mlp_width), ("head_dim", model.head_width)
    heads, kv_heads = (("heads", model.num_heads), width), (("kv_heads", model.kv_heads), width)
    one = [
        *(2 * _norm(embed, model.norm)),
        *_linear((embed,), heads, model.qkv_bias),
        *(2 * _linear((embed,), kv_heads, model.qkv_bias)),
        *((2 * _norm(width, "rmsnorm")) if model.qk_norm else ()),
        *_linear(heads, (embed,), model.out_bias),
        *((2 if model.gated else 1) * _linear((embed,), (mlp,), model.mlp_bias)),
        *_linear((mlp,), (embed,), model.mlp_bias),
    ]
    return tuple(dataclasses.replace(part, copies=model.num_layers) for part in one)


def _linear(inputs: Axes, outputs: Axes, bias: bool) -> tuple[Parameter, ...]:
    kernel = Parameter(axes=inputs + outputs, matrix=True)
    return (kernel, Parameter(axes=outputs, matrix=False)) if bias else (kernel,)


def _norm(axis: tuple[str, int], kind: str) -> tuple[Parameter, ...]:
    return (Parameter(axes=(axis,), matrix=False),) * (2 if kind == "layernorm" else 1)

"""Parameters of Stack and the tensors of transformers that hold their numbers."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from stack.config import LanguageConfig
from stack.config.errors import StackError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One leaf of Stack's tree and the tensors of transformers that hold its numbers."""

    path: str
    name: str
    """Of the tensor; {} stands for the layer."""
    slice_shape: tuple[int, ...]
    """What one tensor fills: one layer, or the rows of the real vocabulary."""
    matrix: tuple[int, ...]
    """The slice with heads folded into one axis: `[inputs, outputs]`, `[rows, embed]` or `[size]`."""
    transposed: bool = False
    """torch.nn.Linear keeps `[outputs, inputs]`; GPT-2's Conv1D does not."""
    part: int = 0
    parts: int = 1
    """GPT-2 keeps queries, keys and values side by side on the last axis of one tensor."""
    of_words: bool = False
    """Whether its rows are words: the leaf is padded as the vocabulary is."""

    def names(self, config: LanguageConfig) -> list[str]:
        """The tensors, layer by layer."""
        return [self.name.format(layer) for layer in range(self.depth(config) or 1)]

    def shape(self, config: LanguageConfig) -> tuple[int, ...]:
        """Of the whole leaf: layers stacked, vocabulary padded."""
        if self.stacked:
            return (self.depth(config), *self.slice_shape)
        return (config.padded_vocab_size, *self.slice_shape[1:]) if self.of_words else self.slice_shape

    @property
    def stacked(self) -> bool:
        """Whether layers are the leading axis."""
        return "layers" in self.path.split("/")

    def depth(self, config: LanguageConfig) -> int:
        """How many layers; 0 if it is of none."""
        if not self.stacked:
            return 0
        return config.decoder_layers if self.path.startswith("decoder/") else config.num_layers

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of each tensor, as transformers keeps it."""
        shape = (*self.matrix[:-1], self.matrix[-1] * self.parts)
        return shape[::-1] if self.transposed else shape

    def part_of(self, tensor: np.ndarray) -> np.ndarray:
        """The view of a tensor that holds this leaf, in the shape of `matrix`."""
        tensor = tensor.T if self.transposed else tensor
        width = self.matrix[-1]
        return tensor[..., self.part * width : (self.part + 1) * width]

    def slice_of(self, tensor: np.ndarray, name: str) -> np.ndarray:
        """One slice of the leaf: a view of the tensor."""
        check_shape(name, shape=tensor.shape, expected=self.tensor_shape)
        return self.part_of(tensor).reshape(self.slice_shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Naming:
    """How the checkpoints of a family name their tensors."""

    embedding: str
    """The table of words."""
    heads: tuple[str, ...]
    """Beginnings of names beside the model's own; a checkpoint without heads leaves out the model's."""
    repeats: Mapping[str, str]
    """Name -> the name of the same tensor, for those that may be there twice, or under either."""
    remedies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Of those, what to do where the two differ and neither is just wrong."""
    constants: re.Pattern[str]
    """What lies beside the weights, and is made anew."""
    unread: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Beginning of a name -> what it is that Stack's models do not have."""
    old: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """End of a name in old checkpoints -> how it ends now."""

    @property
    def prefix(self) -> str:
        """Before all names of the model but those of its heads."""
        return self.embedding.split(".")[0] + "."

    def full(self, name: str) -> str:
        """A name as transformers writes it now."""
        for end, now in self.old.items():
            name = name.removesuffix(end) + now if name.endswith(end) else name
        return name if name.startswith((self.prefix, *self.heads)) else self.prefix + name

    def reason(self, name: str) -> str | None:
        """What a tensor is that is not read; None: it is."""
        return next((what for start, what in self.unread.items() if name.startswith(start)), None)


def table(path: str, name: str, rows: int, config: LanguageConfig, *, of_words: bool = False) -> Leaf:
    """`[rows, embed]`."""
    shape = (rows, config.embed_dim)
    return Leaf(path=f"{path}/table", name=name, slice_shape=shape, matrix=shape, of_words=of_words)


def vector(path: str, name: str, shape: tuple[int, ...], **layout: Any) -> Leaf:
    """`shape`, which transformers keeps flat."""
    return Leaf(path=path, name=name, slice_shape=shape, matrix=(math.prod(shape),), **layout)


def linear(
    path: str,
    name: str,
    inputs: tuple[int, ...],
    outputs: tuple[int, ...],
    *,
    bias: bool,
    transposed: bool = False,
    **layout: Any,
) -> list[Leaf]:
    """A kernel `[*inputs, *outputs]`, and a bias `outputs` if there is one."""
    kernel = Leaf(
        path=f"{path}/kernel",
        name=f"{name}.weight",
        slice_shape=(*inputs, *outputs),
        matrix=(math.prod(inputs), math.prod(outputs)),
        transposed=transposed,
        **layout,
    )
    return [kernel, vector(f"{path}/bias", f"{name}.bias", outputs, **layout)] if bias else [kernel]


def layernorm(path: str, name: str, width: int) -> list[Leaf]:
    """A scale and a bias `[width]`."""
    names = (("scale", "weight"), ("bias", "bias"))
    return [vector(f"{path}/{ours}", f"{name}.{theirs}", (width,)) for ours, theirs in names]


def check_shape(name: str, *, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Compares what a tensor has with what the config asks for.

    Raises:
        StackError: they differ.
    """
    if shape != expected:
        raise StackError(
            f"{name} has shape {list(shape)}, the config asks for {list(expected)}; it is not of the model "
            "the config describes"
        )

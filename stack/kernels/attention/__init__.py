"""Attention within documents."""

from stack.kernels.attention import reference
from stack.kernels.attention.api import attend
from stack.kernels.attention.choice import KERNELS, Choice, Kernel, choose, fitting
from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.mask import Kind, Mask, row_mask
from stack.kernels.attention.request import Problem, Request
from stack.kernels.attention.tiling import Tiled, Tiles, Tiling

__all__ = [
    "KERNELS",
    "Choice",
    "Dropout",
    "Kernel",
    "Kind",
    "Mask",
    "Problem",
    "Request",
    "Tiled",
    "Tiles",
    "Tiling",
    "attend",
    "choose",
    "fitting",
    "reference",
    "row_mask",
]

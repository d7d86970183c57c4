"""Products of tokens with the weights of the groups they belong to: the experts of a mixture."""

from stack.kernels.grouped_matmul import reference
from stack.kernels.grouped_matmul.api import grouped_matmul
from stack.kernels.grouped_matmul.choice import KERNELS, Choice, Kernel, choose, fitting
from stack.kernels.grouped_matmul.request import Request

__all__ = [
    "KERNELS",
    "Choice",
    "Kernel",
    "Request",
    "choose",
    "fitting",
    "grouped_matmul",
    "reference",
]

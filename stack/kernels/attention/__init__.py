"""Attention within documents."""

from stack.kernels.attention.api import attend
from stack.kernels.attention.choice import Choice, choose
from stack.kernels.attention.mask import Mask

__all__ = ["Choice", "Mask", "attend", "choose"]

"""Products of activations with weights."""

from stack.kernels.matmul.choice import Choice, choose, obstacles
from stack.kernels.matmul.fp8 import Fp8

__all__ = ["Choice", "Fp8", "choose", "obstacles"]

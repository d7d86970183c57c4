"""Products of activations with weights."""

from stack.kernels.matmul.choice import Choice, choose, obstacles
from stack.kernels.matmul.operands import Blocks, Fp8

__all__ = ["Blocks", "Choice", "Fp8", "choose", "obstacles"]

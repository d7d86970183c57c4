"""Products of activations with weights."""

from stack.kernels.matmul.choice import Choice, choose, obstacles
from stack.kernels.matmul.fp8 import PRODUCT
from stack.kernels.matmul.operands import Blocks, Fp8

__all__ = ["PRODUCT", "Blocks", "Choice", "Fp8", "choose", "obstacles"]

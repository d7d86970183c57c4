"""Flash attention for NVIDIA's Hopper GPUs, in Pallas: every mask, soft cap and dropout of Stack's models."""

from stack.kernels.attention.mosaic_gpu.attend import attend, obstacles
from stack.kernels.attention.mosaic_gpu.tiles import interpreted

__all__ = ["attend", "interpreted", "obstacles"]

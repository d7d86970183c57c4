"""Flash attention for NVIDIA's Hopper GPUs, in Pallas: every mask, soft cap and dropout of Stack's models."""

from stack.kernels.attention.mosaic_gpu.attend import attend, device_obstacles, obstacles

__all__ = ["attend", "device_obstacles", "obstacles"]

"""Products on NVIDIA's Hopper GPUs, in Pallas."""

from stack.kernels.grouped_matmul.mosaic_gpu.products import multiply, obstacles, weight_gradient

__all__ = ["multiply", "obstacles", "weight_gradient"]

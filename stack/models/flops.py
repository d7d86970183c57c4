"""Model FLOPs: what the mathematics of a step needs, whatever the hardware spends on it.

A multiplication and an addition are two. Only matrix products count; a backward pass costs twice its
forward. Parameters of matrix products cost 6 FLOPs per token in training (arXiv 2001.08361, section
2.1); attention scores and their product with the values cost 12 x layers x attention width x keys
(arXiv 2104.04473, appendix; arXiv 2204.02311, appendix B). Embedding look-ups, norms, biases and
activations are left out.

Two conventions for the keys of a token are in use, and move MFU by several percent: `full` counts the
whole row, `causal` the half of it that a causal mask leaves. Compare projects in one convention only.
"""

from typing import Literal

from stack.config.model import ModelConfig
from stack.hardware.mfu import Mfu, utilisation
from stack.models import model_cost
from stack.models.cost import Attention, Layers

Convention = Literal["full", "causal"]


def keys_per_token(attention: Attention, length: int, convention: Convention) -> float:
    """Mean number of keys a token of a row is counted to attend to.

    Without a window, `full` is the length and `causal` half of it, as published. A window of w tokens
    makes it w and w - w^2 / 2 length, which meet the former at w = length. Documents packed into a
    row attend to less; that is not counted off. Attention that is not causal sees the whole row in
    both conventions.

    Args:
        attention: gives the window, and whether it is causal.
        length: tokens per row.
        convention: `full` or `causal`.
    """
    window = min(attention.window or length, length)
    if convention == "full" or attention.kind != "causal":
        return window
    return window - window**2 / (2 * length)


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that multiply every token: the layers' kernels and the output projection."""
    parts = model_cost(model)
    layers = sum(stack.number * product.size for stack in parts.stacks for product in stack.products)
    return layers + sum(product.size for product in parts.head)


def forward_flops_per_token(model: ModelConfig, length: int, convention: Convention = "causal") -> float:
    """FLOPs of a forward pass per token, in rows of `length` tokens."""
    head = 2 * sum(product.size for product in model_cost(model).head)
    return recomputed_flops_per_token(model, length, convention) + head


def train_flops_per_token(model: ModelConfig, length: int, convention: Convention = "causal") -> float:
    """FLOPs of a training step per token: a forward and a backward pass. MFU is of these."""
    return 3 * forward_flops_per_token(model, length, convention)


def recomputed_flops_per_token(model: ModelConfig, length: int, convention: Convention = "causal") -> float:
    """FLOPs per token that `remat=full` adds to a training step: each layer's forward pass once more.

    They are spent, but not model FLOPs; some published utilisations count them (arXiv 2104.04473).
    """
    return sum(_forward(stack, length, convention) for stack in model_cost(model).stacks)


def mfu(model: ModelConfig, *, length: int, tokens_per_second_per_device: float, device_kind: str) -> Mfu:
    """Utilisation of a training run.

    Args:
        model: its dtype chooses the peak.
        length: tokens per row.
        tokens_per_second_per_device: tokens trained on, padding included, over seconds and devices.
        device_kind: `jax.Device.device_kind`.
    """
    return utilisation(
        full_flops_per_second=tokens_per_second_per_device * train_flops_per_token(model, length, "full"),
        causal_flops_per_second=tokens_per_second_per_device * train_flops_per_token(model, length, "causal"),
        dtype=model.dtype,
        device_kind=device_kind,
    )


def _forward(stack: Layers, length: int, convention: Convention) -> float:
    """FLOPs per token of a stack of layers."""
    # Scores and their product with the values: 2 FLOPs each per key and channel.
    width = stack.attention.heads * stack.attention.head_dim
    attention = 4 * width * keys_per_token(stack.attention, length, convention)
    return stack.number * (2 * sum(product.size for product in stack.products) + attention)

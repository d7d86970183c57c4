"""Model FLOPs: what the mathematics of a step needs, whatever the hardware spends on it.

A multiplication and an addition are two. Only matrix products count; a backward pass costs twice its
forward. Parameters of matrix products cost 6 FLOPs per token in training (arXiv 2001.08361, section
2.1); attention scores and their product with the values cost 12 x layers x attention width x keys
(arXiv 2104.04473, appendix; arXiv 2204.02311, appendix B). Embedding look-ups, norms, biases and
activations are left out.

A model may run over rows of several lengths: what is read and what is written, or all of a row and the few
places of it whose words are scored. FLOPs are per token of `length`, what is read, and those of the other
rows are shared out over it; a plain number is the length of rows of which all tokens are scored.

Two conventions for the keys of a token are in use, and move MFU by several percent: `full` counts the
whole row, `causal` the half of it that a causal mask leaves. Compare projects in one convention only.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from stack.config.model import ModelConfig
from stack.hardware.mfu import Mfu, utilisation
from stack.models import model_cost
from stack.models.cost import Attention, Layers, Product, Sizes

Convention = Literal["full", "causal"]


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """Parameters of matrix products that are not trained, and those of adapters (arXiv 2106.09685)."""

    layers: int = 0
    head: int = 0
    added: int = 0
    """Of adapters."""
    reaches_layers: bool = True
    """Whether gradients go back through the layers."""


def keys_per_token(attention: Attention, length: int, convention: Convention) -> float:
    """Mean number of keys a token of a row is counted to attend to.

    Without a window, `full` is the length and `causal` half of it, as published. A window of w tokens
    makes it w and w - w^2 / 2 length, which meet the former at w = length. Documents packed into a
    row attend to less; that is not counted off. Attention that is not causal sees the whole row in
    both conventions.

    Args:
        attention: gives the window, and whether it is causal.
        length: tokens per row of keys.
        convention: `full` or `causal`.
    """
    window = min(attention.window or length, length)
    if not length:
        return 0.0
    if convention == "full" or attention.kind != "causal":
        return window
    return window - window**2 / (2 * length)


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that multiply every token: the layers' kernels and the output projection."""
    parts = model_cost(model)
    layers = sum(stack.number * product.size for stack in parts.stacks for product in stack.products)
    return layers + sum(product.size for product in parts.head)


def forward_flops_per_token(
    model: ModelConfig, length: int | Sizes, convention: Convention = "causal"
) -> float:
    """FLOPs of a forward pass per token of rows of a length, or of an objective's `sizes`.

    Raises:
        KeyError: the sizes lack a row that the model runs over.
    """
    head = _products(model_cost(model).head, _sizes(length))
    return recomputed_flops_per_token(model, length, convention) + head


def train_flops_per_token(
    model: ModelConfig,
    length: int | Sizes,
    convention: Convention = "causal",
    untrained: Untrained | None = None,
) -> float:
    """FLOPs of a training step per token: a forward and a backward pass. MFU is of these.

    Of what is not trained there is no gradient of weights, a third of its products; and none of activations
    either in layers that no gradient reaches.
    """
    forward = forward_flops_per_token(model, length, convention)
    if untrained is None:
        return 3 * forward
    sizes = _sizes(length)
    scored = sizes["masked"] / sizes["length"]
    if untrained.reaches_layers:
        return 3 * (forward + 2 * untrained.added) - 2 * (untrained.layers + untrained.head * scored)
    head = _products(model_cost(model).head, sizes)
    return forward + max(0.0, head - 2 * untrained.head * scored)


def recomputed_flops_per_token(
    model: ModelConfig, length: int | Sizes, convention: Convention = "causal"
) -> float:
    """FLOPs per token that `remat=full` adds to a training step: each layer's forward pass once more.

    They are spent, but not model FLOPs; some published utilisations count them (arXiv 2104.04473).
    """
    sizes = _sizes(length)
    return sum(_forward(stack, sizes, convention) for stack in model_cost(model).stacks)


def mfu(
    model: ModelConfig,
    *,
    length: int | Sizes,
    tokens_per_second_per_device: float,
    device_kind: str,
    untrained: Untrained | None = None,
) -> Mfu:
    """Utilisation of a training run.

    Args:
        model: its dtype chooses the peak.
        length: tokens per row, or an objective's `sizes`.
        tokens_per_second_per_device: tokens read, padding included, over seconds and devices.
        device_kind: `jax.Device.device_kind`.
        untrained: what is not trained; None: all is.
    """
    full, causal = (train_flops_per_token(model, length, how, untrained) for how in ("full", "causal"))
    return utilisation(
        full_flops_per_second=tokens_per_second_per_device * full,
        causal_flops_per_second=tokens_per_second_per_device * causal,
        dtype=model.dtype,
        device_kind=device_kind,
    )


def _sizes(length: int | Sizes) -> Sizes:
    """Where an objective scores not only some places of a row, it scores all."""
    sizes = {"length": length} if isinstance(length, int) else length
    return {"masked": sizes["length"], **sizes}


def _forward(stack: Layers, sizes: Sizes, convention: Convention) -> float:
    """FLOPs of a stack of layers, per token of `length`."""
    attention = 0.0
    for part in stack.attentions:
        # Scores and their product with the values: 2 FLOPs each per key and channel.
        keys = keys_per_token(part, sizes[part.keys], convention)
        attention += 4 * part.heads * part.head_dim * keys * sizes[part.queries] / sizes["length"]
    return stack.number * (_products(stack.products, sizes) + attention)


def _products(products: Iterable[Product], sizes: Sizes) -> float:
    return sum(2 * product.size * sizes[product.tokens] / sizes["length"] for product in products)

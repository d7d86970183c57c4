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

Convention = Literal["full", "causal"]


def matmul_parameters(model: ModelConfig) -> int:
    """Parameters that multiply every token: the layers' kernels and the output projection.

    The output projection counts with its padded rows, and counts when it is the embedding table.
    """
    return model.num_layers * _layer_parameters(model) + model.padded_vocab_size * model.embed_dim


def keys_per_token(model: ModelConfig, length: int, convention: Convention) -> float:
    """Mean number of keys a token of a row is counted to attend to.

    Without a window, `full` is the length and `causal` half of it, as published. A window of w tokens
    makes it w and w - w^2 / 2 length, which meet the former at w = length. Documents packed into a
    row attend to less; that is not counted off.

    Args:
        model: gives the window.
        length: tokens per row.
        convention: `full` or `causal`.
    """
    window = min(model.sliding_window or length, length)
    return window if convention == "full" else window - window**2 / (2 * length)


def forward_flops_per_token(model: ModelConfig, length: int, convention: Convention = "causal") -> float:
    """FLOPs of a forward pass per token, in rows of `length` tokens."""
    head = 2 * model.padded_vocab_size * model.embed_dim
    return _layers_forward(model, length, convention) + head


def train_flops_per_token(model: ModelConfig, length: int, convention: Convention = "causal") -> float:
    """FLOPs of a training step per token: a forward and a backward pass. MFU is of these."""
    return 3 * forward_flops_per_token(model, length, convention)


def recomputed_flops_per_token(model: ModelConfig, length: int, convention: Convention = "causal") -> float:
    """FLOPs per token that `remat=full` adds to a training step: each layer's forward pass once more.

    They are spent, but not model FLOPs; some published utilisations count them (arXiv 2104.04473).
    """
    return _layers_forward(model, length, convention)


def _layer_parameters(model: ModelConfig) -> int:
    query_and_out = 2 * model.embed_dim * model.num_heads * model.head_width
    key_and_value = 2 * model.embed_dim * model.kv_heads * model.head_width
    mlp = (3 if model.gated else 2) * model.embed_dim * model.mlp_width
    return query_and_out + key_and_value + mlp


def _layers_forward(model: ModelConfig, length: int, convention: Convention) -> float:
    # Scores and their product with the values: 2 FLOPs each per key and channel.
    attention = 4 * model.num_heads * model.head_width * keys_per_token(model, length, convention)
    return model.num_layers * (2 * _layer_parameters(model) + attention)

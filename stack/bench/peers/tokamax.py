"""Tokamax's loss, where it is installed; its attention is one of Stack's own implementations."""

from importlib import import_module

import jax


def cross_entropy(hidden: jax.Array, table: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss of labels [tokens] by hidden states [tokens, embed] and a table [vocab, embed]."""
    loss = import_module("tokamax").linear_softmax_cross_entropy_loss
    return loss(hidden, labels, table.T, reduction="mean")


def ragged_dot(tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """Tokens [tokens, inputs] by the weights [groups, inputs, outputs] of their groups; its own choice."""
    return import_module("tokamax").ragged_dot(tokens, weights, sizes)

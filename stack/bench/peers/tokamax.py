"""Tokamax's kernels, where it is installed."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import jax

from stack.bench.serve import UnableError

_ATTENTION = {"gpu": ("mosaic", "triton"), "cpu": ("xla_chunked",)}
"""Implementations of `dot_product_attention` by platform: those that do not store all scores."""


def attention(spec: dict[str, Any]) -> dict[str, Callable[..., jax.Array]]:
    """By name, (query, key, value, segments=, positions=) -> result, causal within documents."""
    names = _ATTENTION.get(spec["platform"], ("mosaic",))
    return {f"tokamax {name}": partial(_attend, name, spec["packed"]) for name in names}


def _attend(
    name: str,
    packed: bool,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Documents of a row are told apart by a mask: the call takes no segments."""
    del positions
    mask = (segments[:, None, :, None] == segments[:, None, None, :]) if packed else None
    call = import_module("tokamax").dot_product_attention
    try:
        return call(query, key, value, mask=mask, is_causal=True, implementation=name)
    except (NotImplementedError, ValueError) as error:
        raise UnableError(str(error)) from error


def cross_entropy(hidden: jax.Array, table: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean loss of labels [tokens] by hidden states [tokens, embed] and a table [vocab, embed]."""
    loss = import_module("tokamax").linear_softmax_cross_entropy_loss
    return loss(hidden, labels, table.T, reduction="mean")


def ragged_dot(tokens: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
    """Tokens [tokens, inputs] by the weights [groups, inputs, outputs] of their groups; its own choice."""
    return import_module("tokamax").ragged_dot(tokens, weights, sizes)

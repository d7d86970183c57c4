"""Attention of each device's own rows and heads."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec as P

from stack.kernels.attention.dropout import Dropout
from stack.kernels.attention.mask import Mask
from stack.parallel.rules import Layout

Local = Callable[[jax.Array, jax.Array, jax.Array, Mask, jax.Array | None, Dropout | None], jax.Array]
"""Query, key, value, mask, bias and dropout of one device -> what is attended."""


def on_each_device(
    local: Local,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: Mask,
    layout: Layout,
    *,
    bias: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Runs `local` inside `shard_map`, with the batch and the heads where they lie; nothing is moved.

    Outside, the output and the gradients of a custom call are typed replicated, and the compiled step
    gathers the global batch without a word.
    """
    arrays = (query, key, value, mask, bias, dropout)
    if layout.trivial:
        return local(*arrays)
    rows, heads = layout.spec("batch") or P(), layout.spec("batch", None, "heads") or P()
    kv_heads = layout.spec("batch", None, "kv_heads") or P()
    specs = (
        *(heads, kv_heads, kv_heads),
        jax.tree.map(lambda array: rows if array.ndim else P(), mask),
        None if bias is None else _bias_spec(bias, query.shape[2], layout),
        jax.tree.map(lambda _: layout.spec("batch", "heads"), dropout),
    )
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)


def _bias_spec(bias: jax.Array, heads: int, layout: Layout) -> P:
    groups = "batch" if bias.shape[0] > 1 else None
    return layout.spec(groups, "heads" if bias.shape[1] == heads else None) or P()

"""cuDNN's fused attention, on NVIDIA GPUs from compute capability 8.0."""

from functools import partial

import jax
from jax.sharding import PartitionSpec as P

from stack.kernels.attention.mask import Mask
from stack.parallel.rules import Layout


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, layout: Layout, *, window: int | None
) -> jax.Array:
    """See `stack.kernels.attention.attend`; whole rows only, as many queries as keys.

    Always inside `shard_map`: outside, the call's output and gradients are typed replicated, and the
    compiled step gathers the global batch without a word. One document per row needs no mask and runs
    at full speed; packed rows pass one, [batch, 1, queries, keys], which cuDNN reads from memory.
    """
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"cudnn attends whole rows, not {query.shape[1]} queries to {key.shape[1]} keys; use xla"
        )
    heads = layout.spec("batch", None, "heads") or P()
    kv_heads = layout.spec("batch", None, "kv_heads") or P()
    rows = layout.spec("batch") or P()
    call = partial(_attend_local, window=window)
    if layout.trivial:
        return call(query, key, value, mask)
    specs = (heads, kv_heads, kv_heads, jax.tree.map(lambda _: rows, mask))
    return jax.shard_map(call, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, mask)


def _attend_local(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, *, window: int | None
) -> jax.Array:
    packed = mask.query_segments is not None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask.allowed(window)[:, None] if packed else None,
        # The mask says so too, but told of it cuDNN leaves out the half that is masked.
        is_causal=True,
        local_window_size=None if packed or window is None else (window - 1, 0),
        implementation="cudnn",
    )

"""The key-value cache of a batch of prompts that end at the same slot.

Prompts of different lengths are padded on the left, so that every row writes its next token to the
same slot: one `dynamic_update_slice` for the whole batch.
"""

import jax
import jax.numpy as jnp

from stack.config import LanguageConfig
from stack.kernels.attention import Mask
from stack.layers.attention import Cache
from stack.parallel.rules import Layout


def empty(config: LanguageConfig, layout: Layout, *, batch: int, slots: int) -> Cache:
    """Zeros in the compute dtype, [layers, batch, slots, kv_heads, head_dim] each."""
    shape = (config.decoder_layers, batch, slots, config.kv_heads, config.head_width)
    spec = layout.spec("layers", "batch", None, "kv_heads", "head_dim")
    key, value = (jnp.zeros(shape, config.dtype, out_sharding=spec) for _ in Cache._fields)
    return Cache(key, value)


def mask(
    padding: jax.Array,
    *,
    first: jax.Array | int,
    queries: int,
    slots: int,
    window: int | None = None,
    prefix: int = 0,
) -> Mask:
    """Who sees whom when the tokens of slots `first` to `first + queries - 1` are computed.

    Padding is a segment of its own. Slots not written yet stand at later positions than any query, so
    causality hides them.

    Args:
      padding: [batch] int32, empty slots before each prompt.
      first: slot of the first query.
      queries: number of queries.
      slots: number of slots of the cache.
      window: tokens that each sees, itself included; None: all before it.
      prefix: slots whose tokens are seen by all of their text.
    """
    query, query_segments = place(first + jnp.arange(queries, dtype=jnp.int32), padding)
    key, key_segments = place(jnp.arange(slots, dtype=jnp.int32), padding)
    in_prefix = jnp.broadcast_to(jnp.arange(slots) < prefix, key.shape) if prefix else None
    return Mask(
        kind="prefix" if prefix else "causal",
        prefix=in_prefix,
        window=window,
        query_positions=query,
        key_positions=key,
        query_segments=query_segments,
        key_segments=key_segments,
    )


def place(slot: jax.Array, padding: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Position and segment of slots, [batch, slots] int32 each; both 0 for padding."""
    position = slot - padding[:, None]
    return jnp.maximum(position, 0), (position >= 0).astype(jnp.int32)

"""From hidden states to scores of words."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from stack.parallel.rules import ONE_DEVICE, Layout


def logits(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    *,
    vocab_size: int,
    bias: Float32[Array, " vocab"] | None = None,
    softcap: float | None = None,
    layout: Layout = ONE_DEVICE,
) -> Float32[Array, "batch length vocab"]:
    """Scores of every word, [batch, length, vocab] float32, the least float for padded rows.

    Args:
      hidden: [batch, length, embed], any float dtype.
      table: [vocab, embed] in the same dtype; rows from `vocab_size` on are padding.
      vocab_size: words of the tokenizer.
      bias: [vocab] float32, added to the scores; None: nothing is.
      softcap: c of c x tanh(logit / c); None: as they are.
      layout: how things lie on the mesh.
    """
    scores = jnp.einsum(
        "ble,ve->blv",
        hidden,
        table,
        preferred_element_type=jnp.float32,
        out_sharding=layout.spec("batch", "length", "vocab"),
    )
    if bias is not None:
        scores = scores + bias
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(word_numbers(table.shape[0], layout) < vocab_size, scores, jnp.finfo(jnp.float32).min)


def word_numbers(rows: int, layout: Layout) -> Int32[Array, " rows"]:
    """0 .. rows - 1, [rows] int32, split as the vocabulary is."""
    return layout.shard(jnp.arange(rows, dtype=jnp.int32), "vocab")

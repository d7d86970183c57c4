"""Next-token cross-entropy whose logits are never whole.

The vocabulary times the batch is the largest array of a language model, so the loss walks over chunks
of tokens and, in training, makes the gradients of each chunk while its logits exist: three matmuls a
chunk, none repeated in the backward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stack.layers.head import logits, word_numbers
from stack.parallel.rules import ONE_DEVICE, Layout


class Sums(NamedTuple):
    """Sums over the labels that count, float32 scalars."""

    loss: jax.Array
    """Nats, z-loss included."""
    nll: jax.Array
    """Negative log-likelihood, nats."""
    correct: jax.Array
    """Labels with the highest score."""


class Head(NamedTuple):
    """What the loss must know besides arrays."""

    vocab_size: int
    softcap: float | None = None
    z_loss: float = 0.0
    chunk: int = 1024
    layout: Layout = ONE_DEVICE


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(hidden: jax.Array, table: jax.Array, labels: jax.Array, head: Head) -> Sums:
    """Sums of the loss over labels >= 0; differentiable in `hidden` and `table` through `loss` alone.

    Args:
      hidden: [batch, length, embed].
      table: [vocab, embed], same dtype.
      labels: [batch, length] int32; below 0: does not count.
      head: the options.
    """

    def body(sums: Sums, chunk: tuple) -> tuple[Sums, None]:
        return _add(sums, _chunk_sums(*chunk, table=table, head=head)[0]), None

    return jax.lax.scan(body, _zero_sums(), _chunks(hidden, labels, head))[0]


def _forward(hidden: jax.Array, table: jax.Array, labels: jax.Array, head: Head) -> tuple[Sums, tuple]:
    layout = head.layout

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        sums, table_gradient = carry
        more, d_logits = _chunk_sums(*chunk, table=table, head=head)
        hidden_gradient = jnp.einsum(
            "blv,ve->ble", d_logits, table, out_sharding=layout.spec("batch", "length", "embed")
        )
        table_gradient += jnp.einsum(
            "blv,ble->ve",
            d_logits,
            chunk[0],
            preferred_element_type=jnp.float32,
            out_sharding=_cotangent_spec(table, layout),
        )
        return (_add(sums, more), table_gradient), hidden_gradient

    zeros = jnp.zeros(table.shape, jnp.float32, out_sharding=_cotangent_spec(table, layout))
    (sums, table_gradient), hidden_gradient = jax.lax.scan(
        body, (_zero_sums(), zeros), _chunks(hidden, labels, head)
    )
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(hidden.shape)
    return sums, (hidden_gradient, table_gradient.astype(table.dtype))


def _backward(_: Head, gradients: tuple, cotangent: Sums) -> tuple:
    return *(_scale(gradient, cotangent.loss) for gradient in gradients), None


def _scale(gradient: jax.Array, scale: jax.Array) -> jax.Array:
    """Gradient x scale; a partial sum may only be multiplied by what is `reduced` over the same axes."""
    unreduced = jax.typeof(gradient).sharding.spec.unreduced
    if unreduced:
        scale = jax.reshard(scale, P(reduced=unreduced))
    return gradient * scale.astype(gradient.dtype)


cross_entropy.defvjp(_forward, _backward)


def _chunk_sums(
    hidden: jax.Array, labels: jax.Array, *, table: jax.Array, head: Head
) -> tuple[Sums, jax.Array]:
    """The sums of one chunk, and the gradient of its loss with respect to its raw logits."""
    layout = head.layout
    scores = logits(hidden, table, vocab_size=head.vocab_size, softcap=head.softcap, layout=layout)
    counts = labels >= 0
    highest = scores.max(-1)
    exponentials = jnp.exp(scores - highest[..., None])
    total = exponentials.sum(-1)
    normaliser = highest + jnp.log(total)
    words = word_numbers(table.shape[0], layout)
    is_label = words == labels[..., None]
    label_score = jnp.where(is_label, scores, 0.0).sum(-1)
    nll = jnp.where(counts, normaliser - label_score, 0.0)
    penalty = jnp.where(counts, head.z_loss * jnp.square(normaliser), 0.0)
    sums = Sums(
        loss=(nll + penalty).sum(),
        nll=nll.sum(),
        correct=(counts & (label_score >= highest)).sum(dtype=jnp.float32),
    )
    # d loss / d score = softmax x (1 + 2 z log Z) - [is label], then through the soft cap.
    pull = jnp.where(counts, (1.0 + 2.0 * head.z_loss * normaliser) / total, 0.0)
    d_scores = exponentials * pull[..., None] - jnp.where(is_label & counts[..., None], 1.0, 0.0)
    if head.softcap is not None:
        # The scores of padded words are the least float, whose square is infinite.
        slope = 1.0 - jnp.square(scores / head.softcap)
        d_scores = d_scores * jnp.where(words < head.vocab_size, slope, 0.0)
    return sums, d_scores.astype(hidden.dtype)


def _chunks(hidden: jax.Array, labels: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    """Hidden states and labels with the chunks in front, [chunks, batch, chunk, ...]."""
    batch, length = labels.shape
    layout = head.layout
    rows = batch
    for axis in layout.mesh_axes("batch"):
        rows //= layout.size(axis)
    longest = max(1, head.chunk // rows)
    size = max(d for d in range(1, min(longest, length) + 1) if length % d == 0)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0)

    return split(hidden), split(labels)


def _zero_sums() -> Sums:
    return Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))


def _add(left: Sums, right: Sums) -> Sums:
    return jax.tree.map(jnp.add, left, right)


def _cotangent_spec(table: jax.Array, layout: Layout) -> P | None:
    """The cotangent of a `reduced` array is `unreduced`: a partial sum, not communicated."""
    if layout.trivial:
        return None
    spec = jax.typeof(table).sharding.spec
    return P(*spec.partitions, unreduced=spec.reduced)

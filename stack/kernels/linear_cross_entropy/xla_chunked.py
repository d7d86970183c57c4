"""Cross-entropy over a vocabulary, whose logits are never whole.

The vocabulary times the batch is the largest array of a language model, so the loss walks over chunks
of tokens and, in training, makes the gradients of each chunk while its logits exist: three matmuls a
chunk, none repeated in the backward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from stack.kernels.linear_cross_entropy.head import Head, Sums
from stack.kernels.linear_cross_entropy.logits import logits, word_numbers
from stack.parallel.rules import Layout

LEAST_LOGITS_BYTES = 64 * 2**20
"""Of a chunk whose size is not given: below it, starting kernels costs more than memory does."""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def linear_cross_entropy(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    head: Head,
    bias: jax.Array | None = None,
) -> Sums:
    """See `stack.kernels.linear_cross_entropy.linear_cross_entropy`.

    The scale meets the gradients in float32, after the products: rounded to bfloat16, it or the slope at
    the labels, which is close to -1 for most of them, would be off by up to 0.4%, and all gradients with it.
    """

    def body(sums: Sums, chunk: tuple) -> tuple[Sums, None]:
        return _add(sums, _chunk_sums(*chunk, table=table, bias=bias, scale=scale, head=head)[0]), None

    return jax.lax.scan(body, _zero_sums(), _chunks(hidden, labels, head))[0]


def _forward(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    scale: jax.Array,
    head: Head,
    bias: jax.Array | None = None,
) -> tuple[Sums, tuple]:
    layout = head.layout
    bias_spec = _bias_spec(layout)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        sums, table_gradient, bias_gradient = carry
        more, d_logits = _chunk_sums(*chunk, table=table, bias=bias, scale=scale, head=head)
        if bias_gradient is not None:
            bias_gradient += jnp.einsum(
                "blv,bl->v",
                d_logits,
                jnp.ones_like(chunk[1], d_logits.dtype),
                preferred_element_type=jnp.float32,
                out_sharding=bias_spec,
            )
        hidden_gradient = jnp.einsum(
            "blv,ve->ble", d_logits, table, out_sharding=layout.spec("batch", "length", "embed")
        )
        hidden_gradient = _multiply(hidden_gradient, scale)
        table_gradient += jnp.einsum(
            "blv,ble->ve",
            d_logits,
            chunk[0],
            preferred_element_type=jnp.float32,
            out_sharding=_cotangent_spec(table, layout),
        )
        return (_add(sums, more), table_gradient, bias_gradient), hidden_gradient

    zeros = jnp.zeros(table.shape, jnp.float32, out_sharding=_cotangent_spec(table, layout))
    no_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32, out_sharding=bias_spec)
    (sums, table_gradient, bias_gradient), hidden_gradient = jax.lax.scan(
        body, (_zero_sums(), zeros, no_bias), _chunks(hidden, labels, head)
    )
    if bias_gradient is not None:
        bias_gradient = _multiply(layout.shard(bias_gradient, "vocab"), scale)
    batch, length, width = hidden.shape
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(batch, -1, width)[:, :length]
    table_gradient = _multiply(table_gradient, scale).astype(table.dtype)
    return sums, (hidden_gradient, table_gradient, bias_gradient)


def _backward(_: Head, gradients: tuple, cotangent: Sums) -> tuple:
    hidden, table, bias = jax.tree.map(lambda gradient: _multiply(gradient, cotangent.loss), gradients)
    return hidden, table, None, None, bias


def _multiply(gradient: jax.Array, scale: jax.Array) -> jax.Array:
    """Gradient x scale; a partial sum may only be multiplied by what is `reduced` over the same axes."""
    unreduced = jax.typeof(gradient).sharding.spec.unreduced
    if unreduced:
        scale = jax.reshard(scale, P(reduced=unreduced))
    return (gradient.astype(jnp.float32) * scale).astype(gradient.dtype)


linear_cross_entropy.defvjp(_forward, _backward)


def _chunk_sums(
    hidden: jax.Array,
    labels: jax.Array,
    *,
    table: jax.Array,
    bias: jax.Array | None,
    scale: jax.Array,
    head: Head,
) -> tuple[Sums, jax.Array]:
    """The sums of one chunk, and the gradient of its loss with respect to its raw logits."""
    counts, read = labels >= 0, _read(hidden, labels, table=table, bias=bias, head=head)
    penalty = jnp.where(counts, head.z_loss * jnp.square(read.normaliser), 0.0)
    is_word = word_numbers(table.shape[0], head.layout) < head.vocab_size
    if head.smoothing:  # (1 - e) nll + e x the mean of every word's: nll + e (its score - the mean score).
        mean = jnp.where(is_word, read.scores, 0.0).sum(-1) / head.vocab_size
        penalty += jnp.where(counts, head.smoothing * (read.label_score - mean), 0.0)
    sums = Sums(
        loss=scale * (read.nll + penalty).sum(),
        nll=read.nll.sum(),
        correct=read.correct.sum(dtype=jnp.float32),
    )
    # d loss / d score = softmax x (1 + 2 z log Z) - target, then through the soft cap.
    pull = jnp.where(counts, (1.0 + 2.0 * head.z_loss * read.normaliser) / read.total, 0.0)
    target = 1.0 - head.smoothing
    d_scores = read.exponentials * pull[..., None] - jnp.where(read.is_label & counts[..., None], target, 0.0)
    if head.smoothing:
        d_scores -= jnp.where(is_word & counts[..., None], head.smoothing / head.vocab_size, 0.0)
    if head.softcap is not None:
        # The scores of padded words are the least float, whose square is infinite.
        slope = 1.0 - jnp.square(read.scores / head.softcap)
        d_scores = d_scores * jnp.where(is_word, slope, 0.0)
    return sums, d_scores.astype(hidden.dtype)


class _Read(NamedTuple):
    """Of one chunk, [batch, columns] and, of every word, [batch, columns, vocab]."""

    scores: jax.Array
    exponentials: jax.Array
    """Of the scores less the highest."""
    total: jax.Array
    """Sum of these."""
    normaliser: jax.Array
    """Logarithm of the sum of the scores' exponentials."""
    is_label: jax.Array
    label_score: jax.Array
    nll: jax.Array
    """0 where a label does not count."""
    correct: jax.Array


def _read(
    hidden: jax.Array, labels: jax.Array, *, table: jax.Array, bias: jax.Array | None, head: Head
) -> _Read:
    layout = head.layout
    scores = logits(hidden, table, bias=bias, vocab_size=head.vocab_size, softcap=head.softcap, layout=layout)
    counts = labels >= 0
    highest = scores.max(-1)
    exponentials = jnp.exp(scores - highest[..., None])
    total = exponentials.sum(-1)
    normaliser = highest + jnp.log(total)
    is_label = word_numbers(table.shape[0], layout) == labels[..., None]
    label_score = jnp.where(is_label, scores, 0.0).sum(-1)
    return _Read(
        scores=scores,
        exponentials=exponentials,
        total=total,
        normaliser=normaliser,
        is_label=is_label,
        label_score=label_score,
        nll=jnp.where(counts, normaliser - label_score, 0.0),
        correct=counts & (label_score >= highest),
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def label_nll(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, head: Head, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Of each label by itself: -log of its probability, nats, and whether no word scores higher.

    Arguments are those of `linear_cross_entropy`. The first is differentiable in `hidden`, `table` and
    `bias`, for losses that are no sum of it; z-loss and smoothing are none of it. As what a label weighs in
    such a loss is not known before, the logits are computed a second time for the gradients.

    Returns:
      [batch, length] float32, 0 where a label does not count, and [batch, length] bool, false there.
    """

    def body(_: None, chunk: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        read = _read(*chunk, table=table, bias=bias, head=head)
        return None, (read.nll, read.correct)

    _, told = jax.lax.scan(body, None, _chunks(hidden, labels, head))
    batch, length = labels.shape
    nll, correct = (jnp.moveaxis(each, 0, 1).reshape(batch, -1)[:, :length] for each in told)
    return nll, correct


def _label_forward(
    hidden: jax.Array, table: jax.Array, labels: jax.Array, head: Head, bias: jax.Array | None = None
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    return label_nll(hidden, table, labels, head, bias), (hidden, table, labels, bias)


def _label_backward(head: Head, saved: tuple, cotangents: tuple) -> tuple:
    """The weights of labels meet their gradients in float32, after the product, as the scale above does.

    In the gradient of the table, which is a sum over labels, they meet the hidden states before it.
    """
    hidden, table, labels, bias = saved
    layout, one, plain = head.layout, jnp.ones((), jnp.float32), head._replace(z_loss=0.0, smoothing=0.0)
    bias_spec = _bias_spec(layout)

    def body(carry: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        table_gradient, bias_gradient = carry
        hidden, labels, weights = chunk
        _, d_logits = _chunk_sums(hidden, labels, table=table, bias=bias, scale=one, head=plain)
        if bias_gradient is not None:
            bias_gradient += jnp.einsum(
                "blv,bl->v", d_logits.astype(jnp.float32), weights, out_sharding=bias_spec
            )
        hidden_gradient = jnp.einsum(
            "blv,ve->ble", d_logits, table, out_sharding=layout.spec("batch", "length", "embed")
        )
        table_gradient += jnp.einsum(
            "blv,ble->ve",
            d_logits,
            _weigh(hidden, weights),
            preferred_element_type=jnp.float32,
            out_sharding=_cotangent_spec(table, layout),
        )
        return (table_gradient, bias_gradient), _weigh(hidden_gradient, weights)

    zeros = jnp.zeros(table.shape, jnp.float32, out_sharding=_cotangent_spec(table, layout))
    no_bias = None if bias is None else jnp.zeros(bias.shape, jnp.float32, out_sharding=bias_spec)
    chunks = (*_chunks(hidden, labels, head), _split(cotangents[0], 0, head))
    (table_gradient, bias_gradient), hidden_gradient = jax.lax.scan(body, (zeros, no_bias), chunks)
    if bias_gradient is not None:
        bias_gradient = layout.shard(bias_gradient, "vocab")
    batch, length, width = hidden.shape
    hidden_gradient = jnp.moveaxis(hidden_gradient, 0, 1).reshape(batch, -1, width)[:, :length]
    return hidden_gradient, table_gradient.astype(table.dtype), None, bias_gradient


label_nll.defvjp(_label_forward, _label_backward)


def _weigh(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Values [batch, columns, embed] times weights [batch, columns], in the dtype of the values."""
    return (values.astype(jnp.float32) * weights[..., None]).astype(values.dtype)


def _chunks(hidden: jax.Array, labels: jax.Array, head: Head) -> tuple[jax.Array, jax.Array]:
    """Hidden states and labels with the chunks in front, [chunks, batch, columns, ...].

    Chunks are as equal as can be; the last may end with a few columns whose labels do not count.
    """
    return _split(hidden, 0, head), _split(labels, -1, head)


def _split(x: jax.Array, padding: int, head: Head) -> jax.Array:
    """[batch, length, ...] -> [chunks, batch, columns, ...]."""
    batch, length = x.shape[:2]
    rows = batch
    for axis in head.layout.mesh_axes("batch"):
        rows //= head.layout.size(axis)
    columns = chunk_columns(head.chunk, rows, length)
    chunks = -(-length // columns)
    if extra := chunks * columns - length:
        x = jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)), constant_values=padding)
    return jnp.moveaxis(x.reshape(batch, chunks, columns, *x.shape[2:]), 1, 0)


def chunk_columns(tokens: int, rows: int, length: int) -> int:
    """Columns of a chunk of about so many tokens: at most those, unless one column is more.

    Args:
      tokens: of a chunk, on one device.
      rows: on one device.
      length: of a row, which need have no divisors.
    """
    most = max(1, tokens // rows)
    return -(-length // -(-length // most))


def chunk_tokens(logits_bytes: int | None, *, embed_dim: int, vocab_size: int, tensor: int) -> int:
    """Tokens per device whose logits exist at one time.

    Every chunk reads and writes the table's gradient, so chunks much smaller than the model is wide
    spend more on that than on their logits.

    Args:
      logits_bytes: of the float32 logits; None: as many as the table's float32 gradient has, which is
        `embed_dim` tokens' worth, but at least 64 MiB.
      embed_dim: width of the model.
      vocab_size: rows of the table, padding included.
      tensor: ways the vocabulary is split.
    """
    each = 4 * vocab_size // tensor
    if logits_bytes is not None:
        return max(1, logits_bytes // each)
    return max(embed_dim, LEAST_LOGITS_BYTES // each)


def _zero_sums() -> Sums:
    return Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))


def _add(left: Sums, right: Sums) -> Sums:
    return jax.tree.map(jnp.add, left, right)


def _bias_spec(layout: Layout) -> P | None:
    return None if layout.trivial else P(*layout.whole_spec(("vocab",)), unreduced=layout.replicas)


def _cotangent_spec(table: jax.Array, layout: Layout) -> P | None:
    """The cotangent of a `reduced` array is `unreduced`: a partial sum, not communicated."""
    if layout.trivial:
        return None
    spec = jax.typeof(table).sharding.spec
    return P(*spec.partitions, unreduced=spec.reduced)

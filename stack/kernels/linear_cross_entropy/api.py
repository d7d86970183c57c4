"""One entry for every implementation of the loss over a vocabulary."""

from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Float32, Int

from stack.kernels.linear_cross_entropy import reference, xla_chunked
from stack.kernels.linear_cross_entropy.head import Head, Sums


@runtime_checkable
class LinearCrossEntropy(Protocol):
    """An implementation; see `linear_cross_entropy` for what it computes."""

    def __call__(
        self,
        hidden: jax.Array,
        table: jax.Array,
        labels: jax.Array,
        scale: jax.Array,
        head: Head,
        bias: jax.Array | None = None,
        /,
    ) -> Sums:
        """The sums, differentiable through `loss` in `hidden`, `table` and `bias`."""
        ...


KERNELS: dict[str, LinearCrossEntropy] = {
    "xla_chunked": xla_chunked.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}
"""THE list. `xla_chunked` honours everything; `reference` stores all logits and is for one device."""


def linear_cross_entropy(
    hidden: Float[Array, "batch length embed"],
    table: Float[Array, "vocab embed"],
    labels: Int[Array, "batch length"],
    scale: Float32[Array, ""],
    head: Head,
    bias: Float32[Array, " vocab"] | None = None,
    *,
    kernel: str = "xla_chunked",
) -> Sums:
    """Sums over labels >= 0 of -log softmax(cap(hidden table^T + bias))[label], and what goes with it.

    Differentiable through `loss` in `hidden`, `table` and `bias`; each gradient has its array's dtype.
    To have the gradients while the logits exist, and so never whole logits, is the scheme of Liger
    (arXiv 2410.10989). Cut Cross-Entropy (arXiv 2411.09009) keeps no logits of a chunk
    either, but computes all of them a second time.

    Args:
      hidden: [batch, length, embed], float32 or bfloat16.
      table: [vocab, embed], the same dtype; rows from `head.vocab_size` on are padding.
      labels: [batch, length] int32, below `head.vocab_size`; below 0: does not count.
      scale: float32 scalar, what the loss is multiplied by: one over the labels of the whole batch.
      head: the options.
      bias: [vocab] float32, added to the scores of words; None: nothing is.
      kernel: a name in `KERNELS`; nothing falls back.

    Raises:
      ValueError: there is no such kernel, it cannot run on the mesh, the dtypes of `hidden` and `table`
        differ, or the table has fewer rows than there are words.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown linear_cross_entropy kernel {kernel!r}: {', '.join(KERNELS)}")
    if hidden.dtype != table.dtype:
        raise ValueError(
            f"linear_cross_entropy: hidden is {hidden.dtype}, table {table.dtype}; cast one to the other"
        )
    if not 0 < head.vocab_size <= table.shape[0]:
        raise ValueError(
            f"linear_cross_entropy: {head.vocab_size} words do not fit a table of {table.shape[0]} rows"
        )
    return KERNELS[kernel](hidden, table, labels, scale, head, bias)

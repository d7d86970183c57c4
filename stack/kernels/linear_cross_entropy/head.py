"""What a loss over a vocabulary is asked, and what it gives."""

from typing import NamedTuple

from jaxtyping import Array, Float32

from stack.parallel.rules import ONE_DEVICE, Layout


class Sums(NamedTuple):
    """Sums over the labels that count, float32 scalars."""

    loss: Float32[Array, ""]
    """Nats, z-loss and smoothing included, times the scale."""
    nll: Float32[Array, ""]
    """Negative log-likelihood, nats."""
    correct: Float32[Array, ""]
    """Labels with the highest score."""


class Head(NamedTuple):
    """What the loss must know besides arrays."""

    vocab_size: int
    """Words; rows of the table from here on are padding, which no score and no gradient sees."""
    softcap: float | None = None
    """c of c x tanh(score / c) (Gemma 2, arXiv 2408.00118, section 2); None: scores are as they are."""
    z_loss: float = 0.0
    """Nats per squared nat of the softmax's log-normaliser (PaLM, arXiv 2204.02311, section 5)."""
    smoothing: float = 0.0
    """Probability that the target spreads evenly over all words, the label among them (arXiv 1512.00567,
    section 7); `nll` is without it."""
    chunk: int = 1024
    """Tokens per device whose logits exist at one time."""
    layout: Layout = ONE_DEVICE
    """How the arrays lie on the mesh."""

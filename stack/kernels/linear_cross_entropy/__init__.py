"""Cross-entropy of words whose scores are products of hidden states and a table."""

from stack.kernels.linear_cross_entropy.api import KERNELS, linear_cross_entropy
from stack.kernels.linear_cross_entropy.head import Head, Sums
from stack.kernels.linear_cross_entropy.logits import logits
from stack.kernels.linear_cross_entropy.xla_chunked import chunk_columns, chunk_tokens, label_nll

__all__ = [
    "KERNELS",
    "Head",
    "Sums",
    "chunk_columns",
    "chunk_tokens",
    "label_nll",
    "linear_cross_entropy",
    "logits",
]

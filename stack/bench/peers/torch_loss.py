"""PyTorch's loss over a vocabulary, three ways."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from stack.bench.serve import UnableError

KINDS = ("compiled", "chunked", "linear_cross_entropy")
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Hidden states [tokens, embed], table [vocab, embed] and labels [tokens], -1 where none -> mean loss."""

_LOGITS_BYTES = 2**28
"""Of a chunk, in float32."""


def loss(kind: str, *, width: int, words: int) -> Loss:
    """One of `KINDS`.

    Args:
        kind: `compiled`: all logits at once, compiled; `chunked`: their gradients while they exist, as Stack
            does; `linear_cross_entropy`: PyTorch's own in chunks.
        width: of the hidden states.
        words: of the table.

    Raises:
        UnableError: this PyTorch has none.
    """
    if kind == "compiled":
        return torch.compile(_whole)
    if kind == "chunked":
        chunk = max(width, _LOGITS_BYTES // (4 * words))
        slopes = torch.compile(_slopes)
        return lambda hidden, table, labels: _Chunked.apply(hidden, table, labels, chunk, slopes)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise UnableError("this PyTorch has no torch.nn.LinearCrossEntropyOptions")
    return lambda hidden, table, labels: functional.linear_cross_entropy(
        hidden, table, labels, ignore_index=-1, options=options()
    )


def _whole(hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(functional.linear(hidden, table).float(), labels, ignore_index=-1)


def _slopes(
    logits: torch.Tensor, labels: torch.Tensor, count: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a chunk, and its gradient with respect to the logits."""
    scores, counts = logits.float(), labels >= 0
    normaliser = scores.logsumexp(1)
    places = labels.clamp(min=0)[:, None]
    lost = torch.where(counts, normaliser - scores.gather(1, places)[:, 0], 0.0).sum() / count
    is_label = torch.arange(scores.shape[1], device=scores.device) == places
    slopes = (scores - normaliser[:, None]).exp() - is_label.float()
    return lost, (slopes * (counts / count)[:, None]).to(logits.dtype)


class _Chunked(torch.autograd.Function):
    """Three products a chunk, none of them twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, chunk: int, slopes: Any
    ) -> torch.Tensor:
        """The mean loss; the gradients are made on the way."""
        count = (labels >= 0).sum()
        lost = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(hidden)
        of_table = torch.zeros(table.shape, device=table.device)
        for start in range(0, hidden.shape[0], chunk):
            some = hidden[start : start + chunk]
            part, slope = slopes(some @ table.t(), labels[start : start + chunk], count)
            lost += part
            torch.mm(slope, table, out=of_hidden[start : start + chunk])
            of_table += slope.t() @ some
        ctx.save_for_backward(of_hidden, of_table.to(table.dtype))
        return lost

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times the cotangent."""
        of_hidden, of_table = ctx.saved_tensors
        return of_hidden * cotangents[0], of_table * cotangents[0], None, None, None


def exact(
    hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, *, checked: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss by its formula in float32, and the gradient of the first hidden states."""
    lost, words, gradient = torch.zeros((), device=hidden.device), table.float(), torch.empty(0)
    for start in range(0, hidden.shape[0], checked):
        scores = hidden[start : start + checked].float() @ words.t()
        chosen = labels[start : start + checked, None]
        lost += (scores.logsumexp(1) - scores.gather(1, chosen)[:, 0]).sum()
        if start == 0:
            slopes = scores.softmax(1).scatter_add(1, chosen, -torch.ones_like(chosen, dtype=scores.dtype))
            gradient = slopes @ words / hidden.shape[0]
    return lost / hidden.shape[0], gradient

"""Metrics of what is found, and in which order."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Integer

from stack.objectives.metrics.classes import scikit_learn

_BLOCK = 256
"""Queries that are ranked at once."""


def measure(
    scores: Float[np.ndarray, "queries passages"],
    right: Integer[np.ndarray, " queries"],
    at: Sequence[int],
) -> dict[str, float]:
    """Tells recall_at_k, mrr (mean reciprocal rank) and ndcg_at_10 of queries with one right passage each.

    Of passages that score the same the right one counts as the last.

    Args:
      scores: the higher the better.
      right: the passage of each query.
      at: numbers k of best passages.
    """
    ranks = np.concatenate(
        [
            (scores[start : start + _BLOCK] >= _of(scores, right, start)).sum(1)
            for start in range(0, len(right), _BLOCK)
        ]
    )
    told = {f"recall_at_{k}": float((ranks <= k).mean()) for k in at if k <= scores.shape[1]}
    told["mrr"] = float((1 / ranks).mean())
    if scores.shape[1] > 1:
        told["ndcg_at_10"] = float(np.mean(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0.0)))
    return told


def _of(scores: np.ndarray, right: np.ndarray, start: int) -> np.ndarray:
    some = np.arange(start, min(start + _BLOCK, len(right)))
    return scores[some, right[some]][:, None]


def measure_lists(
    scores: Sequence[Float[np.ndarray, " _"]], relevant: Sequence[np.ndarray]
) -> dict[str, float]:
    """Tells mrr and ndcg_at_10 (scikit-learn's) over lists of passages, some of which are relevant.

    Of passages that score the same those that are relevant count as the last, and of gains their mean.

    Args:
      scores: of each list, the higher the better.
      relevant: [passages] bool of each list, at least one true.
    """
    reciprocal, gains = [], []
    for mine, true in zip(scores, relevant, strict=True):
        reciprocal.append(1 / (1 + int((mine[~true] >= mine[true].max()).sum())))
        if len(mine) > 1:
            gains.append(scikit_learn().ndcg_score(true[None].astype(float), mine[None], k=10))
    return {"mrr": float(np.mean(reciprocal)), **({"ndcg_at_10": float(np.mean(gains))} if gains else {})}

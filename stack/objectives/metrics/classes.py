"""Metrics of classification, by scikit-learn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer

from stack.config.errors import StackError

BINS = 15
"""Of confidence, for the calibration error."""


def scikit_learn() -> Any:
    """Its metrics.

    Raises:
      StackError: it is not installed.
    """
    try:
        import sklearn.metrics
    except ImportError as error:
        raise StackError(
            "metrics of tasks need scikit-learn; install it with: pip install 'stack[tasks]'"
        ) from error
    return sklearn.metrics


def measure_one(
    shares: Float[np.ndarray, "records labels"], labels: Integer[np.ndarray, " records"], names: Sequence[str]
) -> dict[str, float]:
    """Accuracy, macro_f1, mcc (Matthews), auroc (one against the rest, macro) and calibration_error.

    `auroc` is of the labels that some records have and others have not; where there are none it is left out.

    Args:
      shares: probabilities.
      labels: the true ones.
      names: of the labels.
    """
    known = scikit_learn()
    guessed = shares.argmax(1)
    told = {
        "accuracy": known.accuracy_score(labels, guessed),
        "macro_f1": known.f1_score(
            labels, guessed, labels=_there(labels, guessed), average="macro", zero_division=0
        ),
        "mcc": known.matthews_corrcoef(labels, guessed),
        "calibration_error": calibration_error(shares.max(1), guessed == labels),
        "most_frequent": float(np.bincount(labels).max() / len(labels)),
    }
    truth = labels[:, None] == np.arange(len(names))
    return {name: float(value) for name, value in (told | _auroc(truth, shares)).items()}


def measure_several(
    shares: Float[np.ndarray, "records labels"],
    labels: Integer[np.ndarray, "records labels"],
    names: Sequence[str],
) -> dict[str, float]:
    """Accuracy (all labels of a record right), micro_f1, macro_f1, mcc (mean), auroc, calibration_error.

    Args:
      shares: probability of each label.
      labels: 1 where a record has it.
      names: of the labels.
    """
    known = scikit_learn()
    guessed = (shares >= 0.5).astype(np.int64)
    told = {
        "accuracy": known.accuracy_score(labels, guessed),
        "micro_f1": known.f1_score(labels, guessed, average="micro", zero_division=0),
        "macro_f1": known.f1_score(labels, guessed, average="macro", zero_division=0),
        "mcc": np.mean([known.matthews_corrcoef(labels[:, i], guessed[:, i]) for i in range(len(names))]),
        "calibration_error": calibration_error(
            np.maximum(shares, 1 - shares).ravel(), (guessed == labels).ravel()
        ),
    }
    return {name: float(value) for name, value in (told | _auroc(labels > 0, shares)).items()}


def calibration_error(
    confidence: Float[np.ndarray, " guesses"], right: np.ndarray, bins: int = BINS
) -> float:
    """Expected calibration error (arXiv 1706.04599, equation 3): |accuracy - confidence|, mean over guesses.

    Args:
      confidence: from 0 to 1.
      right: [guesses] bool.
      bins: of equal width.
    """
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(which, right, bins) - np.bincount(which, confidence, bins)
    return float(np.abs(gaps).sum() / len(confidence))


def _auroc(truth: np.ndarray, shares: np.ndarray) -> dict[str, float]:
    varied = np.flatnonzero(truth.any(0) & ~truth.all(0))
    each = [scikit_learn().roc_auc_score(truth[:, label], shares[:, label]) for label in varied]
    return {"auroc": float(np.mean(each))} if each else {}


def _there(labels: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    return np.union1d(labels, guessed)

"""Exact match and F1 of answers, as SQuAD has them (arXiv 1606.05250, section 6.1; arXiv 1806.03822)."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without punctuation, English articles and more than one space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def overlap(answer: str, right: str) -> float:
    """F1 of the words of an answer; 1 where both are empty."""
    mine, true = normalize(answer).split(), normalize(right).split()
    if not mine or not true:
        return float(mine == true)
    common = (Counter(mine) & Counter(true)).total()
    return 2 * common / (len(mine) + len(true))


def compare(answers: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
    """Tells exact_match and f1 in all, and where there is an answer and where there is none.

    Args:
      answers: what was said (empty: there is none), and all that would be right (none: there is none).
    """
    exact, scores = [], []
    for said, right in answers:
        exact.append(max(float(normalize(said) == normalize(one)) for one in (right or [""])))
        scores.append(max(overlap(said, one) for one in (right or [""])))
    told = {"exact_match": _mean(exact), "f1": _mean(scores)}
    for name, has in (("has_answer", True), ("no_answer", False)):
        some = [number for number, (_, right) in enumerate(answers) if bool(right) == has]
        if some and len(some) < len(answers):
            told |= {
                f"{name}_exact_match": _mean([exact[number] for number in some]),
                f"{name}_f1": _mean([scores[number] for number in some]),
            }
    return told


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))

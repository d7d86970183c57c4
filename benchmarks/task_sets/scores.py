"""Figures of predictions: libraries' metrics under the names that docs/tasks.md uses."""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from nervaluate.evaluator import Evaluator
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sklearn import metrics

Scores = dict[str, float]


def of_classes(truth: Sequence[str], chances: np.ndarray, classes: Sequence[str]) -> Scores:
    """Accuracy, macro-F1, Matthews correlation, AUROC (one against the rest) and calibration error (15 bins).

    Args:
        truth: Labels.
        chances: [rows, classes], probabilities.
        classes: In the order of the columns.
    """
    predicted = np.asarray(classes)[chances.argmax(axis=1)]
    scores = chances[:, 1] if len(classes) == 2 else chances
    auroc = metrics.roc_auc_score(truth, scores, multi_class="ovr", labels=classes, average="macro")
    top = chances.max(axis=1)
    right = predicted == np.asarray(truth)
    bins = np.minimum((top * 15).astype(int), 14)
    gaps = [
        abs(right[bins == key].mean() - top[bins == key].mean()) * (bins == key).mean() for key in set(bins)
    ]
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
        "mcc": float(metrics.matthews_corrcoef(truth, predicted)),
        "auroc": float(auroc),
        "ece": float(sum(gaps)),
    }


def of_label_sets(truth: np.ndarray, chances: np.ndarray) -> Scores:
    """Macro- and micro-F1 at a probability of one half, macro AUROC, and rows with all labels right.

    Args:
        truth: [rows, labels], 0 or 1.
        chances: [rows, labels], probabilities.
    """
    predicted = chances >= 0.5
    return {
        "macro_f1": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
        "micro_f1": float(metrics.f1_score(truth, predicted, average="micro", zero_division=0)),
        "auroc": float(metrics.roc_auc_score(truth, chances, average="macro")),
        "exact": float((truth == predicted).all(axis=1).mean()),
    }


def of_entities(
    truth: Sequence[Sequence[Mapping[str, Any]]], predicted: Sequence[Sequence[Mapping[str, Any]]]
) -> Scores:
    """Precision, recall and F1 of entities whose start, end and label are all right (nervaluate's strict)."""
    tags = sorted({entity["label"] for row in (*truth, *predicted) for entity in row})
    evaluator = Evaluator(
        [list(row) for row in truth], [list(row) for row in predicted], tags=tags, loader="dict"
    )
    result = evaluator.evaluate()["overall"]["strict"]
    return {"f1": float(result.f1), "precision": float(result.precision), "recall": float(result.recall)}


def of_answers(truth: Sequence[Sequence[str]], predicted: Sequence[str]) -> Scores:
    """Exact match and F1 of words as SQuAD 2.0 counts them: of the best answer; none is the empty text."""
    exact, overlap = [], []
    for answers, text in zip(truth, predicted, strict=True):
        pairs = [(_normal(answer), _normal(text)) for answer in (answers or [""])]
        exact.append(max(float(right == given) for right, given in pairs))
        overlap.append(max(_word_f1(right.split(), given.split()) for right, given in pairs))
    return {"exact": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _normal(text: str) -> str:
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _word_f1(right: list[str], given: list[str]) -> float:
    if not right or not given:
        return float(right == given)
    return 2 * (Counter(right) & Counter(given)).total() / (len(right) + len(given))


def of_ranks(ranks: Sequence[int | None]) -> Scores:
    """Recall at 1 and 10, mean reciprocal rank and nDCG at 10, of one right passage a query.

    Args:
        ranks: From 1; None where the right passage was not found.
    """
    places = np.asarray([rank if rank else np.inf for rank in ranks])
    return {
        "recall@1": float((places <= 1).mean()),
        "recall@10": float((places <= 10).mean()),
        "mrr": float((1 / places).mean()),
        "ndcg@10": float(np.where(places <= 10, 1 / np.log2(1 + places), 0).mean()),
    }


def of_texts(truth: Sequence[str], predicted: Sequence[str]) -> Scores:
    """ROUGE-1, 2 and L (F, stemmed), BLEU and chrF of the corpus (0 to 100), and exact matches."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score(right, given) for right, given in zip(truth, predicted, strict=True)]
    rouge = {name: float(np.mean([row[name].fmeasure for row in rows])) for name in rows[0]}
    return rouge | {
        "bleu": BLEU().corpus_score(predicted, [truth]).score,
        "chrf": CHRF().corpus_score(predicted, [truth]).score,
        "exact": float(np.mean([right == given for right, given in zip(truth, predicted, strict=True)])),
    }


def of_extracts(rows: Sequence[Mapping[str, Any]], chosen: Sequence[Sequence[int]], *, size: int) -> Scores:
    """ROUGE-1, 2 and L of the chosen sentences with the summary; how many of `size` are in the extract."""
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    texts = [
        " ".join(row["sentences"][place] for place in sorted(places))
        for row, places in zip(rows, chosen, strict=True)
    ]
    scored = [scorer.score(row["summary"], text) for row, text in zip(rows, texts, strict=True)]
    hits = [
        sum(row["labels"][place] for place in places) / size for row, places in zip(rows, chosen, strict=True)
    ]
    rouge = {name: float(np.mean([row[name].fmeasure for row in scored])) for name in scored[0]}
    return rouge | {f"precision@{size}": float(np.mean(hits))}

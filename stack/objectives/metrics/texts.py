"""Metrics of texts that are written, by rouge-score and sacreBLEU."""

from collections.abc import Sequence
from typing import Any

from stack.config.errors import StackError


def _library(name: str, install: Any) -> Any:
    try:
        return install()
    except ImportError as error:
        raise StackError(
            f"metrics of texts need {name}; install it with: pip install 'stack[tasks]'"
        ) from error


def rouge(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Tells rouge1, rouge2 and rougeL: F1 of words, of pairs of words and of the longest common subsequence.

    With Porter's stems, the mean over texts (Lin, 2004), from 0 to 1.

    Args:
      texts: written.
      wanted: what each is compared with.

    Raises:
      StackError: rouge-score is not installed.
    """

    def install() -> Any:
        from rouge_score import rouge_scorer

        return rouge_scorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = _library("rouge-score", install).RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(right, text) for text, right in zip(texts, wanted, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / max(1, len(scores)) for name in names}


def translation(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Tells bleu and chrf of a whole corpus, by sacreBLEU's settings (arXiv 1804.08771), from 0 to 100.

    Raises:
      StackError: sacrebleu is not installed.
    """

    def install() -> Any:
        import sacrebleu

        return sacrebleu

    library = _library("sacrebleu", install)
    return {
        "bleu": library.corpus_bleu(list(texts), [list(wanted)]).score,
        "chrf": library.corpus_chrf(list(texts), [list(wanted)]).score,
    }


def written(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Tells exact_match (white space around aside), and all of the above."""
    same = [text.strip() == right.strip() for text, right in zip(texts, wanted, strict=True)]
    exact = {"exact_match": sum(same) / max(1, len(same))}
    return exact | rouge(texts, wanted) | translation(texts, wanted)

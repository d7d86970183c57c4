"""BM25 over passages: hard negatives to train with, candidates to rerank, and the ranking to be beaten."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np

from .splits import SPLITS, Split, write_jsonl

CANDIDATES, NEGATIVES = 10, 3
logging.getLogger("bm25s").setLevel(logging.WARNING)


class Bm25:
    """Okapi BM25 (Lucene's form, k1 1.5, b 0.75) over passages; identifiers are split into their words."""

    def __init__(self, passages: Sequence[str]) -> None:
        self._index = bm25s.BM25(k1=1.5, b=0.75, method="lucene")
        self._index.index(_tokens(passages), show_progress=False)

    def search(self, queries: Sequence[str], count: int) -> list[list[int]]:
        """Places of the best passages of each query, best first."""
        found, _ = self._index.retrieve(_tokens(queries), k=count, show_progress=False)
        return np.asarray(found).tolist()


def _tokens(texts: Sequence[str]) -> Any:
    split = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).replace("_", " ") for text in texts]
    return bm25s.tokenize(split, stopwords="en", show_progress=False)


def write_retrieval(
    folder: Path, splits: Mapping[Split, list[dict[str, Any]]]
) -> tuple[dict[Split, list[dict[str, Any]]], dict[Split, list[dict[str, Any]]]]:
    """Writes the corpus and its queries, and makes the rows of bi-encoders and cross-encoders.

    Args:
        folder: Gets `corpus.jsonl` (the passages of all splits) and `queries.jsonl`, those of the test.
        splits: Rows with `query` and `passage`.

    Returns:
        Retrieval rows: `negatives` are the best passages by BM25 that are not the right one. Reranking rows:
        the best passages by BM25, in its order; where the right one is not among them it takes the last place
        in training, and the row is left out elsewhere.
    """
    passages = list(dict.fromkeys(row["passage"] for split in SPLITS for row in splits[split]))
    place = {passage: number for number, passage in enumerate(passages)}
    write_jsonl(folder / "corpus.jsonl", ({"id": str(key), "text": text} for text, key in place.items()))
    write_jsonl(
        folder / "queries.jsonl",
        ({"query": row["query"], "relevant": [str(place[row["passage"]])]} for row in splits["test"]),
    )
    index = Bm25(passages)
    found: dict[Split, list[dict[str, Any]]] = {}
    ranked: dict[Split, list[dict[str, Any]]] = {}
    for split in SPLITS:
        rows = splits[split]
        best = index.search([row["query"] for row in rows], CANDIDATES)
        found[split], ranked[split] = [], []
        for row, top in zip(rows, best, strict=True):
            right = place[row["passage"]]
            wrong = [passages[key] for key in top if key != right]
            found[split].append({**row, "negatives": wrong[:NEGATIVES]})
            if right not in top and split != "train":
                continue
            candidates = top if right in top else [*top[:-1], right]
            texts = [passages[key] for key in candidates]
            ranked[split].append(
                {"query": row["query"], "passages": texts, "relevant": [candidates.index(right)]}
            )
    return found, ranked

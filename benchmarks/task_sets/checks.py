"""What must hold of a folder of sets, looked at in the files that were written."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stack import StackError

from .splits import SPLITS, plain, read_jsonl

RUN = 13  # words in a row that two texts share by chance too seldom to matter (Brown et al. 2020, appendix C)


def check(folder: Path, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Refuses a row on two sides, a span that is not its text, and a relevant passage that is not there.

    Args:
        folder: With a folder for each set, and `pretraining.jsonl`.
        sets: By name; `kind` is read.

    Returns:
        The share of each set's test rows that have 13 words in a row in common with the pretraining text.

    Raises:
        StackError: Names the first set, split and row that is wrong.
    """
    held: dict[str, list[set[int]]] = {}
    for name, task in sets.items():
        seen: dict[str, str] = {}
        for split in SPLITS:
            for number, row in enumerate(read_jsonl(folder / name / f"{split}.jsonl"), 1):
                place = f"{name}/{split}.jsonl:{number}"
                key = "\0".join(plain(text) for text in strings({**row, "label": "", "negatives": []}))
                if seen.setdefault(key, split) != split:
                    raise StackError(f"{place} is also a row of {seen[key]}")
                _check_row(task["kind"], row, place)
                if split == "test":
                    texts = strings({**row, "negatives": [], "passages": []})
                    held.setdefault(name, []).append({run for text in texts for run in runs(text)})
        if task["kind"] == "retrieval":
            known = {passage["id"] for passage in read_jsonl(folder / name / "corpus.jsonl")}
            for number, query in enumerate(read_jsonl(folder / name / "queries.jsonl"), 1):
                if not query["relevant"] or not known.issuperset(query["relevant"]):
                    raise StackError(f"{name}/queries.jsonl:{number}: its passage is not in corpus.jsonl")
    wanted = {run for rows in held.values() for row in rows for run in row}
    found = {
        run for row in read_jsonl(folder / "pretraining.jsonl") for run in runs(row["text"]) if run in wanted
    }
    return {
        name: round(sum(not row.isdisjoint(found) for row in rows) / len(rows), 4)
        for name, rows in held.items()
    }


def _check_row(kind: str, row: Mapping[str, Any], place: str) -> None:
    if kind == "spans":
        for answer in row["answers"]:
            end = answer["start"] + len(answer["text"])
            if not answer["text"] or row["context"][answer["start"] : end] != answer["text"]:
                raise StackError(f"{place}: {answer['text']!r} does not stand at {answer['start']}")
    elif kind == "tagging":
        before = 0
        for entity in row["entities"]:
            inside = row["text"][entity["start"] : entity["end"]]
            if entity["start"] < before or not inside or inside != inside.strip():
                raise StackError(f"{place}: an entity of {entity['label']} is not at its words")
            before = entity["end"]
    elif kind == "sentences" and (len(row["labels"]) != len(row["sentences"]) or not any(row["labels"])):
        raise StackError(f"{place}: not one label for each sentence, or no sentence chosen")
    elif kind == "reranking" and not all(0 <= key < len(row["passages"]) for key in row["relevant"]):
        raise StackError(f"{place}: the relevant passage is not among the candidates")
    elif kind == "retrieval" and row["passage"] in row["negatives"]:
        raise StackError(f"{place}: the right passage is among the negatives")


def strings(row: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a row, those in lists as well."""
    for value in row.values():
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, str))


def runs(text: str) -> Iterator[int]:
    """Hashes, the same within one process, of every 13 words in a row."""
    words = plain(text).split()
    for start in range(len(words) - RUN + 1):
        yield hash(" ".join(words[start : start + RUN]))

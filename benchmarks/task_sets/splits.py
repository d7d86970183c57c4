"""Which rows train, and which are held out: by the hash of the document that a row comes from.

A document is a source package, an RFC, a file of the library or a page: on one side in every task and in the
text that trunks are pretrained on, so nothing of a test has been seen in any.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
_VALID, _TEST = 6, 14  # of a hundred documents


@dataclass(frozen=True, kw_only=True)
class Row:
    """A labelled row and the document it comes from."""

    document: str
    row: Mapping[str, Any]


def number(text: str) -> int:
    """A number of 64 bits that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def split_of(document: str) -> Split:
    """The side of a document: 80% train, 6% valid, 14% test, by the hash of its name."""
    place = number(document) % 100
    return "valid" if place < _VALID else "test" if place < _VALID + _TEST else "train"


def plain(text: str) -> str:
    """The text in lower case, its words parted by one space: what is compared to find the same text twice."""
    return " ".join(text.casefold().split())


def in_splits(
    rows: Iterable[Row], *, same: Iterable[str], at_most: Mapping[Split, int]
) -> dict[Split, list[dict[str, Any]]]:
    """Parts rows into splits, in an order that depends on their content alone.

    Args:
        rows: In any order.
        same: Fields by which two rows are the same, if all are: the first is kept, a held-out one before one
            that trains.
        at_most: Rows kept of each split.

    Returns:
        The rows of each split.
    """
    fields = tuple(same)
    found: dict[Split, list[tuple[int, dict[str, Any]]]] = {split: [] for split in SPLITS}
    for row in rows:
        place = number(json.dumps(row.row, sort_keys=True, ensure_ascii=False))
        found[split_of(row.document)].append((place, dict(row.row)))
    seen: set[str] = set()
    kept: dict[Split, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for split in ("test", "valid", "train"):
        for _, row in sorted(found[split], key=lambda pair: pair[0]):
            key = "\0".join(plain(str(row[field])) for field in fields)
            if key not in seen:
                seen.add(key)
                kept[split].append(row)
        kept[split] = kept[split][: at_most[split]]
    return kept


def balanced(rows: Iterable[Row], *, field: str, at_most: int) -> list[Row]:
    """At most so many rows of each value of a field, those whose content hashes lowest."""
    counts: dict[str, int] = {}
    kept = []
    for row in sorted(rows, key=lambda row: number(json.dumps(row.row, sort_keys=True))):
        value = row.row[field]
        counts[value] = counts.get(value, 0) + 1
        if counts[value] <= at_most:
            kept.append(row)
    return kept


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes rows, one JSON object a line, and says how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows of a file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def cut(text: str, length: int) -> str:
    """The text's first words, of at most `length` characters together."""
    if len(text) <= length:
        return text
    return re.sub(r"\s+\S*$", "", text[: length + 1])

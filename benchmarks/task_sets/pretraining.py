"""Text of the same kinds as the sets, for a small trunk to be pretrained on: nothing of what is held out."""

import gzip
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import debian, rfcs
from .checks import strings
from .splits import number, plain, split_of

# Bytes of each kind: 44 MB together, about what is there of the small ones.
SHARES = {
    "rfcs": 14_000_000,
    "descriptions": 8_000_000,
    "german": 2_000_000,
    "library": 6_000_000,
    "documentation": 6_000_000,
    "foldoc": 4_000_000,
    "dictionary": 4_000_000,
}


def write_pretraining(
    path: Path,
    sources: Path,
    packages: Sequence[debian.Package],
    texts: Sequence[rfcs.Rfc],
    held: Iterable[Mapping[str, Any]],
) -> dict[str, int]:
    """Writes documents, one JSON object with `text` a line, in an order of their hashes.

    A document that is held out of any set is left out whole; of the others, paragraphs that also stand in a
    held-out row.

    Args:
        path: The file.
        sources: The folder of fetched packages.
        packages: Debian's packages.
        texts: The RFCs.
        held: Rows of validation and test.

    Returns:
        Bytes of UTF-8 of each kind of text.
    """
    secret = {plain(part) for row in held for text in strings(row) for part in parts(text)}
    kinds = {
        "rfcs": ((rfc.document, rfc.text) for rfc in texts),
        "descriptions": (
            (
                package.document,
                f"{package.name}: {package.short}\n{package.long.replace(chr(10) + '.', chr(10))}",
            )
            for package in debian.one_of_each_source(packages)
        ),
        "german": (
            (package.document, f"{package.german}\n{package.german_long.replace(chr(10) + '.', chr(10))}")
            for package in debian.one_of_each_source(package for package in packages if package.german)
        ),
        "library": _library(sources / "debian/usr/lib/python3.11"),
        "documentation": _documentation(sources / "debian/usr/share/doc/python3.11/html/_sources"),
        "foldoc": _dictionary(sources / "debian/usr/share/dictd/foldoc.dict.dz"),
        "dictionary": _dictionary(sources / "debian/usr/share/dictd/gcide.dict.dz"),
    }
    written: dict[str, int] = {}
    kept: list[tuple[int, str]] = []
    for kind, documents in kinds.items():
        written[kind] = 0
        for document, text in sorted(documents, key=lambda pair: number(pair[0])):
            if written[kind] >= SHARES[kind]:
                break
            if split_of(document) == "train":
                rest = without(text, secret)
                if len(rest) >= 40:
                    written[kind] += len(rest.encode())
                    kept.append((number(f"{kind}:{document}"), rest))
    with path.open("w", encoding="utf-8") as file:
        for _, text in sorted(kept):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return written


def parts(text: str) -> list[str]:
    """Paragraphs of a text, as they are compared; short ones say too little to give anything away."""
    return [part for part in re.split(r"\n\s*\n|(?<=[.!?])\s+", text) if len(part) >= 40]


def without(text: str, secret: set[str]) -> str:
    """The text less its paragraphs that have a sentence in `secret`."""
    if not secret:
        return text.strip()
    kept = (
        paragraph
        for paragraph in re.split(r"\n\s*\n", text)
        if not any(plain(part) in secret for part in (*parts(paragraph), paragraph))
    )
    return "\n\n".join(kept).strip()


def _library(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.py")):
        yield f"python:{path.relative_to(folder).as_posix()}", path.read_text("utf-8", "replace")


def _documentation(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.rst.txt")):
        module = path.name.removesuffix(".rst.txt").replace(".", "/")
        yield f"python:{module}.py", path.read_text("utf-8", "replace")


def _dictionary(path: Path) -> Iterator[tuple[str, str]]:
    """Groups of neighbouring entries: a blank line and a word at the left edge begin one."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    entries = re.split(r"\n(?=\S)", text)
    for start in range(0, len(entries), 20):
        yield f"{path.name}:{start}", "\n".join(entries[start : start + 20])

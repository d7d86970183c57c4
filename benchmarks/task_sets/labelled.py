"""Sets that people labelled: the parts of names and addresses, and how a sentence feels."""

import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .splits import Row, plain


def entities(parts: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    """Text and its entities, from tokens: each with its label and with what stands behind it.

    Neighbours of one label are one entity; a comma or semicolon at its end is not part of it.
    """
    text = ""
    found: list[dict[str, Any]] = []
    before = ""
    for token, label, behind in parts:
        if label == before:
            found[-1]["end"] = len(text) + len(token)
        else:
            found.append({"start": len(text), "end": len(text) + len(token), "label": label})
        text += token + behind
        before = label
    for entity in found:
        entity["end"] = entity["start"] + len(text[entity["start"] : entity["end"]].rstrip(" ,;"))
    text = text.rstrip()
    return {"text": text, "entities": [entity for entity in found if entity["end"] > entity["start"]]}


def parserator(paths: Iterable[Path], *, at_least: int) -> Iterator[Row]:
    """Tagging: rows of parserator's XML, an element for each token; labels of fewer entities are left out."""
    rows = []
    for path in paths:
        for element in ElementTree.parse(path).getroot():
            parts = []
            for token in element:
                words = " ".join((token.text or "").split())
                behind = " " if token.tail and token.tail.isspace() else (token.tail or "")
                if words:
                    parts.append((words, token.tag, behind))
            if len(parts) >= 2:
                rows.append(entities(parts))
    counts = Counter(entity["label"] for row in rows for entity in row["entities"])
    for row in rows:
        if all(counts[entity["label"]] >= at_least for entity in row["entities"]):
            yield Row(document=f"parserator:{plain(row['text'])}", row=row)


def sentiment(archive: Path) -> Iterator[Row]:
    """Classification: the mean rating of 20 readers, from -4 to 4: at least 0.5, at most -0.5, or between.

    Hutto and Gilbert 2014 (VADER, ICWSM). Sentences of one review or article are one document.
    """
    with tarfile.open(archive) as files:
        for member in sorted(files.getnames()):
            if not member.endswith("_GroundTruth.txt"):
                continue
            file = files.extractfile(member)
            assert file is not None
            kind = Path(member).name.split("_")[0]
            for line in file.read().decode("latin-1").splitlines():
                key, score, text = line.split("\t", 2)
                rating = float(score)
                label = "positive" if rating >= 0.5 else "negative" if rating <= -0.5 else "neutral"
                document = f"{kind}:{key.split('_')[0]}"
                text = re.sub(r"&amp;", "&", " ".join(text.split()))
                if len(text) >= 10:
                    yield Row(document=document, row={"text": text, "label": label})

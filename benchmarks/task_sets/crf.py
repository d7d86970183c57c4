"""A linear-chain conditional random field over words (CRFsuite), and entities as tags of words."""

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pycrfsuite

_CRFSUITE: Any = pycrfsuite  # compiled, without types


@dataclass(frozen=True)
class Token:
    """A word or a mark, and where it stands in its text."""

    text: str
    start: int
    end: int


def tokens(text: str) -> list[Token]:
    """Runs of letters and digits, and single marks."""
    return [Token(match[0], match.start(), match.end()) for match in re.finditer(r"\w+|[^\w\s]", text)]


def tags(words: Sequence[Token], entities: Iterable[Mapping[str, Any]]) -> list[str]:
    """B-label for the first word of an entity, I-label for the others, and O."""
    found = ["O"] * len(words)
    for entity in entities:
        inside = [
            place
            for place, word in enumerate(words)
            if entity["start"] <= word.start and word.end <= entity["end"]
        ]
        for place in inside:
            found[place] = ("B-" if place == inside[0] else "I-") + entity["label"]
    return found


def entities(words: Sequence[Token], found: Sequence[str]) -> list[dict[str, Any]]:
    """Entities from tags: B begins one, I goes on with one of its label, or else begins one."""
    rows: list[dict[str, Any]] = []
    before = "O"
    for word, tag in zip(words, found, strict=True):
        if tag != "O":
            if tag[0] == "I" and before != "O" and before[2:] == tag[2:]:
                rows[-1]["end"] = word.end
            else:
                rows.append({"start": word.start, "end": word.end, "label": tag[2:]})
        before = tag
    return rows


def merged(words: Sequence[Token], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Entities from one label a word, or the empty one: neighbours of one label are one entity."""
    found = [f"I-{label}" if label else "O" for label in labels]
    return entities(words, found)


def features(words: Sequence[Token], *, question: str = "") -> list[list[str]]:
    """What the field sees of each word: itself, its shape, beginning and end, its neighbours and its place.

    With a question all of these are of the question's first two words, and of whether the word is one of a
    run whose first letters are the abbreviation that the question asks for.
    """
    kind = "_".join(question.split()[:2])
    short = next(iter(re.findall(r"\b[A-Z]{2,}\b", question)), "")
    rows = []
    for place, word in enumerate(words):
        row = [f"place={min(place, 40)}", "bias"]
        for offset in (-2, -1, 0, 1, 2):
            if 0 <= place + offset < len(words):
                text = words[place + offset].text
                row.append(f"{offset}:{text.lower()}")
                row.append(f"{offset}:shape={_shape(text)}")
            else:
                row.append(f"{offset}:none")
        row += [f"start={word.text[:3].lower()}", f"end={word.text[-3:].lower()}"]
        if short:
            row += [f"letter={letter}" for letter in _letters(words, place, short)]
        rows.append([f"{kind}|{feature}" for feature in row] if kind else row)
    return rows


def _shape(text: str) -> str:
    return re.sub(r"d+", "d", re.sub(r"x+", "x", re.sub(r"X+", "X", _classes(text))))


def _classes(text: str) -> str:
    return "".join("d" if c.isdigit() else "X" if c.isupper() else "x" if c.islower() else c for c in text)


def _letters(words: Sequence[Token], place: int, short: str) -> list[str]:
    """Whether the word stands at some letter of a run of words whose first letters spell `short`."""
    for start in range(place, max(-1, place - len(short)), -1):
        run = "".join(word.text[0] for word in words[start : start + len(short)]).upper()
        if run == short.upper():
            return ["first" if start == place else "inside"]
    return ["none"]


def fit(examples: Iterable[tuple[list[list[str]], list[str]]], *, rounds: int) -> Any:
    """A field fitted by L-BFGS with an elastic penalty (both 0.1) for at most so many rounds."""
    trainer = _CRFSUITE.Trainer(verbose=False)
    for rows, found in examples:
        trainer.append(rows, found)
    trainer.set_params({"c1": 0.1, "c2": 0.1, "max_iterations": rounds})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        trainer.train(str(path))
        tagger = _CRFSUITE.Tagger()
        tagger.open_inmemory(path.read_bytes())
    return tagger

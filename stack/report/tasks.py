"""What of a row of a task has which label, by name."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from stack.objectives.classification import Classification
from stack.objectives.key_sentences import KeySentences
from stack.objectives.multi_task import MultiTask
from stack.objectives.reranking import Reranking
from stack.objectives.retrieval import NEGATIVE, PASSAGE, QUERY, Retrieval
from stack.objectives.span_answers import SpanAnswers
from stack.objectives.tagging import Tagging, entities
from stack.objectives.task import Task

_KINDS = {QUERY: "query", PASSAGE: "passage", NEGATIVE: "negative"}


class Labelled(NamedTuple):
    """Tokens of a text that have a label."""

    start: int
    """From the text's first token on."""
    end: int
    label: str


class Told(NamedTuple):
    """What is said of a text of a row."""

    note: str
    """Its label, or what it is."""
    labelled: tuple[Labelled, ...] = ()
    """In order, apart."""


def count(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Labels of each row, [rows]: of words, tokens, sentences, texts, passages or queries."""
    if "task" in batch:
        names = {name.partition(".")[0] for name in batch if "." in name}
        return sum((count(_own(batch, name)) for name in names), np.zeros(len(batch["task"]), int))
    if "start" in batch:
        return (batch["start"] >= 0).sum(1)
    if "kinds" in batch:
        return (batch["kinds"] == QUERY).sum(1)
    labels = batch["labels"]
    return ((labels if labels.ndim == 2 else labels[..., 0]) >= 0).sum(1)


def of_row(objective: object, row: Mapping[str, np.ndarray]) -> tuple[Task | None, Mapping[str, np.ndarray]]:
    """The task of a row, and the fields as that has them; None: the objective is no task."""
    if isinstance(objective, MultiTask):
        name = list(objective.tasks)[int(row["task"])]
        return objective.tasks[name], _own(row, name)
    return objective if isinstance(objective, Task) else None, row


def _own(batch: Mapping[str, np.ndarray], task: str) -> dict[str, np.ndarray]:
    """Fields of one task of several, and those of all."""
    own = {name.removeprefix(f"{task}."): values for name, values in batch.items()}
    return {name: values for name, values in own.items() if "." not in name and name != "task"}


def tell(task: Task, row: Mapping[str, np.ndarray], unit: int, places: np.ndarray) -> Told:
    """What a row says of a text.

    Args:
      task: of the run.
      row: its fields, without the axis of rows.
      unit: number of the text, from 0.
      places: of its tokens.
    """
    match task:
        case Classification():
            label = row["labels"][unit]
            named = np.flatnonzero(label > 0) if task.options.multi_label else [int(label)]
            return Told(", ".join(task.options.labels[number] for number in named) or "no label")
        case Tagging():
            found = entities(row["labels"][places])
            return Told("", tuple(Labelled(*one[:2], task.options.labels[one.label]) for one in found))
        case SpanAnswers():
            first, last = (int(row[name][unit]) - int(places[0]) for name in ("start", "end"))
            return Told("", (Labelled(first, last + 1, "answer"),)) if first else Told("no answer")
        case KeySentences():
            return Told("", tuple(_sentences(row["labels"][places])))
        case Retrieval():
            return Told(f"{_KINDS[int(row['kinds'][unit])]} of record {row['records'][unit] + 1}")
        case Reranking():
            answers = "answers" if row["labels"][unit] > 0 else "does not answer"
            return Told(f"passage of record {row['records'][unit] + 1}: {answers}")
    return Told("")


def _sentences(labels: np.ndarray) -> Iterator[Labelled]:
    start = 1
    for end in np.flatnonzero(labels >= 0).tolist():
        if labels[end] > 0:
            yield Labelled(start, end + 1, "in the summary")
        start = end + 1

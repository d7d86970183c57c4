"""What a run would read: documents, lengths, packing, the mixture drawn, and rows as the model sees them."""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from stack.config import Config
from stack.config.errors import StackError
from stack.data import Data, open_data
from stack.data.examples import TRAINING
from stack.data.mixture import Schedule, training_order
from stack.data.tokenizer import Tokenizer
from stack.objectives import build
from stack.objectives.labels import with_labels
from stack.report import tasks
from stack.storage import durable

Kind = Literal["read", "predicted", "hidden"]
MOST_PLACES = 100_000
"""Of the training order that are counted."""
MOST_ROWS = 256
"""That are made to see how full they are."""
_MODES = ("read in both directions", "read from left to right", "a source of {} tokens and what follows")


class Span(NamedTuple):
    """Tokens in a row of one kind."""

    kind: Kind
    """`read`: given; `predicted`: given and, before that, predicted, or written; `hidden`: predicted in its
    place, where the model sees something else."""
    text: str
    label: str = ""
    """Of what is hidden: what stands behind it; of a task: the name of its label."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text of a row."""

    spans: tuple[Span, ...]
    note: str = ""
    """How it is read, where texts differ in that; of a task: what it is, or its label."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the training order."""

    place: int
    source: str
    texts: tuple[Text, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source."""

    name: str
    documents: int
    tokens: int
    megabytes: float
    lengths: tuple[int, ...]
    """Tokens of a document: the fewest, the median, the 90th and 99th percentile, the most."""
    rows: tuple[int, int]
    """To train on, and held out."""
    asked: float
    """Share of the rows counted that the weights ask for."""
    drawn: float
    """Share that it has among the rows counted."""


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """All of it."""

    title: str
    sources: tuple[Source, ...]
    filled: Mapping[str, float]
    """Share of the places that hold a token, by the axis they lie along."""
    sizes: Mapping[str, int]
    texts_per_row: float
    labels_per_row: float
    without_labels: float
    """Share of the rows that have none: nothing is learned of them."""
    places: int
    """Of the training order that were counted."""
    epochs: float
    """How often the run reads all rows."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def examine(config: Config, *, rows: int = 3) -> DataReport:
    """Opens the data of a config, preparing what the cache lacks, and looks at it.

    Args:
      config: of the run.
      rows: of the training order that are shown.

    Raises:
      StackError: what `open_data` raises.
    """
    config = with_labels(config)
    objective = build(config)
    data = open_data(config, examples=objective.examples)
    train, steps = data.train, config.train.steps * config.train.batch_size
    order = training_order(train, seed=config.seed, shuffle=config.data.shuffle)
    numbers = np.array([order[place] for place in range(min(steps, MOST_PLACES))], np.int64)
    made = partial(_make, data, config.seed, objective.fields)
    some = np.unique(np.linspace(0, len(numbers) - 1, min(MOST_ROWS, len(numbers))).astype(np.int64))
    batch = made(numbers[some], some)
    labels = tasks.count(batch)
    names = [_name(source) for source in config.data.read_sources]
    bounds = np.cumsum([0, *(part.num_rows for part in train.parts)])
    show = np.arange(min(rows, len(numbers)))
    shown = made(numbers[show], show)
    return DataReport(
        title=f"{config.name}: {config.objective.kind}, {config.data.tokenizer}",
        sources=tuple(_sources(data, names, np.searchsorted(bounds, numbers, side="right") - 1)),
        filled={axis: float((batch[name] > 0).mean()) for axis, name in _AXES.items() if name in batch},
        sizes={**objective.sizes},
        texts_per_row=float(batch["segments"].max(1).mean()),
        labels_per_row=float(labels.mean()),
        without_labels=float((labels == 0).mean()),
        places=len(numbers),
        epochs=steps / train.num_rows,
        rows=tuple(
            Row(
                place=int(place),
                source=names[int(np.searchsorted(bounds, numbers[place], side="right")) - 1],
                texts=tuple(
                    _texts({name: values[place] for name, values in shown.items()}, data.tokenizer, objective)
                ),
            )
            for place in show
        ),
        notes=data.notes,
    )


_AXES = {"length": "segments", "target_length": "target_segments"}


def _make(data: Data, seed: int, fields: Sequence[Any], rows: np.ndarray, places: np.ndarray) -> Any:
    """Rows by number, as they are drawn at places of the training order."""
    draws = np.stack([np.full_like(places, seed), np.full_like(places, TRAINING), places], axis=1)
    return data.train.examples.read(data.train, rows, draws, fields)


def _name(source: Any) -> str:
    return source.path or source.kind


def _sources(data: Data, names: Sequence[str], drawn: np.ndarray) -> Iterator[Source]:
    schedule = Schedule.of(data.train.weights)
    for number, (name, part, held) in enumerate(
        zip(names, data.train.parts, data.heldout.parts, strict=True)
    ):
        corpus = part.corpus
        # A document that is cut lies on both sides; those like others on none.
        documents = np.union1d(part.documents[:], held.documents[:])
        lengths = np.diff(corpus.offsets[:])[documents] - 2
        asked, whole = schedule.due(number, len(drawn))
        quantiles = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="nearest").astype(int)
        yield Source(
            name=name,
            documents=len(lengths),
            tokens=int(lengths.sum()),
            megabytes=float(corpus.num_bytes[:][documents].sum()) / 1e6,
            lengths=tuple(quantiles.tolist()),
            rows=(part.num_rows, held.num_rows),
            asked=asked / whole / len(drawn),
            drawn=float((drawn == number).mean()),
        )


def _texts(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, objective: object) -> Iterator[Text]:
    task, row = tasks.of_row(objective, row)
    for number in range(1, int(row["segments"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segments"] == number)
        tokens = row["tokens"][places].tolist()
        if task is not None:
            told = tasks.tell(task, row, number - 1, places)
            yield Text(spans=tuple(_labelled(told, tokens, tokenizer)), note=told.note)
            continue
        spans: list[tuple[Kind, int, int]]
        note = ""
        if "types" in row:
            types = row["types"][places]
            note = _MODES[int(types[0])].format(int((types == types[0]).sum()))
        if "reference" in row:
            note = "chosen" if number % 2 else "rejected"
        if "target_segments" in row:
            written = row["labels"][row["target_segments"] == number].tolist()
            spans = [("read", token, -1) for token in tokens] + [
                ("predicted", token, -1) for token in written
            ]
        elif "masked" in row:
            hidden = {
                int(place): int(label)
                for place, label in zip(row["masked"], row["labels"], strict=True)
                if label >= 0
            }
            spans = [
                ("hidden", token, hidden[place]) if place in hidden else ("read", token, -1)
                for place, token in zip(places.tolist(), tokens, strict=True)
            ]
        else:
            labels = row["labels"][places].tolist()
            was = [False, *(label >= 0 for label in labels)]
            tokens += [label for label in labels[-1:] if label >= 0]
            spans = [
                ("predicted" if predicted else "read", token, -1)
                for token, predicted in zip(tokens, was[: len(tokens)], strict=True)
            ]
        yield Text(spans=tuple(_joined(spans, tokenizer)), note=note)


def _labelled(told: tasks.Told, tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[Span]:
    """The text of a task, with what has a label of its own."""
    end = 0
    for start, after, label in told.labelled:
        if start > end:
            yield Span(kind="read", text=tokenizer.decode(tokens[end:start], marks=True))
        yield Span(kind="predicted", text=tokenizer.decode(tokens[start:after], marks=True), label=label)
        end = after
    if tokens[end:]:
        yield Span(kind="read", text=tokenizer.decode(tokens[end:], marks=True))


def _joined(tokens: Sequence[tuple[Kind, int, int]], tokenizer: Tokenizer) -> Iterator[Span]:
    """Neighbours of one kind as one span; hidden ones by themselves."""
    waiting: list[int] = []
    kind: Any = None
    for what, token, label in tokens:
        if waiting and what != kind:
            yield Span(kind=kind, text=tokenizer.decode(waiting, marks=True))
            waiting = []
        kind = what
        if what == "hidden":
            yield Span(
                kind="hidden",
                text=tokenizer.decode([token], marks=True),
                label=tokenizer.decode([label], marks=True),
            )
        else:
            waiting.append(token)
    if waiting:
        yield Span(kind=kind, text=tokenizer.decode(waiting, marks=True))


def as_text(report: DataReport) -> Iterator[str]:
    """The report, line by line."""
    yield report.title
    for source in report.sources:
        yield (
            f"source    {source.name}: {source.documents:,} documents, {source.tokens:,} tokens,"
            f" {source.megabytes:,.1f} MB of text"
        )
        yield "          tokens of a document: " + ", ".join(
            f"{word} {length:,}" for word, length in zip(_LENGTHS, source.lengths, strict=True)
        )
        train, held = source.rows
        yield f"          {train:,} rows to train on, {held:,} held out"
    yield from (f"rows      {line}" for line in _packing(report))
    for source in report.sources:
        yield f"drawn     {source.drawn:.2%} of {source.name}, asked {source.asked:.2%}"
    yield from (f"note      {note}" for note in report.notes)
    for row in report.rows:
        yield ""
        yield f"row {row.place} of the training order, of {row.source}"
        for text in row.texts:
            yield "  " + (f"({text.note}) " if text.note else "") + "".join(map(_marked, text.spans))
    if report.rows:
        yield ""
        yield "what is predicted stands in ⟦ ⟧; what is hidden, or has a label, as ⟦seen → label⟧"


_LENGTHS = ("fewest", "median", "90%", "99%", "most")


def _packing(report: DataReport) -> Iterator[str]:
    full = " and ".join(
        f"{share:.1%} of {report.sizes[axis]:,} {'tokens' if axis == 'length' else 'tokens written'}"
        for axis, share in report.filled.items()
    )
    yield f"full to {full}; {report.texts_per_row:.2f} texts and {report.labels_per_row:.1f} labels each"
    if report.without_labels:
        yield f"{report.without_labels:.1%} of them have no label: the objective finds nothing to predict"
    yield f"the run reads all of them {report.epochs:.2f} times; counted: the first {report.places:,}"


def _marked(span: Span) -> str:
    if span.kind == "hidden" or span.label:
        return f"⟦{_visible(span.text)} → {_visible(span.label)}⟧"
    text = _visible(span.text)
    return f"⟦{text}⟧" if span.kind == "predicted" else text


def _visible(text: str) -> str:
    """Text that cannot move the cursor; a new line is told."""
    return _printable(text.replace("\n", "⏎"))


def _printable(text: str, kept: str = "") -> str:
    return "".join(
        letter if letter.isprintable() or letter in kept else "\N{REPLACEMENT CHARACTER}" for letter in text
    )


def as_html(report: DataReport) -> str:
    """The report as a page that needs no other file."""
    rows = "".join(
        f"<tr><td>{html.escape(source.name)}<td>{source.documents:,}<td>{source.tokens:,}"
        f"<td>{source.megabytes:,.1f}"
        + "".join(f"<td>{length:,}" for length in source.lengths)
        + f"<td>{source.rows[0]:,}<td>{source.rows[1]:,}<td>{source.asked:.2%}<td>{source.drawn:.2%}"
        for source in report.sources
    )
    heads = ("source", "documents", "tokens", "MB", *_LENGTHS, "rows", "held out", "asked", "drawn")
    notes = "".join(f"<p class=note>{html.escape(note)}</p>" for note in report.notes)
    samples = "".join(
        f"<h3>Row {row.place} of the training order, of {html.escape(row.source)}</h3>"
        + "".join(
            "<div class=text>"
            + (f"<i>{html.escape(text.note)}</i>" if text.note else "")
            + "".join(map(_span, text.spans))
            + "</div>"
            for text in row.texts
        )
        for row in report.rows
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(report.title)}</title>'
        f"<style>{_STYLE}</style><h1>{html.escape(report.title)}</h1>"
        f"<table><tr>{''.join(f'<th>{head}' for head in heads)}{rows}</table>"
        + "".join(f"<p>Rows: {html.escape(line)}.</p>" for line in _packing(report))
        + notes
        + '<p><span class="read">given</span> <span class="predicted">predicted</span>'
        ' <span class="hidden">seen<b>label</b></span></p>' + samples + "</html>\n"
    )


_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;display:block;overflow-x:auto}
th,td{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #8884}
th:first-child,td:first-child{text-align:left}
.text{font:13px/1.6 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;
 border-left:3px solid #8886;padding:.2rem .8rem;margin:.6rem 0}
.text i{display:block;opacity:.7}
.predicted{background:#2a9d5c2e}
.hidden{background:#d9822b38;border-radius:3px;padding:0 2px}
.hidden b,.predicted b{background:#2a9d5c4d;margin-left:2px;padding:0 2px}
.note{opacity:.8}
"""


def _span(span: Span) -> str:
    text, label = (html.escape(_printable(part, kept="\n\t")) for part in (span.text, span.label))
    label = f"<b>{label}</b>" if span.kind == "hidden" or span.label else ""
    return f'<span class="{span.kind}">{text}{label}</span>'


def write_html(report: DataReport, path: Path) -> None:
    """Writes the page.

    Raises:
      StackError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, as_html(report))
    except OSError as error:
        raise StackError(f"{path}: cannot be written: {error.strerror}; give another path") from error

"""What a task's model makes of records, in order, on the whole mesh."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from stack.config.errors import StackError
from stack.data.records import Record
from stack.data.tokenizer import Tokenizer
from stack.data.units import Row, UnitEncoder, UnitExamples, lay_out
from stack.objectives.completion import Completion
from stack.objectives.multi_task import MultiTask
from stack.objectives.task import Answer, Asked, Task
from stack.parallel import mesh as meshes
from stack.parallel.zero import gather_module
from stack.step.program import Program

CHUNK = 16
"""Batches that are sorted by length together."""
SHORTEST_ROW = 32
"""Rows are padded to a power of two from here on, so that few lengths are compiled."""


class Given(NamedTuple):
    """A record, and where it stands."""

    record: dict[str, Any]
    text: str
    """As JSON, with its place: see `stack.data.records.Record`."""


def predict(
    program: Program,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    records: Iterable[Given | Mapping[str, Any]],
    *,
    task: str | None = None,
) -> Iterator[Answer]:
    """An answer to each record, in order; `Task.answer` says what it holds.

    Those that are too long are cut, and have `cut`; read in windows; or have `left_out` alone, as
    `objective.too_long` says. Every process of a run gives the same records and gets all answers.

    Args:
      program: of the run.
      params: that lie as `program.parameters`.
      tokenizer: of the run.
      records: without labels, or with labels that are not read.
      task: of several, the one that is asked.

    Raises:
      StackError: the objective answers no records, or a record that cannot be read; with its place.
    """
    objective = asked_task(program, task)
    given = map(_given, itertools.count(), records)
    size = program.config.eval.batch_size or program.config.train.batch_size
    if isinstance(objective, Completion):
        return _written(program, params, tokenizer, given, size)
    if not isinstance(objective, Task):
        raise StackError(
            f"objective.kind={program.config.objective.kind} has no answers to records; ask for texts with:"
            " stack sample RUN PROMPT"
        )
    return _scored(program, params, tokenizer, given, size, objective)


def _given(number: int, record: Given | Mapping[str, Any]) -> Given:
    """A record with its place, which of one that has none is its number."""
    if isinstance(record, Given):
        return record
    return Given(dict(record), Record.at(json.dumps(record), f"record {number}"))


def asked_task(program: Program, task: str | None) -> Any:
    """The objective, or the one of its tasks that is asked.

    Raises:
      StackError: there are several tasks and it is none of them, or there is but one.
    """
    objective = program.objective
    if isinstance(objective, MultiTask):
        return objective.only(task)
    if task is not None:
        raise StackError(f"--head {task}: the run has one task; leave it out")
    return objective


def _scored(
    program: Program,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    records: Iterable[Given],
    size: int,
    objective: Task,
) -> Iterator[Answer]:
    encoder = objective.encoder(tokenizer, labelled=False)
    examples = UnitExamples(encoder, objective.label, sizes=objective.sizes, least=1)
    score = jax.jit(partial(_score, program, objective))
    for some in itertools.batched(records, size * CHUNK):
        rows, cut = _rows(encoder, tokenizer, some)
        flat = [(number, row) for number, each in enumerate(rows) for row in each]
        order = sorted(range(len(flat)), key=lambda place: -len(flat[place][1].tokens))
        outputs: dict[int, Mapping[str, np.ndarray]] = {}
        with meshes.use(program.mesh):
            for places in itertools.batched(order, size):
                here = [flat[place][1] for place in places]
                made = jax.device_get(score(params, _batch(program, objective, examples, here, size)))
                for number, place in enumerate(places):
                    row = flat[place][1]
                    length = row.num_units if objective.axis == "units" else len(row.tokens)
                    outputs[place] = {name: values[number, :length] for name, values in made.items()}
        of = _places(flat, len(some))
        for given, places, is_cut in zip(some, of, cut, strict=True):
            if not places:
                yield {"left_out": "it is too long"}
                continue
            asked = Asked(
                record=given.record,
                rows=[flat[place][1] for place in places],
                outputs=[outputs[place] for place in places],
            )
            answer = objective.answer(asked, tokenizer)
            yield answer | {"cut": True} if is_cut and len(places) == 1 else answer


def _places(flat: Sequence[tuple[int, Row]], number: int) -> list[list[int]]:
    """The rows of each record, in order."""
    found: list[list[int]] = [[] for _ in range(number)]
    for place, (record, _) in enumerate(flat):
        found[record].append(place)
    return found


def _rows(
    encoder: UnitEncoder, tokenizer: Tokenizer, some: Sequence[Given]
) -> tuple[list[list[Row]], list[bool]]:
    """The rows of each record, and whether it is cut."""
    bos, eos = np.array([tokenizer.bos]), np.array([tokenizer.eos])
    made = encoder.encode([given.text for given in some])
    rows = [
        [lay_out([np.concatenate([bos, part.tokens, eos])], [part.marks]) for part in each.parts]
        for each in made
    ]
    return rows, [each.is_cut for each in made]


def _batch(
    program: Program, objective: Task, examples: UnitExamples, rows: Sequence[Row], size: int
) -> dict[str, jax.Array]:
    longest = max(len(row.tokens) for row in rows)
    most = program.config.data.sequence_length
    sizes = dict(objective.sizes) | {
        "length": min(max(SHORTEST_ROW, 1 << (longest - 1).bit_length()), most),
        "units": 1 << (max(row.num_units for row in rows) - 1).bit_length(),
    }
    filled = [*rows, *[lay_out([], [])] * (size - len(rows))]
    fields = {field.name: field for field in objective.fields}
    batch = examples.batch(filled, objective.fields, sizes) | {"example": np.zeros(size, np.int32)}
    return {
        name: jax.make_array_from_callback(
            values.shape, program.layout.sharding(*fields[name].axes), values.__getitem__
        )
        for name, values in batch.items()
    }


def _score(
    program: Program, objective: Task, params: dict[str, Any], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The task's scores, on every device."""
    layout = program.layout
    model = program.merge(params)
    weights = model if layout.zero == 3 else gather_module(model, layout)
    scores = objective.score(weights, batch, program.execution())
    return scores if layout.trivial else jax.tree.map(_everywhere, scores)


def _everywhere(values: jax.Array) -> jax.Array:
    return jax.reshard(values, jax.sharding.PartitionSpec())


def _written(
    program: Program, params: dict[str, Any], tokenizer: Tokenizer, records: Iterable[Given], size: int
) -> Iterator[Answer]:
    """`text`: what is written after each prompt, as `config.sample` says."""
    from stack.inference.text import generate_texts

    objective = cast("Completion", program.objective)
    for some in itertools.batched(records, size):
        prompts = [objective.prompt(given.record, getattr(given.text, "place", "a record")) for given in some]
        for text in generate_texts(program, params, tokenizer, prompts):
            yield {"text": text}

"""What a task's model makes of records, in order, on the whole mesh."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from stack.config.errors import StackError
from stack.data.examples import Encoded
from stack.data.records import Record
from stack.data.tokenizer import Tokenizer
from stack.data.units import Row, UnitExamples, fitting, lay_out
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
    return _scored(Scorer(program, params, tokenizer, objective), tokenizer, given)


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


class Scored(NamedTuple):
    """What a task's model makes of a record."""

    asked: Asked
    """Its rows, none where it is left out, and their scores."""
    is_cut: bool
    """Whether some of it is read nowhere."""


class Scorer:
    """Reads records and scores them, in batches of rows of like length on the whole mesh."""

    def __init__(
        self,
        program: Program,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        objective: Task,
        *,
        cuts: bool = False,
    ) -> None:
        """The model.

        Args:
          program: of the run.
          params: that lie as `program.parameters`.
          tokenizer: of the run.
          objective: of the run, or one of its tasks.
          cuts: a record that is too long is cut, whatever `objective.too_long` says.
        """
        self.program = program
        self.objective = objective
        self.size = program.config.eval.batch_size or program.config.train.batch_size
        self.encoder = self.objective.encoder(tokenizer, labelled=False)
        if cuts:
            fit = fitting("cut", self.encoder.sequence_length)
            self.encoder = replace(self.encoder, fit=fit, fit_key="cut")
        self.examples = UnitExamples(
            self.encoder, self.objective.row_fields, sizes=self.objective.sizes, least=1
        )
        self._bos, self._eos = np.array([tokenizer.bos]), np.array([tokenizer.eos])
        self._params = params
        self._score = jax.jit(partial(_score, program, objective))

    @property
    def chunk(self) -> int:
        """Records that are best given together."""
        return self.size * CHUNK

    def __call__(self, some: Sequence[Given]) -> list[Scored]:
        """The scores of records, in order.

        Raises:
          StackError: a record that cannot be read; with its place.
        """
        fitted = self.encoder.encode([given.text for given in some])
        rows = [[self._row(part) for part in each.parts] for each in fitted]
        flat = [row for each in rows for row in each]
        outputs = iter(self._outputs(flat))
        return [
            Scored(
                Asked(record=given.record, rows=own, outputs=list(itertools.islice(outputs, len(own)))),
                each.is_cut,
            )
            for given, own, each in zip(some, rows, fitted, strict=True)
        ]

    def _row(self, part: Encoded) -> Row:
        return lay_out([np.concatenate([self._bos, part.tokens, self._eos])], [part.marks])

    def _outputs(self, rows: Sequence[Row]) -> list[Mapping[str, np.ndarray]]:
        """Of each row, without padding."""
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place].tokens))
        outputs: dict[int, Mapping[str, np.ndarray]] = {}
        with meshes.use(self.program.mesh):
            for places in itertools.batched(order, self.size):
                here = [rows[place] for place in places]
                made = jax.device_get(self._score(self._params, self._batch(here)))
                for number, place in enumerate(places):
                    row = rows[place]
                    length = row.num_units if self.objective.axis == "units" else len(row.tokens)
                    outputs[place] = {name: values[number, :length] for name, values in made.items()}
        return [outputs[place] for place in range(len(rows))]

    def _batch(self, rows: Sequence[Row]) -> dict[str, jax.Array]:
        longest = max(len(row.tokens) for row in rows)
        most = self.program.config.data.sequence_length
        sizes = dict(self.objective.sizes) | {
            "length": min(max(SHORTEST_ROW, 1 << (longest - 1).bit_length()), most),
            "units": 1 << (max(row.num_units for row in rows) - 1).bit_length(),
        }
        filled = [*rows, *[lay_out([], [])] * (self.size - len(rows))]
        fields = {field.name: field for field in self.objective.fields}
        batch = self.examples.batch(filled, self.objective.fields, sizes)
        batch |= {"example": np.zeros(self.size, np.int32)}
        return {
            name: jax.make_array_from_callback(
                values.shape, self.program.layout.sharding(*fields[name].axes), values.__getitem__
            )
            for name, values in batch.items()
        }


def _scored(scorer: Scorer, tokenizer: Tokenizer, records: Iterable[Given]) -> Iterator[Answer]:
    for some in itertools.batched(records, scorer.chunk):
        for asked, is_cut in scorer(some):
            if len(asked.rows) < scorer.objective.least_rows(asked.record):
                yield {"left_out": "it is too long"}
                continue
            answer = scorer.objective.answer(asked, tokenizer)
            yield answer | {"cut": True} if is_cut else answer


def _score(
    program: Program, objective: Task, params: dict[str, Any], batch: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The task's scores, on every device."""
    layout = program.layout
    model = program.merge(params)
    weights = model if layout.zero == 3 else gather_module(model, layout)
    return layout.everywhere(objective.score(weights, batch, program.execution()))


def _written(
    program: Program, params: dict[str, Any], tokenizer: Tokenizer, records: Iterable[Given], size: int
) -> Iterator[Answer]:
    """`text`: what is likeliest after each prompt, of `sample.length` tokens at most."""
    from stack.inference.text import encode_prompts, generate_texts

    objective = cast("Completion", program.objective)
    config = program.config.replace("sample.temperature=0.0")
    greedy = replace(program, config=config)
    room = config.model.max_length - (config.sample.length if config.model.shape == "decoder" else 0)
    for some in itertools.batched(records, size):
        places = [getattr(given.text, "place", "a record") for given in some]
        prompts = [objective.prompt(given.record, place) for given, place in zip(some, places, strict=True)]
        lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts, program.objective)]
        for place, length in zip(places, lengths, strict=True):
            if length > room and objective.records.too_long != "leave_out":
                raise StackError(
                    f"{place}: a prompt of {length:,} tokens, and there is room for {room:,} beside what is"
                    " written; lower sample.length, or set objective.too_long=leave_out"
                )
        fitting_ones = [prompt for prompt, length in zip(prompts, lengths, strict=True) if length <= room]
        written = iter(generate_texts(greedy, params, tokenizer, fitting_ones) if fitting_ones else [])
        for length in lengths:
            yield {"text": next(written)} if length <= room else {"left_out": "its prompt is too long"}

"""What the model that a run began with tells of all its texts: computed once, and kept with the data."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stack.config import StackError
from stack.data import packing
from stack.data.atomic import cache_folder
from stack.data.dataset import Data, Dataset, digest
from stack.data.entry import EntryWriter, log, open_entry, read_entry, remove_entry
from stack.data.loader import heldout_batches, prefetch
from stack.data.tokenizer import Tokenizer
from stack.evaluation.evaluate import one_behind
from stack.objectives.protocol import Referenced
from stack.parallel import mesh as meshes
from stack.parallel.messages import all_say
from stack.parallel.zero import gather_module
from stack.step import state as states
from stack.step.program import Program
from stack.train import starting
from stack.train.ledger import Ledger

if TYPE_CHECKING:
    from stack.train.trainer import Trainer

_FORMAT = 1  # Raise it when what is computed changes: old entries are then not found.
_AS_IT_RUNS = {"scan_unroll"}
"""Fields of a model that change none of its numbers."""


def with_reference(
    program: Program,
    data: Data,
    tokenizer: Tokenizer,
    ledger: Ledger,
    state: Callable[[], states.State],
) -> Data:
    """The data with what the reference of the objective tells of it; itself where there is none.

    The reference is the model at step 0. What it tells is kept under the data's fingerprint, its weights' and
    its config; where a process of the run lacks it, all compute it anew.

    Args:
      program: of the run; every process calls.
      data: of the run.
      tokenizer: of the run.
      ledger: knows where the first parameters came from.
      state: gives the run's; past step 0 the first parameters are read again.

    Raises:
      StackError: it is computed, and the first parameters are not there, or give no finite numbers; the cache
        cannot be written.
    """
    if not isinstance(program.objective, Referenced):
        return data
    sides = {"train": data.train, "heldout": data.heldout}
    told = _completed(program, sides, data.fingerprint, tokenizer, ledger, state)
    return replace(data, train=told["train"], heldout=told["heldout"])


def completed(trainer: "Trainer", dataset: Dataset) -> Dataset:
    """The same of rows that are none of a run's data, for a trainer that has parameters.

    Raises:
      StackError: see `with_reference`.
    """
    program, state = trainer.program, trainer.state
    if not isinstance(program.objective, Referenced):
        return dataset
    assert state is not None, "it is opened from a run"
    data = program.config.data
    keys = [part.corpus.key for part in dataset.parts]
    content = [packing.VERSION, keys, data.sequence_length, data.packed, dataset.examples.packing]
    sides = {"rows": dataset}
    return _completed(program, sides, content, trainer.words, trainer.ledger, lambda: state)["rows"]


def _completed(
    program: Program,
    sides: Mapping[str, Dataset],
    content: object,
    tokenizer: Tokenizer,
    ledger: Ledger,
    state: Callable[[], states.State],
) -> dict[str, Dataset]:
    """Rows with what the reference tells of them; `content` names what they are."""
    now, origin = state(), ledger.origin  # Which restoring the state may tell.
    folder = cache_folder(program.config.data.cache_dir) / f"reference-{_key(program, content, origin)}"
    entry = read_entry(folder, warn=log)
    if not all_say(entry is not None):
        remove_entry(folder)  # Of another time, and perhaps of another mesh: the others' would differ.
        with meshes.use(program.mesh):
            is_first = ledger.begins and not int(now["step"])
            params = states.join(now) if is_first else starting.again(program, tokenizer, origin)
            values = _compute(program, sides, params)
        if not all(np.isfinite(some).all() for some in values.values()):
            raise StackError(
                f"init_from: {origin['source']} gives log-probabilities that are not finite; give weights"
                " that are sound"
            )

        def write(target: EntryWriter) -> None:
            for side, some in values.items():
                target.whole(side, some)
            target.finish(source=origin["source"])

        entry = open_entry(folder, write, warn=log)
    assert entry is not None
    return {name: _with(side, entry[1][name]) for name, side in sides.items()}


def _with(dataset: Dataset, values: Any) -> Dataset:
    examples: Any = dataset.examples
    return replace(dataset, examples=examples.with_reference(values))


def _key(program: Program, content: object, origin: Mapping[str, Any]) -> str:
    config = program.config
    model = config.model.model_dump(mode="json", exclude=_AS_IT_RUNS)
    # What of the first parameters was not taken came from the seed.
    return digest([_FORMAT, content, origin["digest"], config.seed, model])


def _compute(program: Program, sides: Mapping[str, Dataset], params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Log-probabilities of the texts of all rows, one row after another, float32."""
    score = jax.jit(partial(_score, program))
    with _progress(show=jax.process_index() == 0) as progress:
        task = progress.add_task("reference", total=sum(side.num_rows for side in sides.values()))
        return {
            name: _of_rows(
                program,
                side,
                lambda batch: score(params, batch),
                lambda rows: progress.advance(task, rows),
            )
            for name, side in sides.items()
        }


def _of_rows(
    program: Program,
    dataset: Dataset,
    score: Callable[[dict[str, jax.Array]], jax.Array],
    advance: Callable[[int], None],
) -> np.ndarray:
    config = program.config
    size = config.eval.batch_size or config.train.batch_size
    reference = cast("Referenced", program.objective).reference
    fields = tuple(field for field in program.objective.fields if field.name != reference)
    make, number = heldout_batches(dataset, fields=fields, batch_size=size, layout=program.layout)

    def told() -> Iterator[np.ndarray]:
        for batch, values in enumerate(one_behind(map(score, prefetch(make, range(number))))):
            rows = range(batch * size, min((batch + 1) * size, dataset.num_rows))
            for place, row in enumerate(rows):
                yield values[place, : 2 * len(dataset.piece_numbers(row))]
            advance(len(rows))

    return np.concatenate([np.zeros(0, np.float32), *told()])


def _score(program: Program, params: dict[str, Any], batch: dict[str, jax.Array]) -> jax.Array:
    """[batch, texts] float32, on every device."""
    layout = program.layout
    model = program.merge(params)
    model = model if layout.zero == 3 else gather_module(model, layout)
    told, _ = cast("Referenced", program.objective).log_probs(model, batch, program.execution())
    return told if layout.trivial else jax.reshard(told, P())


def _progress(*, show: bool) -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("Computing the {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (show and (console.is_terminal or console.is_jupyter)),
    )

"""A step done once more, and compared with what the run had: is it the program, or the machine?"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from stack.config.errors import ConfigError, StackError
from stack.parallel import mesh as meshes
from stack.step import state as states
from stack.train import starting
from stack.train.bits import different_leaves
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.weights.origin import describe

if TYPE_CHECKING:
    from stack.train.trainer import Trainer


def replay(trainer: "Trainer", step: int) -> Iterator[str]:
    """Goes from the newest sound checkpoint before a step to it, does that step twice, and compares.

    Loss and gradient norm with every record of the history, the two states with each other and, if it was
    saved, with the checkpoint of the step. Nothing is written.

    Args:
      trainer: of the run.
      step: optimizer steps taken after it, from 1.

    Yields:
      What was found, a line each.

    Raises:
      ConfigError: the run has no such step.
      StackError: something differs; the last line says what, and what it means.
    """
    if not 1 <= step <= trainer.config.train.steps:
        raise ConfigError(f"--replay {step}: a step is from 1 to train.steps={trainer.config.train.steps}")
    if trainer.config.average.folder is not None:
        raise ConfigError(
            "--replay: what this run took of the others at average.folder is not kept; replay one whose"
            " instances are all its own"
        )
    with Checkpoints(trainer.ledger.store) as checkpoints, meshes.use(trainer.mesh):
        whole = states.abstract(trainer.program)
        notes: list[str] = []
        state = trainer.ledger.restore(
            checkpoints, whole, data=lambda: trainer.data.fingerprint, warn=notes.append, below=step
        )
        first = trainer.ledger.position.step
        begun = f"the checkpoint of step {first:,}" if state is not None else "the seed"
        if state is None:
            state, origin = starting.begin(trainer.program, trainer.tokenizer, warn=notes.append)
            begun = describe(origin) or begun
            _check_same_weights(checkpoints, origin)
        yield from notes
        state = states.completed(trainer.program, state)
        recorded = {one["step"]: one for one in trainer.history.records if one["kind"] == "train"}
        compared, problems = 0, []
        batch = trainer.batch
        for number in range(first, step):
            rows = batch(number)
            before = jax.tree.map(jnp.copy, state) if number + 1 == step else None
            after, metrics = trainer.steps.advance(number, state, rows)  # The very program of the run.
            if before is not None:
                twice, _ = trainer.steps.advance(number, before, rows)
                names = different_leaves(after, twice)
                if names:
                    problems.append(
                        f"step {step:,} done twice from the same state differs in {names[0]} and"
                        f" {len(names) - 1} more: a device computes wrongly, or a kernel is not deterministic"
                    )
            state = after
            if (record := recorded.get(number + 1)) is not None:
                compared += 1
                values = trainer.steps.read(metrics)
                for name in ("loss", "grad_norm"):
                    value = values[name]
                    if value != record[name] and not (value != value and record[name] != record[name]):
                        problems.append(
                            f"step {number + 1:,}: {name} is {value!r}, the run had {record[name]!r}"
                        )
        yield f"replayed steps {first + 1:,} to {step:,} from {begun}; the last one twice"
        yield f"compared with {compared} records of the history"
        if step in checkpoints.steps():
            saved = checkpoints.restore(step, whole)
            names = different_leaves(state, saved)
            yield f"compared with the checkpoint of step {step:,}"
            if names:
                problems.append(
                    f"the checkpoint of step {step:,} differs in {names[0]} and {len(names) - 1} more"
                )
        if not problems:
            yield "every bit is the same"
            return
        yield from problems
        raise StackError(
            f"step {step:,} is not what it was: on the same machine, mesh and versions that means broken"
            " hardware or a kernel that is not deterministic; on others rounding may differ"
        )


def _check_same_weights(checkpoints: Checkpoints, origin: Mapping[str, Any]) -> None:
    """Refuses weights that are no longer those the run began with."""
    step = checkpoints.latest()
    then = {} if step is None else checkpoints.extra(step).get("origin", {})
    if step is not None and then.get("digest") != origin.get("digest"):
        now, before = (
            f"{one.get('source', 'the seed')} (digest {one.get('digest')})" for one in (origin, then)
        )
        raise StackError(f"{now} has other weights than this run began with, of {before}; restore those")

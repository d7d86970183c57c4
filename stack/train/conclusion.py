"""How a run ends: with the parameters of its best checkpoint, if it picks one, and what is told of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stack.step import state as states
from stack.train import record as records
from stack.train.best import describe, extension
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import DamagedError
from stack.train.watch.endings import ENDINGS, Ending

if TYPE_CHECKING:
    from stack.train.trainer import Trainer


def endings_of(trainer: "Trainer") -> list[Ending]:
    """What its objective shows at the end."""
    return [ENDINGS[name] for name in trainer.program.objective.endings]


def conclude(
    trainer: "Trainer",
    checkpoints: Checkpoints,
    *,
    reached: int,
    tell: Callable[[int, dict[str, float]], object] | None,
) -> dict[str, Any]:
    """The last evaluation, or the best one, and what the objective shows.

    Where `eval.metric` picks the best checkpoint, the trainer has its parameters afterwards.

    Args:
      trainer: whose run has come to its end.
      checkpoints: of the run.
      reached: the last step.
      tell: is told of an evaluation of that step, if one is made; None: it was told before.

    Returns:
      What is held out by metric, `rows` to show, and more.
    """
    best, config = trainer.best, trainer.config
    summary: dict[str, Any] = {"folder": str(trainer.folder), "longer": records.extension(config)}
    rows: list[Any] = []
    told = best.told
    if trainer.data.heldout.num_rows and tell is not None and reached not in told:
        told = {reached: trainer.evaluate()}
        tell(reached, told[reached])
    if (ended := best.ended) is not None:
        rows.append(("ended", f"early {ended}"))
        summary |= {"ended": ended, "longer": [extension(config.eval)]}
    step = _take_best(trainer, checkpoints, reached) if best.is_asked_for else None
    if step is not None:
        told_of = describe(best.values, config.eval, step)
        rows.append(("best", f"step {step:,} of {reached:,} ({told_of}), of which the rest is"))
        summary["best_step"] = step
    if trainer.data.heldout.num_rows:
        summary |= (told | best.told).get(reached if step is None else step) or trainer.evaluate()
    for ending in endings_of(trainer):
        more = ending.show(trainer, summary)
        rows += more.pop("rows", [])
        summary |= more
    return summary | {"rows": rows}


def _take_best(trainer: "Trainer", checkpoints: Checkpoints, reached: int) -> int | None:
    """Gives the trainer the parameters of the best checkpoint; its step, None where there is none."""
    checkpoints.wait()
    step = trainer.best.among(checkpoints.newest_first())
    if step is None or step == reached:
        return step
    assert trainer.state is not None, "a run that ends has a state"
    trainer.state = states.without_training(trainer.state)  # Its memory.
    try:
        trainer.state = trainer.ledger.parameters(checkpoints, step, states.abstract(trainer.program))
    except DamagedError as error:
        trainer.best.warn(f"{error}; what is shown is of step {reached:,}")
        return None
    return step

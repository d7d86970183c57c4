"""The best evaluation of a run, whose checkpoint is kept, and the end of a run that betters it no more.

All of it follows from the metric of the evaluations so far, which every checkpoint holds: a run that goes on
decides as one that was never interrupted. To read it takes no JAX.
"""

import contextlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stack.config.errors import ConfigError, StackError
from stack.config.train import EvalConfig
from stack.train.watch.listeners import Listener
from stack.train.watch.metrics import FILE, read_history

Values = Mapping[int, float]
"""The metric of evaluations by their step."""
_KEPT = "evaluations"
"""What a checkpoint has of a `Best`: the metric, and [step, value] of each evaluation."""


class UnknownMetricError(ConfigError):
    """An evaluation tells no metric of the name that is asked for."""

    is_of_all = True  # The names are the same everywhere.


def best_step(values: Values, config: EvalConfig, among: Collection[int] | None = None) -> int | None:
    """The step of the best value, of equal ones the first; None where none is finite.

    Args:
      values: of all evaluations.
      config: which way is better.
      among: the steps that may be it; None: all.
    """
    those = [
        (config.sign * value, -step)
        for step, value in values.items()
        if math.isfinite(value) and (among is None or step in among)
    ]
    return -max(those)[1] if those else None


def ended(values: Values, config: EvalConfig) -> str | None:
    """Why a run with these evaluations ends, and how it would go on; None: it does not.

    Only evaluations of `eval.every` count, not one at the end of a run that has been made longer since.
    """
    if config.patience is None:
        return None
    since, waited = None, 0
    for step, value in sorted(values.items()):
        if config.every and step % config.every:
            continue
        gain = config.sign * (value - (-config.sign * math.inf if since is None else values[since]))
        if gain > config.min_gain and math.isfinite(value):
            since, waited = step, 0
        else:
            waited += 1
    if waited < config.patience:
        return None
    at = (
        "no evaluation was finite"
        if since is None
        else f"{values[since]:.6g} of step {since:,} is not bettered"
    )
    more = f" by more than eval.min_gain={config.min_gain:g}" if config.min_gain else ""
    told = f"at step {max(values):,}: eval.metric={config.metric}, {at}{more} in"
    return f"{told} {waited} evaluations; to go on: {extension(config)}"


def extension(config: EvalConfig) -> str:
    """The override that lets a run go on that ended early."""
    return f"eval.patience={2 * (config.patience or 1)}"


def values_of(
    kept: Mapping[str, Any], logged: Iterable[Mapping[str, Any]], metric: str | None
) -> dict[int, float]:
    """The values that a checkpoint and the history know of.

    Args:
      kept: what listeners have in the checkpoint.
      logged: records of evaluations.
      metric: the name.
    """
    values = {int(one["step"]): float(one[metric]) for one in logged if metric in one} if metric else {}
    there = kept.get(_KEPT, {})
    if metric is not None and there.get("metric") == metric:
        values |= {int(step): math.nan if value is None else float(value) for step, value in there["values"]}
    return dict(sorted(values.items()))


def read_values(folder: Path, kept: Mapping[str, Any], metric: str | None) -> dict[int, float]:
    """The same of a run folder, and what listeners have in its newest checkpoint.

    Raises:
      StackError: its history cannot be read.
    """
    records = read_history(folder) if (folder / FILE).is_file() else []
    return values_of(kept, (one for one in records if one["kind"] == "heldout"), metric)


def find_best(folder: Path, kept: Mapping[str, Any], config: EvalConfig, saved: Sequence[int]) -> int:
    """The step of the best checkpoint of a run.

    Args:
      folder: of the run.
      kept: what listeners have in its newest checkpoint.
      config: what it is best by.
      saved: the steps of its checkpoints.

    Raises:
      StackError: no metric is named, or no checkpoint was evaluated.
    """
    if config.metric is None:
        raise StackError(
            f"{folder} picks no best checkpoint, as its eval.metric is null; name a metric of its"
            " evaluations, as eval.metric=loss, to take the best of the checkpoints that it keeps"
        )
    step = best_step(read_values(folder, kept, config.metric), config, saved)
    if step is None:
        raise StackError(
            f"{folder}: no evaluation with eval.metric={config.metric} is of a checkpoint it keeps; train it"
            " with that metric, or name one that its evaluations tell"
        )
    return step


def describe(values: Values, config: EvalConfig, step: int) -> str:
    """What a checkpoint is best by."""
    return f"{config.metric} {values[step]:.6g}"


class Best(Listener):
    """Hears evaluations; knows the best, and whether the run ends."""

    def __init__(self, config: EvalConfig) -> None:
        """Knows of none."""
        self._config = config
        self.values: dict[int, float] = {}
        """The metric of evaluations by their step, those of earlier starts too."""
        self.told: dict[int, dict[str, float]] = {}
        """All metrics of those of this start."""

    @property
    def is_asked_for(self) -> bool:
        """Whether a metric is named."""
        return self._config.metric is not None

    @property
    def ended(self) -> str | None:
        """Why the run ends early; None: it does not."""
        return ended(self.values, self._config)

    @property
    def step(self) -> int | None:
        """Of the best evaluation; None: there is none yet."""
        return best_step(self.values, self._config)

    def among(self, saved: Collection[int]) -> int | None:
        """The best of the steps that are saved; None: none was evaluated."""
        return best_step(self.values, self._config, saved)

    def check(self, names: Collection[str]) -> None:
        """Refuses a metric that is none of those of an evaluation.

        Raises:
          UnknownMetricError: it is not.
        """
        if self._config.metric not in names:
            raise UnknownMetricError(
                f"eval.metric={self._config.metric} is none of what an evaluation tells: {', '.join(names)}"
            )

    def check_before(self, evaluate: Callable[[], Collection[str]]) -> None:
        """The same before the first evaluation, where part of one tells the names.

        Args:
          evaluate: gives them.

        Raises:
          UnknownMetricError: the metric is none of them.
        """
        if self.is_asked_for and not self.values:
            names: Collection[str] = ()
            with contextlib.suppress(StackError):  # A part without a label: the first evaluation tells.
                names = evaluate()
            if names:
                self.check(names)

    def on_start(self, info: dict[str, Any]) -> None:
        """Goes on with what the checkpoint and the history know, on all processes what the first has."""
        self.told = {}
        if self.is_asked_for:
            from stack.train.checkpoint.agreement import text_of_first

            kept, logged = info.get("kept", {}), info.get("evaluations", ())
            values = text_of_first(
                lambda: json.dumps(list(values_of(kept, logged, self._config.metric).items()))
            )
            self.values = {int(step): float(value) for step, value in json.loads(values)}

    def on_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the metric, on all processes that of the first.

        Raises:
          UnknownMetricError: there is none of its name.
        """
        if self.is_asked_for:
            from stack.train.checkpoint.agreement import text_of_first

            self.check(metrics)
            value = text_of_first(lambda: json.dumps(float(metrics[str(self._config.metric)])))
            self.values[step] = float(json.loads(value))
            self.told[step] = metrics

    def on_save(self, step: int) -> dict[str, Any] | None:
        """Has the values kept with the checkpoint."""
        if not self.is_asked_for:
            return None
        values = [[one, value if math.isfinite(value) else None] for one, value in self.values.items()]
        return {_KEPT: {"metric": self._config.metric, "values": values}}

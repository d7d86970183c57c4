"""The same run from several seeds: what of a result is the method's, and what is chance."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stack.config import Config, ConfigError, StackError
from stack.config.paths import expand
from stack.storage import durable
from stack.train.best import best_step, values_of
from stack.train.checkpoint.agreement import text_of_first
from stack.train.trainer import Trainer
from stack.train.watch.metrics import TIMING


@dataclass(frozen=True, kw_only=True)
class SeedRun:
    """What a run of one seed came to."""

    seed: int
    name: str
    """Of its run."""
    config: str
    """A digest of its config."""
    step: int
    """Of its best evaluation by `eval.metric`, or of its last where none is named."""
    metrics: Mapping[str, float]
    """That evaluation."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What the runs of several seeds came to."""

    runs: tuple[SeedRun, ...]

    @property
    def values(self) -> dict[str, list[float]]:
        """Each metric that all runs have, of every run."""
        first = self.runs[0].metrics
        names = [name for name in first if all(name in run.metrics for run in self.runs)]
        return {name: [run.metrics[name] for run in self.runs] for name in names}

    @property
    def means(self) -> dict[str, float]:
        """Of each metric."""
        return {name: float(np.mean(values)) for name, values in self.values.items()}

    @property
    def deviations(self) -> dict[str, float | None]:
        """The sample standard deviation of each metric; None of one run."""
        alone = len(self.runs) == 1
        return {name: None if alone else float(np.std(v, ddof=1)) for name, v in self.values.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain values; a metric that is not finite is written as a word."""
        runs = [asdict(run) | {"metrics": _plain(run.metrics)} for run in self.runs]
        return {"runs": runs, "mean": _plain(self.means), "spread": _plain(self.deviations)}

    def lines(self) -> list[str]:
        """A table: a metric in each row, with its mean, its sample standard deviation, and every run's."""
        head = ["", "mean", "spread", *(f"seed {run.seed}" for run in self.runs)]
        rows = [head, ["step", "", "", *(f"{run.step:,}" for run in self.runs)]]
        for name, values in self.values.items():
            spread = self.deviations[name]
            told = [self.means[name], spread, *values]
            rows.append([name, *("-" if value is None else f"{value:.6g}" for value in told)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(cell.ljust(w) if not place else cell.rjust(w) for place, (cell, w) in enumerate(pairs))
            for pairs in (list(zip(row, widths, strict=True)) for row in rows)
        ]


def fit_seeds(config: Config, number: int, *, progress: bool = True, **options: Any) -> Spread:
    """Trains a config from `seed`, the one after it, and so on, each run under the name NAME-seedSEED.

    Runs that are at their end are not trained again, one that was interrupted goes on. What they came to is
    in NAME-seeds.json beside their folders, after each. Every process of a run calls it.

    Args:
      config: of all of them but for `seed` and `name`.
      number: of runs.
      progress: show each.
      options: of each `Trainer`.

    Raises:
      ConfigError: a number below 1, or nothing is held out.
      StackError: what a run raises; those before it are kept.
    """
    if number < 1:
        raise ConfigError(f"--seeds {number}: there is nothing to train; give 1 or more")
    if config.average.folder is not None:
        raise ConfigError(
            f"--seeds {number}: runs that meet at average.folder have one seed; train each seed in another"
            " folder"
        )
    if not config.data.heldout_fraction:
        raise ConfigError(
            "--seeds compares evaluations, and data.heldout_fraction=0 holds nothing out; set it above 0"
        )
    file = expand(config.output_dir) / f"{config.name}-seeds.json"
    known = {run.seed: run for run in _read(file)}
    runs: list[SeedRun] = []
    for seed in range(config.seed, config.seed + number):
        one = config.replace(f"seed={seed}", f"name={config.name}-seed{seed}")
        done = known.get(seed)
        if done is None or done.config != _digest(one):
            done = _fit(one, progress=progress, **options)
        runs.append(done)
        if jax.process_index() == 0:
            told = Spread(runs=tuple(runs)).as_dict()
            try:
                durable.write_text(file, json.dumps(told, indent=2) + "\n")
            except OSError as error:
                raise StackError(f"cannot write {file}: {error.strerror}; check its disk") from error
    return Spread(runs=tuple(runs))


def _fit(config: Config, *, progress: bool, **options: Any) -> SeedRun:
    trainer = Trainer(config, **options)
    logged = [record for record in trainer.fit(progress=progress).records if record["kind"] == "heldout"]
    if not logged:
        raise StackError(f"{trainer.folder}: nothing was held out to evaluate on; hold out more text")
    values = values_of({}, logged, config.eval.metric)
    step = best_step(values, config.eval) or logged[-1]["step"]
    (found,) = [record for record in logged if record["step"] == step]
    metrics = {name: float(v) for name, v in found.items() if name not in {"kind", "step", *TIMING}}
    return SeedRun(seed=config.seed, name=config.name, config=_digest(config), step=step, metrics=metrics)


def _digest(config: Config) -> str:
    plain = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _read(file: Path) -> Sequence[SeedRun]:
    """The runs that a file knows and whose folders are there, as process 0 sees them."""

    def tell() -> str:
        try:
            runs = json.loads(file.read_text("utf-8"))["runs"] if file.is_file() else []
            return json.dumps([asdict(_run(one)) for one in runs if (file.parent / one["name"]).is_dir()])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StackError(f"{file} is not what was written: {error!r}; delete it") from error

    return [_run(one) for one in json.loads(text_of_first(tell))]


def _run(values: Mapping[str, Any]) -> SeedRun:
    read: dict[str, Any] = dict(values)
    read["metrics"] = {name: float(value) for name, value in values["metrics"].items()}
    return SeedRun(**read)


def _plain(values: Mapping[str, float | None]) -> dict[str, Any]:
    return {name: v if v is None or np.isfinite(v) else str(v) for name, v in values.items()}

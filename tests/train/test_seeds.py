"""Runs from several seeds: their mean and spread, by NumPy; what is done is not done again."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from tiny_runs import config, records

from stack import ConfigError, StackError, Trainer
from stack.cli import main
from stack.config import Config
from stack.train.seeds import SeedRun, Spread, fit_seeds
from stack.train.watch.listeners import Listener


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("seeds")


@pytest.fixture
def fitted(monkeypatch) -> list[str]:
    """The names of the runs that are trained."""
    names: list[str] = []
    fit = Trainer.fit

    def recorded(self, **options):
        names.append(self.config.name)
        return fit(self, **options)

    monkeypatch.setattr(Trainer, "fit", recorded)
    return names


def seeds(config: Config, number: int, **options: Any) -> Spread:
    return fit_seeds(config, number, progress=False, devices=jax.devices()[:1], **options)


class Interrupt(Listener):
    """Ctrl-C at step 6 of the second run."""

    def on_start(self, info) -> None:
        self.is_second = info["name"].endswith("seed6")

    def on_metrics(self, step, metrics) -> None:
        if self.is_second and step == 6:
            raise KeyboardInterrupt


def test_an_interrupted_series_goes_on_where_it_was(folder, fitted) -> None:
    tiny = config(folder, "tiny", "seed=5", "checkpoint.every=4")
    with pytest.raises(KeyboardInterrupt):
        seeds(tiny, 3, listeners=[Interrupt()])
    spread = seeds(tiny, 3)
    assert fitted == ["tiny-seed5", "tiny-seed6", "tiny-seed6", "tiny-seed7"]
    assert [record["step"] for record in records(folder, "tiny-seed6")] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    losses = [
        Trainer.from_run(folder / "runs" / f"tiny-seed{seed}", devices=jax.devices()[:1]).evaluate()["loss"]
        for seed in (5, 6, 7)
    ]
    assert len(set(losses)) == 3
    assert spread.values["loss"] == losses
    assert spread.means["loss"] == pytest.approx(sum(losses) / 3, rel=1e-12)
    variance = sum((loss - sum(losses) / 3) ** 2 for loss in losses) / 2
    assert spread.deviations["loss"] == pytest.approx(variance**0.5, rel=1e-9)
    told = json.loads((folder / "runs" / "tiny-seeds.json").read_text())
    assert told == spread.as_dict()
    assert told["spread"]["loss"] == spread.deviations["loss"]
    fitted.clear()
    assert seeds(tiny, 3) == spread
    assert fitted == [], "all are at their end"
    assert seeds(tiny.replace("train.steps=10"), 1).runs[0].step == 10
    assert fitted == ["tiny-seed5"]


@pytest.mark.full
def test_the_best_evaluation_counts_where_one_is_picked(folder) -> None:
    options = ("train.steps=60", "eval.every=5", "eval.metric=loss", "optimizer.learning_rate=0.03")
    (one,) = seeds(config(folder, "picked", *options), 1).runs
    logged = {r["step"]: r["loss"] for r in records(folder, "picked-seed0") if r["kind"] == "heldout"}
    assert one.step == min(logged, key=logged.__getitem__)
    assert one.metrics["loss"] == logged[one.step]


def test_the_table_has_mean_spread_and_every_run() -> None:
    runs = [
        SeedRun(
            seed=seed, name=f"x-seed{seed}", config="", step=1200, metrics={"loss": loss, "f1": 0.5} | more
        )
        for seed, loss, more in ((0, 1.0, {}), (1, 3.0, {"only": 1.0}))
    ]
    assert Spread(runs=tuple(runs)).lines() == [
        "      mean   spread  seed 0  seed 1",
        "step                  1,200   1,200",
        "loss     2  1.41421       1       3",
        "f1     0.5        0     0.5     0.5",
    ]
    assert [line.split()[2] for line in Spread(runs=tuple(runs[:1])).lines()[2:]] == ["-", "-"]
    broken = Spread(runs=(SeedRun(seed=0, name="x", config="", step=1, metrics={"loss": np.nan}),))
    assert json.loads(json.dumps(broken.as_dict(), allow_nan=False))["mean"] == {"loss": "nan"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds 0: there is nothing to train; give 1 or more"),
        (["--seeds", "-1"], "--seeds -1: there is nothing to train; give 1 or more"),
        (["--seeds", "2", "--replay", "3"], "--seeds trains runs, and --replay does a step of one again;"),
        (
            ["--seeds", "2", "data.heldout_fraction=0"],
            "--seeds compares evaluations, and data.heldout_fraction=0",
        ),
        (["--seeds", "two"], "argument --seeds: invalid int value: 'two'"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, capsys, arguments, message) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(f"output_dir: {tmp_path}\n")
    assert main(["train", str(file), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_of_results_that_is_damaged_is_refused(tmp_path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "bad-seeds.json").write_text('{"runs": [{"seed": 0}]}')
    with pytest.raises(StackError, match=r"bad-seeds\.json is not what was written: .*; delete it"):
        seeds(config(tmp_path, "bad"), 1)


@pytest.mark.full
def test_the_command_line_prints_the_table(folder, capsys) -> None:
    file = folder / "cli.yaml"
    file.write_text(yaml.safe_dump(config(folder, "cli", "train.steps=3").model_dump(mode="json")))
    assert main(["train", str(file), "--seeds", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index(next(line for line in lines if line.split()[:2] == ["mean", "spread"]))
    assert [line.split()[0] for line in lines[start + 1 :]][:3] == ["step", "loss", "perplexity"]
    assert (folder / "runs" / "cli-seeds.json").is_file()


def test_a_config_error_names_the_option() -> None:
    with pytest.raises(ConfigError, match=r"^--seeds 0"):
        fit_seeds(Config(), 0)

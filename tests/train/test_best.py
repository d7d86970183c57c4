"""The best checkpoint is kept and shown, and a run that betters it no more ends, whatever interrupts it."""

import math
import re
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import config, records, run, saved_state, start, trainer, wait_for_step

from stack import ConfigError, StackError, Trainer
from stack.cli import main
from stack.config import EvalConfig
from stack.step import state as states
from stack.train.best import best_step, ended, values_of
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.stop import StoppedError
from stack.train.watch.listeners import Listener

SCRIPT = {2: 5.0, 4: 4.0, 6: 3.5, 8: 3.6, 10: 3.55, 12: 3.7, 14: 3.8, 16: 3.9}
"""Best at step 6; of a patience of 3 evaluations the last is at step 12."""
OPTIONS = ("train.steps=16", "eval.every=2", "checkpoint.every=0", "checkpoint.keep_last=1")
PICKS = (*OPTIONS, "eval.metric=loss", "eval.patience=3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("best")


class Heard(Listener):
    """What a run says, and Ctrl-C or a signal at a step."""

    def __init__(self, at: int | None = None, number: int | None = None) -> None:
        self.at = at
        self.number = number
        self.warnings: list[str] = []
        self.saved: list[int] = []
        self.summary: dict[str, Any] = {}

    def on_metrics(self, step, metrics) -> None:
        if step == self.at:
            if self.number is None:
                raise KeyboardInterrupt
            signal.raise_signal(self.number)

    def on_warning(self, text) -> None:
        self.warnings.append(text)

    def on_checkpoint(self, step) -> None:
        self.saved.append(step)

    def on_end(self, summary) -> None:
        self.summary = summary


def scripted(folder: Path, name: str, *overrides: str, **options: Any) -> Trainer:
    """A run whose evaluations are those of the script."""
    made: Any = trainer(folder, name, *overrides, **options)
    made.evaluate = lambda **_: {"loss": SCRIPT[int(made.state["step"]) or 2], "accuracy": 0.5}
    return made


@pytest.fixture(scope="module")
def ended_run(folder) -> tuple[Trainer, Heard]:
    heard = Heard()
    made = scripted(folder, "ended", *PICKS, listeners=[heard])
    made.fit(progress=False)
    return made, heard


def config_of(**fields: Any) -> EvalConfig:
    return EvalConfig(**{"every": 2, "metric": "loss", "patience": 3} | fields)


def test_the_best_is_the_first_of_the_least_or_most_that_is_a_number() -> None:
    values = {2: 3.0, 4: 1.0, 6: 1.0, 8: 2.0, 10: math.nan, 12: -math.inf}
    assert best_step(values, config_of()) == 4
    assert best_step(values, config_of(mode="max")) == 2
    assert best_step(values, config_of(metric="accuracy")) == 2
    assert best_step(values, config_of(), among=[6, 8, 10, 14]) == 6
    assert best_step({2: math.nan}, config_of()) is None


@pytest.mark.parametrize(
    ("values", "fields", "steps"),
    [
        # The evaluations after which it ends, by hand.
        ([5, 4, 3.5, 3.6, 3.55, 3.7, 3.8], {}, [12, 14]),
        ([5, 4, 3.5, 3.6, 3.55, 3.4, 3.8], {}, []),
        ([5, 4, 3.5, 3.6, 3.55, 3.5, 3.8], {}, [12, 14]),
        ([5, 4.6, 4.2, 3.8, 3.4, 3.0], {"min_gain": 0.5}, []),
        ([5, 4.9, 4.8, 4.75, 4.5, 4.4], {"min_gain": 0.25, "patience": 2}, [6, 8]),
        ([5, 4, 3, 2], {"mode": "max", "patience": 2}, [6, 8]),
        ([math.nan, math.nan, math.nan, 4.0], {}, [6]),
        ([5, math.nan, math.inf, -math.inf], {}, [8]),
        ([5, 6, 7, 8], {"patience": None}, []),
    ],
)
def test_a_run_ends_after_so_many_evaluations_without_a_gain(values, fields, steps) -> None:
    so_far = [
        dict(zip(range(2, 2 * count + 2, 2), values, strict=False)) for count in range(1, len(values) + 1)
    ]
    assert [max(some) for some in so_far if ended(some, config_of(**fields))] == steps


def test_an_evaluation_at_the_end_of_a_run_that_went_on_does_not_count() -> None:
    values = {2: 1.0, 4: 2.0, 6: 2.0, 7: 2.0}
    assert ended(values, config_of()) is None
    assert ended(values | {8: 2.0}, config_of()) is not None


def test_the_checkpoint_knows_as_much_as_the_history_of_the_same_metric() -> None:
    kept = {"evaluations": {"metric": "loss", "values": [[2, 3.0], [4, None]]}}
    logged = [{"step": 4, "loss": math.nan, "accuracy": 0.5}, {"step": 6, "loss": 2.0, "accuracy": 0.6}]
    values = values_of(kept, logged, "loss")
    assert (list(values), values[2], values[6]) == ([2, 4, 6], 3.0, 2.0)
    assert math.isnan(values[4])
    assert values_of(kept, logged, "accuracy") == {4: 0.5, 6: 0.6}
    assert values_of(kept, logged, None) == {}


def test_a_run_ends_early_with_its_best_checkpoint_which_is_kept_and_shown(folder, ended_run, capsys) -> None:
    made, heard = ended_run
    assert sorted(SCRIPT)[: len(made.best.values)] == list(made.best.values) == [2, 4, 6, 8, 10, 12]
    assert Checkpoints(made.ledger.store).steps() == [6, 12]
    assert heard.saved == [2, 4, 6, 12], "each that is the best so far, and the last"
    why = (
        "at step 12: eval.metric=loss, 3.5 of step 6 is not bettered in 3 evaluations;"
        " to go on: eval.patience=6"
    )
    assert (heard.summary["ended"], heard.summary["best_step"], heard.summary["loss"]) == (why, 6, 3.5)
    assert heard.summary["longer"] == ["eval.patience=6"]
    short = run(folder, "short", "train.steps=6")
    assert made.state is not None
    assert int(made.state["step"]) == 6
    for one, other in zip(
        jax.tree.leaves(states.join(made.state)), jax.tree.leaves(short.trained), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert main(["checkpoint", "list", str(made.folder)]) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("step 6 ")
    assert first.endswith(", the best: loss 3.5")
    assert "best" not in last
    assert main(["show", str(made.folder)]) == 0
    assert f"state     ended early {why}\n" in capsys.readouterr().out


def test_a_run_is_opened_at_its_best_checkpoint_or_at_another(ended_run) -> None:
    made, _ = ended_run
    opened: dict[Any, Any] = {
        step: Trainer.from_run(made.folder, step=step, devices=jax.devices()[:1])
        for step in ("best", 6, 12, None)
    }
    assert {step: int(one.state["step"]) for step, one in opened.items()} == {
        "best": 6,
        6: 6,
        12: 12,
        None: 12,
    }
    with pytest.raises(StackError, match=r"no checkpoint of step 4 in .*; there are steps 6, 12"):
        Trainer.from_run(made.folder, step=4)
    with pytest.raises(
        StackError, match=r"picks no best checkpoint, as its eval\.metric is null; name a met"
    ):
        Trainer.from_run(made.folder, ["eval.metric=null", "eval.patience=null"], step="best")
    with pytest.raises(
        StackError, match=r"no evaluation with eval\.metric=f1 is of a checkpoint it keeps; t"
    ):
        Trainer.from_run(made.folder, ["eval.metric=f1"], step="best")


@pytest.mark.usefixtures("ended_run")
def test_a_run_that_ended_early_says_so_again_and_goes_on_with_more_patience(folder) -> None:
    before = records(folder, "ended")
    heard = Heard()
    again = scripted(folder, "ended", *PICKS, listeners=[heard])
    again.fit(progress=False)
    assert heard.summary["ended"].startswith("at step 12: eval.metric=loss, 3.5 of step 6 is not bettered")
    assert (heard.warnings, heard.saved, records(folder, "ended")) == ([], [], before)
    scripted(folder, "ended", *OPTIONS, "eval.metric=loss", "eval.patience=9", listeners=[heard]).fit(
        progress=False
    )
    whole = scripted(folder, "whole", *OPTIONS)
    whole.fit(progress=False)
    assert saved_state(folder, "ended") == saved_state(folder, "whole")
    assert records(folder, "ended") == records(folder, "whole")
    assert (heard.summary["best_step"], heard.summary["loss"]) == (6, 3.5)
    assert "ended" not in heard.summary
    assert Checkpoints(whole.folder / "checkpoints").steps() == [16], "none is picked without a metric"


@pytest.mark.parametrize(
    ("at", "number"),
    [
        (8, signal.SIGTERM),
        (11, None),
        pytest.param(5, None, marks=pytest.mark.full),
        pytest.param(12, None, marks=pytest.mark.full),
    ],
)
def test_an_interrupted_run_picks_and_ends_as_one_that_was_not(folder, at, number) -> None:
    """Ctrl-C, as a kill, leaves what was saved; SIGTERM saves step 8 before it is evaluated."""
    name, options = f"broken{at}", (*PICKS, "checkpoint.every=3")
    broken = scripted(folder, name, *options, listeners=[Heard(at - 1 if number else at, number)])
    with pytest.raises(StoppedError if number else KeyboardInterrupt):
        broken.fit(progress=False)
    heard = Heard()
    resumed = scripted(folder, name, *options, listeners=[heard])
    resumed.fit(progress=False)
    assert heard.warnings == []
    assert (resumed.best.values, heard.summary["best_step"]) == (
        {k: v for k, v in SCRIPT.items() if k <= 12},
        6,
    )
    assert [r["step"] for r in records(folder, name) if r["kind"] == "heldout"] == [2, 4, 6, 8, 10, 12]
    assert Checkpoints(resumed.ledger.store).steps() == [6, 12]


def test_what_a_lost_history_knew_the_checkpoint_knows(folder) -> None:
    with pytest.raises(KeyboardInterrupt):
        scripted(folder, "lost", *PICKS, "checkpoint.every=3", listeners=[Heard(10)]).fit(progress=False)
    (folder / "runs" / "lost" / "metrics.jsonl").unlink()
    resumed = scripted(folder, "lost", *PICKS, "checkpoint.every=3")
    resumed.fit(progress=False)
    assert list(resumed.best.values) == [2, 4, 6, 8, 10, 12]


def test_where_the_best_could_not_be_saved_the_best_that_was_is_shown(folder, monkeypatch) -> None:
    save = Checkpoints._commit

    def commit(self, name, step, *arguments):
        if step == 6:
            return "the disk is full"
        return save(self, name, step, *arguments)

    monkeypatch.setattr(Checkpoints, "_commit", commit)
    heard = Heard()
    scripted(folder, "full", *PICKS, listeners=[heard]).fit(progress=False)
    assert heard.warnings == ["the disk is full; it is tried again with the next one"]
    assert (heard.summary["best_step"], heard.summary["loss"]) == (12, 3.7)
    assert Checkpoints(folder / "runs" / "full" / "checkpoints").steps() == [12]


def test_a_best_checkpoint_that_is_damaged_is_told_and_the_last_is_shown(folder) -> None:
    scripted(folder, "damaged", *PICKS).fit(progress=False)
    (file,) = [
        path
        for path in (folder / "runs/damaged/checkpoints/6").rglob("*")
        if path.name.isdecimal() and path.is_file()
    ]
    file.write_bytes(b"\0" * file.stat().st_size)
    heard = Heard()
    scripted(folder, "damaged", *PICKS, listeners=[heard]).fit(progress=False)
    assert len(heard.warnings) == 1
    assert re.search(r"/6/.* is damaged: .*; what is shown is of step 12", heard.warnings[0])
    assert heard.summary["loss"] == 3.7
    with pytest.raises(StackError, match="damaged"):
        Trainer.from_run(folder / "runs" / "damaged", step="best")


def test_a_metric_that_no_evaluation_tells_is_refused_before_the_first_step(folder) -> None:
    names = "loss, perplexity, accuracy, nats_per_byte, tokens"
    with pytest.raises(ConfigError, match=rf"^eval\.metric=f1 is none of what an evaluation tells: {names}$"):
        run(folder, "unknown", *OPTIONS, "eval.metric=f1")
    assert records(folder, "unknown") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.metric=loss"], r"metric=loss is not read with every=0; remove it, or set every$"),
        (
            ["eval.every=2", "eval.patience=2"],
            r"patience=2 is not read with metric=null; remove it, or set met",
        ),
        (["eval.every=2", "eval.mode=max"], r"mode=max is not read with metric=null"),
        (
            ["eval.every=2", "eval.metric=loss", "eval.min_gain=1"],
            r"min_gain=1\.0 is not read with patience=",
        ),
        (
            ["eval.every=2", "eval.metric=recall"],
            r"metric=recall: .* whether more of it is better; set mode=max",
        ),
        (["eval.every=2", "eval.metric=loss", "eval.patience=0"], r"eval\.patience=0 must be "),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, "x", *overrides)


REAL = (
    *("train.steps=120", "eval.every=5", "checkpoint.every=7", "train.log_every=1", "eval.metric=loss"),
    *("eval.patience=3", "data.sources=[{kind: python, max_bytes: 20000}]"),
)


@pytest.mark.full
def test_a_killed_run_ends_where_one_that_was_not_does(folder) -> None:
    whole = run(folder, "unbroken", *REAL)
    steps = [record["step"] for record in records(folder, "unbroken")]
    assert whole.best.ended is not None
    assert steps[-1] < 120
    process = start(folder, "killed", *REAL)
    wait_for_step(folder, "killed", steps[-1] - 8, process)
    process.kill()
    process.communicate()
    process = start(folder, "killed", *REAL)
    process.communicate()
    assert process.returncode == 0
    assert records(folder, "killed") == records(folder, "unbroken")
    assert saved_state(folder, "killed") == saved_state(folder, "unbroken")


def decide(folder: str) -> list[Any]:
    """In one of two processes, whose evaluations are not the same."""
    made: Any = Trainer(config(Path(folder), "two", *PICKS, "mesh.data=2"))
    other = jax.process_index() == 1
    made.evaluate = lambda **_: {
        "loss": (-1 if other else 1) * SCRIPT[int(made.state["step"]) or 2],
        "accuracy": 0.5,
    }
    made.fit(progress=False)
    return [list(made.best.values.values()), made.best.step, int(made.state["step"]), made.best.ended]


@pytest.mark.full
def test_processes_decide_alike(tmp_path, run_processes) -> None:
    first, second = run_processes(decide, str(tmp_path), processes=2, devices=1)
    assert first == second
    assert first[:3] == [[5.0, 4.0, 3.5, 3.6, 3.55, 3.7], 6, 6]

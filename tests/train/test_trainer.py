"""The trainer: it learns, logs, saves, goes on, and never waits for the device it is feeding."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from tiny_runs import config

from stack import StackError, Trainer
from stack.step import state as states
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import NAME
from stack.train.watch.listeners import Listener


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("trainer")


def trainer(folder: Path, name: str, *overrides: str, **options: Any) -> Trainer:
    return Trainer(config(folder, name, *overrides), devices=jax.devices()[:1], **options)


def run(folder: Path, name: str, *overrides: str, **options: Any) -> Trainer:
    made = trainer(folder, name, *overrides, **options)
    made.fit()
    return made


@pytest.fixture(scope="module")
def finished(folder) -> Trainer:
    """A run of 8 steps that was never interrupted."""
    return run(folder, "finished", "eval.every=4")


def assert_same_state(one: Trainer, other: Trainer) -> None:
    for first, second in zip(jax.tree.leaves(one.state), jax.tree.leaves(other.state), strict=True):
        np.testing.assert_array_equal(first, second)


SAMPLE = ("sample.at_end=true", "sample.prompt=a")


class Notes(Listener):
    """Writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []
        self.saved: list[int] = []
        self.summary: dict[str, Any] = {}

    def on_start(self, info) -> None:
        self.heard.append(("start", info["step"], info["steps"]))

    def on_metrics(self, step, metrics) -> None:
        self.heard.append(("metrics", step))

    def on_eval(self, step, metrics) -> None:
        self.heard.append(("eval", step))

    def on_save(self, step) -> None:
        self.heard.append(("save", step))

    def on_checkpoint(self, step) -> None:
        self.saved.append(step)

    def on_end(self, summary) -> None:
        self.heard.append(("end",))
        self.summary = summary


def test_a_run_learns_and_leaves_its_history_config_data_and_checkpoint(finished) -> None:
    steps, losses = finished.history.curve("loss")
    assert steps == list(range(1, 9))
    assert losses[0] == pytest.approx(math.log(257), rel=0.02)
    assert losses[-1] < losses[0] - 0.5
    assert finished.history.curve("loss", "heldout")[0] == [4, 8]
    for metric in ("grad_norm", "learning_rate", "accuracy", "tokens_per_second", "step_seconds"):
        assert all(map(math.isfinite, finished.history.curve(metric)[1])), metric
    assert (finished.folder / "checkpoints" / "8").is_dir()
    assert json.loads((finished.folder / "data.json").read_text()) == finished.data.fingerprint
    assert Trainer.from_run(finished.folder, devices=jax.devices()[:1]).config == finished.config


def test_a_run_opened_again_evaluates_and_generates_as_it_did(finished) -> None:
    opened = Trainer.from_run(finished.folder, devices=jax.devices()[:1])
    assert opened.evaluate() == finished.evaluate()
    assert opened.generate(["a", "b"]) == finished.generate(["a", "b"])


def test_evaluation_counts_every_held_out_token_once(finished) -> None:
    metrics = finished.evaluate()
    heldout = finished.data.heldout
    assert metrics["tokens"] == heldout.num_tokens
    nats = metrics["loss"] * heldout.num_tokens
    assert metrics["nats_per_byte"] == pytest.approx(nats / heldout.num_bytes, rel=1e-12)
    assert metrics["perplexity"] == math.exp(metrics["loss"])


def test_an_interrupted_run_goes_on_bit_for_bit(folder, finished) -> None:
    class Interrupt(Listener):
        def on_metrics(self, step, metrics) -> None:
            if step == 6:
                raise KeyboardInterrupt

    interrupted = trainer(folder, "interrupted", "checkpoint.every=5", listeners=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        interrupted.fit()
    notes = Notes()
    resumed = run(folder, "interrupted", listeners=[notes])
    assert notes.heard[:2] == [("start", 5, 8), ("metrics", 6)]
    assert_same_state(resumed, finished)
    assert resumed.history.curve("loss") == finished.history.curve("loss")


@pytest.mark.full
def test_a_finished_run_goes_on_with_more_steps(folder) -> None:
    """From the command line, which says what it does and how it ended."""
    short = run(folder, "longer", "train.steps=3", *SAMPLE)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "stack", "train", short.folder, "train.steps=5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert short.history.curve("loss")[0] == [1, 2, 3, 4, 5]
    start, run_line = done.stdout.splitlines(keepends=True)[:2]
    assert start == "start     longer: loading JAX, then its data\n"
    assert run_line.startswith("run       longer, 5 steps (3 taken) of 256 tokens\n")
    for line in (
        f"{short.program.num_parameters:,} parameters; {short.program.attention}",
        "MFU peak  none: cpu is not in the table of chips",
        f"folder    {short.folder}",
        f"go on     stack sample {short.folder} a",
        f"          stack train {short.folder} train.steps=10",
    ):
        assert f"{line}\n" in done.stdout
    assert re.search(r"^held-out  \d\.\d{4} nats per byte\n", done.stdout, re.MULTILINE)


def test_a_finished_run_trained_again_only_tells_its_results(folder, finished) -> None:
    metadata = finished.folder / "checkpoints" / "8" / NAME
    before = metadata.stat()
    notes = Notes()
    again = run(folder, "finished", listeners=[notes])
    assert notes.heard == [("start", 8, 8), ("end",)]
    assert notes.summary["loss"] == finished.evaluate()["loss"]
    assert again.history == finished.history
    assert_same_state(again, finished)
    after = metadata.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_run_does_not_go_on_over_other_data(folder, finished) -> None:
    copy = shutil.copytree(finished.folder, finished.folder.with_name("copy"))
    with pytest.raises(StackError, match=r"began otherwise: data\.sequence_length 32 -> 16; restore it"):
        run(folder, copy.name, "data.sequence_length=16")
    with pytest.raises(StackError, match=r"began otherwise: data\.sources content \w{8} -> content \w{8}; "):
        run(folder, copy.name, "data.sources.0.max_bytes=30000")
    assert json.loads((copy / "data.json").read_text()) == finished.data.fingerprint


def test_a_run_that_may_not_resume_is_refused_before_it_touches_the_folder(folder, finished) -> None:
    history = (finished.folder / "metrics.jsonl").read_bytes()
    with pytest.raises(StackError, match=r"holds a run at step 8 and checkpoint\.resume is false"):
        run(folder, "finished", "checkpoint.resume=false")
    assert (finished.folder / "metrics.jsonl").read_bytes() == history


def test_a_run_folder_that_cannot_be_made_is_told(folder) -> None:
    (folder / "file").write_text("")
    with pytest.raises(StackError, match=r"run cannot be written: .*; set output_dir to a folder that"):
        run(folder, "run", f"output_dir={folder}/file")


def test_a_folder_without_a_checkpoint_cannot_be_opened(folder, finished) -> None:
    empty = folder / "runs" / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((finished.folder / "config.yaml").read_text())
    with pytest.raises(StackError, match="holds no checkpoint yet; train it first: stack train"):
        Trainer.from_run(empty, [f"name={empty.name}"])
    with pytest.raises(StackError, match=r"no parameters yet; call fit\(\), or open a run with from_run"):
        trainer(folder, "empty").evaluate()


def test_a_tiny_model_overfits_a_fixed_batch(folder) -> None:
    made = trainer(folder, "overfit", "train.batch_size=2", "data.shuffle=false")
    batch = made.batch(0)
    state = states.init(made.program)
    with jax.set_mesh(made.mesh):
        for _ in range(150):
            state, metrics = made.train_step(state, batch)
    assert float(metrics["loss"]) < 0.01
    assert float(metrics["accuracy"]) == 1


def test_accumulation_changes_nothing(folder, finished) -> None:
    accumulated = run(folder, "accumulated", "train.accumulation=4")
    losses, other = (each.history.curve("loss")[1] for each in (accumulated, finished))
    np.testing.assert_allclose(losses, other, rtol=1e-5)


def test_listeners_hear_the_run_in_order(folder) -> None:
    notes, others = Notes(), Notes()
    run(
        folder,
        "heard",
        *("train.steps=4", "eval.every=2", "checkpoint.every=2", *SAMPLE),
        listeners=[notes, others],
    )
    assert notes.heard == [
        ("start", 0, 4),
        ("metrics", 1),
        ("metrics", 2),
        ("save", 2),
        ("eval", 2),
        ("metrics", 3),
        ("metrics", 4),
        ("save", 4),
        ("eval", 4),
        ("end",),
    ]
    assert notes.saved == [2, 4], "whenever they are"
    assert (others.heard, others.saved) == (notes.heard, notes.saved)
    assert notes.summary["prompt"] == "a"
    assert set(notes.summary) >= {"folder", "loss", "nats_per_byte", "sample"}


def test_what_a_listener_returns_is_heard_by_those_after_it(folder) -> None:
    class Add(Listener):
        def on_start(self, info):
            self.warn(f"{info['name']} begins")
            return {"colour": "blue"}

        def on_metrics(self, step, metrics):
            return {"twice": 2 * metrics["loss"]}

    class Hear(Notes):
        def on_start(self, info) -> None:
            self.heard.append(info["colour"])

        def on_warning(self, text) -> None:
            self.heard.append(text)

        def on_metrics(self, step, metrics) -> None:
            self.heard.append(metrics["twice"] == 2 * metrics["loss"])

    hear = Hear()
    run(folder, "added", "train.steps=3", "optimizer.schedule.warmup_steps=0", listeners=[Add(), hear])
    assert hear.heard[:5] == ["added begins", "blue", True, True, True]
    assert "sample" not in hear.summary, "as sample.at_end is false"


def test_a_prompt_that_could_not_be_continued_is_refused_at_the_start(folder) -> None:
    prompt = "a" * 40
    with pytest.raises(StackError, match=r"^sample\.prompt has 41 tokens, but the context is model\.max_len"):
        run(folder, "wordy", "sample.at_end=true", f"sample.prompt={prompt}")
    assert not (folder / "runs" / "wordy" / "metrics.jsonl").exists()


def test_a_step_is_saved_before_it_is_evaluated(folder) -> None:
    class Fail(Listener):
        def on_eval(self, step, metrics) -> None:
            raise ArithmeticError("too much")

    with pytest.raises(ArithmeticError):
        run(folder, "saved", "eval.every=2", "checkpoint.every=2", listeners=[Fail()])
    assert Checkpoints(folder / "runs" / "saved" / "checkpoints").latest() == 2


def test_listeners_hear_the_end_after_an_error(folder) -> None:
    class Fail(Listener):
        def on_metrics(self, step, metrics) -> None:
            raise ArithmeticError("too much")

    notes = Notes()
    with pytest.raises(ArithmeticError):
        run(folder, "failed", listeners=[Fail(), notes])
    assert notes.heard == [("start", 0, 8), ("end",)]
    assert notes.summary == {"error": "ArithmeticError: too much"}


@pytest.mark.full
def test_a_trigram_model_stands_beside_the_loss_when_asked_for(folder) -> None:
    notes = Notes()
    run(folder, "trigram", "train.steps=1", "optimizer.schedule.warmup_steps=0", "eval.baselines=true",
        listeners=[notes])  # fmt: skip
    assert 1 < notes.summary["trigram_nats_per_byte"] < notes.summary["nats_per_byte"]


def test_profile_steps_writes_a_trace(folder) -> None:
    profiled = run(folder, "profiled", "train.steps=3", "train.profile_steps=[1, 2]")
    assert list((profiled.folder / "profile").rglob("*.xplane.pb"))


def test_metrics_of_a_step_are_read_only_when_the_next_is_dispatched(folder, monkeypatch) -> None:
    """And nothing else is read in the loop: `_value` is what every way of reading an array goes through."""
    events: list[tuple[str, int | None]] = []
    step_of: dict[int, int] = {}
    kept = []  # An array that is gone may leave its id to another.
    read: Any = vars(ArrayImpl)["_value"].fget

    def recorded(array: jax.Array) -> np.ndarray:
        events.append(("read", step_of.get(id(array))))
        return read(array)

    made = trainer(folder, "late", "checkpoint.every=0")
    steps: Any = made.steps
    step = steps.step

    def dispatched(state, batch):
        state, metrics = step(state, batch)
        number = sum(kind == "dispatch" for kind, _ in events) + 1
        events.append(("dispatch", number))
        kept.append(metrics)
        step_of.update({id(value): number for value in metrics.values()})
        return state, metrics

    steps.step = dispatched
    monkeypatch.setattr(ArrayImpl, "_value", property(recorded))
    made.fit()
    first, last = events.index(("dispatch", 1)), events.index(("dispatch", 8))
    reads = len(kept[0])
    expected: list[tuple[str, int | None]] = [("dispatch", 1)]
    for number in range(2, 9):
        expected += [("dispatch", number), *[("read", number - 1)] * reads]
    assert events[first : last + 1 + reads] == expected
    assert events.count(("read", 8)) == reads


def test_a_run_over_another_model_is_refused_and_left_as_it_was(folder, finished) -> None:
    copy = shutil.copytree(finished.folder, finished.folder.with_name("other"))
    kept = (copy / "config.yaml").read_text()
    with pytest.raises(
        StackError,
        match=r"began otherwise: model\.embed_dim 32 -> 64; restore it, .* --accept model\.emb",
    ):
        run(folder, copy.name, "model.embed_dim=64")
    assert (copy / "config.yaml").read_text() == kept


@pytest.mark.full
def test_a_trace_may_begin_before_a_run_that_goes_on(folder) -> None:
    run(folder, "resumed", "train.steps=2")
    resumed = run(folder, "resumed", "train.steps=4", "train.profile_steps=[1, 4]")
    assert list((resumed.folder / "profile").rglob("*.xplane.pb"))


def test_a_run_that_cannot_fit_reads_and_writes_nothing(folder) -> None:
    large = trainer(folder, "large", "train.batch_size=1000000000")
    with pytest.raises(StackError, match=r"large needs [\d,]+ GB a device, of .*; set train\.accumulation="):
        large.fit()
    assert not large.folder.exists()


def test_progress_is_shown_unless_it_is_not_wanted(folder, capsys) -> None:
    made = trainer(folder, "shown", "train.steps=3")
    made.fit()
    assert "step 3/3" in capsys.readouterr().out
    made.fit(progress=False)
    assert capsys.readouterr().out == ""
    table = str(made.history).splitlines()
    assert table[0].split() == ["step", "loss", "held-out", "tokens/s"]
    assert table[-1].split()[0] == "3"
    assert made.history._repr_html_().count("<tr>") == len(table)

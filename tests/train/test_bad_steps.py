"""Steps with bad numbers are never applied; a run of them ends, or goes back and leaves their rows out."""

import random
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import records, run, saved_state, trainer

from stack import StackError, Trainer
from stack.cli import main
from stack.storage.store import Store
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.checkpoint.manifest import read_manifest
from stack.train.watch.bad_steps import BadStepsError
from stack.train.watch.listeners import Listener


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bad")


class Warnings(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_warning(self, text) -> None:
        self.texts.append(text)


def test_a_run_that_diverges_ends_with_an_error_and_no_checkpoint_that_is_not_finite(folder) -> None:
    heard = Warnings()
    options = ("train.steps=40", "checkpoint.every=2", "checkpoint.keep_last=20", "stability.most_in_row=3")
    with pytest.raises(BadStepsError) as error:
        run(folder, "diverges", *options, "optimizer.learning_rate=1e30", listeners=[heard])
    assert "4 steps in a row, up to step" in str(error.value)
    assert "more than stability.most_in_row=3: the last had loss nan" in str(error.value)
    bad = [text for text in heard.texts if "is not applied: loss nan" in text]
    assert len(bad) == 4
    diverged = trainer(folder, "diverges")
    store = diverged.ledger.store
    for step in Checkpoints(store).steps():
        for name, file in read_manifest(store, step).files.items():
            for piece in file.pieces:
                if piece.leaf.startswith("params"):
                    data = store.read(f"{step}/{name}")
                    count = int(np.prod(piece.shape))
                    assert np.isfinite(np.frombuffer(data, np.float32, count, piece.offset)).all()


@pytest.mark.full
def test_a_run_of_a_hopeless_rate_stops_and_what_it_saved_is_evaluated_and_sampled(folder, capsys) -> None:
    options = ("train.steps=200", "checkpoint.every=1", "optimizer.learning_rate=1e6")
    with pytest.raises(BadStepsError):
        run(folder, "hopeless", *options, "optimizer.clip_norm=null", "model.norm_epsilon=1e-30")
    there = str(folder / "runs" / "hopeless")
    assert main(["eval", there]) == 0
    out, _ = capsys.readouterr()
    loss = re.search(r"^loss (.+)$", out, re.MULTILINE)
    assert loss is not None, out
    assert main(["sample", there, "a", "--length", "3"]) == 0
    assert capsys.readouterr().out.startswith("a")


def test_a_step_that_is_not_applied_changes_nothing_but_the_count(folder) -> None:
    made = trainer(folder, "one")
    from stack.step import state as states

    with jax.set_mesh(made.mesh):
        state = states.init(made.program)
        state["params"]["embed"]["table"] = state["params"]["embed"]["table"].at[3].set(jax.numpy.inf)
        before = jax.tree.map(np.asarray, {key: state[key] for key in ("params", "opt_state")})
        after, metrics = made.train_step(state, made.batch(0))
    assert (metrics["skipped"], after["step"], after["guard"]["skipped"]) == (1, 1, 1)
    for one, other in zip(
        jax.tree.leaves({key: after[key] for key in ("params", "opt_state")}),
        jax.tree.leaves(before),
        strict=True,
    ):
        assert np.asarray(one).tobytes() == other.tobytes()


@pytest.fixture(scope="module")
def noisy(folder) -> dict[str, Any]:
    """Text in which two batches, of steps 13 and 14, are noise."""
    place = folder / "text"
    place.mkdir()
    rows = random.Random(0)
    for number in range(200):
        noise = 96 <= number < 112
        letters = (chr(rows.randrange(33, 127)) for _ in range(31))
        (place / f"{number:04}.txt").write_text("".join(letters) if noise else "abcd" * 7 + "abc")
    return {"kind": "text", "path": str(place)}


def noisy_options(noisy) -> tuple[str, ...]:
    return (
        f"data.sources=[{{kind: text, path: {noisy['path']}}}]",
        *("data.shuffle=false", "data.heldout_fraction=0", "train.steps=20", "checkpoint.every=4"),
        *("stability.spike_deviations=4", "stability.spike_window=8", "stability.most_in_row=1"),
        *("optimizer.learning_rate=1e-2", "stability.save_batches=true"),
    )


@pytest.mark.full
def test_noise_is_a_spike_that_is_left_out_and_its_rows_are_told_and_saved(folder, noisy) -> None:
    heard = Warnings()
    options = (*noisy_options(noisy), "stability.most_in_row=5")
    made = run(folder, "spikes", *options, listeners=[heard])
    skipped = [record["step"] for record in made.history.records if record["skipped"]]
    assert skipped == [13, 14]
    assert [text for text in heard.texts if text.endswith("its rows are 96 to 103 of those used")]
    with np.load(made.folder / "skipped" / "step-13-process-0.npz") as batch:
        assert np.array_equal(batch["tokens"], np.asarray(made.batch(12)["tokens"]))
    curve = made.history.curve("loss")[1]
    assert curve[12] > curve[11] + 1
    assert made.history.records[-1]["learning_rate"] == pytest.approx(1e-2)


@pytest.fixture(scope="module")
def rolled(folder, noisy) -> tuple[Trainer, list[str]]:
    """A run that goes back, and what it was warned of."""
    heard = Warnings()
    made = run(folder, "rolled", *noisy_options(noisy), "stability.then=roll_back", listeners=[heard])
    return made, heard.texts


def test_a_run_rolls_back_and_leaves_the_rows_out_and_a_broken_one_does_the_same(
    folder, noisy, rolled
) -> None:
    whole, heard = rolled
    assert "steps 13 to 14 are left out: going back" in heard
    assert not any(record["skipped"] for record in whole.history.records)
    assert [record["step"] for record in records(folder, "rolled") if record["kind"] == "train"] == [
        *range(1, 21)
    ]
    manifest = read_manifest(Store(whole.folder / "checkpoints"), 20)
    assert manifest.extra["skipped"] == [[96, 112]]
    assert manifest.extra["rows"] == 160

    class Break(Listener):
        def on_metrics(self, step, metrics) -> None:
            if step == 15:
                raise ArithmeticError

    options = (*noisy_options(noisy), "stability.then=roll_back")
    with pytest.raises(ArithmeticError):
        run(folder, "broken", *options, listeners=[Break()])
    run(folder, "broken", *options)
    assert saved_state(folder, "broken") == saved_state(folder, "rolled")
    assert records(folder, "broken") == records(folder, "rolled")


@pytest.mark.full
def test_a_run_without_a_checkpoint_goes_back_to_its_seed(folder, noisy, rolled) -> None:
    options = (*noisy_options(noisy), "stability.then=roll_back", "checkpoint.every=0")
    made = run(folder, "seed", *options, "checkpoint.resume=false")
    assert read_manifest(Store(made.folder / "checkpoints"), 20).extra["skipped"] == [[96, 112]]
    assert saved_state(folder, "seed") == saved_state(folder, rolled[0].config.name)


@pytest.mark.full
def test_a_run_that_only_goes_back_is_given_up(folder) -> None:
    options = ("stability.then=roll_back", "stability.most_in_row=1", "optimizer.learning_rate=1e30")
    with pytest.raises(StackError, match=r"rolled back 10 times, and once more: 2 steps in a row"):
        run(folder, "given up", "train.steps=30", *options)

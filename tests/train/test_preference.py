"""A run that learns preferences: from log 2 down, against a reference that is computed once."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import pytest
from tiny_runs import config, records, run, saved_state, trainer

from stack import StackError, Trainer
from stack.cli import main
from stack.evaluation.files import evaluate_file
from stack.parallel import mesh as meshes
from stack.train import reference

STEPS = 24
SIDES = "train", "heldout"
MESH = ("mesh.fsdp=2", "mesh.tensor=2", "mesh.data=2")


def overrides(folder: Path, *more: str) -> tuple[str, ...]:
    source = json.dumps({"kind": "jsonl", "path": f"{folder}/pairs.jsonl", "field": None})
    return (
        f"init_from={folder}/runs/base",
        "objective.kind=preference",
        f"data.sources=[{source}]",
        "data.sequence_length=32",
        f"train.steps={STEPS}",
        "checkpoint.every=8",
        "optimizer.learning_rate=3e-3",
        *more,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of a few steps, and pairs in which a text of vowels is preferred to one of consonants."""
    folder = tmp_path_factory.mktemp("preference")
    random = np.random.default_rng(0)

    def text(letters: str) -> str:
        return "".join(random.choice(list(letters), random.integers(2, 6)))

    lines = [
        {"prompt": text("xyz") + ": ", "chosen": text("aeiou"), "rejected": text("bcdfg")} for _ in range(160)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(folder, "base", "train.steps=2", "data.heldout_fraction=0")
    run(folder, "pairs", *overrides(folder))
    return folder


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """A number for each time that a reference is computed."""
    times: list[int] = []
    before = reference._compute

    def compute(*arguments: Any) -> Any:
        times.append(1)
        return before(*arguments)

    monkeypatch.setattr(reference, "_compute", compute)
    return times


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("reference-*"))


def test_it_begins_at_log_2_and_learns_what_is_held_out(folder):
    history = records(folder, "pairs")
    first = next(record for record in history if record["kind"] == "train")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(first["margin"]) < 1e-5
    held_out = [record for record in history if record["kind"] == "heldout"][-1]
    assert held_out["accuracy"] > 0.95
    assert held_out["loss"] < 0.5
    assert held_out["margin"] > 0.3
    assert held_out["margin"] == pytest.approx(
        held_out["chosen_reward"] - held_out["rejected_reward"], abs=1e-4
    )


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "gone"])
def test_a_run_that_goes_on_is_the_same_run(folder, computed, kept):
    name = f"again-{kept}"
    run(folder, name, *overrides(folder, "train.steps=8", "optimizer.schedule.kind=constant"))
    assert not computed, "of the same data and weights it is there"
    if not kept:
        for entry in entries(folder):
            shutil.rmtree(entry)
    run(folder, name, *overrides(folder))
    assert len(computed) == (0 if kept else 1)
    assert saved_state(folder, name) == saved_state(folder, "pairs")
    ours, theirs = ([r for r in records(folder, one) if r["kind"] == "train"] for one in (name, "pairs"))
    assert ours == theirs


def test_an_evaluation_of_a_run_has_the_same_numbers(folder, computed):
    opened = Trainer.from_run(folder / "runs" / "pairs", devices=jax.devices()[:1])
    metrics = opened.evaluate()
    told = [record for record in records(folder, "pairs") if record["kind"] == "heldout"][-1]
    assert metrics == {name: told[name] for name in metrics}
    assert not computed


def test_a_file_of_ones_own_is_compared_too(folder, computed, capsys, tmp_path):
    lines = (folder / "pairs.jsonl").read_text().splitlines()[:9]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    arguments = ["eval", str(folder / "runs" / "pairs"), "--data", str(tmp_path / "mine.jsonl")]
    cache = f"data.cache_dir={tmp_path}/cache"
    shown = []
    for _ in range(2):
        assert main([*arguments, cache]) == 0
        shown.append(dict(line.split() for line in capsys.readouterr().out.splitlines()))
    assert shown[0] == shown[1]
    assert len(computed) == 1
    assert float(shown[0]["pairs"]) == 9
    assert float(shown[0]["accuracy"]) > 0.95
    opened = Trainer.from_run(folder / "runs" / "pairs", devices=jax.devices()[:1])
    with pytest.raises(StackError, match=r"objective\.kind=preference compares .*: stack eval RUN --data"):
        evaluate_file(opened.program, opened.trained, opened.words, str(tmp_path / "mine.jsonl"))


@pytest.mark.full
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "gone"])
def test_an_adapter_is_compared_with_its_base(folder, computed, kept, tmp_path):
    cache = f"data.cache_dir={tmp_path}/cache"
    adapter = "adapter={targets: [{modules: [layers.*], rank: 4}]}"
    run(folder, f"adapted-{kept}", *overrides(folder, cache, adapter, "optimizer.learning_rate=2e-2"))
    told = [record for record in records(folder, f"adapted-{kept}") if record["kind"] == "heldout"][-1]
    assert told["loss"] < 0.6
    if not kept:
        for entry in entries(tmp_path):
            shutil.rmtree(entry)
    opened = Trainer.from_run(
        folder / "runs" / "base", adapter=folder / "runs" / f"adapted-{kept}", devices=jax.devices()[:1]
    )
    metrics = opened.evaluate()
    assert metrics == {name: pytest.approx(told[name], rel=1e-5) for name in metrics}
    assert len(computed) == (1 if kept else 2)


def test_a_damaged_reference_is_computed_again(folder, computed, caplog):
    (entry,) = entries(folder)
    before = (entry / "train.bin").read_bytes()
    manifest = entry / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    opened = Trainer.from_run(folder / "runs" / "pairs", devices=jax.devices()[:1])
    opened.evaluate()
    assert computed == [1]
    assert (entry / "train.bin").read_bytes() == before
    assert "damaged" in caplog.text


def test_where_both_reference_and_weights_are_gone_that_is_told(folder):
    (entry,) = entries(folder)
    aside, base = entry.with_name("aside"), folder / "runs" / "base"
    entry.rename(aside)
    base.rename(base.with_name("away"))
    try:
        with pytest.raises(StackError, match=r"init_from: .*runs/base does not exist"):
            Trainer.from_run(folder / "runs" / "pairs", devices=jax.devices()[:1]).evaluate()
        shutil.copytree(base.with_name("away"), base)
        shutil.rmtree(base)
        run(folder, "base", "train.steps=3", "data.heldout_fraction=0")
        with pytest.raises(StackError, match=r"is not what the run began with, .*runs/base at step 2"):
            Trainer.from_run(folder / "runs" / "pairs", devices=jax.devices()[:1]).evaluate()
    finally:
        shutil.rmtree(base, ignore_errors=True)
        base.with_name("away").rename(base)
        shutil.rmtree(entry, ignore_errors=True)
        aside.rename(entry)


def test_the_reference_is_the_same_on_a_mesh(folder, tmp_path):
    (entry,) = entries(folder)
    cache = f"data.cache_dir={tmp_path}/cache"
    made = Trainer(
        config(folder, "mesh", *overrides(folder, cache, *MESH, "train.steps=8")), devices=jax.devices()
    )
    made.fit(progress=False)
    (other,) = entries(tmp_path)
    for side in SIDES:
        one, two = (np.fromfile(where / f"{side}.bin", np.float32) for where in (entry, other))
        np.testing.assert_allclose(two, one, rtol=2e-6)
    ours, theirs = (
        [r for r in records(folder, one) if r["kind"] == "train"][:8] for one in ("mesh", "pairs")
    )
    for one, two in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["pairs"] == two["pairs"]


def fit_here(folder: str) -> tuple[int, list[float], bytes]:
    """A run whose processes each have a home: how often it computed its reference, losses, the reference."""
    where = Path(folder)
    home = where / f"home-{jax.process_index()}"
    os.environ["HOME"] = str(home)
    options = overrides(where, "data.cache_dir=~/cache", *MESH, "train.steps=4", "checkpoint.every=0")
    with patch.object(reference, "_compute", wraps=reference._compute) as computes:
        Trainer(config(where, "two", *options)).fit(progress=False)
    (entry,) = (home / "cache").glob("reference-*")
    history = [record["loss"] for record in records(where, "two") if record["kind"] == "train"]
    return computes.call_count, history, b"".join((entry / f"{side}.bin").read_bytes() for side in SIDES)


@pytest.mark.full
def test_processes_agree_on_the_reference(folder, run_processes):
    """Each has what it needs; where one has lost it all compute it, so that none keeps another."""
    (entry,) = entries(folder)
    first = run_processes(fit_here, str(folder), processes=2, devices=4)
    shutil.rmtree(folder / "runs" / "two")
    for lost in (folder / "home-1" / "cache").glob("reference-*"):
        shutil.rmtree(lost)
    (kept,) = (folder / "home-0" / "cache").glob("reference-*")
    stamp = (kept / "train.bin").stat().st_ino
    second = run_processes(fit_here, str(folder), processes=2, devices=4)
    for times, losses, values in (*first, *second):
        assert times == 1
        assert losses == first[0][1]
        assert values == first[0][2]
        one = np.concatenate([np.fromfile(entry / f"{side}.bin", np.float32) for side in SIDES])
        np.testing.assert_allclose(np.frombuffer(values, np.float32), one, rtol=2e-6)
    assert (kept / "train.bin").stat().st_ino != stamp, "that of the other is new too"
    theirs = [record["loss"] for record in records(folder, "pairs") if record["kind"] == "train"]
    np.testing.assert_allclose(first[0][1], theirs[:4], rtol=1e-4)


def test_batches_can_be_asked_for_only_with_a_reference(folder):
    made = trainer(folder, "asks", *overrides(folder))
    with meshes.use(made.mesh), pytest.raises(StackError, match="no parameters yet"):
        made.batch(0)

"""Runs of tasks: from a pretrained trunk, to the end and again, and what they ask for before they train."""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import task_cases
from tiny_runs import saved_state

from stack import Config, StackError, Trainer

WORDS = {"objective": {"kind": "masked_words", "mask_token": "[MASK]"}}


def config(folder: Path, name: str, **sections: Any) -> Config:
    task_cases.write(folder / "classification.jsonl", task_cases.records("classification", 120))
    tree = task_cases.tree("classification", folder) | {"name": name, "output_dir": f"{folder}/runs"}
    tree["model"] |= {"vocab_size": 258, "num_layers": 1}
    tree["data"] |= {"heldout_fraction": 0.2} | sections.pop("data", {})
    tree["train"] |= {"steps": 4} | sections.pop("train", {})
    return Config.model_validate(tree | {"eval": {"every": 2}} | sections)


def fit(made: Config) -> Trainer:
    trainer = Trainer(made, devices=jax.devices()[:1])
    trainer.fit(progress=False)
    return trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    data = {"sources": [{"kind": "synthetic", "max_bytes": 20_000}]}
    fit(config(made, "words", data=data, **WORDS))
    fit(config(made, "whole", init_from=f"{made}/runs/words"))
    return made


def test_the_trunk_is_that_of_the_weights_and_the_head_is_new(folder) -> None:
    trunk = Trainer.from_run(folder / "runs" / "words", devices=jax.devices()[:1]).trained
    begun = fit(config(folder, "begun", init_from=f"{folder}/runs/words", optimizer={"learning_rate": 1e-12}))
    np.testing.assert_allclose(begun.trained["embed"]["table"], trunk["embed"]["table"], atol=1e-9)
    assert "head" not in begun.trained
    assert begun.trained["task"]["kernel"].shape == (16, 3)
    notes = (folder / "runs" / "begun" / "init_from.json").read_text()
    assert "left as initialised: task.bias, task.kernel" in notes
    assert "not used: head." in notes


def test_a_run_that_goes_on_ends_as_the_unbroken_one(folder) -> None:
    made = config(
        folder, "parts", init_from=f"{folder}/runs/words", optimizer={"schedule": {"decay_steps": 4}}
    )
    fit(config(folder, "one", init_from=f"{folder}/runs/words", optimizer={"schedule": {"decay_steps": 4}}))
    fit(made.replace("train.steps=2"))
    fit(made)
    assert saved_state(folder, "parts") == saved_state(folder, "one")


def test_labels_stay_with_the_run(folder) -> None:
    opened = Trainer.from_run(folder / "runs" / "whole", devices=jax.devices()[:1])
    assert opened.config.objective.labels == ("a", "b", "c")  # pyrefly: ignore[missing-attribute]
    assert {"loss", "accuracy", "macro_f1", "mcc"} <= opened.evaluate().keys()


def test_a_library_of_metrics_that_is_missing_is_told_before_the_run_trains(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(StackError, match=r"scikit-learn; install it with: pip install 'stack\[tasks\]'"):
        fit(config(tmp_path, "bare"))
    assert not list((tmp_path / "runs" / "bare").glob("checkpoints/[0-9]*"))


def test_a_head_of_other_labels_begins_anew(folder) -> None:
    data = {"labels": ["b", "a", "c"], "kind": "classification"}
    other = fit(config(folder, "other", init_from=f"{folder}/runs/whole", objective=data))
    kept = (folder / "runs" / "other" / "init_from.json").read_text()
    assert "the head of the weights is of another task or of other labels; it begins anew" in kept
    assert "left as initialised: task.bias, task.kernel" in kept
    assert other.trained["task"]["kernel"].shape == (16, 3)
    same = {"labels": ["a", "b", "c"], "kind": "classification"}
    fit(config(folder, "same", init_from=f"{folder}/runs/whole", objective=same))
    assert "left as initialised" not in (folder / "runs" / "same" / "init_from.json").read_text()

"""Runs in a pipeline: what is saved, evaluated and written knows nothing of stages."""

import jax
import numpy as np
import pytest
from tiny_runs import config, records

from stack import Trainer

LAYERS = ("model.num_layers=3", "eval.every=4", "checkpoint.every=4", "train.accumulation=2")
PIPELINE = (*LAYERS, "mesh.stage=2", "mesh.fsdp=1", "mesh.zero=1")


def losses(folder, name: str) -> list[float]:
    return [line["loss"] for line in records(folder, name) if "loss" in line]


def train(folder, name: str, *overrides: str, devices: int = 1) -> Trainer:
    made = Trainer(config(folder, name, *overrides), devices=jax.devices()[:devices])
    made.fit(progress=False)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run on one device, and one in a pipeline."""
    made = tmp_path_factory.mktemp("pipeline")
    train(made, "one", *LAYERS)
    train(made, "staged", *PIPELINE, devices=2)
    return made


def test_a_pipeline_trains_and_evaluates_as_one_device(folder):
    assert len(losses(folder, "staged")) == len(losses(folder, "one")) > 8
    np.testing.assert_allclose(losses(folder, "staged"), losses(folder, "one"), rtol=2e-4)


@pytest.mark.parametrize(
    ("first", "second"), [(PIPELINE, LAYERS), (LAYERS, PIPELINE)], ids=["to one device", "to a pipeline"]
)
def test_a_checkpoint_of_the_one_opens_in_the_other(folder, first, second):
    name = f"from-{len(first)}"
    train(folder, name, *first, "train.steps=4", devices=2 if first is PIPELINE else 1)
    train(folder, name, *second, devices=2 if second is PIPELINE else 1)
    np.testing.assert_allclose(losses(folder, name)[-5:], losses(folder, "one")[-5:], rtol=2e-4)


def test_a_pipeline_writes_what_one_device_writes(folder):
    staged = Trainer.from_run(folder / "runs" / "staged", devices=jax.devices()[:2])
    one = Trainer.from_run(folder / "runs" / "one", devices=jax.devices()[:1])
    assert staged.generate("def ") == one.generate("def ")


def test_the_start_tells_of_the_pipeline(folder):
    made = Trainer(config(folder, "told", *PIPELINE), devices=jax.devices()[:2])
    assert str(made.program.pipeline(made.program.stacks)) == (
        "1f1b, 2 stages of 2 and 1 layers, 2 micro-batches, bubble 33%"
    )

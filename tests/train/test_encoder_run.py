"""A run of an encoder: it goes on as the unbroken one, is evaluated alike twice, and writes no text."""

import json

import jax
import numpy as np
import pytest

from stack.cli import main
from stack.config import Config, ConfigError, StackError
from stack.train.trainer import Trainer


def config(folder, **train) -> Config:
    return Config.model_validate(
        {
            "name": "masked",
            "output_dir": str(folder),
            "model": {
                "kind": "encoder",
                "vocab_size": 361,
                "max_length": 64,
                "num_layers": 2,
                "embed_dim": 32,
                "num_heads": 4,
                "norm_placement": "post",
                "num_types": 4,
                "dtype": "float32",
                "residual_dropout": 0.1,
            },
            "objective": {"kind": "unilm", "whole_words": True},
            "data": {
                "sources": [{"kind": "synthetic", "max_bytes": 60_000}],
                "cache_dir": str(folder / "cache"),
                "sequence_length": 64,
                "heldout_fraction": 0.1,
            },
            "optimizer": {"learning_rate": 1e-2, "schedule": {"warmup_steps": 1, "decay_steps": 5}},
            "train": {"steps": 6, "batch_size": 8, **train},
            "eval": {"every": 2},
            "checkpoint": {"every": 2},
        }
    )


def numbers(folder) -> list[dict]:
    """What a run logged, but times and speeds."""
    lines = (folder / "masked" / "metrics.jsonl").read_text().splitlines()
    names = ("kind", "step", "loss", "accuracy", "tokens", "grad_norm")
    return [{name: record.get(name) for name in names} for record in map(json.loads, lines)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = Trainer(config(folder))
    trainer.fit(progress=False)
    return folder, trainer


def test_a_run_that_goes_on_is_the_unbroken_one(whole, tmp_path):
    folder, trainer = whole
    Trainer(config(tmp_path, steps=4)).fit(progress=False)
    second = Trainer(config(tmp_path))
    second.fit(progress=False)
    for one, other in zip(jax.tree.leaves(second.state), jax.tree.leaves(trainer.state), strict=True):
        np.testing.assert_array_equal(one, other)
    ours, theirs = ({(r["kind"], r["step"]): r for r in numbers(place)} for place in (tmp_path, folder))
    # A run's last step is always logged, the fourth here and not there.
    assert {key: record for key, record in ours.items() if key in theirs} == theirs


def test_evaluations_agree_to_the_last_digit(whole):
    folder, trainer = whole
    logged = [record for record in numbers(folder) if record["kind"] == "heldout"][-1]
    for evaluated in (trainer.evaluate(), Trainer.from_run(folder / "masked").evaluate()):
        assert evaluated["loss"] == logged["loss"]
        assert evaluated["accuracy"] == logged["accuracy"]
        assert "nats_per_byte" not in evaluated


def test_it_writes_no_text_and_says_so(whole, capsys):
    folder, trainer = whole
    with pytest.raises(StackError, match=r"model\.kind=encoder writes no text"):
        trainer.generate("a")
    assert main(["sample", str(folder / "masked"), "a"]) == 1
    assert "model.kind=encoder writes no text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sample.prompt=a", r"sample\.prompt=.?a.? is not read with model\.kind=encoder"),
        ("eval.baselines=true", r"eval\.baselines=true: objective\.kind=unilm has none"),
        ("model.num_types=2", r"set model\.num_types=4, not 2"),
    ],
)
def test_what_has_no_meaning_there_is_refused(whole, override, told):
    with pytest.raises(ConfigError, match=told):
        config(whole[0]).replace(override)

"""A run takes the tiles that were tuned for its very problem, says so, and keeps it with its checkpoints."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny_runs import trainer

from stack import Config, Trainer
from stack.doctor.faults.runs import TINY
from stack.kernels import tuned
from stack.kernels.attention.xla_chunked import BLOCKS, BlockSizes
from stack.step import program as programs
from stack.step.tiles import key_of, problem, with_tuned
from stack.train.checkpoint.checkpoints import Checkpoints
from stack.train.watch.listeners import Listener

CHUNKED = "kernels.attention=xla_chunked"
SMALL = BlockSizes(8, 64)
TOLD = "xla_chunked 8 tokens, 64 scores"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def keep(program: programs.Program, longest: int = SMALL.longest, scores: int = SMALL.scores) -> Path:
    """As if these had been tuned for a program."""
    asked = problem(program.config, program.layout, platform="cpu")
    key = key_of(tuned.device_name(jax.devices()[0]), asked, "xla_chunked")
    return tuned.keep(key, {"longest": longest, "scores": scores}, seconds=1.0, default_seconds=1.5)


class Heard(Listener):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.losses: list[float] = []

    def on_start(self, info: dict[str, Any]) -> None:
        self.info = info

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.losses.append(metrics["loss"])


def fit(folder: Path, name: str, *overrides: str) -> tuple[Trainer, Heard]:
    heard = Heard()
    made = trainer(folder, name, CHUNKED, *overrides, listeners=[heard])
    made.fit(progress=False)
    return made, heard


def test_a_run_tells_its_tiles_keeps_them_and_says_when_they_are_others(tmp_path):
    plain, untuned = fit(tmp_path, "plain", "train.steps=2")
    assert untuned.info["attention"] == "attention: xla_chunked (asked for); default tiles"
    assert not any(setting.startswith("attention.tiles") for setting in untuned.info["settings"])
    path = keep(plain.program)
    made, heard = fit(tmp_path, "run", "train.steps=2")
    device = tuned.device_name(jax.devices()[0])
    assert heard.info["attention"] == (
        f"attention: xla_chunked (asked for); tiles tuned on {device} (8 tokens, 64 scores),"
        " 1.5 times as fast as the default"
    )
    assert f"attention.tiles={TOLD} (stack kernels tune)" in heard.info["settings"]
    assert made.program.attention.tiles == SMALL
    np.testing.assert_allclose(heard.losses, untuned.losses, rtol=1e-5)
    kept = json.loads((made.folder / "settings.json").read_text())
    (setting,) = (one for one in kept if one["kind"] == "tiles")
    assert (setting["name"], setting["value"]) == ("attention.tiles", TOLD)
    with Checkpoints(made.ledger.store) as checkpoints:
        assert setting in checkpoints.extra(2)["settings"]

    _, heard = fit(tmp_path, "run", "train.steps=3")
    assert not any("attention.tiles" in text for text in heard.warnings)
    path.unlink()
    _, heard = fit(tmp_path, "run", "train.steps=4")
    told = f"compiled with attention.tiles {TOLD} -> not set: the same run, but not bit for bit"
    assert told in heard.warnings


def built(*overrides: str) -> programs.Program:
    config = Config.model_validate(TINY).replace(CHUNKED, *overrides)
    return programs.build(config, jax.devices()[:1])


@pytest.mark.parametrize(
    "other",
    ["train.batch_size=4", "model.num_heads=4", "model.attention_dropout=0.1", "model.dtype=bfloat16"],
)
def test_tiles_of_another_problem_are_not_taken(other):
    keep(built())
    choice = with_tuned(built(other), pytest.fail).attention
    assert (choice.tiles, choice.tiles_from) == (None, "default tiles")


def test_a_kernel_without_tiles_has_none():
    keep(built())
    plain = built("kernels.attention=xla")
    assert with_tuned(plain, pytest.fail) == plain


@pytest.mark.parametrize("longest", [100, 0])
def test_tiles_that_do_not_fit_are_warned_of_and_not_taken(longest):
    path, warned = keep(built(), longest=longest), []
    choice = with_tuned(built(), warned.append).attention
    (line,) = warned
    assert line.startswith(f"{path}: tuned tiles are ignored: blocks of {longest} tokens")
    assert (choice.tiles, choice.tiles_from) == (None, "default tiles (those tuned here do not fit)")


def test_a_trainer_warns_of_a_damaged_file_and_takes_the_default(tmp_path, caplog):
    keep(trainer(tmp_path, "run", CHUNKED).program).write_bytes(b"\x00no json")
    made = trainer(tmp_path, "run", CHUNKED)
    (record,) = caplog.records
    assert "tuned tiles are ignored: Invalid JSON" in record.getMessage()
    assert made.program.attention.tiles_from == "default tiles (those tuned here cannot be read)"


def test_the_default_that_was_the_fastest_is_the_default():
    """So that its numbers are those of a run that was never tuned, to the last bit, and its record too."""
    keep(built(), BLOCKS["cpu"].longest, BLOCKS["cpu"].scores)
    choice = with_tuned(built(), pytest.fail).attention
    assert choice.tiles is None
    assert choice.tiles_from.startswith("default tiles, the fastest that were tried on cpu ")


def test_a_plan_takes_the_default():
    """The same on every machine, whatever was tuned there."""
    keep(built())
    assert built().attention.tiles is None


def here(folder: str) -> tuple[str, str]:
    """The tiles of this process, each of which has a cache of its own."""
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{jax.process_index()}"
    config = Config.model_validate(TINY).replace(CHUNKED)
    program = programs.build(config)
    keep(program, longest=8 * (jax.process_index() + 1))
    choice = with_tuned(program, lambda _: None).attention
    # One whose kernel has no tiles takes part all the same, or the others would wait for it.
    mixed = CHUNKED if jax.process_index() else "kernels.attention=xla"
    other = with_tuned(programs.build(config.replace(mixed)), lambda _: None).attention
    return str(choice.tiles), str(other.tiles)


@pytest.mark.full
def test_all_processes_take_the_tiles_of_the_first(run_processes, tmp_path):
    assert run_processes(here, str(tmp_path), processes=2, devices=1) == [("8 tokens, 64 scores", "None")] * 2

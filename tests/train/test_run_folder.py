"""What lies in a run's folder: cut or damaged it is named, and neither believed, lost nor overwritten."""

import random
import shutil
from pathlib import Path

import jax
import pytest
from tiny_runs import records, run, saved_state

from stack import StackError, Trainer
from stack.cli import main
from stack.train.checkpoint.manifest import NAME
from stack.train.watch.listeners import Listener

OPTIONS = ("eval.every=4", "checkpoint.every=4", "checkpoint.keep_last=9")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("folder")
    run(folder, "whole", *OPTIONS)
    return folder


def copy(folder: Path, name: str) -> Path:
    return shutil.copytree(folder / "runs" / "whole", folder / "runs" / name)


class Heard(Listener):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_warning(self, text) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("number", [30, pytest.param(800, marks=pytest.mark.full)])
def test_a_config_that_was_cut_is_named_and_left_as_it_is(folder, capsys, number) -> None:
    path = copy(folder, f"cut{number}") / "config.yaml"
    whole = path.read_bytes()
    places = range(len(whole) - 1)  # The end of the last line is no loss.
    for place in [0, *random.Random(number).sample(places, number)]:
        path.write_bytes(whole[:place])
        for verb in ("train", "eval"):
            assert main([verb, str(path.parent)]) == 2, place
            out, error = capsys.readouterr()
            assert (out, error.count("\n")) == ("", 1)
            assert error.startswith(f"error: {path}: "), place
        assert path.read_bytes() == whole[:place]
    path.write_bytes(whole[:-1])
    assert main(["config", "show", str(path.parent)]) == 0


def test_a_config_that_was_changed_by_hand_is_taken(folder) -> None:
    path = copy(folder, "edited") / "config.yaml"
    path.write_text(path.read_text().replace("\n  steps: 8\n", "\n  steps: 9\n"))
    assert Trainer.from_run(path.parent, devices=jax.devices()[:1]).config.train.steps == 9


def test_fewer_steps_than_were_taken_train_nothing_and_change_nothing(folder) -> None:
    there = copy(folder, "shorter")
    before = {path: path.read_bytes() for path in there.rglob("*") if path.is_file()}
    with pytest.raises(StackError, match=r"has taken 8 steps, more than train\.steps=3; set train\.steps ab"):
        run(folder, "shorter", *OPTIONS, "train.steps=3")
    before.pop(there / "writer.lock")
    assert {path: path.read_bytes() for path in before} == before


def test_another_held_out_set_is_no_evaluation_of_the_run(folder, capsys) -> None:
    assert main(["eval", str(folder / "runs" / "whole"), "data.heldout_fraction=0.5"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the run began otherwise: data.heldout_fraction 0.1 -> 0.5; restore it" in error


@pytest.mark.full
def test_the_last_evaluation_comes_again_where_a_run_was_killed_before_it(folder) -> None:
    path = copy(folder, "killed") / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert b'"heldout", "step": 8' in lines[-1]
    path.write_bytes(b"".join(lines[:-1]))
    run(folder, "killed", *OPTIONS)
    assert records(folder, "killed") == records(folder, "whole")


class FailAt(Listener):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_checkpoint(self, step) -> None:
        if step == self.step:
            raise ArithmeticError


@pytest.mark.parametrize(
    "damage",
    ["half a line", *(pytest.param(name, marks=pytest.mark.full) for name in ("none", "no UTF-8", "gone"))],
)
def test_no_record_up_to_a_checkpoint_is_lost(folder, capsys, damage) -> None:
    """The run failed right after it; the history of its last steps was damaged."""
    name = f"failed {damage}"
    with pytest.raises(ArithmeticError):
        run(folder, name, *OPTIONS, listeners=[FailAt(4)])
    path = folder / "runs" / name / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if b'"train", "step": 4' in line)
    if damage == "half a line":
        path.write_bytes(b"".join(lines[:place]) + lines[place][:30])
    elif damage == "no UTF-8":
        lines[place] = b'{"kind": "\xff' + lines[place][10:]
        path.write_bytes(b"".join(lines))
        assert main(["show", str(path.parent)]) == 1
        assert f"metrics.jsonl, line {place + 1}: not a record" in capsys.readouterr().err
    elif damage == "gone":
        path.unlink()
    heard = Heard()
    run(folder, name, *OPTIONS, listeners=[heard])
    assert records(folder, name) == records(folder, "whole")
    assert saved_state(folder, name) == saved_state(folder, "whole")
    lost = [text for text in heard.texts if "was lost; the checkpoint had it" in text or "damaged" in text]
    assert bool(lost) == (damage != "none"), heard.texts


def test_a_checkpoint_without_its_manifest_is_named_before_it_is_removed(folder) -> None:
    path = copy(folder, "unfinished")
    (path / "checkpoints" / "8" / NAME).unlink()
    heard = Heard()
    run(folder, "unfinished", *OPTIONS, listeners=[heard])
    told = f"{path}/checkpoints/8 had no {NAME}: its save did not end, and what there was of it is removed"
    assert heard.texts == [told]
    assert saved_state(folder, "unfinished") == saved_state(folder, "whole")

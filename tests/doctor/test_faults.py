"""Runs that are broken on purpose come to the end of the unbroken one; one that does not is seen."""

import random
import shutil

import pytest
from tiny_runs import run as train

from stack.config.errors import StackError
from stack.doctor.faults import harness, kinds
from stack.doctor.faults.runs import Run, differences


def test_a_run_that_is_killed_and_then_damaged_comes_to_the_same_end() -> None:
    lines = list(harness.run(1, kinds=("damage a checkpoint",)))
    assert [line for line in lines if line.startswith("|")][2:] == [
        "| a file of the newest checkpoint flipped, cut, emptied, removed | 1 | 1 | 1 | 0 |",
    ], lines


ALONE = [kind.name for kind in kinds.KINDS if kind.processes == 1]
TOGETHER = [kind.name for kind in kinds.KINDS if kind.processes > 1]


@pytest.mark.full
@pytest.mark.parametrize("names", [[*ALONE, harness.CUT], TOGETHER], ids=["one process", "two"])
def test_a_fault_of_each_kind(names) -> None:
    lines = list(harness.run(1, seed=random.randrange(10_000), kinds=names))
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == len(names)
    assert all(row.endswith(" | 0 |") for row in rows), lines


def test_another_end_is_seen(tmp_path) -> None:
    for name, overrides in (("one", ()), ("same", ()), ("other", ("seed=1",))):
        train(tmp_path / name, "run", "train.steps=3", *overrides)
    one, same, other = (Run(tmp_path / name, "run", 1) for name in ("one", "same", "other"))
    assert differences(same, one) == []
    told = differences(other, one)
    assert any(line.startswith("the state differs in params.") for line in told), told
    assert any(line.startswith("the history differs") for line in told), told
    shutil.rmtree(same.folder / "checkpoints")
    assert differences(same, one) == ["its last checkpoint cannot be read: list index out of range"]


@pytest.mark.full
def test_what_comes_to_what_should_not_be_is_an_error_that_tells_where_it_lies(monkeypatch) -> None:
    def strike(run: Run, _: random.Random) -> kinds.Outcome:
        run.start(overrides=("train.steps=20", "seed=5"))
        return kinds.Outcome(done="another seed", problem="" if run.wait() == [0] else run.said()[0])

    wrong = kinds.Kind(name="wrong", text="another seed", processes=1, strike=strike)
    monkeypatch.setattr(harness, "KINDS", (wrong,))
    with pytest.raises(
        StackError, match=r"^1 faults of --seed 0 came to what should not be; their runs are in "
    ) as told:
        list(harness.run(1, kinds=("wrong",)))
    shutil.rmtree(str(told.value).rsplit(" ", 1)[1])


def test_damage_always_changes_the_file(tmp_path) -> None:
    for seed in range(200):
        path = tmp_path / "file"
        path.write_bytes(b"some bytes")
        kinds.damage(path, random.Random(seed))
        assert not path.exists() or path.read_bytes() != b"some bytes"

"""A loss of power at any moment: what was called saved is there, and the run goes on as if it was not."""

import os
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from tiny_runs import config, records, run, saved_state

from stack.doctor.faults.power import Call, Disk, calls, record
from stack.storage.store import Store
from stack.train.checkpoint.manifest import saved_steps, verify

OPTIONS = ("train.steps=12", "checkpoint.every=3", "checkpoint.keep_last=1", "eval.every=4")


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> tuple[Path, list[Call]]:
    """A run, and what it asked of the system."""
    if not shutil.which("strace") and "CI" not in os.environ:
        pytest.skip("needs strace, which records what a run writes")
    folder = tmp_path_factory.mktemp("power")
    (folder / "run.yaml").write_text(yaml.safe_dump(config(folder / "disk", "run").model_dump(mode="json")))
    (folder / "disk").mkdir()
    command = [sys.executable, "-m", "stack", "train", folder / "run.yaml", *OPTIONS]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = record(command, folder / "trace", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, list(calls(folder / "trace"))


def check(traced, seed: int, of: int, tmp_path: Path) -> None:
    """Cuts the power in one of so many parts of the run, looks at the disk, and goes on."""
    folder, every = traced
    chance = random.Random(seed)
    disk = Disk(folder / "disk")
    name = str(folder / "disk").encode().hex("_").replace("_", "\\x")
    inside = [number for number, call in enumerate(every) if name in call.arguments]
    place = int((seed % of + chance.random()) / of * len(inside))
    for call in every[: inside[place] + 1]:
        disk.apply(call)
    shutil.rmtree(tmp_path / "disk", ignore_errors=True)
    disk.cut(seed, tmp_path / "disk")
    store = Store(tmp_path / "disk" / "runs" / "run" / "checkpoints")
    promised = [int(step) for step in re.findall(r"^step (\d+)  checkpoint$", disk.shown, re.MULTILINE)]
    there = saved_steps(store)
    for step in there:
        assert list(verify(store, step)) == [], f"seed {seed}"
    assert max(there, default=0) >= max(promised, default=0), f"seed {seed}"
    run(tmp_path / "disk", "run", *OPTIONS)
    assert saved_state(tmp_path / "disk", "run") == saved_state(folder / "disk", "run"), f"seed {seed}"
    assert records(tmp_path / "disk", "run") == records(folder / "disk", "run"), f"seed {seed}"


def test_the_recorded_calls_make_the_disk_as_it_is(traced, tmp_path) -> None:
    folder, every = traced
    disk = Disk(folder / "disk")
    for call in every:
        disk.apply(call)
    disk.cut(0, tmp_path / "disk")
    for path in (folder / "disk" / "runs").rglob("*"):
        other = tmp_path / "disk" / path.relative_to(folder / "disk")
        if path.is_file() and path.name not in ("writer.lock", "metrics.jsonl"):
            assert other.read_bytes() == path.read_bytes(), path


def test_what_is_not_synced_is_seen_to_be_lost(tmp_path) -> None:
    """The instrument itself: the same run without fsync would fail."""
    code = (
        "import os, pathlib, sys; place = pathlib.Path(sys.argv[1])\n"
        "(place / 'new').write_bytes(b'x' * 100); os.rename(place / 'new', place / 'name')"
    )
    (tmp_path / "disk").mkdir()
    record([sys.executable, "-c", code, tmp_path / "disk"], tmp_path / "trace")
    disk = Disk(tmp_path / "disk")
    for call in calls(tmp_path / "trace"):
        disk.apply(call)
    found = set()
    for seed in range(40):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        disk.cut(seed, tmp_path / "cut")
        found.add(tuple((path.name, path.read_bytes()[:1]) for path in sorted((tmp_path / "cut").iterdir())))
    assert found >= {(), (("name", b""),), (("name", b"\0"),), (("name", b"x"),)}


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 5))])
def test_after_a_cut_the_run_is_the_unbroken_one(traced, tmp_path, seed) -> None:
    check(traced, seed, 5, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("part", range(4))
def test_after_any_cut_the_run_is_the_unbroken_one(traced, tmp_path, part) -> None:
    for seed in range(100 + 10 * part, 110 + 10 * part):
        check(traced, seed, 40, tmp_path)

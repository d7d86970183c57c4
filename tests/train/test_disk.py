"""A disk that takes nothing: at the start one line, in the middle a warning, and nothing is lost."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import records, run, saved_state, start, wait_for_step

OPTIONS = ("train.steps=600", "eval.every=0", "checkpoint.every=25", "checkpoint.keep_last=1")


def system(*command: object) -> bool:
    return subprocess.run([str(word) for word in command], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """Of two megabytes."""
    (tmp_path / "runs").mkdir()
    if os.geteuid() != 0 or not system("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path / "runs"):
        pytest.skip("only root may mount a small disk")
    yield tmp_path
    system("umount", "-l", tmp_path / "runs")


def fill(folder: Path) -> Path:
    """The file that takes all the room that is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return path


@pytest.mark.full
@pytest.mark.parametrize("field", ["output_dir", "data.cache_dir", "checkpoint.folder"])
def test_a_full_disk_at_the_start_is_one_line(small_disk, field) -> None:
    fill(small_disk / "runs")
    place = small_disk / "runs" / "here"
    elsewhere = [] if field == "output_dir" else [f"output_dir={small_disk}/elsewhere"]
    process = start(small_disk, "full", *elsewhere, f"{field}={place}")
    out, error = process.communicate()
    assert process.returncode == 1, (out, error)
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert str(place) in error
    assert field.split(".")[0] in error


@pytest.mark.full
def test_a_folder_that_takes_nothing_is_one_line(tmp_path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    if not system("chattr", "+i", runs):
        pytest.skip("only root may make a folder immutable, where the file system knows that")
    try:
        process = start(tmp_path, "immutable")
        _, error = process.communicate()
    finally:
        system("chattr", "-i", runs)
    assert process.returncode == 1
    told = "cannot be written: Operation not permitted; set output_dir to a folder that can"
    assert error == f"error: {runs}/immutable {told}\n"


@pytest.mark.full
def test_a_run_outlasts_a_disk_that_is_full_for_a_while(small_disk, tmp_path) -> None:
    process = start(small_disk, "run", *OPTIONS)
    wait_for_step(small_disk, "run", 30, process)
    filler = fill(small_disk / "runs")
    history = small_disk / "runs" / "run" / "metrics.jsonl"
    size = -1
    while size != history.stat().st_size:  # Until it takes no more.
        assert process.poll() is None, process.communicate()
        size = history.stat().st_size
        time.sleep(0.5)
    time.sleep(1)
    filler.unlink()
    out, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert out.count("warning: cannot write the metrics to ") == 1
    assert "warning: cannot save the checkpoint of step " in out
    assert "No space left on device; the checkpoint of step " in out
    assert out.index("cannot save the checkpoint") < out.rindex("step 600  checkpoint")
    elsewhere = tmp_path / "elsewhere"
    run(elsewhere, "run", *OPTIONS)
    assert records(small_disk, "run") == records(elsewhere, "run")
    assert saved_state(small_disk, "run") == saved_state(elsewhere, "run")

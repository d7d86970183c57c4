"""A real Slurm of one node: submitted, preempted, requeued, finished, and equal to the unbroken run."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tiny_runs import config, records, saved_state

from stack.config import Config
from stack.launch.render import render

ROOT = Path(__file__).parents[1]
UP = ROOT / "launch" / "local_slurm.sh"
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged", "mungekey")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """Runs a command of Slurm's, against one that was brought up for this."""
    if not all(map(shutil.which, PROGRAMS)) and "CI" not in os.environ:
        pytest.skip("needs slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([UP, "up", folder], check=True, capture_output=True)
    # What a job hands to its tasks: an outer launcher's variables are none of theirs.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment |= {"SLURM_CONF": f"{folder}/slurm.conf", "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}

    def call(*command: object, **options: str) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=options.get("cwd"))
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    yield call
    subprocess.run([UP, "down", folder], check=True)


def submit(slurm: Callable[..., str], folder: Path, name: str, *overrides: str) -> str:
    """A job of two tasks with the script of the repository; its number."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(run_of(folder, name).model_dump(mode="json")))
    return submit_script(slurm, folder, name, ROOT / "launch" / "slurm.sbatch", path.name, *overrides)


def submit_script(slurm: Callable[..., str], folder: Path, name: str, script: Path, *arguments: str) -> str:
    """A job of two tasks, from a folder that looks like the repository; its number."""
    if not (folder / ".venv").exists():
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "stack").symlink_to(Path(sys.executable).with_name("stack"))
    # A node without GPUs.
    size = ("--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1", f"--output={folder}/{name}.log")
    return slurm("sbatch", "--parsable", *size, script, *arguments, cwd=str(folder)).strip()


def run_of(folder: Path, name: str) -> Config:
    # More steps than pass before Slurm has taken the node away from it.
    return config(folder, name, "mesh.data=2", "train.steps=500", "eval.every=200", "checkpoint.every=0")


def wait(until: Callable[[], bool], log: Path, seconds: float = 500) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, log.read_text() if log.exists() else "no log"
        time.sleep(0.2)


def steps(folder: Path, name: str) -> int:
    path = folder / "runs" / name / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def state(slurm: Callable[..., str], job: str) -> str:
    """As RUNNING, PENDING."""
    words = slurm("scontrol", "show", "job", "--oneliner", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)["JobState"]


def wait_for_state(slurm: Callable[..., str], job: str, wanted: str, log: Path) -> None:
    """Not in vain: a job that has ended otherwise comes to no other state."""

    def is_there() -> bool:
        is_now = state(slurm, job)
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert is_now == wanted or is_now not in ended, (is_now, log.read_text())
        return is_now == wanted

    wait(is_there, log)


def test_a_job_that_is_preempted_and_killed_ends_as_the_unbroken_one(slurm, tmp_path) -> None:
    log = tmp_path / "parts.log"
    job = submit(slurm, tmp_path, "parts")
    wait(lambda: steps(tmp_path, "parts") > 40, log)
    urgent = ("--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    slurm("sbatch", *urgent)
    wait_for_state(slurm, job, "PENDING", log)
    assert "; it is saved; go on with: stack train" in log.read_text()
    stopped = steps(tmp_path, "parts")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # It would wait for two minutes.
    wait(lambda: steps(tmp_path, "parts") > stopped + 40, log)
    slurm("scontrol", "requeue", job)  # Taken away at once: srun kills its tasks.
    wait_for_state(slurm, job, "PENDING", log)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for_state(slurm, job, "COMPLETED", log)

    other = submit(slurm, tmp_path, "whole")
    wait_for_state(slurm, other, "COMPLETED", tmp_path / "whole.log")
    assert records(tmp_path, "parts") == records(tmp_path, "whole")
    assert saved_state(tmp_path, "parts") == saved_state(tmp_path, "whole")


def test_a_rendered_job_goes_on_as_often_as_it_may(slurm, tmp_path) -> None:
    log, script = tmp_path / "few.log", tmp_path / "few.sbatch"
    # Told to stop at once, at every start.
    made = run_of(tmp_path, "few").replace("train.stop_after_minutes=0.02")
    script.write_text(render("slurm", made, nodes=1, gpus=2, restarts=1))
    job = submit_script(slurm, tmp_path, "few", script)
    wait(lambda: steps(tmp_path, "few") > 0, log)
    wait_for_state(slurm, job, "PENDING", log)
    time.sleep(3)  # What begins in the second in which it was queued again, Slurm takes for the old start.
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for_state(slurm, job, "FAILED", log)
    assert log.read_text().count("; it is saved; go on with: stack train") == 2 * 2, (
        "two processes, two starts"
    )
    assert log.read_text().endswith(
        "error: started again 1 times, and not done; submit the job again to go on\n"
    )


def test_a_job_that_fails_is_not_queued_again(slurm, tmp_path) -> None:
    job = submit(slurm, tmp_path, "fails", "train.batch_size=7")
    wait_for_state(slurm, job, "FAILED", tmp_path / "fails.log")
    assert "error: train.batch_size=7" in (tmp_path / "fails.log").read_text()

"""Several processes of one run: they equal one, and none waits for one that failed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from stack import Config, Trainer
from stack.storage.store import Store
from stack.train.checkpoint.manifest import saved_steps
from stack.train.watch.metrics import read_history

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
FIELDS = {
    "name": "run",
    "model": {
        "num_layers": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "max_length": 32,
        "dtype": "float32",
    },
    "data": {
        "sources": [{"kind": "synthetic", "max_bytes": 40_000}],
        "sequence_length": 32,
        "heldout_fraction": 0.1,
    },
    "mesh": {"data": 2, "fsdp": 2},
    "optimizer": {"learning_rate": 3e-3, "schedule": {"kind": "constant", "warmup_steps": 2}},
    "train": {"steps": 8, "batch_size": 8, "log_every": 1},
    "eval": {"every": 4},
    "sample": {"at_end": False, "prompt": "a", "length": 8, "temperature": 0},
}


def config(folder: Path, *overrides: str) -> Config:
    changes = (f"output_dir={folder}/runs", f"data.cache_dir={folder}/cache", *overrides)
    return Config.model_validate(FIELDS).replace(*changes)


def train(config: Config, devices: int | None = None) -> dict[str, Any]:
    """What a run says of itself."""
    trainer = Trainer(config, devices=jax.devices()[:devices])
    history = trainer.fit()
    return {
        "loss": history.curve("loss")[1],
        "heldout": history.curve("loss", "heldout")[1],
        "evaluation": trainer.evaluate(),
        "text": trainer.generate(config.sample.prompt),
        "processes": [{device.process_index for device in row.flat} for row in trainer.mesh.devices],
    }


def fail_in_one() -> None:
    from jax.experimental import multihost_utils

    if jax.process_index() == 1:
        raise ValueError("this one fails")
    multihost_utils.sync_global_devices("never")


def assert_equal(run: dict[str, Any], other: dict[str, Any]) -> None:
    np.testing.assert_allclose(run["loss"], other["loss"], rtol=1e-6)
    np.testing.assert_allclose(run["heldout"], other["heldout"], rtol=1e-6)
    assert run["evaluation"] == pytest.approx(other["evaluation"], rel=1e-6)
    assert run["text"] == other["text"]


def test_two_processes_train_evaluate_and_save_and_one_goes_on_as_if_it_had_been_one(
    tmp_path, run_processes
) -> None:
    one = train(config(tmp_path, "name=one"), devices=4)
    assert one["loss"][-1] < one["loss"][0] - 0.3

    halves = run_processes(train, config(tmp_path, "name=two", "train.steps=4"), processes=2, devices=2)
    for half in halves:
        assert half["processes"] == [{0}, {1}], "`data` crosses the processes, `fsdp` does not"
        np.testing.assert_allclose(half["loss"], one["loss"][:4], rtol=1e-6)
        np.testing.assert_allclose(half["heldout"], one["heldout"][:1], rtol=1e-6)
        assert half["evaluation"]["loss"] == half["heldout"][-1]
    assert halves[0]["text"] == halves[1]["text"]

    assert_equal(train(config(tmp_path, "name=two"), devices=4), one)


@pytest.mark.full
def test_processes_go_on_with_what_one_began(tmp_path, run_processes) -> None:
    """On another mesh, too."""
    one = train(config(tmp_path, "name=one"), devices=4)
    train(config(tmp_path, "name=more", "train.steps=4"), devices=4)
    mesh = ("mesh.data=2", "mesh.tensor=2", "mesh.fsdp=2", "mesh.zero=2", "train.accumulation=2")
    for process in run_processes(train, config(tmp_path, "name=more", *mesh), processes=2, devices=4):
        assert_equal(process, one)


def test_a_process_that_fails_ends_at_once_with_its_error(run_processes) -> None:
    with pytest.raises(AssertionError, match=r"(?s)^failed: process 1 \(status 1\).*this one fails"):
        run_processes(fail_in_one, devices=1, timeout_seconds=60)


@pytest.mark.full
def test_tasks_of_a_slurm_step_find_each_other() -> None:
    """By the variables that `srun` sets; the port is made from the number of the job."""
    with socket.socket() as candidate:
        for job in range(os.getpid() % 4000, 4096):
            try:
                candidate.bind(("", 61_440 + job))
                break
            except OSError:
                continue
    step = {"SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    code = "import jax; from stack.parallel.processes import join; join(); print(jax.process_count())"
    tasks = []
    for number in ("0", "1"):
        task = step | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": number, "SLURM_LOCALID": number}
        tasks.append(
            subprocess.Popen([sys.executable, "-c", code], env=os.environ | task, stdout=subprocess.PIPE)
        )
    assert [task.communicate()[0].split()[-1] for task in tasks] == [b"2", b"2"]
    alone = subprocess.run([sys.executable, "-c", code], env=os.environ | step, capture_output=True)
    assert alone.stdout == b"1\n", "the shell of an allocation is not a step"


def launch(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """launch/local.sh of this Python's stack."""
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config(folder).model_dump(mode="json")))
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{bin_folder}:{os.environ['PATH']}", "TMPDIR": str(folder)}
    command = [str(LOCAL), "-n", "2", "-d", "2", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, cwd=folder, **pipes, **options)


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes it started, in order."""
    shown = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True
    )
    return [int(line.split()[0]) for line in shown.stdout.splitlines() if "-m stack train" in line]


def wait_for(text: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if re.match(text, line):
            return
    raise AssertionError(f"ended without {text}: {process.communicate()[1]}")


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_local_sh_passes_on_an_error_and_its_status(tmp_path) -> None:
    process = launch(tmp_path, "run.yaml", "train.step=1")
    told, error = process.communicate()
    assert (process.returncode, told) == (2, "")
    assert "error: override 'train.step=1': train.step is not a field; did you mean train.steps?" in error


def test_local_sh_tells_a_config_that_cannot_be_once(tmp_path) -> None:
    process = launch(tmp_path, "run.yaml", "train.batch_size=5")
    _, error = process.communicate()
    assert process.returncode == 2
    assert error.startswith("error: train.batch_size=5 in 1 micro-batch does not divide")
    assert error.count("error: ") == 1


@pytest.mark.parametrize("arguments", [[], ["-n", "0", "run.yaml"], ["-d", "x", "run.yaml"]])
def test_local_sh_shows_how_it_is_called(tmp_path, arguments) -> None:
    process = launch(tmp_path, *arguments)
    told, error = process.communicate()
    assert (process.returncode, told) == (2, "")
    assert error.startswith("  launch/local.sh -n N [-d D] CONFIG [overrides]\n")


@pytest.mark.full
def test_local_sh_trains_with_one_process_on_the_screen(tmp_path) -> None:
    process = launch(tmp_path, "run.yaml")
    told, error = process.communicate()
    assert process.returncode == 0, error
    assert told.count("\nstep 8/8  loss ") == 1
    assert "devices   4 x cpu; mesh data 2 x fsdp 2; zero 3" in told
    assert len(read_history(tmp_path / "runs" / "run")) == 8 + 2, "steps and evaluations, written once"
    assert not list(tmp_path.glob("stack-logs*"))


@pytest.mark.full
def test_local_sh_ends_all_when_one_is_killed(tmp_path) -> None:
    process = launch(tmp_path, "run.yaml", "train.steps=100000")
    wait_for("step 1/", process)
    pids = children(process)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 137
    assert "error: process 1 of 2 failed with status 137\n" in error
    assert not any(map(alive, pids))


@pytest.mark.full
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_local_sh_passes_a_signal_on_and_all_save_at_the_same_step(tmp_path, number, status) -> None:
    process = launch(tmp_path, "run.yaml", "train.steps=100000", start_new_session=True)
    wait_for("step 1/", process)
    pids = children(process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # What Ctrl-C does.
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == status, error
    assert not any(map(alive, pids))
    assert not list(tmp_path.glob("stack-logs*"))
    told = re.search(
        r"^stopped at step ([\d,]+) by SIG.*; it is saved; go on with: stack train", error, re.MULTILINE
    )
    assert told is not None, error
    assert saved_steps(Store(tmp_path / "runs" / "run" / "checkpoints"))[-1] == int(told[1].replace(",", ""))


@pytest.mark.full
def test_a_signal_to_one_of_several_processes_stops_all_at_the_same_step(tmp_path) -> None:
    process = launch(tmp_path, "run.yaml", "train.steps=100000")
    wait_for("step 1/", process)
    os.kill(children(process)[1], signal.SIGUSR1)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 75, error
    assert "by SIGTERM, here or on another process; it is saved" in error


@pytest.mark.full
def test_the_processes_of_a_launcher_that_was_killed_save_and_go(tmp_path) -> None:
    process = launch(tmp_path, "run.yaml", "train.steps=100000")
    wait_for("step 1/", process)
    pids = children(process)
    process.kill()
    _, error = process.communicate(timeout=100)
    assert "it is saved; go on with" in error
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))

"""A run on a Ray cluster is the run of one machine, whatever is lost meanwhile."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from local_ray import STACK, cluster, pids_of
from tiny_runs import config, records, saved_state

from stack.cli import main
from stack.launch import ray_cluster
from stack.launch.node import Process, Shared, Site, look

LONG = ("train.steps=120", "checkpoint.every=10", "checkpoint.keep_last=2")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--workers", "0"], "--workers 0 is too few; give at least 1"),
        (["--workers", "1", "--gpus-per-worker", "-1"], "--gpus-per-worker -1 is too few; give at least 0"),
        (["--workers", "1", "--max-restarts", "-1"], "--max-restarts -1 is too few; give at least 0"),
        (["--workers", "1", "train.step=1"], "override 'train.step=1': train.step is not a field; did you"),
        (["--workers", "1", "--address", "x"], "'x' is no address of Ray; give auto, local, HOST:PORT"),
    ],
)
def test_what_cannot_be_is_refused_before_a_cluster_is_asked(capsys, tmp_path, options, told) -> None:
    (tmp_path / "run.yaml").write_text("train: {steps: 3}\n")
    assert main(["launch", "ray", str(tmp_path / "run.yaml"), *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


def site(node: str, *gpus: str) -> Site:
    return Site(node=node, host=node, address=f"10.0.0.{node}", port=20_000 + len(gpus), gpus=gpus)


def test_processes_are_told_of_the_first_and_see_all_gpus_of_their_machine_but_use_their_own(
    monkeypatch,
) -> None:
    monkeypatch.setenv("JAX_PROCESS_ID", "7")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--some")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "4")
    monkeypatch.setenv("STACK_DEFAULTS", "NCCL_LAUNCH_MODE")
    monkeypatch.setenv("NCCL_LAUNCH_MODE", "GROUP")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    sites = [site("1", "2", "3"), site("1", "6", "7"), site("4", "0", "1")]
    told = [ray_cluster.process_environment(sites, number) for number in range(3)]
    assert [one["JAX_PROCESS_ID"] for one in told] == ["0", "1", "2"]
    assert {one["JAX_COORDINATOR_ADDRESS"] for one in told} == {"10.0.0.1:20002"}
    assert {one["JAX_NUM_PROCESSES"] for one in told} == {"3"}
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["2,3,6,7", "2,3,6,7", "0,1"]
    assert [one["JAX_LOCAL_DEVICE_IDS"] for one in told] == ["0,1", "2,3", "0,1"]
    assert {one["XLA_FLAGS"] for one in told} == {"--some"}
    assert {one["CUDA_DEVICE_MAX_CONNECTIONS"] for one in told} == {"4"}
    assert {one["NCCL_DEBUG"] for one in told} == {"INFO"}
    assert not any({"NCCL_LAUNCH_MODE", "STACK_DEFAULTS"} & {*one} for one in told), "set for this machine"
    assert "JAX_PLATFORMS" not in told[0], "a launcher without a GPU does not decide that"
    assert ray_cluster.process_environment([site("1")], 0)["JAX_PLATFORMS"] == "cpu"


def test_a_machine_that_does_not_share_the_files_is_named(tmp_path) -> None:
    (tmp_path / "mark").touch()
    look(Shared(folder=str(tmp_path), mark=str(tmp_path / "mark")))
    with pytest.raises(Exception, match=r"^\S+ has no folder /nowhere; launch from a folder that all"):
        look(Shared(folder="/nowhere", mark=str(tmp_path / "mark")))
    with pytest.raises(
        Exception, match=r"^\S+ does not see what the launcher writes into .*; set output_dir"
    ):
        look(Shared(folder=str(tmp_path), mark=str(tmp_path / "other")))


def test_a_process_is_started_from_the_text_of_a_config_and_its_end_is_told(tmp_path) -> None:
    process = Process()
    process.start("train: {step: 1}\n", str(tmp_path), {})
    error = b""
    while (report := process.report(5)).status is None:
        error += report.error
    error += report.error
    assert report.status == 2
    assert b"train.step is not a field" in error
    assert "train.step is not a field" in process.tail()
    folder = Path(process.tail().rpartition(" ")[2])
    assert folder.is_dir()
    process.remove()
    assert not folder.exists()


@pytest.fixture(scope="module")
def local():
    with cluster() as found:
        yield found


def start(folder: Path, local, name: str, *options: str) -> subprocess.Popen[str]:
    """`stack launch ray` of two workers."""
    address, environment = local
    file = folder / f"{name}.yaml"
    tree = config(folder, name, "mesh.data=2").model_dump(mode="json")
    file.write_text(yaml.safe_dump(tree))
    command = [*STACK, "launch", "ray", str(file), "--workers", "2", "--address", address, *options]
    return subprocess.Popen(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(folder: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    """Until there is a checkpoint of it or a later one."""
    while process.poll() is None:
        saved = (folder / "runs" / name / "checkpoints").glob("*/manifest.jsonl")
        if any(int(path.parent.name) >= step for path in saved):
            return
        time.sleep(0.05)
    raise AssertionError(f"ended before step {step}: {process.communicate()}")


def training() -> list[int]:
    return pids_of(f"{sys.executable} -m stack train /tmp")


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.full
def test_a_run_whose_process_is_killed_starts_again_and_ends_as_the_unbroken_one(tmp_path, local) -> None:
    whole = start(tmp_path, local, "whole", *LONG)
    told, error = whole.communicate()
    assert whole.returncode == 0, error
    assert told.startswith("launch    2 processes on ")
    assert told.count("\nstep 120/120  loss ") == 1
    assert "devices   2 x cpu; mesh data 2" in told

    parts = start(tmp_path, local, "parts", *LONG)
    wait_for_step(tmp_path, "parts", 20, parts)
    os.kill(training()[1], signal.SIGKILL)
    told, error = parts.communicate()
    assert parts.returncode == 0, error
    assert re.search(
        r"\nrestart   process \d of 2 on \S+ ended with status \d+; all start again from step", told
    )
    assert told.count("launch    2 processes on ") == 2
    assert saved_state(tmp_path, "parts") == saved_state(tmp_path, "whole")
    assert records(tmp_path, "parts") == records(tmp_path, "whole")
    assert not training()


@pytest.mark.full
def test_a_worker_that_dies_ends_its_process_and_the_run_starts_again(tmp_path, local) -> None:
    process = start(tmp_path, local, "run", *LONG)
    wait_for_step(tmp_path, "run", 20, process)
    before = training()
    os.kill(pids_of("ray::Process")[0], signal.SIGKILL)
    told, error = process.communicate()
    assert process.returncode == 0, error
    assert "its worker or machine died; all start again from step" in told
    assert gone(before)


@pytest.mark.full
def test_a_config_that_cannot_be_is_told_once_and_not_started_again(tmp_path, local) -> None:
    process = start(tmp_path, local, "bad", "train.batch_size=5")
    told, error = process.communicate()
    assert process.returncode == 2
    assert "train.batch_size=5 in 1 micro-batch does not divide" in error
    assert error.count("error: ") == 1
    assert "restart" not in told


@pytest.mark.full
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_launcher_that_is_told_to_stop_has_all_save(tmp_path, local, number, status) -> None:
    process = start(tmp_path, local, "run", "train.steps=100000", "checkpoint.every=10")
    wait_for_step(tmp_path, "run", 10, process)
    pids = training()
    process.send_signal(number)
    told, error = process.communicate(timeout=120)
    assert process.returncode == status, error
    stopped = re.search(r"^stopped at step ([\d,]+) by SIG.*; it is saved", error, re.MULTILINE)
    assert stopped is not None, error
    assert (tmp_path / "runs/run/checkpoints" / stopped[1].replace(",", "") / "manifest.jsonl").exists()
    assert f"stopped by {number.name}; the same command goes on with " in error
    assert "restart   " not in told
    assert gone(pids)


@pytest.mark.full
def test_the_processes_of_a_launcher_that_was_killed_save_and_go(tmp_path, local) -> None:
    process = start(tmp_path, local, "run", "train.steps=100000", "checkpoint.every=100000")
    history = tmp_path / "runs" / "run" / "metrics.jsonl"
    while process.poll() is None and not (history.exists() and history.stat().st_size > 1000):
        time.sleep(0.1)
    pids = training()
    process.kill()
    process.communicate()
    assert len(pids) == 2
    assert gone(pids)
    assert list((tmp_path / "runs" / "run" / "checkpoints").glob("*/manifest.jsonl"))


@pytest.mark.full
def test_a_run_that_makes_no_progress_is_given_up(tmp_path, local) -> None:
    process = start(
        tmp_path, local, "run", "--max-restarts", "1", "data.sources.0.kind=text", "data.sources.0.path=no"
    )
    told, error = process.communicate()
    assert process.returncode == 1
    assert told.count("restart   process ") == 1
    assert error.splitlines()[-1].endswith("given up after 1 restarts in a row without a newer checkpoint")


@pytest.mark.full
def test_more_workers_than_the_cluster_can_hold_are_refused_with_what_it_has(tmp_path, local) -> None:
    process = start(tmp_path, local, "run", "--workers", "3")
    _, error = process.communicate()
    assert process.returncode == 1
    assert error.startswith(
        "error: --workers 3 need 3 times 1 CPU; the cluster has 2 CPU on 1 machines, room for 2"
    )
    process = start(tmp_path, local, "run", "--gpus-per-worker", "2")
    _, error = process.communicate()
    assert "need 2 times 1 CPU and 2 GPU; the cluster has 2 CPU, 0 GPU on 1 machines, room for 0" in error

"""Processes of a run that differ, die or stand still are named, and the others end in time."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny_runs import config

from stack.parallel.ports import free_port
from stack.train.supervisor import STALLED, Judge


def start_two(
    folder: Path, *overrides: str, other: tuple[str, ...] = (), script: str = ""
) -> list[subprocess.Popen[str]]:
    """A run of two processes without a launcher that would end the others."""
    made = config(folder, "run", "train.steps=100000", "mesh.data=2", "checkpoint.every=20", *overrides)
    (folder / "run.yaml").write_text(yaml.safe_dump(made.model_dump(mode="json")))
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for number in range(2):
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(number),
        }
        stack = ["-c", script] if script else ["-m", "stack", "train"]
        command = [sys.executable, *stack, folder / "run.yaml", *(other if number else ())]
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return processes


def wait_for_steps(folder: Path, step: int, processes: list[subprocess.Popen[str]]) -> None:
    path = folder / "runs" / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        lines = path.read_bytes().splitlines() if path.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError([process.communicate() for process in processes if process.poll() is not None])


@pytest.fixture
def end():
    """Kills what a test leaves."""
    left: list[subprocess.Popen[str]] = []
    yield left.extend
    for process in left:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "optimizer.learning_rate=1",
            "optimizer.learning_rate is 1.0, not 0.01; start all with one config and environment",
        ),
        pytest.param(
            "data.sources.0.max_bytes=30000",
            "data.sources.0.max_bytes is 30000, not 40000; start all with one",
            marks=pytest.mark.full,
        ),
    ],
)
def test_processes_that_differ_are_told_before_they_train(tmp_path, end, override, told) -> None:
    processes = start_two(tmp_path, other=(override,))
    end(processes)
    errors = [process.communicate(timeout=100)[1] for process in processes]
    host = socket.gethostname()
    assert [process.returncode for process in processes] == [1, 1]
    assert all(
        f"process 1 on {host} is not of one mind with process 0 on {host}: {told}" in e for e in errors
    )
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists()


@pytest.mark.full
@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_one_that_dies_or_freezes_is_named_by_the_other(tmp_path, end, victim, number) -> None:
    processes = start_two(tmp_path, "train.silent_seconds=3")
    end(processes)
    wait_for_steps(tmp_path, 5, processes)
    processes[victim].send_signal(number)
    begin = time.monotonic()
    error = processes[1 - victim].communicate(timeout=60)[1]
    assert time.monotonic() - begin < 12
    assert processes[1 - victim].returncode == STALLED, error
    want = "is dead, killed or crashed" if number == signal.SIGKILL else "has not been heard of for"
    assert f"error: process {victim} on {socket.gethostname()} {want}" in error
    assert "; start the run again to go on\n" in error
    assert f"process {1 - victim} on {socket.gethostname()}, at step " in error


HANGS = """
import sys, time, jax
from stack import Trainer, load
from stack.parallel.processes import together
from stack.train.watch.listeners import Listener

class HangsHere(Listener):
    def on_metrics(self, step, metrics):
        if step == 7 and jax.process_index() == 1:
            time.sleep(600)

with together():
    Trainer(load(sys.argv[1]), listeners=[HangsHere()]).fit()
"""


@pytest.mark.full
def test_one_that_stands_still_is_named_and_shows_where_it_stands(tmp_path, end) -> None:
    processes = start_two(tmp_path, "train.silent_seconds=6", "train.stall_minutes=0.8", script=HANGS)
    end(processes)
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [STALLED, STALLED], errors
    told = f"error: process 1 on {socket.gethostname()} has stood still at step 8 for "
    assert all(told in error for error in errors), errors
    assert "in on_metrics" in errors[1], "where it stands"
    assert "in on_metrics" not in errors[0]


FAILS = HANGS.replace("HangsHere", "FailsHere").replace("time.sleep(600)", 'raise OSError("no such place")')


@pytest.mark.full
def test_one_that_fails_alone_is_named_with_its_error_and_nobody_starts_again(tmp_path, end) -> None:
    processes = start_two(tmp_path, script=FAILS)
    end(processes)
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    host = socket.gethostname()
    assert f"error: process 1 on {host} failed at step 8: no such place; process 0 on {host}" in errors[0]
    assert "start the run again" not in errors[0]
    assert "in on_metrics" in errors[1]


def states(*steps: tuple[int, float], data: tuple[float, ...] = (0.0, 0.0, 0.0)) -> Judge:
    """A judge that heard of a step and the seconds since then from each process at time 100."""
    judge = Judge(len(steps), silent=10.0, stall=60.0)
    for number, ((step, still), wait) in enumerate(zip(steps, data, strict=False)):
        told = {"host": f"host-{number}", "step": step, "still": still}
        judge.hear(number, told | {"step_seconds": 1.0, "data_seconds": wait}, 100.0)
    return judge


def test_those_who_wait_are_not_taken_for_the_one_that_stands_still() -> None:
    assert states((7, 59.0), (6, 59.0), (7, 59.0)).judge(105.0) is None
    assert states((7, 61.0), (6, 70.0), (7, 61.0)).judge(105.0) == (
        1,
        "process 1 on host-1 has stood still at step 6 for 70 s; the furthest is at step 7",
    )
    behind = states((7, 61.0), (7, 62.0), (7, 61.0)).judge(105.0)
    assert behind is not None
    assert behind[0] == 1


def test_silence_is_counted_from_the_last_word() -> None:
    judge = states((7, 0.0), (7, 0.0))
    assert judge.judge(110.0) is None
    judge.hear(1, {"host": "host-1", "step": 9, "still": 0.0}, 105.0)
    assert judge.judge(111.0) == (
        0,
        "process 0 on host-0 has not been heard of for 11 s; it was at step 7",
    )


def test_after_the_end_nobody_is_late() -> None:
    judge = states((7, 61.0), (6, 70.0))
    judge.over.add(0)
    assert judge.judge(1000.0) is None


def test_slow_data_is_told_once() -> None:
    judge = states((7, 0.0), (7, 0.0), (7, 0.0), data=(0.01, 0.5, 0.0))
    assert judge.slow() == ["all wait for process 1 on host-1: its data takes 0.5 s a step, 0.01 s is usual"]
    assert judge.slow() == []


@pytest.mark.full
def test_a_short_pause_is_forgiven(tmp_path, end) -> None:
    processes = start_two(tmp_path, "train.silent_seconds=8")
    end(processes)
    wait_for_steps(tmp_path, 5, processes)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(3)
    processes[1].send_signal(signal.SIGCONT)
    last = json.loads((tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()[-2])["step"]
    wait_for_steps(tmp_path, last + 20, processes)
    assert [process.poll() for process in processes] == [None, None]

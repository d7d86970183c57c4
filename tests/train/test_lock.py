"""A run's folder has one writer at a time, and a dead one is none."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stack.config.errors import StackError
from stack.train import lock
from stack.train.lock import FILE, only_writer

HOLD = (
    "import sys, time; from pathlib import Path; from stack.train.lock import only_writer\n"
    "with only_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process that holds a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_by_the_name_of_the_first_and_a_dead_one_is_none(tmp_path) -> None:
    other = hold(tmp_path / "run")
    told = (
        rf"run: process {other.pid} on {socket.gethostname()} is training there since 20\d\d-.*; wait for it"
    )
    with pytest.raises(StackError, match=told), only_writer(tmp_path / "run"):
        pass
    other.send_signal(signal.SIGKILL)
    other.communicate()
    with only_writer(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / FILE).read_text())["pid"] == os.getpid()
        with pytest.raises(StackError, match=f"process {os.getpid()} "), only_writer(tmp_path / "run"):
            pass
    with only_writer(tmp_path / "run"):
        pass


def test_without_locks_a_process_that_lives_here_is_respected(tmp_path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    owner = {"host": socket.gethostname(), "pid": os.getppid(), "start": 1.0}
    (tmp_path / FILE).write_text(json.dumps(owner))
    with pytest.raises(StackError, match=f"process {os.getppid()} on "), only_writer(tmp_path):
        pass
    for other in (
        owner | {"pid": 2**22 + 1},
        owner | {"pid": os.getpid()},
        owner | {"host": "elsewhere"},
        {},
    ):
        (tmp_path / FILE).write_text(json.dumps(other))
        with only_writer(tmp_path):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    (tmp_path / FILE).write_text("half of a rec")
    with only_writer(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    with (
        pytest.raises(StackError, match=r"/proc/run cannot be written: .*; set output_dir"),
        only_writer(Path("/proc/run")),
    ):
        pass


def test_an_error_inside_comes_out_as_it_is(tmp_path) -> None:
    with pytest.raises(OSError, match="something else"), only_writer(tmp_path):
        raise OSError(5, "something else")

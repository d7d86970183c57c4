"""A run that is told to stop saves, says where it stands, and goes on as if nothing had been."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import records, run, saved_state, start, trainer, wait_for_step

from stack import StackError
from stack.storage.store import Store
from stack.train.checkpoint.manifest import saved_steps, verify
from stack.train.stop import StoppedError
from stack.train.watch.listeners import Listener

LONG = ("train.steps=3000", "eval.every=200", "checkpoint.every=500")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stop")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR1, 75, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.full),
    ],
)
def test_a_signal_saves_and_tells_the_way_on(folder, number, status) -> None:
    name = number.name.lower()
    process = start(folder, name, *LONG)
    wait_for_step(folder, name, 20, process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    run_folder = folder / "runs" / name
    last = records(folder, name)[-1]["step"]
    assert process.returncode == status
    assert error == (
        f"stopped at step {last:,} by {number.name}; it is saved; go on with: stack train {run_folder}\n"
    )
    assert (run_folder / "checkpoints" / str(last) / "manifest.jsonl").exists()


@pytest.mark.full
def test_two_interrupts_leave_at_once(folder) -> None:
    process = start(folder, "twice", *LONG)
    wait_for_step(folder, "twice", 5, process)
    process.send_signal(signal.SIGSTOP)  # So that both are there before it looks.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.count("\n") == 1


@pytest.mark.full
def test_a_run_stopped_by_the_clock_and_started_again_is_the_unbroken_one(folder) -> None:
    """By the history, each step and evaluation once, and every byte of the state."""
    options = ("train.steps=60", "eval.every=7", "checkpoint.every=25")
    run(folder, "whole", *options)

    class After(Listener):
        """Asks at a step, as a signal would."""

        def __init__(self, step: int) -> None:
            self.step = step

        def on_metrics(self, step, metrics) -> None:
            if step == self.step:
                signal.raise_signal(signal.SIGTERM)

    for step in (3, 20, 34):  # 35 is evaluated when it is stopped there.
        with pytest.raises(StoppedError, match=r"by SIGTERM; it is saved; go on with: stack train"):
            run(folder, "parts", *options, listeners=[After(step)])
    run(folder, "parts", *options)
    assert records(folder, "parts") == records(folder, "whole")
    assert saved_state(folder, "parts") == saved_state(folder, "whole")


def test_the_time_limit_is_one_of_the_process(folder) -> None:
    with pytest.raises(StoppedError, match=r"stopped at step 1 by train\.stop_after_minutes=0\.001; it is"):
        run(folder, "limit", "train.stop_after_minutes=0.001")
    assert trainer(folder, "limit").ledger.store.names("1/")


def test_a_run_that_ends_as_it_is_told_to_stop_ends(folder) -> None:
    class AtTheEnd(Listener):
        def on_metrics(self, step, metrics) -> None:
            if step == 8:
                signal.raise_signal(signal.SIGTERM)

    run(folder, "ended", listeners=[AtTheEnd()])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert records(folder, "ended")[-1]["step"] == 8


def test_a_stop_that_cannot_save_is_an_error(folder) -> None:
    class Fill(Listener):
        def on_metrics(self, step, metrics) -> None:
            if step == 2:
                signal.raise_signal(signal.SIGTERM)

        def sync(self) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(
        StackError, match=r"cannot save the checkpoint of step 3 .*: No space left on device; there"
    ):
        run(folder, "full", listeners=[Fill()])


@pytest.mark.full
def test_a_run_whose_last_save_fails_ends_with_an_error_whenever_it_was_told(folder) -> None:
    told = threading.Event()

    class Full(Listener):
        def sync(self) -> None:
            raise OSError(28, "No space left on device")

        def on_warning(self, text) -> None:
            told.set()

        def on_eval(self, step, metrics) -> None:
            told.wait(30)  # At the end of the run it was told already.

    with pytest.raises(StackError, match=r"cannot save the checkpoint of step 8 .*: No space left on device"):
        run(folder, "last", "eval.every=0", listeners=[Full()])


@pytest.mark.parametrize(
    ("number", "status", "told"),
    [
        (signal.SIGUSR1, 75, "stopped by SIGUSR1 while not training: nothing is lost, start it again\n"),
        (signal.SIGINT, 130, "interrupted\n"),
    ],
)
def test_signals_are_heard_while_the_command_line_is_imported(tmp_path, number, status, told) -> None:
    """Where Python finds a module of it that waits."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "yaml.py").write_text(f"open({str(pipe)!r}).read()\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "stack", "train", "no.yaml"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    with pipe.open("w"):
        process.send_signal(number)
        _, error = process.communicate()
    assert (process.returncode, error) == (status, told)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_signal_before_training_ends_the_process_at_once_to_be_started_again(tmp_path, number) -> None:
    """It comes while the command waits for a config from a pipe."""
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "stack", "train", pipe]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with pipe.open("w"):  # Returns when the process has opened its end.
        process.send_signal(number)
        _, error = process.communicate()
    assert process.returncode == 75
    assert error == f"stopped by {number.name} while not training: nothing is lost, start it again\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_a_process_that_has_only_to_leave_changes_nothing(tmp_path, number) -> None:
    """Another of its job has left a moment before, and whatever started them ends the rest."""
    program = f"import atexit, os, sys; atexit.register(os.kill, os.getpid(), {int(number)}); "
    program += "from stack.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", tmp_path / "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


@pytest.mark.full
def test_an_interrupt_at_any_moment_ends_the_process_in_time(tmp_path) -> None:
    """While it loads, reads the config, prepares data, compiles, trains, evaluates: it says where it stands.

    What was saved is sound, and the next start is refused nothing.
    """
    chance = random.Random(0)
    begun = time.monotonic()
    process = start(tmp_path, "timed")
    out, error = process.communicate()
    assert (process.returncode, error) == (0, ""), out
    whole = time.monotonic() - begun
    for number in range(8):
        process = start(tmp_path, "interrupted", *LONG)
        time.sleep(whole * (number + chance.random()) / 8)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
        if not out and process.returncode == -signal.SIGINT:
            continue  # Python itself was starting.
        assert process.returncode == 130, (number, error)
        lines = error.splitlines()
        assert lines[-1] == "interrupted" or re.match(r"stopped at step .* by SIGINT; it is saved", lines[-1])
        assert "damaged" not in error
        assert "Traceback" not in error
    folder = tmp_path / "runs" / "interrupted"
    for step in saved_steps(Store(folder / "checkpoints")):
        assert list(verify(Store(folder / "checkpoints"), step)) == []


def test_an_interrupt_while_a_checkpoint_is_read_is_no_damage(folder, monkeypatch) -> None:
    run(folder, "read")
    kept = sorted((folder / "runs" / "read").rglob("*"))

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "read_into", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, "read", "train.steps=9")
    assert sorted((folder / "runs" / "read").rglob("*")) == kept
    assert run(folder, "read", "train.steps=9").state is not None

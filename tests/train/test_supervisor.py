"""Supervisors of two processes, whose trainers are this test, and a stranger at their door."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from stack.train import supervisor
from stack.train.supervisor import STALLED


class Trainer:
    """A supervisor's other side."""

    def __init__(self, number: int, **more: Any) -> None:
        task = {"pid": -1, "number": number, "count": 2, "silent": 30.0, "stall": 60.0, "token": "secret"}
        self.supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(task | more)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self.supervisor.stdin is not None
        assert self.supervisor.stdout is not None
        self.pipe, self.told = self.supervisor.stdin, self.supervisor.stdout

    def say(self, **message: Any) -> None:
        self.pipe.write(json.dumps(message) + "\n")

    def hear(self) -> dict[str, Any]:
        return json.loads(self.told.readline())

    def error(self) -> str:
        """What the supervisor printed, once it has ended."""
        self.pipe.close()
        self.supervisor.wait(20)
        assert self.supervisor.stderr is not None
        return self.supervisor.stderr.read()

    def end(self) -> None:
        self.supervisor.kill()
        self.supervisor.wait()
        for pipe in (self.supervisor.stdin, self.supervisor.stdout, self.supervisor.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def trainers() -> Iterator[tuple[Trainer, Trainer]]:
    first = Trainer(0)
    address = ["127.0.0.1", first.hear()["port"]]
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"token": "guessed", "number": 1}\n'):
        with socket.create_connection((address[0], address[1])) as stranger:
            stranger.sendall(words)
            assert stranger.recv(100) == b"", "no word for strangers"
    second = Trainer(1, address=address)
    assert second.hear() == {"joined": True}
    for number, trainer in enumerate((first, second)):
        trainer.say(step=4 + number, still=0.0, step_seconds=0.1, data_seconds=0.0)
    yield first, second
    first.end()
    second.end()


def test_an_end_without_a_word_is_told_to_the_other(trainers) -> None:
    first, second = trainers
    host = socket.gethostname()
    first.pipe.close()
    assert second.hear() == {"leave": STALLED}
    said = f"error: process 0 on {host} is dead, killed or crashed; it was at step 4; process 1 on {host}, at"
    assert re.fullmatch(re.escape(said) + r" step [05], ends; start the run again to go on\n", second.error())


def test_an_error_is_told_and_its_status_is_taken(trainers) -> None:
    first, second = trainers
    host = socket.gethostname()
    second.say(step=6, end="failed", text="no such place", status=2)
    assert first.hear() == {"leave": 2}
    assert first.error() == (
        f"error: process 1 on {host} failed at step 6: no such place; process 0 on {host}, at step 4, ends\n"
    )
    assert second.error() == ""


def test_those_who_come_to_the_same_error_tell_it_themselves(trainers) -> None:
    for trainer in trainers:
        trainer.say(step=6, end="failed", text="no such place", status=1)
    assert [trainer.error() for trainer in trainers] == ["", ""]


def test_at_the_end_nobody_says_anything(trainers) -> None:
    first, second = trainers
    first.say(step=9, end="done")
    assert first.error() == ""
    second.say(step=9, end="done")
    assert second.error() == ""


def test_a_supervisor_that_reaches_nobody_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    alone = Trainer(1, address=["127.0.0.1", port])
    assert alone.hear() == {"leave": 1}
    error = alone.error()
    alone.end()
    assert f"does not reach that of process 0 at 127.0.0.1:{port}: Connection refused" in error

"""A small process beside each process of a run that sees it die or stand still, and has the others end.

JAX ends the others of a dead process too, from C++ and without saying who. The supervisors meet at that of
process 0, which judges; each hears its trainer, the process that started it, by a pipe, and tells it by
another when it is to leave. A machine that is gone is one whose supervisor is silent. They know nothing of
JAX and import nothing but the standard library: one starts in some tens of milliseconds.
"""

import json
import os
import selectors
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

STALLED = 76
"""Exit status of a process that ends because one of the run's is dead, silent or stands still."""

BEATS = 6
"""Words in the time after which silence is death."""

_SLOW = 0.1  # Of a step: who waits this much longer for its data than the median process is named.
_LINGER_SECONDS = (
    2.0  # Process 0 stays so long for the others to leave; JAX ends those that it leaves behind.
)
_ALIKE_SECONDS = 1.0
_GRACE_SECONDS = 5.0  # A trainer that is told to leave and does not is killed after these.
_JOIN_SECONDS = 120.0  # After process 0 the others may come so late.
_BLOCK = 1 << 16

Message = dict[str, Any]


class Line:
    """Both ends of a connection that carries one JSON object a line."""

    def __init__(self, read: int, write: int) -> None:
        """Of two file descriptors, or twice the same."""
        self.read, self.write = read, write
        self._rest = b""

    def receive(self) -> list[Message] | None:
        """What has come; None when the other side is gone, or speaks of something else."""
        try:
            data = os.read(self.read, _BLOCK)
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return messages if all(isinstance(one, dict) for one in messages) else None

    def send(self, **message: Any) -> None:
        """Says it, to whoever is still there."""
        try:
            os.write(self.write, json.dumps(message).encode() + b"\n")
        except OSError:  # Told by `receive`.
            return


class Judge:
    """What process 0 knows of all, and who is at fault."""

    def __init__(self, count: int, silent: float, stall: float) -> None:
        """Of so many processes, with the seconds after which one is silent, or stands still."""
        self._count, self._silent, self._stall = count, silent, stall
        self._states: dict[int, Message] = {}
        self._heard = dict.fromkeys(range(count), time.monotonic() + _JOIN_SECONDS)
        self._named: set[int] = set()
        self.over: set[int] = set()
        """Those that are at the end of their training."""

    def hear(self, process: int, state: Message, now: float) -> None:
        """Notes a state: `host`, `step`, `still`, `step_seconds` and `data_seconds`."""
        self._states[process], self._heard[process] = state, now

    def where(self, process: int) -> str:
        """It and its host."""
        state = self._states.get(process)
        return f"process {process} on {state['host'] if state else 'a host that is not known'}"

    def step(self, process: int) -> str:
        """Where it was when it was heard of last."""
        state = self._states.get(process)
        return f"{state['step']:,}" if state else "none yet"

    def judge(self, now: float) -> tuple[int, str] | None:
        """Who is silent or stands still, and the words for it; None if nobody does."""
        if self.over:
            return None
        for process, when in self._heard.items():
            if now - when > self._silent:
                said = f"{self.where(process)} has not been heard of for {now - when:.0f} s"
                return process, f"{said}; it was at step {self.step(process)}"
        states = self._states
        if len(states) < self._count or max(one["still"] for one in states.values()) <= self._stall:
            return None
        # The others wait for the one that is behind; of those at one step, for the one that came there first.
        process = min(states, key=lambda number: (states[number]["step"], -states[number]["still"]))
        furthest = max(one["step"] for one in states.values())
        said = f"{self.where(process)} has stood still at step {self.step(process)}"
        return process, (f"{said} for {states[process]['still']:.0f} s; the furthest is at step {furthest:,}")

    def slow(self) -> list[str]:
        """Each process once that the others wait for, as its data is slow."""
        states = self._states
        if len(states) < self._count:
            return []
        usual = statistics.median(one["data_seconds"] for one in states.values())
        notes = []
        for process, one in states.items():
            late = one["data_seconds"] - usual
            if process not in self._named and late > _SLOW * one["step_seconds"] > 0:
                self._named.add(process)
                notes.append(
                    f"all wait for {self.where(process)}: its data takes {one['data_seconds']:.3g} s a step,"
                    f" {usual:.3g} s is usual"
                )
        return notes


class Supervisor:
    """That of one process; see the module."""

    def __init__(self, task: Message, trainer: Line) -> None:
        """As the trainer says in `task`: pid, number, count, silent, stall, token, for all but 0 address."""
        self._number, self._silent, self._token = task["number"], task["silent"], task["token"]
        self._tick_seconds = self._silent / BEATS
        self._trainer = trainer
        self._trainer_pid = task["pid"]
        self._host = socket.gethostname()
        self._step = 0
        self._trainer_ended = self._told = False
        self._judge = Judge(task["count"], self._silent, task["stall"])
        self._peers: dict[int, Line] = {}
        self._first: Line | None = None  # To process 0.
        self._heard_first = time.monotonic()
        self._sockets: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._deadline: float | None = None
        self._goes_on = True
        self._watch(trainer, self._hear_trainer)
        if self._number == 0:
            server = socket.create_server(("", 0))
            self._sockets.append(server)
            self._selector.register(server, selectors.EVENT_READ, lambda: self._welcome(server))
            trainer.send(port=server.getsockname()[1])
        else:
            self._join(*task["address"])

    def run(self) -> None:
        """Until the trainer is gone, or the training is over."""
        tick = time.monotonic()
        while self._goes_on:
            pause = max(0.0, min(tick, self._deadline or tick) - time.monotonic())
            self._hear_one(pause)
            if self._deadline is not None and time.monotonic() > self._deadline:
                self._kill()
            if time.monotonic() >= tick:
                tick = time.monotonic() + self._tick_seconds
                self._tick()

    def _hear_one(self, seconds: float) -> None:
        """Waits so long for a word, and takes one: what it leads to may hear the others."""
        for key, _ in self._selector.select(seconds)[:1]:
            key.data()

    def _watch(self, line: Line, hear: Callable[[list[Message] | None], None]) -> None:
        self._selector.register(line.read, selectors.EVENT_READ, lambda: hear(line.receive()))

    def _join(self, host: str, port: int) -> None:
        try:
            connection = socket.create_connection((host, port), timeout=_JOIN_SECONDS)
        except OSError as error:
            self._print(
                f"error: the supervisor of process {self._number} on {self._host} does not reach that of"
                f" process 0 at {host}:{port}: {error.strerror or error}; let the nodes reach each other on"
                " all ports"
            )
            self._leave(1, self._number)
            return
        connection.settimeout(None)
        self._sockets.append(connection)
        self._first = Line(connection.fileno(), connection.fileno())
        self._first.send(token=self._token, number=self._number)
        self._watch(self._first, self._hear_first)

    def _welcome(self, server: socket.socket) -> None:
        connection, _ = server.accept()
        self._sockets.append(connection)
        line = Line(connection.fileno(), connection.fileno())
        known: list[int] = []

        def hear(messages: list[Message] | None) -> None:
            if messages and not known:
                greeting = messages.pop(0)
                if greeting.get("token") == self._token:
                    known.append(greeting["number"])
                    self._peers[known[0]] = line
                    line.send(joined=True)
            if messages is None or not known:  # Gone, which silence tells, or a stranger.
                self._selector.unregister(line.read)
                connection.close()
                self._peers = {number: peer for number, peer in self._peers.items() if peer is not line}
                return
            for message in messages:
                self._hear(known[0], message)

        self._watch(line, hear)

    def _hear_trainer(self, messages: list[Message] | None) -> None:
        """Passes on what the trainer says, and that it is gone."""
        messages = [{"gone": True}] if messages is None else messages
        if any("gone" in message or "end" in message for message in messages):
            self._trainer_ended = True
            self._selector.unregister(self._trainer.read)
            self._goes_on = False
        for message in messages:
            message |= {"host": self._host}
            self._step = message.setdefault("step", self._step)
            if self._number == 0:
                self._hear(0, message)
            elif self._first is not None:
                self._first.send(**message)

    def _hear(self, process: int, message: Message) -> None:
        """On process 0: what any trainer says."""
        if process in self._judge.over or self._deadline is not None:
            return
        if message.get("end") == "done":
            self._judge.over.add(process)
            if process == 0:
                self._tell_all(over=True)
            return
        self._judge.hear(
            process, {"still": 0.0, "step_seconds": 0.0, "data_seconds": 0.0} | message, time.monotonic()
        )
        if message.get("end") == "failed":
            said = f"{self._judge.where(process)} failed at step {message['step']:,}: {message['text']}"
            self._decide(process, said, message["status"])
        elif "gone" in message:
            said = f"{self._judge.where(process)} is dead, killed or crashed; it was at step"
            self._decide(process, f"{said} {message['step']:,}", STALLED)

    def _hear_first(self, messages: list[Message] | None) -> None:
        """On the others: what process 0's supervisor says."""
        self._heard_first = time.monotonic()
        if messages is None:
            assert self._first is not None
            self._selector.unregister(self._first.read)
            self._first = None
            if self._deadline is None and not self._trainer_ended:
                self._end("process 0 cannot be reached any more", STALLED, culprit=0)
            return
        for message in messages:
            if "joined" in message:
                self._trainer.send(joined=True)
            elif "over" in message and self._first is not None:
                self._selector.unregister(self._first.read)
                self._first = None
            elif "verdict" in message and self._deadline is None:
                self._end(message["verdict"], message["status"], culprit=message["culprit"])

    def _tick(self) -> None:
        if self._deadline is not None:
            return
        now = time.monotonic()
        if self._number == 0:
            self._tell_all(beat=True)
            if verdict := self._judge.judge(now):
                self._decide(*verdict, STALLED)
            for note in self._judge.slow():
                self._trainer.send(note=note)
        elif self._first is not None and now - self._heard_first > self._silent:
            silence = f"process 0 has not answered for {now - self._heard_first:.0f} s"
            self._end(silence, STALLED, culprit=0)

    def _tell_all(self, **message: Any) -> None:
        for peer in list(self._peers.values()):
            peer.send(**message)

    def _decide(self, culprit: int, verdict: str, status: int) -> None:
        """Tells all, and waits until they are gone before process 0 goes, and with it JAX's service."""
        self._deadline = time.monotonic() + _LINGER_SECONDS
        if status != STALLED:  # The others may be about to come to the same error, and tell it themselves.
            self._serve(_ALIKE_SECONDS)
        self._tell_all(verdict=verdict, status=status, culprit=culprit)
        self._say(verdict, status)
        self._serve(_LINGER_SECONDS)
        self._leave(status, culprit)

    def _serve(self, seconds: float) -> None:
        """Until there is nobody any more, or for so long."""
        end = time.monotonic() + seconds
        while (self._peers or not self._trainer_ended) and time.monotonic() < end:
            self._hear_one(0.05)
            if not self._peers and self._told:
                return

    def _end(self, verdict: str, status: int, *, culprit: int) -> None:
        """On the others."""
        self._say(verdict, status)
        self._leave(status, culprit)

    def _say(self, verdict: str, status: int) -> None:
        self._told = True
        if self._trainer_ended:  # By an error that it has told itself, or for good.
            return
        me = f"process {self._number} on {self._host}, at step {self._step:,}, ends"
        way = "; start the run again to go on" if status == STALLED else ""
        self._print(f"error: {verdict}; {me}{way}")

    def _leave(self, status: int, culprit: int) -> None:
        """Has the trainer leave; the one at fault shows first where its threads stand."""
        if self._trainer_ended:
            return
        if culprit == self._number and status == STALLED:
            self._signal(signal.SIGUSR2)  # It has faulthandler answer that.
            time.sleep(0.2)
        self._trainer.send(leave=status)
        self._deadline = time.monotonic() + _GRACE_SECONDS

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._goes_on = False

    def _signal(self, number: int) -> None:
        if os.getppid() == self._trainer_pid:  # Else it is gone already.
            os.kill(self._trainer_pid, number)

    @staticmethod
    def _print(text: str) -> None:
        os.write(2, f"{text}\n".encode())  # In one piece: others write there too.


def main() -> None:
    """Serves the process that started this one, until that is gone."""
    # What ends a run ends its trainer, and that is heard here; schedulers signal every process of a job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    Supervisor(json.loads(sys.argv[1]), Line(0, 1)).run()


if __name__ == "__main__":
    main()

"""Cases one after the other: children are started, prepared and timed in turns, and end in time."""

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from stack.bench.case import Case, Machine, Row, Status, derive
from stack.bench.worker import EndedError, LateError, Worker

GRACE_SECONDS = 60
"""What a case may run on after the time that was given."""
PREPARATION = 0.75
"""Of a case's time, the share by which all must be ready: one that is not takes no other's turns."""
FEWEST_BLOCKS = 3
"""Blocks of which a median is told when the time of a case is over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Team:
    """Contestants that a process serves."""

    name: str
    """`stack`, or a peer."""
    command: tuple[str, ...]
    """To which the request is added."""


PEERS = ("torch", "tokamax")
_REFUSALS: dict[str, Status] = {"unable": "unable", "large": "too large", "failed": "failed"}
STACK = Team(name="stack", command=(sys.executable, "-m", "stack.bench.child"))


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Of the children, which leave each other room on a GPU."""
    room = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    return room | dict(given)


def probe(environment: Mapping[str, str], seconds: float = 120.0) -> Machine:
    """The machine, as a child sees it.

    Raises:
        EndedError: the child ended before it could say.
        LateError: it said nothing.
    """
    command = [*STACK.command, json.dumps({"suite": "machine"})]
    worker = Worker(command, environment, time.monotonic() + seconds)
    worker.close()
    return Machine(**worker.about["machine"])


class Contest:
    """One case: who takes part, and what each did."""

    def __init__(
        self,
        case: Case,
        teams: Sequence[Team],
        machine: Machine,
        environment: Mapping[str, str],
        *,
        seconds: float,
        block_seconds: float,
        tell: Callable[[Row], None] | None = None,
    ) -> None:
        """Starts nothing yet.

        Args:
            case: the problem.
            teams: Stack, and the peers that take part.
            machine: it runs on.
            environment: of the children.
            seconds: until all must have ended.
            block_seconds: of a block of one contestant.
            tell: hears of each contestant once it is prepared, or cannot be.
        """
        self.case = case
        self.tell = tell
        self.environment = environment
        self.seconds = seconds
        begun = time.monotonic()
        self.deadline = begun + seconds
        self.ready_by = begun + PREPARATION * seconds
        names = ("platform", "device_kind", "compute_capability")
        self.request = json.dumps(
            {
                "suite": case.suite,
                "spec": case.spec | {name: getattr(machine, name) for name in names},
                "peers": [team.name for team in teams if team is not STACK],
                "block_seconds": block_seconds,
            }
        )
        self.teams = [team for team in teams if team.command]
        self.rows: dict[str, Row] = {}
        self.served: dict[str, list[Row]] = {team.name: [] for team in self.teams}
        """The rows of each process, prepared or tried."""
        self.workers: dict[str, Worker] = {}
        self.ended: dict[str, str] = {}
        """Why a process could not be started."""

    def run(self) -> list[Row]:
        """The rows of all contestants, whatever became of them."""
        try:
            for group in [self.teams] if self.case.together else [[team] for team in self.teams]:
                for team in group:
                    self._prepare(team)
                self._take_turns(group)
                self._finish(group)
        finally:
            self._close()
        for row in self.rows.values():
            if row.status == "measured" and not row.blocks:
                self._fail(row, self._late)
        return list(self.rows.values())

    def _prepare(self, team: Team) -> None:
        """Has each contestant of a team prepared; one that takes the process with it is left out after."""
        worker = self._worker(team)
        for name in worker.contestants if worker else ():
            label = next((peer for peer in PEERS if name.startswith(peer)), team.name)
            row = self.rows[name] = self._row(name, label)
            self._ask(team, row, "prepare", self.ready_by)
            self.served[team.name].append(row)
            if self.tell is not None:
                self.tell(row)

    def _worker(self, team: Team) -> Worker | None:
        """The process of a team; where it has ended, another, in which all that ran are prepared anew."""
        if worker := self.workers.get(team.name):
            return worker
        try:
            if time.monotonic() >= self.deadline:
                raise LateError
            worker = Worker([*team.command, self.request], self.environment, self.deadline)
        except (EndedError, LateError) as error:
            self.ended[team.name] = self._told(error)
            if not self.served[team.name]:
                self.rows[team.name] = self._row(team.name, team.name)
                self.served[team.name].append(self.rows[team.name])
            for row in self._running(team):
                self._cut_short(row, self._told(error))
            return None
        self.workers[team.name] = worker
        for row in self._running(team):
            self._ask(team, row, "prepare")
        return self.workers.get(team.name) or self._worker(team)

    def _row(self, by: str, team: str) -> Row:
        return Row(suite=self.case.suite, title=self.case.title, by=by, team=team, status="measured")

    def _take_turns(self, group: Sequence[Team]) -> None:
        """A block of each, in an order shuffled every round."""
        shuffle = random.Random(0)
        for _ in range(self.case.blocks):
            order = [(team, row) for team in group for row in self._running(team)]
            shuffle.shuffle(order)
            for team, row in order:
                if row.status == "measured":
                    answer = self._ask(team, row, "block")
                    row.blocks += [answer["seconds"]] if "seconds" in answer else []

    def _finish(self, group: Sequence[Team]) -> None:
        for team in group:
            for row in self._running(team):
                if team.name in self.workers:
                    self._ask(team, row, "finish")
        self._close()

    def _ask(self, team: Team, row: Row, verb: str, by: float | None = None) -> dict[str, Any]:
        """The answer, whose facts are the row's; where there is none, or a refusal, the row says why."""
        worker = self._worker(team)
        if worker is None or row.status != "measured":
            if row.status == "measured":
                self._cut_short(row, self.ended.get(team.name, self._late))
            return {}
        try:
            answer = worker.ask(by or self.deadline, **{verb: row.by})
        except (EndedError, LateError) as error:
            worker.close()
            self.workers.pop(team.name, None)
            is_slow = by and isinstance(error, LateError)
            self._cut_short(row, self._slow if is_slow else self._told(error))
            return {}
        row.facts |= answer.get("facts", {})
        for key, status in _REFUSALS.items():
            if key in answer:
                row.status, row.reason, row.blocks = status, answer[key], []
        if row.status == "measured" and not row.facts.get("ok", True):
            row.status, row.reason, row.blocks = "wrong", _wrong(row.facts), []
        return answer

    def _cut_short(self, row: Row, told: str) -> None:
        """It fails, unless it has been timed often enough."""
        if len(row.blocks) < FEWEST_BLOCKS:
            self._fail(row, told)
        else:
            row.facts["cut_short"] = told

    def _running(self, team: Team) -> list[Row]:
        rows = self.served[team.name]
        return [row for row in rows if row.status == "measured" and "cut_short" not in row.facts]

    def _fail(self, row: Row, reason: str) -> None:
        row.status, row.reason, row.blocks = "failed", reason, []

    @property
    def _late(self) -> str:
        return f"not done after {self.seconds:.0f} s"

    @property
    def _slow(self) -> str:
        return f"not ready after {PREPARATION * self.seconds:.0f} s"

    def _told(self, error: Exception) -> str:
        return self._late if isinstance(error, LateError) else str(error)

    def _close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()


def _wrong(facts: dict[str, Any]) -> str:
    if "error" not in facts:
        return "its loss is not that of a new model, or no number"
    of = f" of {facts['error_of']}" if "error_of" in facts else ""
    return f"error{of} {facts['error']:.2g}, limit {facts['limit']:.2g}"


def run_cases(
    cases: Sequence[Case],
    teams: Sequence[Team],
    machine: Machine,
    environment: Mapping[str, str],
    *,
    seconds: float,
    block_seconds: float,
) -> Iterator[tuple[Case, list[Row]]]:
    """Runs cases in their order; none begins after `seconds`, and none runs on for more than a minute after.

    Args:
        cases: the ceilings first.
        teams: `stack`, and the peers that are here.
        machine: it runs on.
        environment: of the children.
        seconds: for all.
        block_seconds: of a block of one contestant.

    Yields:
        A case and its rows, one `not run` where the time was over.
    """
    begun, ceilings = time.monotonic(), {}
    for case in cases:
        taken = time.monotonic() - begun
        if taken >= seconds:
            why = f"{seconds:g} s were over"
            yield (
                case,
                [Row(suite=case.suite, title=case.title, by="", team="stack", status="not run", reason=why)],
            )
            continue
        contest = Contest(
            case,
            [team for team in teams if team is STACK or team.name in case.peers],
            machine,
            environment,
            seconds=min(case.seconds, seconds - taken + GRACE_SECONDS),
            block_seconds=block_seconds,
        )
        rows = contest.run()
        if case.suite == "ceilings":
            ceilings = best(rows)
        for row in rows:
            derive(row, ceilings)
        yield case, rows


def best(rows: Sequence[Row]) -> dict[str, float]:
    """The ceilings: the fastest product of each precision, FLOP/s, and the copy, bytes/s."""
    ceilings: dict[str, float] = {}
    for row in rows:
        if seconds := row.seconds:
            name = row.facts.get("precision", "copy")
            rate = row.facts.get("flops_full", row.facts.get("bytes", 0)) / seconds
            ceilings[name] = max(rate, ceilings.get(name, 0.0))
    return ceilings

"""`stack bench`: chooses the cases, runs them, and tells and writes what comes of it as it comes."""

import dataclasses
import importlib.util
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from stack.bench import table
from stack.bench.case import Case, Machine, Row
from stack.bench.run import PEERS, STACK, Team, best, environment, probe, run_cases
from stack.bench.suites import attention, cross_entropy, embedding, grouped_matmul, matmul, parity, step
from stack.bench.worker import EndedError, LateError
from stack.config.errors import ConfigError, StackError
from stack.config.explain import nearest
from stack.config.paths import check_writable, expand
from stack.storage.durable import write_bytes

SUITES: dict[str, Callable[..., list[Case]]] = {
    "attention": attention.cases,
    "step": step.cases,
    "cross_entropy": cross_entropy.cases,
    "parity": parity.cases,
    "matmul": matmul.cases,
    "embedding": embedding.cases,
    "grouped_matmul": grouped_matmul.cases,
}
"""By name, the cases for a machine."""

_TORCH_CHILD = Path(__file__).parent / "peers" / "torch_child.py"
_ASK_TORCH = "import torch; print(torch.__version__, torch.cuda.is_available())"


def run(
    suites: Sequence[str],
    *,
    tiny: bool = False,
    seconds: float = 420.0,
    path: str | None = None,
    against: str | None = None,
    torch_python: str | None = None,
    only_list: bool = False,
) -> Iterator[str]:
    """Measures, and tells a line at a time.

    Args:
        suites: names in `SUITES`; none: all.
        tiny: tiny problems, to try it out.
        seconds: no case is begun after these.
        path: of a JSON file that is written after every case; None: nowhere.
        against: names of peers, with commas, or `none`; None: those that are here.
        torch_python: an interpreter that has PyTorch; None: this one.
        only_list: tell the cases and run none.

    Raises:
        ConfigError: a suite or a peer that there is not, a time that is none, or a file that exists.
        StackError: no device is found, or, at the end, a case failed.
    """
    names, wanted = _checked(suites, SUITES, "suite"), _peers(against)
    if not seconds > 0:
        raise ConfigError(f"--seconds {seconds:g}: give more than 0")
    target = None if path is None else new_file(path)
    around = environment(os.environ)
    # Plans are made here, where a GPU must stay free for the children.
    jax.config.update("jax_platforms", "cpu")
    machine = _probe(around)
    chosen = [case for name in names for case in SUITES[name](machine, tiny=tiny)]
    cases = [matmul.ceilings(machine, tiny=tiny), *sorted(chosen, key=lambda case: case.priority)]
    if only_list:
        yield from (f"{case.suite:14} {case.title}" for case in cases)
        return
    teams, peers = _teams(wanted, torch_python, machine)
    about = {"commit": _commit(), "load": os.getloadavg()[0], "peers": peers}
    report = _Report(target, machine, about, {"suites": names, "tiny": tiny, "seconds": seconds})
    yield from table.head(machine, about)
    measured: list[Row] = []
    block_seconds = 0.02 if tiny else 0.25
    for case, rows in run_cases(cases, teams, machine, around, seconds=seconds, block_seconds=block_seconds):
        measured += rows
        if case.suite == "ceilings":
            report.ceilings = best(rows)
            yield from (table.ceilings_line(report.ceilings), "", table.heading())
        report.add(case, rows)
        yield from table.lines(case, rows)
    yield ""
    yield from table.summary(measured)
    if failed := sum(row.status in ("failed", "wrong") for row in measured):
        raise StackError(f"{failed} of {len(measured)} measurements failed; their reasons are above")


class _Report:
    """The JSON file, whole after every case: what is killed keeps what it had."""

    def __init__(
        self, path: Path | None, machine: Machine, about: Mapping[str, Any], options: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.ceilings: dict[str, float] = {}
        self.fields = {"machine": dataclasses.asdict(machine), **about, "options": options}
        self.cases: list[dict[str, Any]] = []
        self._write()

    def add(self, case: Case, rows: Sequence[Row]) -> None:
        """A case that has ended."""
        self.cases.append({**dataclasses.asdict(case), "rows": [row.as_json() for row in rows]})
        self._write()

    def _write(self) -> None:
        if self.path:
            report = self.fields | {"ceilings": self.ceilings, "cases": self.cases}
            write_bytes(self.path, json.dumps(report, indent=1).encode())


def _checked(given: Sequence[str], known: Mapping[str, Any] | Sequence[str], kind: str) -> list[str]:
    for name in given:
        if name not in known:
            close = nearest(name, list(known))
            meant = f"did you mean {close}? " if close else ""
            raise ConfigError(f"{kind} {name!r} is unknown; {meant}there are {', '.join(known)}")
    return [name for name in known if not given or name in given]


def _peers(against: str | None) -> list[str]:
    if against == "none":
        return []
    return _checked([] if against is None else against.split(","), PEERS, "peer")


def new_file(path: str) -> Path:
    """The path of a file that is to be written, and can be.

    Raises:
        ConfigError: it exists.
        StackError: it could not be written.
    """
    target = expand(path)
    if target.exists():
        raise ConfigError(f"{target}: the file exists; remove it or give another name")
    check_writable(target)
    return target


def _probe(around: Mapping[str, str]) -> Machine:
    try:
        return probe(around)
    except EndedError as error:
        raise StackError(f"no device: {error}") from None
    except LateError:
        raise StackError("no device: JAX found none in two minutes") from None


def _teams(
    wanted: Sequence[str], torch_python: str | None, machine: Machine
) -> tuple[list[Team], dict[str, str]]:
    """Who takes part; of each peer its version, or why it does not."""
    teams, found = [STACK], {}
    for peer in wanted:
        if peer == "torch":
            command, found[peer] = _torch(torch_python, machine)
        else:  # It is JAX: Stack's child serves it, and compiles it in the same way.
            command = ()
            is_here = importlib.util.find_spec(peer) is not None
            found[peer] = machine.versions.get(peer, "of no version") if is_here else "absent: not installed"
        if not found[peer].startswith("absent"):
            teams.append(Team(name=peer, command=command))
    return teams, found


def _torch(python: str | None, machine: Machine) -> tuple[tuple[str, ...], str]:
    """What starts the child, and its version."""
    if python is None and importlib.util.find_spec("torch") is None:
        return (), "absent: not installed; --torch-python names an interpreter that has it"
    command = python or STACK.command[0]
    try:
        asked = subprocess.run(
            [command, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"absent: {command} does not run: {error}"
    if asked.returncode:
        return (), f"absent: {command}: {(asked.stderr.splitlines() or ['it failed'])[-1]}"
    version, has_cuda = asked.stdout.split()[-2:]
    if machine.platform == "gpu" and has_cuda != "True":
        return (), f"absent: {version} sees no GPU"
    if machine.platform not in ("cpu", "gpu"):
        return (), f"absent: it is not compared on {machine.platform}"
    return (command, str(_TORCH_CHILD)), version


def _commit() -> str:
    """Of the code that runs, and whether it was changed since."""
    call = [
        "git",
        "-C",
        str(_TORCH_CHILD.parent),
        "describe",
        "--always",
        "--dirty=, changed",
        "--abbrev=10",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode:
        from stack.versions import code_digest

        return f"no commit; digest {code_digest()}"
    return f"commit {done.stdout.strip()}"

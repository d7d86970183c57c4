"""Breaks runs on purpose, again and again, and compares their end with that of one that was left alone."""

import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from stack.config.errors import ConfigError, StackError
from stack.doctor.faults.kinds import KINDS, Cuts, Kind, Outcome
from stack.doctor.faults.runs import Run, differences

_MOST_IN_ONE_RUN = 6
CUT = "cut the power"


@dataclass
class Tally:
    """What came of all faults of a kind."""

    kind: str
    text: str
    faults: int = 0
    told: int = 0
    """Those that somebody was told of; of the others nothing was to be seen, before or after."""
    runs: int = 0
    """That came to their end, and were compared."""
    problems: list[str] = field(default_factory=list)


def run(faults: int, *, seed: int = 0, kinds: Sequence[str] = ()) -> Iterator[str]:
    """Strikes so many times with each kind; a line as each is done, and a table at the end.

    Args:
      faults: of each kind.
      seed: of what is struck, and when.
      kinds: names of `KINDS` and "cut the power"; none: all.

    Raises:
      ConfigError: there is no such kind, or nothing to do.
      StackError: at the end, if anything was silent, hung or came to another end.
    """
    if faults < 1:
        raise ConfigError(f"--faults {faults}: strike at least once")
    if unknown := set(kinds) - {*(kind.name for kind in KINDS), CUT}:
        raise ConfigError(f"there is no kind of fault {min(unknown)!r}")
    root = Path(tempfile.mkdtemp(prefix="stack-faults-"))
    chosen = [kind for kind in KINDS if not kinds or kind.name in kinds]
    unbroken = {}
    for processes in sorted({kind.processes for kind in chosen} | {1}):
        unbroken[processes] = Run(root / f"unbroken-{processes}", "run", processes)
        unbroken[processes].start()
        if any(unbroken[processes].wait()):
            raise StackError(f"a run that nobody broke has failed: {unbroken[processes].said()[0][-500:]}")
    tallies = []
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        tasks = [pool.submit(_try, kind, faults, seed, root, unbroken[kind.processes]) for kind in chosen]
        if not kinds or CUT in kinds:
            if shutil.which("strace"):
                tasks.append(pool.submit(_cut, faults, seed, root, unbroken[1]))
            else:
                yield f"{CUT}: not tried: it needs strace, which records what a run writes"
        for task in as_completed(tasks):
            tally = task.result()
            tallies.append(tally)
            yield f"{tally.kind}: {tally.faults} faults, {tally.told} told, {len(tally.problems)} problems"
            yield from (f"  {problem}" for problem in tally.problems)
    yield from ("", *table(tallies))
    problems = sum(len(tally.problems) for tally in tallies)
    if problems:
        raise StackError(
            f"{problems} faults of --seed {seed} came to what should not be; their runs are in {root}"
        )
    shutil.rmtree(root)


def table(tallies: Sequence[Tally]) -> Iterator[str]:
    """Of all kinds, in Markdown."""
    yield "| fault | times | told | runs at the same end | silent or otherwise wrong |"
    yield "|---|---|---|---|---|"
    for tally in tallies:
        yield f"| {tally.text} | {tally.faults} | {tally.told} | {tally.runs} | {len(tally.problems)} |"


def _try(kind: Kind, faults: int, seed: int, root: Path, unbroken: Run) -> Tally:
    """Faults of a kind in run after run, each to its end and compared."""
    tally = Tally(kind=kind.name, text=kind.text)
    chance = random.Random(f"{kind.name} {seed}")
    while tally.faults < faults:
        name = kind.name.replace(" ", "-")
        broken = Run(root / f"{name}-{seed}-{tally.faults}", "run", kind.processes)
        done: list[Outcome] = []
        for _ in range(min(chance.randint(1, _MOST_IN_ONE_RUN), faults - tally.faults)):
            done.append(kind.strike(broken, chance))
            tally.faults += 1
        _finish(tally, broken, unbroken, done)
    return tally


def _cut(faults: int, seed: int, root: Path, unbroken: Run) -> Tally:
    tally = Tally(kind=CUT, text="no power: what was not synced is lost or not, by chance")
    chance = random.Random(f"{CUT} {seed}")
    cuts = Cuts(Run(root / "recorded", "run", 1), root / "trace")
    while tally.faults < faults:
        # Of the recorded run's own paths: in its place.
        broken = Run(root / f"cut-{seed}-{tally.faults}", "run", 1)
        done = [cuts.strike(broken, chance)]
        tally.faults += 1
        _finish(tally, broken, unbroken, done)
    return tally


def _finish(tally: Tally, broken: Run, unbroken: Run, done: list[Outcome]) -> None:
    """Lets a run come to its end, and compares."""
    broken.kill()
    if not broken.statuses or any(broken.statuses):
        broken.start()
    statuses = broken.wait()
    tally.told += sum(outcome.is_told for outcome in done)
    problems = [f"{outcome.done}: {outcome.problem}" for outcome in done if outcome.problem]
    what = "; ".join(outcome.done for outcome in done)
    if any(statuses):
        problems.append(f"{what}: does not come to its end: {statuses}: {broken.said()[0][-500:]}")
    else:
        if told := differences(broken, unbroken):
            problems.append(f"{what}: {told[0]}, the first of {len(told)} differences")
        tally.runs += not problems
    tally.problems += problems
    if not problems:
        shutil.rmtree(broken.root)

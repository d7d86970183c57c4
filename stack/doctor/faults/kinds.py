"""What can happen to a run: each kind does it once, at a moment of chance, and says what came of it."""

import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stack.config.errors import StackError
from stack.data.entry import EntryWriter, open_entry
from stack.doctor.faults import power
from stack.doctor.faults.runs import Run
from stack.interrupt import REQUEUE
from stack.train.checkpoint.manifest import verify
from stack.train.supervisor import STALLED


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a fault."""

    done: str
    """The fault, and the moment."""
    is_told: bool = False
    """Whether somebody was told what had happened."""
    problem: str = ""
    """What should not have been: a traceback, a hang, a status that says something else."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Of faults."""

    name: str
    text: str
    """What it does, for a table."""
    processes: int
    strike: Callable[[Run, random.Random], Outcome]


def _kill(run: Run, chance: random.Random) -> Outcome:
    run.start()
    moment = run.wait_for_moment(chance)
    run.started[0].kill()
    (status,) = run.wait()
    return _outcome(run, f"SIGKILL {moment}", [status], {-signal.SIGKILL, 0})


def _kill_one(run: Run, chance: random.Random) -> Outcome:
    return _strike_one(run, chance, signal.SIGKILL, is_training=None)


def _freeze_one(run: Run, chance: random.Random) -> Outcome:
    return _strike_one(run, chance, signal.SIGSTOP, is_training=True)


def _strike_one(
    run: Run, chance: random.Random, number: signal.Signals, *, is_training: bool | None
) -> Outcome:
    """Of two processes one; the other has to say which, and end."""
    run.start()
    moment = run.wait_for_moment(chance, is_training=is_training)
    victim = chance.randrange(2)
    is_over = not run.is_running()
    run.started[victim].send_signal(number)
    # Before they have met, nobody but their launcher knows.
    statuses = run.wait(as_launcher=moment != "at a step")
    done = f"{number.name} to process {victim} {moment}"
    other = run.said()[1 - victim]
    is_told = f"process {victim} on" in other
    is_over = is_over or statuses[1 - victim] == 0
    if moment == "at a step" and not is_over and not is_told:
        return Outcome(done=done, problem=f"not told by the other: {statuses}: {other[-300:]}")
    # Before they train together JAX ends the others, by an abort from C++.
    good = {-signal.SIGKILL, 0, STALLED} | ({1, -signal.SIGABRT} if not is_told else set())
    return _outcome(run, done, statuses, good, is_told=is_told)


def _signal(run: Run, chance: random.Random) -> Outcome:
    run.start()
    moment = run.wait_for_moment(chance)
    number = chance.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    run.started[0].send_signal(number)
    statuses = run.wait()
    done = f"{number.name} {moment}"
    said = run.said()[0]
    stopped = re.search(r"stopped at step ([\d,]+)", said)
    good = {0, 130} if number == signal.SIGINT else {0, REQUEUE}
    if stopped and int(stopped[1].replace(",", "")) not in run.steps():
        return Outcome(done=done, problem=f"says it has saved, and has not: {said[-300:]}")
    if statuses == [-number] and not said:
        return Outcome(done=f"{done}, as Python itself was starting")
    if moment == "at a step" and 0 not in statuses and not stopped:
        return Outcome(done=done, problem=f"did not save: {statuses}: {said[-300:]}")
    return _outcome(run, done, statuses, good, is_told=bool(stopped) or "interrupted" in said)


def _damage_checkpoint(run: Run, chance: random.Random) -> Outcome:
    """The newest of a run that was killed with checkpoints behind it."""
    if problem := _get_to(run, chance, checkpoints=2):
        return problem
    folders = [run.folder / "checkpoints" / str(step) for step in run.steps()]
    # Of one that was struck before, nothing may be left to strike.
    folder, paths = next((folder, paths) for folder in reversed(folders) if (paths := _files(folder)))
    step, path = int(folder.name), chance.choice(paths)
    done = f"{damage(path, chance)} {path.relative_to(folder)} of step {step}"
    named = [problem for problem in verify(run.store, step) if str(step) in problem]
    if not named and step in run.steps():
        return Outcome(done=done, problem="`stack checkpoint verify` finds nothing")
    run.start()
    run.wait_for_moment(chance, is_training=True)
    run.kill()
    run.wait()
    said = run.said()[0]
    # Without its manifest it is a save that did not end, and one before it is the newest.
    is_told = str(folder) in said
    if not is_told and path.exists():
        return Outcome(done=done, problem=f"not told: {said[-300:]}")
    return _outcome(run, done, [0], {0}, is_told=is_told)


def _damage_cache(run: Run, chance: random.Random) -> Outcome:
    if problem := _get_to(run, chance, checkpoints=1):
        return problem
    path = chance.choice(_files(run.root / "cache"))
    before = path.read_bytes()
    done = f"{damage(path, chance)} {path.name} of the data cache"
    run.start()
    statuses = run.wait()
    is_told = path.parent.name in run.said()[0]
    is_there = path.exists() and path.read_bytes() != before
    # A run that has come to its end does not read all of it.
    if not is_told and is_there and not _is_found(path.parent):
        return Outcome(done=done, problem=f"neither told nor mended: {run.said()[0][-300:]}")
    return _outcome(run, done, statuses, {0}, is_told=is_told)


def _is_found(entry: Path) -> bool:
    """Whether damage of an entry of the cache is named once all of it is read, which removes the entry."""

    def write(_: EntryWriter) -> None:
        raise StackError("it would be made anew")

    try:
        _, arrays = open_entry(entry, write, warn=lambda _: None)
        for array in arrays.values():
            array.tolist()
    except StackError:
        return True
    return False


def _damage_history(run: Run, chance: random.Random) -> Outcome:
    """Of the files that lie beside the checkpoints; what is refused is put back."""
    if problem := _get_to(run, chance, checkpoints=1):
        return problem
    paths = [run.folder / name for name in ("metrics.jsonl", "goodput.json", "config.yaml")]
    path = chance.choice([path for path in paths if path.exists() and path.stat().st_size])
    before = path.read_bytes()
    done = f"{damage(path, chance)} {path.name}"
    run.start()
    statuses = run.wait()
    is_told = path.name in run.said()[0]
    if not is_told and not _is_as_before(path, before) and path.name != "goodput.json":
        return Outcome(done=done, problem=f"not told: {run.said()[0][-300:]}")
    if any(statuses):
        path.write_bytes(before)
    elif path.name == "metrics.jsonl" and is_told:  # Records that no checkpoint keeps are lost for good.
        run.is_history_lost = True
    return _outcome(run, done, statuses, {0, 1, 2}, is_told=is_told)


def _fill(run: Run, chance: random.Random) -> Outcome:
    """The disk takes no more for a while: every write past a few bytes fails."""
    run.start()
    moment = run.wait_for_moment(chance)
    process = run.started[0].pid
    try:
        hard = resource.prlimit(process, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(process, resource.RLIMIT_FSIZE, (chance.choice((1, 4096, 100_000)), hard))
        time.sleep(chance.uniform(0.05, 1.0))
        resource.prlimit(process, resource.RLIMIT_FSIZE, (hard, hard))
    except ProcessLookupError:  # It had ended.
        moment = "at its end"
    statuses = run.wait()
    said = run.said()[0]
    is_told = any(word in said for word in ("warning", "error"))
    return _outcome(run, f"a full disk {moment}", statuses, {0, 1}, is_told=is_told)


KINDS = (
    Kind(name="kill", text="SIGKILL", processes=1, strike=_kill),
    Kind(name="kill one of two", text="SIGKILL to one of two processes", processes=2, strike=_kill_one),
    Kind(name="freeze one of two", text="SIGSTOP to one of two processes", processes=2, strike=_freeze_one),
    Kind(name="signal", text="SIGTERM, SIGUSR1 or SIGINT", processes=1, strike=_signal),
    Kind(
        name="damage a checkpoint",
        text="a file of the newest checkpoint flipped, cut, emptied, removed",
        processes=1,
        strike=_damage_checkpoint,
    ),
    Kind(name="damage the cache", text="the same of the data cache", processes=1, strike=_damage_cache),
    Kind(
        name="damage the folder",
        text="the same of config.yaml, metrics.jsonl, goodput.json",
        processes=1,
        strike=_damage_history,
    ),
    Kind(name="fill the disk", text="no file may grow for a while", processes=1, strike=_fill),
)


def damage(path: Path, chance: random.Random) -> str:
    """Does one of the things that happen to files; which."""
    data = bytearray(path.read_bytes())
    match chance.choice(("flip", "cut", "empty", "remove")):
        case "flip":
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
            return "a flipped bit in"
        case "cut":
            path.write_bytes(data[: chance.randrange(len(data))])
            return "a cut in"
        case "empty":
            path.write_bytes(b"")
            return "nothing left in"
    path.unlink()
    return "removed:"


class Cuts:
    """Losses of power, of one recorded run; see `stack.doctor.faults.power`."""

    def __init__(self, run: Run, trace: Path) -> None:
        """Records a run to its end."""
        run.start(wrapper=power.strace(trace))
        statuses = run.wait()
        if any(statuses):
            raise StackError(f"a run that nobody broke has failed under strace: {run.said()[0][-500:]}")
        self._root = run.root
        self._calls = list(power.calls(trace))
        mark = str(run.root).encode().hex("_").replace("_", "\\x")
        self._inside = [number for number, call in enumerate(self._calls) if mark in call.arguments]

    def strike(self, run: Run, chance: random.Random) -> Outcome:
        """Has the folder of a run be what a cut has left of that of the recorded one."""
        place = chance.choice(self._inside)
        disk = power.Disk(self._root)
        for call in self._calls[: place + 1]:
            disk.apply(call)
        shutil.rmtree(run.root, ignore_errors=True)
        disk.cut(chance.randrange(1 << 30), run.root)
        steps = [int(step) for step in re.findall(r"^step (\d+)  checkpoint$", disk.shown, re.MULTILINE)]
        done = f"no power after call {place} of {len(self._calls)}"
        there = run.steps()
        damaged = [problem for step in there for problem in verify(run.store, step)]
        if damaged or max(there, default=0) < max(steps, default=0):
            return Outcome(done=done, problem=f"called saved: {steps[-1:]}, there: {there}; {damaged}")
        return Outcome(done=done, is_told=True)


def _get_to(run: Run, chance: random.Random, *, checkpoints: int) -> Outcome | None:
    """Lets a run come to where it has so many checkpoints, and kills it."""
    if len(run.steps()) >= checkpoints:
        return None
    run.start()
    begin = time.monotonic()
    while run.is_running() and len(run.steps()) < checkpoints and time.monotonic() - begin < 60:
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.3))
    run.kill()
    run.wait()
    if len(run.steps()) < checkpoints:
        return Outcome(done="to its first checkpoints", problem=f"does not get there: {run.said()[0][-300:]}")
    return None


def _files(folder: Path) -> list[Path]:
    """Those in it, however deep, that hold something."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _is_as_before(path: Path, before: bytes) -> bool:
    """Whether what was damaged is mended; a history may have grown."""
    return path.exists() and path.read_bytes().startswith(before)


def _outcome(run: Run, done: str, statuses: list[int], good: set[int], *, is_told: bool = False) -> Outcome:
    if not set(statuses) <= good:
        return Outcome(done=done, problem=f"ends with {statuses}: {run.said()[0][-300:]}")
    for number, said in enumerate(run.said()):
        # One that is left alone by another before they train is ended by JAX, which says so in its way.
        if "Traceback" in said and -signal.SIGABRT not in statuses:
            return Outcome(done=done, problem=f"a traceback of process {number}: {said[-500:]}")
    return Outcome(done=done, is_told=is_told)

"""`stack kernels tune`: finds the fastest tiles of a config's attention on this machine, and keeps them."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax

from stack.bench.case import Case, Machine, Row
from stack.bench.command import new_file
from stack.bench.run import STACK, Contest, environment
from stack.bench.worker import EndedError, LateError, Worker
from stack.config import Config
from stack.config.errors import ConfigError, StackError
from stack.kernels import tuned
from stack.kernels.attention import KERNELS, Problem, Tiles, choose
from stack.kernels.attention.tiling import Part, Tiling
from stack.step.tiles import key_of
from stack.storage.durable import write_bytes

GAIN = 1.02
"""How many times as fast as the default tiles others must be: less is noise, and numbers round otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What a part of an implementation came to."""

    kernel: str
    part: Part
    rows: Sequence[Row]
    default: str
    """The names of the default tiles, and of those that are taken; None: none ran."""
    chosen: str | None

    def seconds(self, name: str | None) -> float | None:
        """Of some tiles, if they were measured."""
        return next((row.seconds for row in self.rows if row.by == name), None)

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        told = {"kernel": self.kernel, "part": self.part.name, "passes": self.part.passes}
        names = {"default": self.default, "chosen": self.chosen}
        return told | names | {"rows": [row.as_json() for row in self.rows]}


def run(
    config: Config,
    *,
    rounds: int = 7,
    seconds: float = 300.0,
    devices: int | None = None,
    path: str | None = None,
    progress: Callable[[str], None] | None = None,
    block_seconds: float = 0.25,
) -> Iterator[str]:
    """Tunes, and tells a line at a time.

    Every implementation that the config may take, that has tiles and that runs here is tuned, in a process
    of its own: the default tiles beside others that fit, each compared with the definition before it is
    timed, all in turns. The fastest are kept where they are faster than the default by `GAIN`, else those.

    Args:
        config: what is trained.
        rounds: how often each is timed.
        seconds: of each part of an implementation, at most.
        devices: of the run; None: those of this machine.
        path: of a JSON file with all that was measured; None: none.
        progress: hears of each candidate once it is compiled and compared.
        block_seconds: about how long each is timed in a round.

    Raises:
        ConfigError: no such number, a file that exists, or a config whose attention has no tiles.
        StackError: no device is found, or nothing could be tuned.
    """
    if rounds < 1 or not seconds > 0:
        raise ConfigError(f"--rounds {rounds} --seconds {seconds:g}: give more than 0 of both")
    tilings = _tilings(config)
    target = None if path is None else new_file(path)
    around = environment(os.environ)
    jax.config.update("jax_platforms", "cpu")  # A GPU must stay free for the children.
    machine, problem, device = _ask(config, devices, around)
    able, told = _able(tilings, problem)
    choice = choose(problem.request, config.kernels.attention)
    yield f"device     {machine.device_kind}, {machine.processor}, {machine.cores} cores"
    yield f"attention  {problem}"
    yield from (f"           {name} cannot: {reason}" for name, reason in told.items())

    def tell(row: Row) -> None:
        if progress is not None:
            progress(f"  {row.by}: {'right' if row.status == 'measured' else f'{row.status}: {row.reason}'}")

    def race(case: Case) -> list[Row]:
        limits = {"seconds": seconds, "block_seconds": block_seconds}
        return Contest(case, [STACK], machine, around, tell=tell, **limits).run()

    tuned.check_writable(key_of(device, problem, next(iter(able))))
    results: list[Result] = []
    kept: dict[str, str] = {}
    for name, tiling in able.items():
        best = yield from _tune(name, tiling, problem, rounds, race, results)
        if best is not None:
            last, key = results[-1], key_of(device, problem, name)
            taken, before = last.seconds(last.chosen), last.seconds(last.default)
            assert taken is not None, "it was measured"
            kept[name] = str(tuned.keep(key, tiling.plain(best), seconds=taken, default_seconds=before))
            yield f"{name}: {best} kept in {kept[name]}"
        if target is not None:
            about = {"machine": dataclasses.asdict(machine), "device": device, "problem": problem.plain()}
            about |= {"versions": tuned.versions("attention"), "kept": kept}
            about |= {"parts": [result.as_json() for result in results]}
            write_bytes(target, json.dumps(about, indent=1).encode())
    if not kept:
        raise StackError(f"nothing was tuned: no tiles of {' or '.join(able)} ran; the reasons are above")
    if choice.kernel not in kept:
        other = f"kernels.attention={next(iter(kept))}"
        yield f"a run takes {choice.kernel} ({choice.reason}); with {other} it takes these tiles"


def _tune(
    kernel: str,
    tiling: Tiling,
    problem: Problem,
    rounds: int,
    race: Callable[[Case], list[Row]],
    results: list[Result],
) -> Generator[str, None, Tiles | None]:
    """One implementation, part after part; its best tiles, or None where no tiles of a part ran."""
    best = default = tiling.default(problem)
    for part in tiling.parts:
        tries = {str(tiles): tiles for tiles in (default, best, *part.candidates(problem, best))}
        yield f"{kernel}, {part.name}, {part.passes}: {len(tries)} to try"
        spec = {
            "kernel": kernel,
            "passes": part.passes,
            "problem": problem.plain(),
            "tiles": {name: tiling.plain(tiles) for name, tiles in tries.items()},
        }
        rows = race(Case(suite="tiles", title=f"{kernel}, {part.name}", spec=spec, priority=0, blocks=rounds))
        chosen = _fastest(rows, str(default))
        results.append(Result(kernel=kernel, part=part, rows=rows, default=str(default), chosen=chosen))
        yield from lines(results[-1])
        if chosen is None:
            return None
        best = tries[chosen]
    return best


def _ask(config: Config, devices: int | None, around: Mapping[str, str]) -> tuple[Machine, Problem, str]:
    """The machine, what a device of it attends to, and what that is called, as a child sees it."""
    plain = config.model_dump(mode="json")
    request = {"suite": "machine", "attention_of": plain, "devices": devices}
    try:
        worker = Worker([*STACK.command, json.dumps(request)], around, time.monotonic() + 120)
    except EndedError as error:
        raise StackError(f"no device: {error}") from None
    except LateError:
        raise StackError("no device: JAX found none in two minutes") from None
    worker.close()
    about = worker.about
    if "error" in about:
        more = (
            ""
            if devices
            else "; --devices N tells how many a run has that is not to be on this machine alone"
        )
        raise ConfigError(f"{about['error']}{more}")
    return Machine(**about["machine"]), Problem.of_plain(about["problem"]), about["device"]


def _tilings(config: Config) -> dict[str, Tiling]:
    """Of the implementations that a config may take."""
    wanted = config.kernels.attention
    tilings = {name: kernel.tiling for name, kernel in KERNELS.items() if kernel.tiling is not None}
    if wanted not in ("auto", *tilings):
        names = " or ".join(tilings)
        raise ConfigError(
            f"kernels.attention={wanted} has no tiles to tune; set kernels.attention=auto, {names}"
        )
    return {name: tiling for name, tiling in tilings.items() if wanted in ("auto", name)}


def _able(tilings: Mapping[str, Tiling], problem: Problem) -> tuple[dict[str, Tiling], dict[str, str]]:
    """What can be tuned on a machine, and why the rest cannot."""
    obstacles = {name: KERNELS[name].obstacles(problem.request) for name in tilings}
    able = {name: tiling for name, tiling in tilings.items() if not obstacles[name]}
    told = {name: "; ".join(texts) for name, texts in obstacles.items() if texts}
    if not able:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in told.items())
        raise StackError(f"nothing can be tuned on this machine: {reasons}")
    return able, told


def _fastest(rows: Sequence[Row], default: str) -> str | None:
    """The tiles to take: the default, unless others are faster by `GAIN`; None: none were measured."""
    seconds = {row.by: row.seconds for row in rows if row.seconds is not None}
    if not seconds:
        return None
    best = min(seconds, key=lambda name: seconds[name])
    return default if default in seconds and seconds[default] < GAIN * seconds[best] else best


def lines(result: Result) -> Iterator[str]:
    """A line for each of the tiles, the fastest first, then those without a time."""
    width = max(len(row.by) for row in result.rows)
    base = result.seconds(result.default)
    timed = [(row.seconds, row) for row in result.rows if row.seconds is not None]
    for seconds, row in sorted(timed, key=lambda pair: pair[0]):
        ratio = f"{base / seconds:6.3f} x" if base else f"{'':8}"
        notes = [*(["default"] if row.by == result.default else [])]
        notes += ["taken"] if row.by == result.chosen else []
        notes += ["noisy"] if row.is_noisy else []
        yield f"  {row.by:<{width}} {1e3 * seconds:9.3f} ms {ratio}  {', '.join(notes)}".rstrip()
    for row in result.rows:
        if row.seconds is None:
            yield f"  {row.by:<{width}} {row.status}: {row.reason}"

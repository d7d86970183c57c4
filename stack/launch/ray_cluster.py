"""One run on a Ray cluster: a process a worker, all of them started again when one is lost."""

import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from stack import environment, interrupt
from stack.config import Config, dump, load
from stack.config.errors import ConfigError, StackError
from stack.config.paths import expand
from stack.launch.node import Process, Report, Shared, Site, look
from stack.parallel import cluster
from stack.storage import durable
from stack.train.checkpoint.manifest import place, saved_steps

REFUSED, REQUEUE, INTERRUPTED = 2, 75, 130
"""Exit statuses: a config that cannot be; a run that saved as it was asked to stop; the same by Ctrl-C."""

_PASSED_ON = ("JAX_", "XLA_", "NCCL_", "CUDA_DEVICE_MAX_CONNECTIONS")  # Names of the environment begin so.
# Each machine's own, or set here.
_OWN = {
    *("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS"),
    "JAX_PLATFORMS",
}
# Or a worker of Ray that ends, as all do when the launcher is killed, kills its child before that has saved.
_RUNTIME = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}
_LAST_WORDS_SECONDS = 2  # For the others when one has failed.
_SAVE_SECONDS = 60  # For the others when one has saved and gone.
_LONGEST_PAUSE_SECONDS = 60
_RETURN_SECONDS = 600  # A machine that died may come back so long.


class EndedError(StackError):
    """The run ended as it was asked to, or was refused: a line, and the status to exit with."""

    def __init__(self, told: str, status: int) -> None:
        """The line that is printed."""
        super().__init__(told)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is asked for."""

    config: Config
    workers: int
    gpus: int
    """Of each worker; 0: it runs on its CPU."""
    most_restarts: int

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for a worker."""
        return {"CPU": 1.0} | ({"GPU": float(self.gpus)} if self.gpus else {})

    @property
    def folder(self) -> Path:
        """Of the run."""
        return Path(self.config.output_dir) / self.config.name

    def newest_step(self) -> int:
        """Of the newest checkpoint; -1: there is none."""
        return max(saved_steps(place(self.config, self.folder)), default=-1)


@dataclass
class Asked:
    """What signals asked for, and what of it the processes have heard."""

    number: int | None = None
    times: int = 0
    passed_on: int = 0
    before: dict[int, Any] = field(default_factory=dict)

    @contextmanager
    def hearing(self) -> Iterator[None]:
        """Hears SIGINT, SIGTERM and SIGUSR1, if this is the main thread."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        with interrupt.taken_over(numbers, self._hear) as self.before:
            yield

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            interrupt.acted_on()
            if self.times > 1:  # Whoever should end all at once does not.
                self.before[number](number, frame)
        self.number = number
        self.times += 1

    @property
    def at_once(self) -> bool:
        """Whether nothing is waited for any more."""
        return self.number == signal.SIGINT and self.times > 1

    def error(self, folder: Path) -> BaseException:
        """What to raise when all have ended."""
        name = signal.Signals(self.number or 0).name
        told = f"stopped by {name}; the same command goes on with {folder}"
        return KeyboardInterrupt(told) if self.number == signal.SIGINT else EndedError(told, REQUEUE)


def launch(
    file: str,
    overrides: Sequence[str],
    *,
    workers: int,
    gpus_per_worker: int,
    address: str,
    max_restarts: int,
) -> None:
    """Trains on a cluster to the end, whatever the cluster does meanwhile.

    Args:
        file: a config, or the folder of a run.
        overrides: of its fields.
        workers: processes.
        gpus_per_worker: 0: each runs on the CPU.
        address: of the cluster; see `cluster.connected`.
        max_restarts: so often in a row without a newer checkpoint.

    Raises:
        ConfigError: numbers that cannot be, a bad config.
        StackError: the cluster cannot hold so many workers; processes ended too often.
        KeyboardInterrupt: after Ctrl-C, when all have saved.
    """
    for name, number, least in (
        ("--workers", workers, 1),
        ("--gpus-per-worker", gpus_per_worker, 0),
        ("--max-restarts", max_restarts, 0),
    ):
        if number < least:
            raise ConfigError(f"{name} {number} is too few; give at least {least}")
    config = load(file, overrides)
    config = config.model_copy(update={"output_dir": str(expand(config.output_dir).absolute())})
    asked = Launch(config=config, workers=workers, gpus=gpus_per_worker, most_restarts=max_restarts)
    stop = Asked()
    with cluster.connected(address), stop.hearing():
        _keep_going(asked, stop)


def _keep_going(launch: Launch, stop: Asked) -> None:
    """Starts all processes, again and again, until they have done or there is no sense in it."""
    idle, newest = 0, launch.newest_step()
    while True:
        failure = _Attempt(launch, stop, is_first=newest < 0 and not idle).run()
        if stop.number is not None and (failure is None or failure.is_stop):
            raise stop.error(launch.folder)
        if failure is None:
            return
        if failure.status == REFUSED:
            raise EndedError("the config is refused, as told above; nothing is started again", REFUSED)
        if stop.number is not None:
            raise StackError(f"{failure.told}; it had been told to stop, so nothing is started again")
        before, newest = newest, launch.newest_step()
        idle = 0 if newest > before else idle + 1
        if idle > launch.most_restarts:
            raise StackError(
                f"{failure.told}; given up after {launch.most_restarts} restarts in a row without a newer"
                " checkpoint"
            )
        pause = min(2**idle, _LONGEST_PAUSE_SECONDS)
        where = f"step {newest:,}" if newest >= 0 else "the beginning"
        _tell(f"restart   {failure.told}; all start again from {where} in {pause} s")
        end = time.monotonic() + pause
        while time.monotonic() < end and stop.number is None:
            time.sleep(0.1)
        if stop.number is not None:
            raise stop.error(launch.folder)


@dataclass(frozen=True)
class Failure:
    """Why a run has to be started again."""

    told: str
    status: int | None
    """Of the process that failed first; None: its worker died."""
    is_stop: bool = False
    """Whether every process stopped as it was asked to, or was never started."""


class _Attempt:
    """All processes from their start to their end."""

    def __init__(self, launch: Launch, stop: Asked, *, is_first: bool) -> None:
        """Starts nothing."""
        self._launch = launch
        self._stop = stop
        self._is_first = is_first
        self._actors: list[Any] = []
        self._sites: list[Site] = []
        self._statuses: dict[int, int | None] = {}

    def run(self) -> Failure | None:
        """Reserves what is asked for, and trains there; None: the run is done."""
        import ray
        from ray.exceptions import RayError

        with self._reserved() as group:
            if self._stop.number is not None:
                return Failure("never started", None, is_stop=True)
            try:
                self._start(group)
                return self._watch()
            except RayError as error:
                return Failure(f"a worker of Ray died: {_first_line(error)}", None)
            finally:
                for actor in self._actors:
                    ray.kill(actor)

    @contextmanager
    def _reserved(self) -> Iterator[Any]:
        """Room for all workers, near each other: neighbours in rank share a machine."""
        from ray.util.placement_group import placement_group, remove_placement_group

        _check_room(self._launch, self._stop, 0 if self._is_first else _RETURN_SECONDS)
        group = placement_group([self._launch.bundle] * self._launch.workers, strategy="PACK")
        try:
            is_told = False
            while not group.wait(1) and self._stop.number is None:
                if not is_told:
                    _tell(f"waiting   for {_needs(self._launch)}, which others use now")
                is_told = True
            yield group
        finally:
            remove_placement_group(group)

    def _start(self, group: Any) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        launch = self._launch
        places = [PlacementGroupSchedulingStrategy(group, number) for number in range(launch.workers)]
        with _marked(Path(launch.config.output_dir)) as mark:
            task, shared = cluster.Task(look), Shared(folder=os.getcwd(), mark=str(mark))
            looks = [task.start(shared, num_cpus=1, scheduling_strategy=one, max_retries=0) for one in places]
            for number, reference in enumerate(looks):
                cluster.result(reference, f"worker {number}")
        # One thread waits for output while others pass signals on.
        options = {"num_cpus": 1, "num_gpus": launch.gpus, "max_concurrency": 3, "runtime_env": _RUNTIME}
        self._actors = [
            ray.remote(Process).options(**options, scheduling_strategy=one).remote() for one in places
        ]
        sites: list[Site] = ray.get([one.site.remote() for one in self._actors])
        nodes = list(dict.fromkeys(site.node for site in sites))
        order = sorted(range(launch.workers), key=lambda number: nodes.index(sites[number].node))
        self._actors = [self._actors[number] for number in order]
        self._sites = [sites[number] for number in order]
        _tell(
            f"launch    {launch.workers} processes on {', '.join(dict.fromkeys(s.host for s in self._sites))}"
        )
        config = dump(launch.config)
        ray.get(
            [
                one.start.remote(config, os.getcwd(), process_environment(self._sites, number))
                for number, one in enumerate(self._actors)
            ]
        )

    def _watch(self) -> Failure | None:
        """Until all have ended: shows what the first writes, and passes signals on."""
        import ray

        waiting = {one.report.remote(1): number for number, one in enumerate(self._actors)}
        end = None
        while waiting:
            self._pass_on()
            if self._stop.at_once or (end is not None and time.monotonic() > end):
                break
            ready, _ = ray.wait(list(waiting), timeout=0.2)
            for reference in ready:
                number = waiting.pop(reference)
                report = self._report(reference, number)
                if report is not None and report.status is None:
                    waiting[self._actors[number].report.remote(1 if number == 0 else 5)] = number
                    continue
                self._statuses[number] = None if report is None else report.status
                if self._statuses[number] != 0 and end is None:
                    stops = self._statuses[number] in (REQUEUE, INTERRUPTED) or self._stop.number is not None
                    end = time.monotonic() + (_SAVE_SECONDS if stops else _LAST_WORDS_SECONDS)
        return self._verdict()

    def _report(self, reference: Any, number: int) -> Report | None:
        """What a process says, its output shown if it is the first; None: its worker died."""
        import ray
        from ray.exceptions import RayError

        try:
            report: Report = ray.get(reference)
        except RayError:
            return None
        if number == 0:
            for screen, data in ((sys.stdout, report.out), (sys.stderr, report.error)):
                screen.write(data.decode(errors="replace"))
                screen.flush()
        return report

    def _pass_on(self) -> None:
        if self._stop.number is not None and not self._stop.passed_on:
            self._stop.passed_on = self._stop.number
            for actor in self._actors:
                actor.signal.remote(int(self._stop.number))

    def _verdict(self) -> Failure | None:
        import ray
        from ray.exceptions import RayError

        ended = {number: status for number, status in self._statuses.items() if status != 0}
        stops = {REQUEUE, INTERRUPTED}
        if self._stop.number is not None:  # It ends a process that does not listen yet.
            stops.add(128 + self._stop.number)
        if self._stop.at_once or (ended and set(ended.values()) <= stops):
            return Failure("the run stopped, as it was asked to", REQUEUE, is_stop=True)
        if not ended:
            ray.get([actor.remove.remote() for actor in self._actors])
            return None
        if REFUSED in ended.values():
            return Failure("refused", REFUSED)
        first, status = next((n, s) for n, s in ended.items() if s not in stops)
        site = self._sites[first]
        name = f"process {first} of {self._launch.workers} on {site.host}"
        if status is None:
            return Failure(f"{name}: its worker or machine died", None)
        if first:
            try:
                text = ray.get(self._actors[first].tail.remote())
            except RayError:
                text = "its worker has died meanwhile"
            sys.stderr.writelines(f"[process {first}] {line}\n" for line in text.splitlines())
        return Failure(f"{name} ended with status {status}", status)


def process_environment(sites: Sequence[Site], number: int) -> Mapping[str, str]:
    """What a process is told of the others, its devices, and how JAX is to be."""
    own = sites[number]
    passed_on = {
        # What Stack sets by itself each process finds for its own machine.
        name: value
        for name, value in environment.given().items()
        if name.startswith(_PASSED_ON) and name not in _OWN
    }
    told = passed_on | {
        "JAX_COORDINATOR_ADDRESS": f"{sites[0].address}:{sites[0].port}",
        "JAX_NUM_PROCESSES": str(len(sites)),
        "JAX_PROCESS_ID": str(number),
    }
    if not own.gpus:
        return told | {"JAX_PLATFORMS": "cpu"}
    # All of the run's that are there, or NCCL could not go from one to another directly.
    visible = [gpu for site in sites if site.node == own.node for gpu in site.gpus]
    return told | {
        "CUDA_VISIBLE_DEVICES": ",".join(visible),
        "JAX_LOCAL_DEVICE_IDS": ",".join(str(visible.index(gpu)) for gpu in own.gpus),
    }


def _check_room(launch: Launch, stop: Asked, seconds: float) -> None:
    """Refuses more workers than the machines of the cluster can hold; waits so long for one to come back."""
    import ray

    end = time.monotonic() + seconds
    while True:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = sum(
            min(int(machine.get(name, 0) // amount) for name, amount in launch.bundle.items())
            for machine in machines
        )
        if room >= launch.workers or stop.number is not None:
            return
        if time.monotonic() >= end:
            there = ", ".join(
                f"{sum(machine.get(name, 0) for machine in machines):g} {name}" for name in launch.bundle
            )
            raise StackError(
                f"--workers {launch.workers} need {_needs(launch)}; the cluster has {there} on"
                f" {len(machines)} machines, room for {room}; ask for fewer, or add machines"
            )
        time.sleep(1)


def _needs(launch: Launch) -> str:
    each = " and ".join(f"{amount:g} {name}" for name, amount in launch.bundle.items())
    return f"{launch.workers} times {each}"


@contextmanager
def _marked(folder: Path) -> Iterator[Path]:
    """A file in the output folder, for others to see."""
    mark = folder / f".launch-{uuid.uuid4().hex}"
    try:
        durable.make_folder(folder)
        mark.touch()
    except OSError as error:
        raise StackError(
            f"{folder} cannot be written: {error.strerror}; set output_dir to a folder that can"
        ) from error
    try:
        yield mark
    finally:
        mark.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(". ")


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

"""What runs on the machines of a Ray cluster: the actor that holds one process of a run."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from stack.config.errors import StackError
from stack.parallel.ports import free_port

_TAIL = 30  # lines of a process that failed
_OUTPUT = 1 << 20  # bytes of its output that go to the launcher at one time


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every machine must see as the launcher does."""

    folder: str
    """Where the launcher was started: paths of the config are read from there."""
    mark: str
    """A file that lies in the output folder."""


def look(shared: Shared) -> None:
    """Refuses a machine that does not share the launcher's files; for `cluster.Task`."""
    host = socket.gethostname()
    if not os.path.isdir(shared.folder):
        raise StackError(f"{host} has no folder {shared.folder}; launch from a folder that all machines have")
    if not os.path.exists(shared.mark):
        raise StackError(
            f"{host} does not see what the launcher writes into {os.path.dirname(shared.mark)};"
            " set output_dir to a folder of a file system that all machines share"
        )


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where a process will run."""

    node: str
    host: str
    address: str
    port: int
    """One that is free there."""
    gpus: tuple[str, ...]
    """Those that Ray reserved, as CUDA_VISIBLE_DEVICES names them."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a process wrote since it was last asked, and how it ended."""

    out: bytes
    error: bytes
    status: int | None
    """As a shell tells it, 128 and more for a signal; None while it runs."""


class Process:
    """One process of a run, a child of a worker of Ray: what aborts it leaves the worker there to say so."""

    def __init__(self) -> None:
        """Starts nothing yet."""
        self._folder = Path(tempfile.mkdtemp(prefix="stack-launch-"))
        self._child: subprocess.Popen[bytes] | None = None
        self._places = {"out": 0, "error": 0}

    def site(self) -> Site:
        """Where this is."""
        import ray

        return Site(
            node=ray.get_runtime_context().get_node_id(),
            host=socket.gethostname(),
            address=ray.util.get_node_ip_address(),
            port=free_port(),
            gpus=tuple(map(str, ray.get_gpu_ids())),
        )

    def start(self, config: str, folder: str, environment: Mapping[str, str]) -> None:
        """Trains a config, given as YAML, in a folder."""
        file = self._folder / "config.yaml"
        file.write_text(config, "utf-8")
        command = [sys.executable, "-m", "stack", "train", str(file)]
        own = {"STACK_LAUNCHER": str(os.getpid()), "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
        begun: Future[subprocess.Popen[bytes]] = Future()

        def run() -> None:
            # The system ties a child to the thread that began it, so this one stays as long as the child.
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray's workers do not hear Ctrl-C.
            try:
                with self._file("out").open("wb") as out, self._file("error").open("wb") as error:
                    child = subprocess.Popen(
                        command,
                        cwd=folder,
                        env={**os.environ, **environment, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=error,
                        start_new_session=True,
                    )
            except OSError as error:
                begun.set_exception(error)
                return
            begun.set_result(child)
            child.wait()

        threading.Thread(target=run, daemon=True).start()
        self._child = begun.result()

    def report(self, seconds: float) -> Report:
        """What is new; waits so long for something to be."""
        assert self._child is not None
        end = time.monotonic() + seconds
        while True:
            status = self._child.poll()
            out, error = self._new("out"), self._new("error")
            if status is not None and max(len(out), len(error)) == _OUTPUT:
                status = None  # There is more to come.
            if out or error or status is not None or time.monotonic() >= end:
                return Report(out=out, error=error, status=_as_shell(status))
            time.sleep(0.1)

    def signal(self, number: int) -> None:
        """Sends the process a signal."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def tail(self) -> str:
        """The end of what the process wrote, and where the rest is."""
        texts = [self._file(name).read_text("utf-8", "replace") for name in ("out", "error")]
        lines = "".join(texts).splitlines()
        return "\n".join([*lines[-_TAIL:], f"all it wrote is on {socket.gethostname()} in {self._folder}"])

    def remove(self) -> None:
        """Removes what the process wrote."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self._folder / name

    def _new(self, name: str) -> bytes:
        with self._file(name).open("rb") as file:
            file.seek(self._places[name])
            data = file.read(_OUTPUT)
        self._places[name] += len(data)
        return data


def _as_shell(status: int | None) -> int | None:
    return 128 - status if status is not None and status < 0 else status

"""Running a function in several JAX processes at once, with gloo between their CPU devices.

The parent calls `run`; each child runs this file.
"""

import importlib.util
import inspect
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stack.parallel.ports import free_port


def run(
    function: Callable[..., Any],
    *arguments: Any,
    processes: int = 2,
    devices: int = 4,
    timeout_seconds: float = 240,
) -> list[Any]:
    """Calls `function(*arguments)` in every one of `processes` new processes of `devices` devices each.

    The function is at the top level of its file, which is loaded anew in each process after it has
    joined the others. Arguments and result are pickled, so they are plain values and NumPy arrays.

    Returns:
      What each process returned, in the order of `jax.process_index()`.

    Raises:
      AssertionError: a process failed or hung; with the end of what it wrote. The others are killed.
    """
    source = inspect.getsourcefile(function)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((source, function.__qualname__, arguments)))
        coordinator = f"127.0.0.1:{free_port()}"
        started = []
        try:
            for process in range(processes):
                environment = os.environ | {
                    "JAX_NUM_CPU_DEVICES": str(devices),
                    "JAX_COORDINATOR_ADDRESS": coordinator,
                    "JAX_NUM_PROCESSES": str(processes),
                    "JAX_PROCESS_ID": str(process),
                }
                with (folder / f"log{process}").open("wb") as log:
                    command = [sys.executable, __file__, str(folder)]
                    started.append(
                        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
                    )
            _wait(started, folder, time.monotonic() + timeout_seconds)
        finally:
            for process in started:
                process.kill()
                process.wait()
        return [pickle.loads((folder / f"result{process}").read_bytes()) for process in range(processes)]


def _wait(started: Sequence[subprocess.Popen[bytes]], folder: Path, deadline: float) -> None:
    """Returns when every process ended well; raises as soon as one did not."""
    while (statuses := [process.poll() for process in started]) and set(statuses) != {0}:
        late = time.monotonic() > deadline
        failed = [number for number, status in enumerate(statuses) if status] or (
            [number for number, status in enumerate(statuses) if status is None] if late else []
        )
        if failed:
            logs = {number: (folder / f"log{number}").read_text()[-4000:] for number in failed}
            ends = "\n".join(
                f"process {number} (status {statuses[number]}):\n{log}" for number, log in logs.items()
            )
            raise AssertionError(f"{'timed out' if late else 'failed'}: {ends}")
        time.sleep(0.02)


def main(folder: Path) -> None:
    """One process: joins the others, calls the function, leaves its result in the folder."""
    import jax

    from stack.parallel.processes import join, together

    source, name, arguments = pickle.loads((folder / "call").read_bytes())
    join(initialization_timeout_seconds=60, heartbeat_timeout_seconds=10)
    with together():
        spec = importlib.util.spec_from_file_location(Path(source).stem, source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        result = getattr(module, name)(*arguments)
        (folder / f"result{jax.process_index()}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

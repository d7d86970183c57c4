"""A Ray cluster of this machine alone, for tests: `ray start` in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stack.parallel.ports import free_port

STACK = [sys.executable, "-m", "stack"]


@contextmanager
def cluster(cpus: int = 2) -> Iterator[tuple[str, dict[str, str]]]:
    """Its address, and the environment of whoever connects to it: with a token that is its own."""
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": uuid.uuid4().hex,
        "RAY_USAGE_STATS_ENABLED": "0",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    port = free_port()
    # Sockets lie in there, whose names may not be long.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [
            *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"),
            *(f"--num-cpus={cpus}", "--include-dashboard=false", "--object-store-memory=150000000"),
            *("--disable-usage-stats", f"--temp-dir={folder}"),
        ]
        with (Path(folder) / "log").open("w") as log:
            head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_for(port, head, Path(folder) / "log")
            yield f"127.0.0.1:{port}", environment
        finally:
            head.send_signal(signal.SIGTERM)  # It ends those that it started.
            head.wait(60)


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    socket.create_connection(("127.0.0.1", port)).close()


def pids_of(words: str) -> list[int]:
    """Processes whose command line has something in it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if words in line:
                found.append(int(folder.name))
    return sorted(found)

"""Ports for processes to meet at."""

import random
import socket


def free_port() -> int:
    """One that nobody listens at here, below 32768: above, the system itself hands ports to connections."""
    while True:
        with socket.socket() as candidate:
            try:
                candidate.bind(("", random.randrange(20_000, 32_768)))
            except OSError:
                continue
            return candidate.getsockname()[1]

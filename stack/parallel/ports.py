"""Ports for processes to meet at."""

import random
import socket


def free_port() -> int:
    """One that nobody listens at here, below 32768: above, the system itself hands ports to connections.

    It is drawn by the system's chance, which no seed repeats: it is bound seconds later, and gRPC lets two
    that were handed the same one bind it both.
    """
    chance = random.SystemRandom()
    while True:
        with socket.socket() as candidate:
            try:
                candidate.bind(("", chance.randrange(20_000, 32_768)))
            except OSError:
                continue
            return candidate.getsockname()[1]

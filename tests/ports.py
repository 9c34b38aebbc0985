"""Ports of servers that tests start."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A port that nobody listens on, below those that connections take for themselves."""
    # A seeded generator would give tests that run side by side the same one.
    choose = random.SystemRandom()
    while True:
        port = choose.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

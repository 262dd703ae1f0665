"""Ports for servers of the tests."""

from __future__ import annotations

import socket
from random import SystemRandom

_given: set[int] = set()


def free_port() -> int:
    """Return a port on which nothing listens, each only once.

    It lies below those from which the system takes one for every connection, and above those of Ray's workers: none of these
    takes it before the server does.
    """
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        if port not in _given and not answers(port):
            _given.add(port)
            return port


def answers(port: int) -> bool:
    """Return whether a server on this machine accepts connections at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

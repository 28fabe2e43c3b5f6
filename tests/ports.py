"""Ports of this machine for processes that bind them later."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress

# Below the ports that Linux gives to outgoing connections and for port 0: it cannot give one of
# these to another socket between the choice and the bind.
FIRST_PORT, PORTS = 10_000, 22_000
PORTS_BETWEEN_PROCESSES = 997  # a prime: each process id has a start of its own
_calls = itertools.count()


def free_port() -> int:
    """A free port, which neither this process nor one that runs at the same time chooses again.

    Processes count upward from starts that are far apart, forks too.
    """
    while True:
        number = os.getpid() * PORTS_BETWEEN_PROCESSES + next(_calls)
        port = FIRST_PORT + number % PORTS
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port

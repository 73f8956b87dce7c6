"""Ports for servers that must know theirs in advance, or that restart on the same port.

A port that was free a moment ago may be assigned by the system to the next connection or listener.
These ports are below the range that it assigns from (`ip_local_port_range`), and each test process,
such as a worker of xdist, has a range of its own.
"""

from __future__ import annotations

import itertools
import os
import socket

UNUSED_ADDRESS = "127.0.0.1:1"
"""An address on which no server listens: no program uses a port this low."""
_FIRST, _PORTS_PER_PROCESS, _PROCESSES = 12_000, 100, 200
_numbers = itertools.count()


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free, and that is not returned again soon."""
    first = _FIRST + os.getpid() % _PROCESSES * _PORTS_PER_PROCESS
    for number in itertools.islice(_numbers, _PORTS_PER_PROCESS):
        port = first + number % _PORTS_PER_PROCESS
        with socket.socket() as trial:
            # Servers set this too: connections of the last server on the port may linger.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port is taken")

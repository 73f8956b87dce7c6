"""Ports for servers that must be told theirs, or that come back to the one they had.

The system gives a port that was free a moment ago to whoever connects or listens next. These lie below those that it gives away
(`ip_local_port_range`), and each test process, such as xdist's workers, has its own.
"""

from __future__ import annotations

import itertools
import os
import socket

UNUSED_ADDRESS = "127.0.0.1:1"
"""An address at which nobody listens: no server of ours or of anybody's takes a port this low."""
_FIRST, _EACH, _PROCESSES = 12_000, 100, 200
_numbers = itertools.count()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, and that nobody else is given soon."""
    first = _FIRST + os.getpid() % _PROCESSES * _EACH
    for number in itertools.islice(_numbers, _EACH):
        port = first + number % _EACH
        with socket.socket() as trial:
            # As servers do it: connections of the last one on it may linger.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port is taken")

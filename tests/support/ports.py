"""Ports for servers that must be told theirs, or that come back to the one they had.

The system gives a port that was free a moment ago to whoever connects or listens next. These lie below those that it gives away
(`ip_local_port_range`), and each of xdist's workers has its own.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

NOBODY = "127.0.0.1:1"
"""An address at which nobody listens: no server of ours or of anybody's takes a port this low."""
_FIRST, _EACH, _WORKERS = 12_000, 1_000, 20
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
# Another run on this machine begins elsewhere.
_numbers = itertools.count(random.randrange(_EACH))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, and that nobody else is given soon."""
    for number in itertools.islice(_numbers, _EACH):
        port = _FIRST + _worker * _EACH + number % _EACH
        with socket.socket() as trial:
            # As servers do it: connections of the last one on it may linger.
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("every port is taken")

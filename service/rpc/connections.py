"""Closes TCP connections at shutdown so that clients see UNAVAILABLE rather than CANCELLED.

A stopping gRPC server sends GOAWAY and answers the calls that cross it on the wire with CANCELLED,
which clients do not retry. gRPC has no interface to end connections without that. A closed
connection is reported as UNAVAILABLE, which clients retry, possibly on another replica.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


def close_connections(port: int) -> None:
    """Stop accepting connections on a TCP port, and close those that were accepted there.

    Data that was already written is still delivered. On platforms without /dev/fd, and for
    listeners outside Linux, nothing happens, and gRPC closes the connections in its own way.
    """
    sockets = _sockets(port)
    # Listeners first: a client whose connection is closed reconnects immediately, and gRPC stops
    # listening only a moment later. On Linux SHUT_RD makes a listener refuse connections. gRPC then
    # logs "Closing acceptor. Failed accept4", which is expected at this point.
    sockets.sort(key=_is_listening, reverse=True)
    for sock in sockets:
        with sock, suppress(OSError):
            sock.shutdown(socket.SHUT_RD if _is_listening(sock) else socket.SHUT_RDWR)


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _sockets(port: int) -> list[socket.socket]:
    """Return duplicates of the sockets that listen on a port or were accepted there."""
    sockets: list[socket.socket] = []
    with suppress(OSError):
        for descriptor in Path("/dev/fd").iterdir():
            with suppress(OSError):
                if descriptor.is_socket():
                    # A duplicate, because gRPC may close its descriptor at any time, and the number
                    # may then be reused.
                    sock = socket.socket(fileno=os.dup(int(descriptor.name)))
                    if (
                        sock.family in (socket.AF_INET, socket.AF_INET6)
                        and sock.getsockname()[1] == port
                    ):
                        sockets.append(sock)
                    else:
                        sock.close()
    return sockets

"""Closes TCP connections at shutdown, so that clients see UNAVAILABLE rather than CANCELLED.

A gRPC server that stops sends GOAWAY. It answers calls that clients sent before they received it
with CANCELLED, which clients do not retry. When a connection is closed, the client reports
UNAVAILABLE, or sends the call to another replica automatically. gRPC has no API for this.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

_SO_ATTACH_FILTER = 26
"""A socket option of Linux, for which Python has no constant."""
_DROP_ALL = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
"""A packet filter of one instruction, return 0 (BPF_RET | BPF_K), which drops every packet."""


def close_connections(port: int) -> None:
    """Close the connections that this process accepted on a TCP port, and accept no others.

    Data that was written to them is still delivered. Where a process cannot list its descriptors
    (/dev/fd), this does nothing, and gRPC closes them with GOAWAY.
    """
    sockets = _duplicate_sockets(port)
    # The listening socket first: gRPC stops listening only a moment later, and clients whose
    # connection was closed would connect again.
    sockets.sort(key=lambda sock: not _is_listening(sock))
    for sock in sockets:
        with sock, suppress(OSError):
            if not _is_listening(sock):
                sock.shutdown(socket.SHUT_RDWR)
            elif sys.platform == "linux":
                program = struct.pack("HL", 1, ctypes.addressof(_DROP_ALL))
                sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _duplicate_sockets(port: int) -> list[socket.socket]:
    """Return duplicates of the sockets that listen on a port or were accepted there.

    They are duplicates, since gRPC may close its own at any time, and the system may then reuse
    their numbers.
    """
    sockets: list[socket.socket] = []
    with suppress(OSError):
        for descriptor in Path("/dev/fd").iterdir():
            with suppress(OSError):
                if descriptor.is_socket():
                    sock = socket.socket(fileno=os.dup(int(descriptor.name)))
                    if (
                        sock.family in (socket.AF_INET, socket.AF_INET6)
                        and sock.getsockname()[1] == port
                    ):
                        sockets.append(sock)
                    else:
                        sock.close()
    return sockets

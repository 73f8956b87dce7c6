"""The connections of a server at its end, as sockets: gRPC itself has no way to end them that tells every caller to try again.

A gRPC server that stops says so (GOAWAY), and answers what clients send before they have heard of it with CANCELLED, which is no reason
to try again. A connection that ends is: the client reports UNAVAILABLE, or sends the call to another replica by itself.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

_ATTACH_FILTER = 26
"""SO_ATTACH_FILTER of Linux, which Python has no name for."""
_TAKE_NOTHING = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
"""The program of a packet filter, in one instruction: return 0 (BPF_RET | BPF_K), which drops the packet."""


def close_connections(port: int) -> None:
    """End the connections that this process has accepted on a TCP port, and let nobody in again. What was written on them still arrives.

    Where a process cannot see its descriptors (/dev/fd), nothing happens, and gRPC ends them in its own way.
    """
    found = _sockets(port)
    # The one that listens first: who is sent away would come again, as gRPC stops listening by itself only a moment later.
    found.sort(key=lambda each: not _listens(each))
    for each in found:
        with each, suppress(OSError):
            if not _listens(each):
                each.shutdown(socket.SHUT_RDWR)
            elif sys.platform == "linux":
                program = struct.pack("HL", 1, ctypes.addressof(_TAKE_NOTHING))
                each.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, program)


def _listens(each: socket.socket) -> bool:
    return bool(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _sockets(port: int) -> list[socket.socket]:
    """Return sockets of one's own for what listens on a port and for what was accepted there."""
    found: list[socket.socket] = []
    with suppress(OSError):
        for descriptor in Path("/dev/fd").iterdir():
            with suppress(OSError):
                if descriptor.is_socket():
                    # A duplicate: gRPC may close its own meanwhile, and the number be given to something else.
                    each = socket.socket(fileno=os.dup(int(descriptor.name)))
                    if (
                        each.family in (socket.AF_INET, socket.AF_INET6)
                        and each.getsockname()[1] == port
                    ):
                        found.append(each)
                    else:
                        each.close()
    return found

"""Lets grpc.aio wake the event loop without ever having to wait for it.

A thread of grpc.aio writes one byte to a socket for each event of gRPC. The loop then reads one
byte and handles all events, so that bytes remain for events that were handled. While the loop is
busy, about 280 of them accumulate: the socket is full, the thread waits, and no event of any call
reaches the loop until it has read most of the bytes, one in each turn. That has taken up to 0.3 s.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

_MAX_BYTES = 4096
"""More than a socket with the usual buffer holds of writes of one byte."""


class _WakeUps(socket.socket):
    """The end of a pair of sockets from which grpc.aio reads."""

    def recv(self, _max_bytes: int, _flags: int = 0) -> bytes:
        """Read all bytes: the caller handles the events of all."""
        # Loops of several threads share the socket: another one may have read the bytes.
        with suppress(BlockingIOError):
            return super().recv(_MAX_BYTES)
        return b""


@contextmanager
def all_read_together() -> Generator[None]:
    """Have grpc.aio read all wake-ups together, if it is initialised within the block.

    It does that when the first server or channel of the process is created.
    """
    make_pair = socket.socketpair
    thread_id = threading.get_ident()

    def socketpair(*args: Any, **kwargs: Any) -> tuple[socket.socket, socket.socket]:
        read_end, write_end = make_pair(*args, **kwargs)
        if threading.get_ident() == thread_id:
            read_end = _WakeUps(fileno=read_end.detach())
        return read_end, write_end

    socket.socketpair = socketpair
    try:
        yield
    finally:
        socket.socketpair = make_pair

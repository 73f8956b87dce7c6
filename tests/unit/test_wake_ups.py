"""The socket by which grpc.aio wakes the event loop: none of its bytes may stay there."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
from typing import Any

import grpc
import pytest
from grpc import aio

from service.rpc.accepting import UntakenCalls, create_server
from service.rpc.wake_ups import _WakeUps, all_read_together

CALLS = 200
"""Calls that are made together; each takes several events."""


def test_all_wake_ups_are_read_together() -> None:
    with all_read_together():
        read_end, write_end = socket.socketpair()
    with read_end, write_end:
        read_end.setblocking(False)
        for _ in range(CALLS):
            write_end.send(b"1")
        assert len(read_end.recv(1)) == CALLS
        assert read_end.recv(1) == b"", "raised where another loop has read the bytes"


def test_other_pairs_of_sockets_stay_as_they_are() -> None:
    make_pair = socket.socketpair
    with pytest.raises(ZeroDivisionError), all_read_together():
        _ = 1 / 0
    assert socket.socketpair is make_pair


def test_no_wake_up_of_a_handled_event_stays_in_the_socket() -> None:
    """In a process of its own: grpc.aio makes its socket once, for the first server or channel."""
    subprocess.run([sys.executable, "-m", __name__], check=True)


async def main() -> None:
    """Make many calls, and check that their wake-ups are gone when they have ended."""
    server = create_server((), (), UntakenCalls())

    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    handler = grpc.method_handlers_generic_handler(
        "test.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sockets = [value for value in gc.get_objects() if isinstance(value, _WakeUps)]
    assert len(sockets) == 1, "grpc.aio makes its socket in another way than expected"
    async with aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        method = channel.unary_unary("/test.Echo/Echo", bytes, bytes)
        await asyncio.gather(*(method(b"ping") for _ in range(CALLS)))
        await asyncio.sleep(0)  # The last wake-ups are of events that come with the replies.
        unread = _unread(sockets[0])
    await server.stop(None)
    assert len(unread) < CALLS // 2, f"{len(unread)} wake-ups for events that were handled"


def _unread(read_end: socket.socket) -> bytes:
    try:
        return socket.socket.recv(read_end, 16 * CALLS, socket.MSG_PEEK)
    except BlockingIOError:
        return b""


if __name__ == "__main__":
    asyncio.run(main())

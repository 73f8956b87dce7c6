"""The calls that gRPC has received, and the service has not yet taken up."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2
from google.protobuf.message import Message

from service.auth.caller import Caller
from service.rpc.receiving import RequestReceiver
from tests.support.chat import Chat
from tests.support.raw_http2 import RawConnection
from tests.support.servers import connected, serving

CONNECTIONS, CALLS_PER_CONNECTION = 10, 190
RESETS = 6000
REJECTED: dict[str, Message] = {
    "ListSessions": session_pb2.ListSessionsRequest(user_id="not an id"),
    "AppendMessages": message_pb2.AppendMessagesRequest(user_id="not an id"),
}
"""Requests that are rejected immediately."""


@pytest.mark.parametrize("method", ["ListSessions", "AppendMessages"])
async def test_append_does_not_wait_behind_a_flood(database_url: str, method: str) -> None:
    """Neither of calls of another method nor of the same one."""
    rejected = REJECTED[method]
    async with (
        serving(database_url) as server,
        connected(server.address) as stub,
        AsyncExitStack() as stack,
    ):
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        flood = [
            await stack.enter_async_context(RawConnection(server.address, window_bytes=1 << 16))
            for _ in range(CONNECTIONS)
        ]
        for connection in flood:
            for _ in range(CALLS_PER_CONNECTION):
                await connection.call(method, rejected)
        finished_before = _finished_count(flood)
        await chat.append(session_id, "one message")
        waiting = CONNECTIONS * CALLS_PER_CONNECTION - finished_before
        assert waiting > 500, "the flood has ended before the append: the test shows nothing"
        assert _finished_count(flood) - finished_before < waiting / 2
        for connection in flood:
            await connection.wait_for(CALLS_PER_CONNECTION)
            assert set(connection.statuses.values()) == {"3"}  # INVALID_ARGUMENT


async def test_calls_that_are_reset_immediately_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """GRPC refuses calls of a connection whose earlier ones still occupy memory."""
    received = 0
    receive = RequestReceiver.receive

    async def count(receiver: RequestReceiver, context: Any, caller: Caller) -> bytes:
        nonlocal received
        received += 1
        return await receive(receiver, context, caller)

    monkeypatch.setattr(RequestReceiver, "receive", count)
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        async with RawConnection(server.address, window_bytes=1 << 16) as flood:
            for _ in range(RESETS):
                flood.reset(await flood.call("ListSessions", REJECTED["ListSessions"]))
            # Answered after most of the calls that wait.
            await chat.list_sessions()
    assert received < RESETS * 0.9


def _finished_count(connections: list[RawConnection]) -> int:
    return sum(len(connection.statuses) for connection in connections)

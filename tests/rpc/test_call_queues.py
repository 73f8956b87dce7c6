"""The calls that gRPC has received, and the service has not yet taken up."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import pytest
from chathistory.v1 import session_pb2

from service.auth.caller import Caller
from service.rpc.receiving import RequestReceiver
from tests.support.chat import Chat
from tests.support.raw_http2 import RawConnection
from tests.support.servers import connected, serving

CONNECTIONS, CALLS_PER_CONNECTION = 10, 190
RESETS = 6000


async def test_hot_calls_do_not_wait_behind_a_flood_of_other_calls(database_url: str) -> None:
    rejected = session_pb2.ListSessionsRequest(user_id="not an id")
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
                await connection.call("ListSessions", rejected)
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
    received = 0
    receive = RequestReceiver.receive

    async def count(receiver: RequestReceiver, context: Any, caller: Caller) -> bytes:
        nonlocal received
        received += 1
        return await receive(receiver, context, caller)

    monkeypatch.setattr(RequestReceiver, "receive", count)
    request = session_pb2.ListSessionsRequest(user_id="not an id")
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        session_id = await chat.start()
        async with RawConnection(server.address, window_bytes=1 << 16) as flood:
            for _ in range(RESETS):
                flood.reset(await flood.call("ListSessions", request))
            await chat.append(session_id, "one message")
            # Answered after every call that waits: the queue of these methods is in order.
            await chat.list_sessions()
    assert received < RESETS / 2


def _finished_count(connections: list[RawConnection]) -> int:
    return sum(len(connection.statuses) for connection in connections)

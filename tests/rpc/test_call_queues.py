"""The calls that gRPC has received, and the service has not yet taken up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Generator
from contextlib import AsyncExitStack, contextmanager
from typing import Any

import pytest
from chathistory.v1 import message_pb2, session_pb2
from google.protobuf.message import Message
from structlog.testing import capture_logs

from service.auth.caller import Caller
from service.rpc import accepting
from service.rpc.accepting import _Calls
from service.rpc.receiving import RequestReceiver
from tests.support.chat import Chat
from tests.support.raw_http2 import RawConnection
from tests.support.servers import connected, serving
from tests.support.waits import until

CONNECTIONS, CALLS_PER_CONNECTION = 10, 190
RESETS = 6000
INVALID_ARGUMENT = "3"
REJECTED: dict[str, Message] = {
    "ListSessions": session_pb2.ListSessionsRequest(user_id="not an id"),
    "AppendMessages": message_pb2.AppendMessagesRequest(user_id="not an id"),
}
"""Requests that are rejected immediately."""


@contextmanager
def nothing_is_taken_up() -> Generator[None]:
    """Let the calls that arrive in this block wait until its end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Calls, "done", lambda _calls: False)
        yield


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list[Caller]:
    """Return a list that collects the callers whose requests are received."""
    callers: list[Caller] = []
    receive = RequestReceiver.receive

    async def record(receiver: RequestReceiver, context: Any, caller: Caller) -> bytes:
        callers.append(caller)
        return await receive(receiver, context, caller)

    monkeypatch.setattr(RequestReceiver, "receive", record)
    return callers


@pytest.mark.parametrize("method", ["ListSessions", "AppendMessages"])
async def test_append_does_not_wait_behind_a_flood(database_url: str, method: str) -> None:
    """Neither of calls of another method nor of the same one."""
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
        with nothing_is_taken_up():
            for connection in flood:
                for _ in range(CALLS_PER_CONNECTION):
                    await connection.call(method, REJECTED[method])
        await chat.append(session_id, "one message")
        assert _finished_count(flood) < CONNECTIONS * CALLS_PER_CONNECTION / 2
        for connection in flood:
            await connection.wait_for(CALLS_PER_CONNECTION)
            assert set(connection.statuses.values()) == {INVALID_ARGUMENT}


async def test_calls_that_are_reset_immediately_do_not_pile_up(
    received: list[Caller], database_url: str
) -> None:
    """GRPC refuses calls of a connection whose earlier ones still occupy memory."""
    async with serving(database_url) as server, connected(server.address) as stub:
        chat = await Chat.of_new_user(stub)
        async with RawConnection(server.address, window_bytes=1 << 16) as flood:
            with nothing_is_taken_up():
                for _ in range(RESETS):
                    flood.reset(await flood.call("ListSessions", REJECTED["ListSessions"]))
            await chat.list_sessions()
            await until(lambda: not server.untaken_calls.waiting_count)
    assert 200 < len(received) < RESETS / 2


async def test_calls_whose_deadlines_have_passed_are_not_taken_up_and_others_are(
    received: list[Caller], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "MAX_IN_ORDER", 0)
    async with (
        serving(database_url) as server,
        RawConnection(server.address, window_bytes=1 << 16) as late,
        RawConnection(server.address, window_bytes=1 << 16) as patient,
        asyncio.timeout(30),
    ):
        with nothing_is_taken_up():
            for timeout in ("1M", None):
                for _ in range(25):
                    await patient.call("ListSessions", REJECTED["ListSessions"], timeout=timeout)
            for _ in range(25):
                late.start_call("ListSessions", timeout="20m")
            # The loop is busy: the deadlines pass before it sees the calls.
            time.sleep(0.3)  # noqa: ASYNC251
        await patient.call("ListSessions", REJECTED["ListSessions"])
        await patient.wait_for(51)
        assert set(patient.statuses.values()) == {INVALID_ARGUMENT}
        await until(lambda: not server.untaken_calls.waiting_count)
        assert server.untaken_calls.dropped_count == 25
    assert len(received) == 51


async def test_server_stops_while_many_calls_wait(database_url: str) -> None:
    with capture_logs() as events, nothing_is_taken_up():
        async with (
            serving(database_url) as server,
            RawConnection(server.address, window_bytes=1 << 16) as connection,
        ):
            for _ in range(CALLS_PER_CONNECTION):
                await connection.call("ListSessions", REJECTED["ListSessions"])
            await until(lambda: server.untaken_calls.waiting_count == CALLS_PER_CONNECTION)
    assert not [event for event in events if event["event"] == "shutdown step timed out"]


def _finished_count(connections: list[RawConnection]) -> int:
    return sum(len(connection.statuses) for connection in connections)

"""What must be true of every replica when nothing is broken and nobody calls, and of the first calls that come then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from chathistory.v1 import user_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import aio

from tests.soak.stack import Replica, Stack
from tests.soak.tally import Tally
from tests.support.chat import Chat
from tests.support.servers import channel, settings

CALL_SECONDS = 10.0
"""Within which a call must have succeeded, at its first try."""
REST_SECONDS = 20.0
"""Within which a replica that nobody calls has given back what it took."""
AT_REST = ("calls_in_flight", "watches_open", "appends_waiting", "connections_in_use")
"""What a replica that nobody calls has none of, by its metrics."""


async def look(stack: Stack, tally: Tally) -> None:
    """Look at each replica, then call it in every way; note what should not be."""
    for replica in stack.replicas:
        await _at_rest(replica, tally)
    for replica, other in zip(stack.replicas, reversed(stack.replicas), strict=True):
        async with channel(replica.front.address) as mine, channel(other.front.address) as others:
            await _call(
                replica, ChatHistoryServiceStub(mine), ChatHistoryServiceStub(others), tally
            )


async def _at_rest(replica: Replica, tally: Tally) -> None:
    """Look for what was taken and is not given back before long."""
    give_up = time.monotonic() + REST_SECONDS
    while (found := await _held(replica)) and time.monotonic() < give_up:
        await asyncio.sleep(0.2)
    for words in found:
        tally.blame("LEAK", f"the {replica.name} replica, at rest: {words}")


async def _held(replica: Replica) -> list[str]:
    gauges = await replica.gauges()
    taken = {name: gauges[f"chat_history_{name}"] for name in AT_REST}
    found = [f"{name} {count:.0f}" for name, count in taken.items() if count]
    # Those beyond the pool's size end when they are given back.
    if (connections := replica.connections) > (most := settings().db_pool_size):
        found.append(f"{connections} connections, and {most} are kept")
    return found


async def _call(replica: Replica, stub: Any, others: Any, tally: Tally) -> None:
    """Call one replica in every way."""

    @asynccontextmanager
    async def trying(what: str) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                yield
        except (aio.AioRpcError, TimeoutError) as error:
            code = error.code().name if isinstance(error, aio.AioRpcError) else "no answer"
            tally.blame(
                "STUCK", f"{what} by the {replica.name} replica, when nothing was broken: {code}"
            )

    calls: dict[str, Callable[[], Awaitable[object]]] = {}
    async with trying("CreateUser, CreateSession and AppendMessages"):
        chat = await Chat.of_new_user(stub)
        session_id = (await chat.create_session()).id
        message_id = (await chat.append(session_id, "hello")).messages[0].id
        calls = {
            "GetSession": lambda: chat.get_session(session_id),
            "ListSessions": chat.list_sessions,
            "UpdateSession": lambda: chat.update_session(["title"], id=session_id, title="new"),
            "ListMessages": lambda: chat.page(session_id),
            "GetMessage": lambda: chat.get(session_id, message_id),
            "GetContext": lambda: chat.context(session_id),
            "WatchMessages": lambda: _follow(chat, Chat(others, chat.user_id), session_id),
            "UpdateMessage": lambda: chat.update(
                session_id, message_id, ["content"], content="changed"
            ),
            "DeleteMessage": lambda: chat.delete(session_id, message_id),
            "DeleteSession": lambda: chat.delete_session(session_id),
            "DeleteUser": lambda: stub.DeleteUser(user_pb2.DeleteUserRequest(user_id=chat.user_id)),
        }
    for what, call in calls.items():
        async with trying(what):
            await call()


async def _follow(chat: Chat, other: Chat, session_id: str) -> None:
    """Follow a session to which the other replica appends."""
    stream = chat.watch(session_id)
    await stream.read()
    await other.append(session_id, "by way of the other replica")
    await stream.read()
    stream.cancel()

"""Checks after a round, when nothing is broken and no client calls.

Idle replicas hold no resources, every RPC succeeds immediately, and every document is indexed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from chathistory.v1 import document_pb2, user_pb2
from chathistory.v1.chat_history_service_pb2_grpc import ChatHistoryServiceStub
from grpc import StatusCode, aio

from tests.soak.stack import Replica, Stack
from tests.soak.tally import Tally
from tests.soak.traffic import Document
from tests.support.chat import Chat
from tests.support.cluster import fetch
from tests.support.servers import channel, settings

CALL_TIMEOUT_S = 10.0
"""Limit for a call, which must succeed at the first attempt."""
RELEASE_TIMEOUT_S = 20.0
"""Limit for the release of resources after the last call."""
INDEX_TIMEOUT_S = 180.0
"""Limit for the documents of a round to be indexed: more than two leases of a minute, of indexers
that were killed, and less than the hour by which a fault dates rows ahead."""
COUNT_OUTBOX = "SELECT count(*) FROM search_outbox"
IDLE_GAUGES = ("calls_in_flight", "watches_open", "appends_waiting", "connections_in_use")
"""Metrics, without their prefix, that are zero on an idle replica."""


async def check_replicas(stack: Stack, tally: Tally) -> None:
    """Check that each replica is idle, then call all its RPCs; add problems to the tally."""
    for replica in stack.replicas:
        await _check_idle(replica, tally)
    for replica, other in zip(stack.replicas, reversed(stack.replicas), strict=True):
        async with (
            channel(replica.client_proxy.address) as mine,
            channel(other.client_proxy.address) as others,
        ):
            await _call(
                replica, ChatHistoryServiceStub(mine), ChatHistoryServiceStub(others), tally
            )


async def check_documents(stack: Stack, tally: Tally, documents: Sequence[Document]) -> None:
    """Check that every acknowledged document is stored and indexed; add problems to the tally."""
    deadline = time.monotonic() + INDEX_TIMEOUT_S
    async with channel(stack.replicas[0].client_proxy.address) as opened:
        stub: Any = ChatHistoryServiceStub(opened)
        waiting = list(documents)
        while waiting:
            document = waiting[-1]
            status = await _status(stub, document, tally)
            if status == document_pb2.DOCUMENT_STATUS_PENDING:
                if time.monotonic() > deadline:
                    tally.add_problem("STUCK", f"{len(waiting)} documents wait to be indexed")
                    return
                await asyncio.sleep(0.1)
                continue
            waiting.pop()
            if status == document_pb2.DOCUMENT_STATUS_INDEXED:
                tally.documents += 1
            elif status is not None:
                tally.add_problem("ERROR", f"document {document.id} was not indexed")


async def _status(stub: Any, document: Document, tally: Tally) -> int | None:
    """Return the status of a document; None if it cannot be read, which is a problem."""
    request = document_pb2.GetDocumentRequest(user_id=document.user_id, document_id=document.id)
    try:
        reply = await stub.GetDocument(request, timeout=CALL_TIMEOUT_S)
    except aio.AioRpcError as error:
        kind = "LOST" if error.code() == StatusCode.NOT_FOUND else "STUCK"
        tally.add_problem(kind, f"document {document.id}: {error.code().name}")
        return None
    return int(reply.document.status)


async def check_outbox(stack: Stack, tally: Tally) -> None:
    """Check that the indexers finish: before that they are not idle. Add a problem otherwise."""
    deadline = time.monotonic() + INDEX_TIMEOUT_S
    while (await fetch(stack.database_url, COUNT_OUTBOX))[0][0]:
        if time.monotonic() > deadline:
            tally.add_problem("STUCK", "rows of the search outbox wait")
            return
        await asyncio.sleep(0.2)


async def _check_idle(replica: Replica, tally: Tally) -> None:
    """Add a problem for every resource that is not released within the limit."""
    deadline = time.monotonic() + RELEASE_TIMEOUT_S
    while (leaks := await _leaks(replica)) and time.monotonic() < deadline:
        await asyncio.sleep(0.2)
    for leak in leaks:
        tally.add_problem("LEAK", f"the {replica.name} replica, at rest: {leak}")


async def _leaks(replica: Replica) -> list[str]:
    gauges = await replica.gauges()
    counts = {name: gauges[f"chat_history_{name}"] for name in IDLE_GAUGES}
    leaks = [f"{name} {count:.0f}" for name, count in counts.items() if count]
    # Connections beyond the pool's size are closed when they are returned to it.
    if (connections := replica.connections) > (pool_size := settings().db_pool_size):
        leaks.append(f"{connections} connections, with a pool of {pool_size}")
    return leaks


async def _call(replica: Replica, stub: Any, others: Any, tally: Tally) -> None:
    """Call the RPCs of one replica; `others` is a stub of the other replica."""

    @asynccontextmanager
    async def reporting(rpc: str) -> AsyncGenerator[None]:
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                yield
        except (aio.AioRpcError, TimeoutError) as error:
            code = error.code().name if isinstance(error, aio.AioRpcError) else "no answer"
            tally.add_problem(
                "STUCK", f"{rpc} by the {replica.name} replica, without a fault: {code}"
            )

    calls: dict[str, Callable[[], Awaitable[object]]] = {}
    async with reporting("CreateUser, CreateSession and AppendMessages"):
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
    for rpc, call in calls.items():
        async with reporting(rpc):
            await call()


async def _follow(chat: Chat, other: Chat, session_id: str) -> None:
    """Follow a session to which a client of the other replica appends."""
    stream = chat.watch(session_id)
    await stream.read()
    await other.append(session_id, "through the other replica")
    await stream.read()
    stream.cancel()

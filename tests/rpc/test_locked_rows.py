"""A transaction holds a row: calls that need it fail in time, and no other call waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from chathistory.v1 import session_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.server import Server
from service.store.db import retries
from service.store.db.dsn import parse
from tests.support import failures
from tests.support.chat import Chat
from tests.support.cluster import Cluster
from tests.support.servers import channel, connected, serving
from tests.support.statements import SentStatements, database_name

pytestmark = pytest.mark.faults  # Locks are waited for.

BLOCKED = 40
TIMEOUT_S = 10.0
"""For calls that do not need the row: much longer than they take, shorter than the row is held."""


@pytest.fixture(params=["direct", "pooled"])
async def busy(database_url: str, request: pytest.FixtureRequest) -> AsyncGenerator[Server]:
    """Give a server, connected to PostgreSQL directly and as through a transaction pooler."""
    target = parse(database_url, prepared_statements="off" if request.param == "pooled" else "on")
    async with serving(target) as server:
        yield server


@asynccontextmanager
async def held(cluster: Cluster, database_url: str, *session_ids: str) -> AsyncGenerator[Any]:
    """Lock the rows of sessions during the block."""
    holder = await cluster.connect(database_name(database_url))
    try:
        async with holder.transaction():
            await holder.execute(
                "SELECT FROM chat_sessions WHERE id = ANY($1::uuid[]) FOR UPDATE", list(session_ids)
            )
            yield holder
    finally:
        await holder.close()


async def test_updates_of_a_locked_row_delay_no_other_call(
    busy: Server, cluster: Cluster, database_url: str
) -> None:
    async with connected(busy.address) as stub, channel(busy.address) as opened:
        chat, other = await Chat.of_new_user(stub), await Chat.of_new_user(stub)
        mine = await chat.create_session()
        theirs = await other.start()
        health: Any = health_pb2_grpc.HealthStub(opened)
        async with held(cluster, database_url, mine.id) as holder:
            blocked = [
                asyncio.create_task(chat.update_session(["title"], id=mine.id, title=f"{n}"))
                for n in range(BLOCKED)
            ]
            for turn in range(8):
                async with asyncio.timeout(TIMEOUT_S):
                    await other.append(theirs, f"{turn}")
                    await other.append("", "a new session")
                    await other.page(theirs)
                    await other.context(theirs)
                    await other.get_session(theirs)
                    await other.list_sessions()
                    await other.update_session(["title"], id=theirs, title=f"{turn}")
                    await other.create_session()
                    for name in ("", "liveness", "database"):
                        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
                        assert reply.status == health_pb2.HealthCheckResponse.SERVING
                used = await holder.fetchval(
                    "SELECT count(*) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND application_name = 'chat-history'"
                )
                assert used <= busy.settings.db_pool_size + busy.settings.db_max_overflow
                await asyncio.sleep(0.1)
            assert not any(task.done() for task in blocked)
        async with asyncio.timeout(60):
            done = await asyncio.gather(*blocked)
        assert {session.title for session in done} == {f"{n}" for n in range(BLOCKED)}
        assert (await chat.get_session(mine.id)).title in {f"{n}" for n in range(BLOCKED)}


async def test_update_of_a_locked_row_fails_before_the_deadline(
    busy: Server, cluster: Cluster, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy machine needs time to deliver 40 replies.
    monkeypatch.setattr(retries, "REPLY_MARGIN_S", 1.0)
    async with connected(busy.address) as stub:
        chat = await Chat.of_new_user(stub)
        session = await chat.create_session()
        request = session_pb2.UpdateSessionRequest(user_id=chat.user_id, session=session)
        async with held(cluster, database_url, session.id):
            calls = [stub.UpdateSession(request, timeout=5) for _ in range(BLOCKED)]
            for call in calls:
                failure = await failures.failure_of(call)
                # In a queue of 40, a call may time out while it still waits for a connection.
                assert failure.reason in ("CONTENTION", "DATABASE_UNAVAILABLE"), failure
                assert failure.retry_after
        await chat.update_session(["title"], id=session.id, title="at last")


async def test_lock_timeout_costs_no_round_trip(
    busy: Server, cluster: Cluster, database_url: str
) -> None:
    async with connected(busy.address) as stub:
        chat = await Chat.of_new_user(stub)
        session = await chat.create_session()
        sent = SentStatements(cluster, database_url)
        await chat.update_session(["title"], id=session.id, title="new")
        commands = [statement.sql.split()[0].rstrip(";") for statement in sent.so_far()]
    assert commands == ["BEGIN", "SELECT", "UPDATE", "COMMIT"]
